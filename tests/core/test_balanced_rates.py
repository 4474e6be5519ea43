"""Classes share a stream as a plan shares its seats, and the sum over all classes and bins is what was asked for."""

import numpy as np
import pytest

from adq_wds.core.allocation import exact_shares, weigh_classes
from adq_wds.core.balanced_rates import balanced_rates

N = np.array([5000, 900, 100, 12])
ONE = 1 << 20
RNG = np.random.default_rng(0)
FREQUENCY = RNG.dirichlet(np.ones(5), size=4)
WEIGHT = RNG.random((4, 5)) + 0.1
KEEPS = (0.0, 0.01, 0.1, 0.5, 0.8, 0.95)


@pytest.mark.parametrize("balance", ["class", "equal", "none", 0.0, 0.5, 1.0])
@pytest.mark.parametrize("n_left_out", [0, 700])
def test_the_sum_is_what_was_asked_for(balance: str | float, n_left_out: int) -> None:
    part, before = N / (N.sum() + n_left_out), np.zeros((4, 5))
    for keep in KEEPS:
        rates = balanced_rates(N, n_left_out, FREQUENCY, WEIGHT, keep, balance)
        assert (part[:, None] * FREQUENCY * rates).sum() == pytest.approx(min(keep, part.sum()), abs=1e-12)
        assert (rates <= 1).all()
        assert (rates >= before - 1e-12).all()
        before = rates
    assert (balanced_rates(N, n_left_out, FREQUENCY, WEIGHT, 1.0, balance) == 1).all()


@pytest.mark.parametrize("balance", ["class", "equal", 0.3])
def test_classes_are_kept_as_by_a_plans_exact_shares(balance: str | float) -> None:
    for keep in KEEPS:
        budget = round(keep * (int(N.sum()) + 700) * ONE)
        shares = exact_shares(N * ONE, weigh_classes(N, balance), min(budget, int(N.sum()) * ONE)) / ONE
        rates = balanced_rates(N, 700, FREQUENCY, WEIGHT, keep, balance)
        assert N * (FREQUENCY * rates).sum(axis=1) == pytest.approx(shares, abs=1e-4)


def test_with_none_all_cells_share_at_once() -> None:
    rates = balanced_rates(N, 0, FREQUENCY, WEIGHT, 0.2, "none")
    level = rates / WEIGHT
    assert level[rates < 1] == pytest.approx(level.min())


def test_a_class_of_which_nothing_is_left_has_a_rate() -> None:
    n = np.array([50, 0, 10, 1])
    assert balanced_rates(n, 0, FREQUENCY, WEIGHT, 0.25, "class")[1] @ FREQUENCY[1] == pytest.approx(0.25)
    assert (balanced_rates(n, 0, FREQUENCY, WEIGHT, 0.5, "equal")[1] == 1).all()
