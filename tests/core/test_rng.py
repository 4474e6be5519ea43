"""Draws: golden values, independence of the fields, uniformity."""

from typing import Any

import numpy as np
import pytest

from adq_wds.core.rng import check_seed, draw, draws, generator

# Any change here changes every plan ever made: python -c "from adq_wds.core.rng import draw; print(draw(...))"
GOLDEN = {
    (0, 0, "train-000000.tar", "a", "rank"): 13359746798998722042,
    (1, 0, "train-000000.tar", "a", "rank"): 17529122217179367303,
    (0, 3, "train-000000.tar", "dir/é\n", "map"): 1788873998145044848,
    (-5, 0, "", "", "rank"): 4217054439415734789,
}


def test_draws_never_change() -> None:
    assert {(*place, purpose): draw(*place, purpose=purpose) for *place, purpose in GOLDEN} == GOLDEN


def test_every_field_of_a_draw_matters() -> None:
    places = [(0, 0, "ab", "c"), (1, 0, "ab", "c"), (0, 1, "ab", "c"), (0, 0, "a", "bc"), (0, 0, "", "abc")]
    assert len({draw(0, 0, "ab", "c", purpose="map"), *(draw(*place) for place in places)}) == 6


def test_many_draws_are_the_single_ones() -> None:
    keys = [f"k{i}" for i in range(50)]
    assert draws(7, 2, "s.tar", keys).tolist() == [draw(7, 2, "s.tar", key) for key in keys]


def test_draws_are_uniform() -> None:
    u = draws(0, 0, "s.tar", [str(i) for i in range(20_000)]) / 2.0**64
    counts = np.histogram(u, bins=20, range=(0, 1))[0]
    chi_square = ((counts - 1000.0) ** 2 / 1000.0).sum()
    assert chi_square < 43.8  # 99.9 % of uniform samples are below, with 19 degrees of freedom


def test_a_generator_repeats_itself_and_differs_by_epoch() -> None:
    a, b, c = (generator(0, e, "s.tar", "k").random(4).tolist() for e in (0, 0, 1))
    assert a == b != c


@pytest.mark.parametrize("seed", [True, 1.0, "1", None, 2**63, -(2**63) - 1])
def test_a_seed_that_is_not_a_64_bit_integer_is_refused(seed: Any) -> None:
    with pytest.raises(ValueError, match="seed must"):
        check_seed(seed)
