"""Seats by a keyed tree: exact, nested, fair over seeds, and equal to the slow definition."""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from adq_wds.core.allocation import (
    adaptive,
    budget_for,
    exact_shares,
    fresh_draw,
    published,
    split_budget,
    uniform,
)
from adq_wds.core.fresh import ONE
from adq_wds.core.patches import n_kept
from adq_wds.core.rng import draw

# ---- The oracle: the definition in fractions, one node at a time


def filled(w: list[Fraction], low: list[int], high: list[int], total: Fraction) -> list[Fraction]:
    """clip(level · w, low, high) that sums to `total`; the level is found among all that could be it."""

    def at(level: Fraction) -> list[Fraction]:
        return [min(max(level * x, Fraction(a)), Fraction(b)) for x, a, b in zip(w, low, high, strict=True)]

    bounds = sorted({Fraction(x) / y for y, a, b in zip(w, low, high, strict=True) for x in (a, b)})
    for i, level in enumerate(bounds):
        if sum(at(level)) >= total:
            before = bounds[max(0, i - 1)]
            slope = sum(at(level)) - sum(at(before))
            part = (total - sum(at(before))) / slope if slope else Fraction(0)
            return at(before + part * (level - before))
    raise AssertionError


def grown(w: list[Fraction], low: list[int], high: list[int], total: int, seed: int, name: str) -> list[int]:
    def below(a: int, b: int, total: int) -> list[int]:
        if b - a == 1:
            return [total]
        middle = (a + b) // 2
        shares = filled(w[a:b], low[a:b], high[a:b], Fraction(total))
        u = Fraction(draw(seed, 0, name, f"{a}-{b}", purpose="seat"), 2**64)
        left = math.floor(sum(shares[: middle - a]) + u)
        return below(a, middle, left) + below(middle, b, total - left)

    return below(0, len(w), total) if w else []


def slow_split(
    size: Any, weight: Any, budget: int, *, seed: int = 0, name: str = "", low: Any = None
) -> list[int]:
    """`split_budget` by the oracle: cells with a choice and a weight first, those without a weight by their sizes."""
    low = np.zeros_like(size) if low is None else low
    quota = low.tolist()
    scale = 40 - int(np.frexp(weight[low < size].max(initial=0.0))[1])
    positive = [k for k in range(len(size)) if weight[k] > 0]
    others = [k for k in range(len(size)) if weight[k] == 0]
    first = min(int(size[positive].sum()), budget - int(low[others].sum()))
    for part, cells, total in (("", positive, first), ("0", others, budget - first)):
        total -= sum(int(low[k]) for k in cells if low[k] == size[k])
        cells = [k for k in cells if low[k] < size[k]]
        w = [Fraction(max(1, round(Fraction(weight[k]) * Fraction(2) ** scale))) for k in cells]
        w = w if part == "" else [Fraction(int(size[k])) for k in cells]
        bounds = [int(low[k]) for k in cells], [int(size[k]) for k in cells]
        seats = grown(w, *bounds, total, seed, f"{name}/{part}")
        for k, n in zip(cells, seats, strict=True):
            quota[k] = n
    return quota


weights = st.one_of(st.integers(0, 4).map(float), st.floats(0, 10, allow_subnormal=False))
cells = st.lists(st.tuples(st.integers(0, 9), weights, st.integers(0, 3)), min_size=1, max_size=7)


@settings(max_examples=150)
@given(cells, st.integers(0, 5))
@example([(0, 1.0, 0), (1, 2e-218, 0), (1, 1e-103, 0)], 0)  # the largest weight is of a cell without a choice
def test_splits_are_the_slow_ones_exact_and_nested(cells: list[tuple[int, float, int]], seed: int) -> None:
    size, weight, low = (np.array(column) for column in zip(*cells, strict=True))
    low = np.minimum(low, size)
    before = low
    for budget in range(int(low.sum()), int(size.sum()) + 1):
        quota = split_budget(size, weight.astype(float), budget, seed=seed, name="x", low=low)
        assert quota.tolist() == slow_split(size, weight.astype(float), budget, seed=seed, name="x", low=low)
        assert quota.sum() == budget
        assert (quota >= before).all(), "a larger budget took a pick away"
        assert (quota <= size).all()
        before = quota


def test_large_splits_equal_the_slow_ones() -> None:
    rng = np.random.default_rng(0)
    size = rng.integers(0, 200, 60)
    for weight in (rng.uniform(0.9, 1.1, 60) * size, rng.random(60) * size, rng.random(60) + 0.01):
        for budget in (1, 500, 2500, int(size.sum()) - 3):
            found = split_budget(size, weight, budget, seed=1)
            assert found.tolist() == slow_split(size, weight, budget, seed=1)


@pytest.mark.parametrize("scale", [2.0**-1000, 0.5, 2.0**20, 2.0**1000])
def test_the_scale_of_the_weights_does_not_matter(scale: float) -> None:
    size = np.array([50, 70, 20, 60])
    weight = np.array([1.0, 2.5, 4.0, 0.5])
    assert (split_budget(size, weight * scale, 90) == split_budget(size, weight, 90)).all()


def test_cells_of_weight_0_are_filled_when_all_others_are_full() -> None:
    size, weight = np.array([4, 9, 5]), np.array([1.0, 0.0, 2.0])
    assert split_budget(size, weight, 9).tolist() == [4, 0, 5]
    assert split_budget(size, weight, 12).tolist() == [4, 3, 5]
    assert split_budget(size, np.zeros(3), 18).tolist() == [4, 9, 5]


# ---- Fairness: over seeds, the mean of a cell's seats is its share

SEEDS = 1000
FAIR: dict[str, tuple[Any, Any, int, Any]] = {
    "200 classes of one": (np.ones(200, dtype=int), np.ones(200), 40, None),
    "bins of one and two": (np.array([2, 2] + [1] * 8), np.array([2.0, 2.0] + [1.0] * 8), 2, None),
    "equal weights": (np.full(13, 50), np.ones(13), 100, None),
    "unequal weights": (np.full(13, 50), np.linspace(0.2, 3.0, 13), 57, None),
    "cells in any case": (np.full(11, 30), np.linspace(1, 2, 11), 60, np.array([1, 0, 2] + [0] * 8)),
    "some are full": (np.array([3, 40, 2, 60, 50, 50]), np.array([9.0, 4.0, 9.0, 6.0, 5.0, 5.0]), 51, None),
}


@pytest.mark.parametrize("name", FAIR)
def test_over_seeds_the_mean_of_every_cell_is_its_share(name: str) -> None:
    size, weight, budget, low = FAIR[name]
    got = np.array([split_budget(size, weight, budget, seed=seed, low=low) for seed in range(SEEDS)])
    share = exact_shares(size * ONE, weight, budget * ONE, low=None if low is None else low * ONE) / ONE
    error = got.std(axis=0) / math.sqrt(SEEDS)
    assert (np.abs(got.mean(axis=0) - share) <= 4.5 * error + 1e-5).all()
    assert (np.abs(got - share) < 2).all()
    if name == "200 classes of one":
        assert len({tuple(row) for row in got.tolist()}) == SEEDS


def test_splits_of_other_names_are_rounded_independently() -> None:
    size, weight = np.ones(2, dtype=int), np.ones(2)
    first = [[split_budget(size, weight, 1, seed=s, name=n)[0] for s in range(1000)] for n in ("a", "b")]
    assert 400 < np.equal(*first).sum() < 600


@settings(max_examples=150)
@given(cells, st.data())
def test_exact_shares_are_the_fractions(cells: list[tuple[int, float, int]], data: st.DataObject) -> None:
    size, weight, low = (np.array(column) for column in zip(*cells, strict=True))
    weight, low = np.maximum(weight, 0.5), np.minimum(low, size)
    budget = data.draw(st.integers(int(low.sum()), int(size.sum())))
    share = exact_shares(size, weight, budget, low=low)
    assert share.sum() == budget
    assert ((low <= share) & (share <= size)).all()
    expected = filled([Fraction(w) for w in weight], low.tolist(), size.tolist(), Fraction(budget))
    assert all(abs(a - b) < 1 + 1e-6 for a, b in zip(share.tolist(), expected, strict=True))


def test_adaptive_at_alpha_0_is_uniform_for_any_sizes() -> None:
    size, importance = np.array([7, 30, 0, 11]), np.array([0.4, 0.3, 0.2, 0.1])
    assert (adaptive(size, importance, 0.2, alpha=0.0) == uniform(size, importance, 0.2)).all()


@pytest.mark.parametrize("size", [[100] * 4, [7, 30, 0, 11], [0] * 4], ids=["equal", "unequal", "none"])
@pytest.mark.parametrize("alpha", [0.0, 0.65, 1.0])
def test_published_is_the_papers_and_adaptive_for_equal_bins(size: list[int], alpha: float) -> None:
    importance = [0.4, 0.3, 0.2, 0.1]
    pairs = list(zip(size, importance, strict=True))
    papers = [n * (alpha * i + (1 - alpha) * n / sum(size)) if n else 0.0 for n, i in pairs]
    given = (np.array(size), np.array(importance), 0.2)
    assert published(*given, alpha=alpha) == pytest.approx(papers, abs=1e-12)
    ours = adaptive(*given, alpha=alpha)
    scaled = ours * (sum(papers) / max(ours.sum(), 1e-9))
    same = len(set(size)) == 1 or alpha == 1
    assert (scaled == pytest.approx(papers, abs=1e-12)) == same


def test_the_budget_rounds_half_to_even() -> None:
    assert [budget_for(0.5, n) for n in (1, 3, 5, 7)] == [0, 2, 2, 4]
    assert [budget_for(k, 10) for k in (0, 1, 0.0, 1.0, 1e-9)] == [0, 10, 0, 10, 0]


@given(st.integers(1, 40), st.data())
def test_old_fresh_draws_keep_all_within_a_round(n: int, data: st.DataObject) -> None:
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


@pytest.mark.parametrize("value", [-1e-9, 1.0000001, math.nan, math.inf, True, False, "0.5", None])
def test_a_ratio_out_of_range_is_refused_with_its_value(value: Any) -> None:
    """F34."""
    for name, call in (
        ("keep", lambda: budget_for(value, 10)),
        ("alpha", lambda: adaptive(np.array([1]), np.array([1.0]), 0.5, alpha=value)),
        ("alpha", lambda: published(np.array([1]), np.array([1.0]), 0.5, alpha=value)),
        ("keep", lambda: n_kept(10, value)),
    ):
        with pytest.raises(ValueError, match=rf"{name} must be a number in \[0, 1\], got {value!r}"):
            call()
