"""Seats by highest averages: exact, nested, and equal to the slow sequence."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adq_wds.core.allocation import adaptive, budget_for, fresh_draw, split_budget, uniform


def seat_by_seat(size: Any, weight: Any, budget: int) -> list[int]:
    """Webster, one seat at a time, as the definition says."""
    quota = [0] * len(size)
    for _ in range(budget):
        open_cells = [k for k in range(len(size)) if quota[k] < size[k]]
        winner = max(open_cells, key=lambda k: (weight[k] / (2 * quota[k] + 1), -k))
        quota[winner] += 1
    return quota


cells = st.lists(
    st.tuples(
        st.integers(0, 9), st.one_of(st.integers(0, 4).map(float), st.floats(0, 10, allow_subnormal=False))
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=300, deadline=None)
@given(cells)
def test_the_fast_split_is_the_seat_by_seat_split_for_every_budget(cells: list[tuple[int, float]]) -> None:
    size, weight = (np.array(column) for column in zip(*cells, strict=True))
    before = np.zeros(len(size), dtype=np.int64)
    for budget in range(int(size.sum()) + 1):
        quota = split_budget(size, weight.astype(float), budget)
        assert quota.tolist() == seat_by_seat(size, weight, budget)
        assert quota.sum() == budget
        assert (quota >= before).all(), "a larger budget took a pick away"
        before = quota


@pytest.mark.parametrize("scale", [1e-300, 1e-12, 1.0, 1e12, 1e300])
def test_the_scale_of_the_weights_does_not_matter(scale: float) -> None:
    size = np.array([50, 70, 20, 60])
    weight = np.array([1.0, 2.5, 4.0, 0.5])
    assert (split_budget(size, weight * scale, 90) == seat_by_seat(size, weight, 90)).all()


def test_large_splits_equal_the_slow_ones() -> None:
    rng = np.random.default_rng(0)
    size = rng.integers(0, 200, 60)
    weight = rng.random(60) * size
    for budget in (1, 500, 2500, int(size.sum()) - 3):
        assert split_budget(size, weight, budget).tolist() == seat_by_seat(size, weight, budget)


@pytest.mark.parametrize(
    ("size", "weight", "budget", "text"),
    [
        ([3, 3], [1.0], 2, "must both be"),
        ([3, -1], [1.0, 1.0], 2, "sizes must be >= 0"),
        ([3, 3], [1.0, -1.0], 2, "weights must be finite and >= 0"),
        ([3, 3], [1.0, np.nan], 2, "weights must be finite and >= 0"),
        ([3, 3], [1.0, np.inf], 2, "weights must be finite and >= 0"),
        ([3, 3], [1.0, 1.0], 7, "budget must lie in 0 … 6"),
        ([3, 3], [1.0, 1.0], -1, "budget must lie in 0 … 6"),
    ],
)
def test_impossible_splits_are_refused(size: list[int], weight: list[float], budget: int, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        split_budget(np.array(size), np.array(weight), budget)


def test_adaptive_at_alpha_0_is_uniform_for_any_sizes() -> None:
    size, importance = np.array([7, 30, 0, 11]), np.array([0.4, 0.3, 0.2, 0.1])
    assert (adaptive(size, importance, 0.2, alpha=0.0) == uniform(size, importance, 0.2)).all()


def test_adaptive_is_the_papers_rate_for_equal_bins() -> None:
    """r_n = α·Î_n + (1−α)/K, counts r_n · N: our weights are that, times a constant."""
    size, importance = np.full(4, 100), np.array([0.4, 0.3, 0.2, 0.1])
    ours = adaptive(size, importance, 0.2, alpha=0.65)
    papers = (0.65 * importance + 0.35 / 4) * size
    assert ours / ours.sum() == pytest.approx(papers / papers.sum(), abs=1e-15)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan"), True, "0.5"])
def test_alpha_out_of_range_is_refused_with_its_value(alpha: Any) -> None:
    with pytest.raises(ValueError, match=f"alpha must be a number in .*{alpha!r}"):
        adaptive(np.array([1]), np.array([1.0]), 0.5, alpha=alpha)


def test_the_budget_rounds_half_to_even() -> None:
    assert [budget_for(0.5, n) for n in (1, 3, 5, 7)] == [0, 2, 2, 4]
    assert [budget_for(k, 10) for k in (0, 1, 0.0, 1.0, 1e-9)] == [0, 10, 0, 10, 0]


@pytest.mark.parametrize("keep", [-1e-9, 1.0000001, float("nan"), float("inf"), True, False, "0.5", None])
def test_keep_out_of_range_is_refused_with_its_value(keep: Any) -> None:
    """F34."""
    with pytest.raises(ValueError, match=rf"keep must be a number in \[0, 1\], got {keep!r}"):
        budget_for(keep, 10)


@given(st.integers(1, 40), st.data())
def test_fresh_draws_keep_the_quota_in_every_epoch_and_all_within_a_round(
    n: int, data: st.DataObject
) -> None:
    quota = data.draw(st.integers(1, n))
    first = data.draw(st.integers(0, 10**12))
    rank, size, quotas = np.arange(n, dtype=np.int32), np.full(n, n), np.full(n, quota)
    epochs = [fresh_draw(rank, size, quotas, first + e) for e in range(-(-n // quota))]
    assert {int(kept.sum()) for kept in epochs} == {quota}
    assert np.logical_or.reduce(epochs).all()


def test_a_negative_epoch_is_refused() -> None:
    one = np.ones(1, dtype=np.int64)
    with pytest.raises(ValueError, match="epoch must be >= 0, got -1"):
        fresh_draw(np.zeros(1, dtype=np.int32), one, one, -1)
