"""Splits a budget over bins: weights by an allocation rule, whole numbers by a keyed tree."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from adq_wds.core.seats import parts, tree_seats, whole_shares

I64 = NDArray[np.int64]
F64 = NDArray[np.float64]

_POWER = {"class": 1.0, "equal": 0.0}
_WEIGHT_STEP = 2.0**-20  # so that no last bit of a power moves a seat


def split_budget(
    size: I64,
    weight: F64,
    budget: int,
    *,
    seed: int = 0,
    name: str = "",
    low: I64 | None = None,
) -> I64:
    """Split `budget` picks over K cells in proportion to their weights.

    The exact shares are clip(λ·weight, low, size), with the λ at which they sum to `budget`; a keyed tree rounds them
    (`core.seats.tree_seats`): the sum is `budget`, the seed decides which cells get the odd picks, each cell
    with the probability of its fraction, and a larger budget never takes a pick away. Cells of weight 0
    are filled last, by their sizes.

    Args:
        size: (K,) int64, samples in each cell, >= 0.
        weight: (K,) float64, finite, >= 0.
        budget: picks to give out, low.sum() <= budget <= size.sum().
        seed: of the rounding.
        name: of this split, so that two splits of one seed are rounded independently.
        low: (K,) int64, picks that each cell has in any case, 0 <= low <= size; none by default.

    Returns:
        (K,) int64, sums to `budget`, low <= quota <= size.

    Source: Li et al. 2024 (arXiv 2412.16895), bin sampling; shares within the sizes and their rounding are ours.

    >>> split_budget(np.array([5, 5, 2]), np.array([1.0, 2.0, 1.0]), 8)
    array([2, 4, 2])
    """
    low = np.zeros_like(size) if low is None else low
    assert low.sum() <= budget <= size.sum()
    quota = low.copy()
    for part, cells, whole, total in parts(weight, low, size, budget):
        least, most = low[cells].tolist(), size[cells].tolist()
        quota[cells] = tree_seats(whole, least, most, total, seed=seed, name=f"{name}/{part}")
    return quota


def exact_shares(
    size: I64,
    weight: F64,
    budget: int,
    *,
    low: I64 | None = None,
) -> I64:
    """The shares that `split_budget` rounds: (K,) int64, in the unit of sizes and budget.

    >>> exact_shares(np.array([500, 500, 200]), np.array([1.0, 2.0, 1.0]), 100)
    array([25, 50, 25])
    """
    low = np.zeros_like(size) if low is None else low
    assert low.sum() <= budget <= size.sum()
    share = low.copy()
    for _, cells, whole, total in parts(weight, low, size, budget):
        share[cells] = whole_shares(whole, low[cells].tolist(), size[cells].tolist(), total)
    return share


def fresh_draw(rank: NDArray[np.int32], size: I64, quota: I64, epoch: int) -> NDArray[np.bool_]:
    """The samples that an epoch keeps, by the rule of plans of version 1.

    Epoch e keeps ranks with (rank − e·quota) mod size < quota: exactly `quota` of a cell in each epoch, epoch 0 as a
    plan without fresh draws, and each sample at least once in ⌈size/quota⌉ epochs. The compute per epoch falls with
    the keep ratio; the data seen over a training does not.

    Args:
        rank: (n,) int32, rank of each sample in its cell, 0 … size − 1.
        size: (n,) int64, samples in that cell, >= 1.
        quota: (n,) int64, how many of them an epoch keeps.
        epoch: >= 0.

    Returns:
        (n,) bool.

    Source: ours.

    >>> rank, size, quota = np.arange(5), np.full(5, 5), np.full(5, 2)
    >>> [np.flatnonzero(fresh_draw(rank, size, quota, epoch)).tolist() for epoch in range(3)]
    [[0, 1], [2, 3], [0, 4]]
    """
    if epoch < 0:
        raise ValueError(f"epoch must be >= 0, got {epoch}")
    place = (rank.astype(np.int64) - (epoch % size) * quota) % size
    fresh: NDArray[np.bool_] = place < quota
    return fresh


def adaptive(size: I64, importance: F64, keep: float, *, alpha: float = 0.65) -> F64:
    """ADQ's weights: size · (alpha · K · importance + 1 − alpha).

    Args:
        size: (K,) int64, samples in each bin.
        importance: (K,) float64, >= 0; sums to 1 over all bins of the set.
        keep: the keep ratio; this rule does not use it.
        alpha: share of the importance in the rate, in [0, 1]; 0 is DQ's uniform sampling.

    Returns:
        (K,) float64 weights for `split_budget`.

    Source: Li et al. 2024 (arXiv 2412.16895), bin sampling: r_n = α·Î_n + (1−α)·N_n/ΣN for equal bins; the
    form for bins of unequal size is ours, so that alpha = 0 is exactly proportional for any sizes.

    >>> adaptive(np.array([10, 10]), np.array([0.75, 0.25]), 0.5, alpha=0.5)
    array([12.5,  7.5])
    """
    check_ratio("alpha", alpha)
    weight: F64 = size * (alpha * len(size) * importance + (1.0 - alpha))
    return weight


def published(size: I64, importance: F64, keep: float, *, alpha: float = 0.65) -> F64:
    """The paper's weights: size · r, r = alpha · importance + (1 − alpha) · size / Σ size.

    For bins of equal size they are those of `adaptive`, times a constant. Of bins of unequal size a larger one has a
    higher rate, so that alpha = 0 is not DQ.

    Args:
        size: (K,) int64, samples in each bin.
        importance: (K,) float64, >= 0; sums to 1 over all bins of the set.
        keep: the keep ratio; this rule does not use it.
        alpha: share of the importance in the rate, in [0, 1].

    Returns:
        (K,) float64 weights for `split_budget`.

    Source: Li et al. 2024 (arXiv 2412.16895), bin sampling: r_n = α·Î_n + (1−α)·N_n/ΣN, q_n = r_n·N_n. It knows no
    keep ratio; that the counts are in proportion to these is ours.

    >>> published(np.array([30, 10]), np.array([0.5, 0.5]), 0.5, alpha=0.5)
    array([18.75,  3.75])
    """
    check_ratio("alpha", alpha)
    rate = alpha * importance + (1.0 - alpha) * size / max(1, int(size.sum()))
    weight: F64 = size * rate
    return weight


def uniform(size: I64, importance: F64, keep: float) -> F64:
    """DQ's weights: every bin in proportion to its size.

    Source: Zhou et al. 2023 (arXiv 2308.10524).

    >>> uniform(np.array([10, 20]), np.array([0.9, 0.1]), 0.5)
    array([10., 20.])
    """
    return size.astype(np.float64)


def weigh_classes(n: I64, balance: str | float) -> F64:
    """What each class weighs when classes share the budget: its samples to the power of `balance`.

    Args:
        n: (C,) int64, samples that each class may keep, >= 0.
        balance: a power in [0, 1]; "class" is 1, "equal" is 0.

    Returns:
        (C,) float64 weights for `split_budget`.

    Source: ours.

    >>> weigh_classes(np.array([0, 1, 100]), 0.5).tolist()
    [0.0, 1.0, 10.0]
    """
    power = _POWER[balance] if isinstance(balance, str) else balance
    weight = np.rint(n.astype(np.float64) ** power / _WEIGHT_STEP) * _WEIGHT_STEP
    return np.where(n > 0, weight, 0.0)


def check_ratio(name: str, value: object) -> None:
    """Raise `ValueError` unless `value` is a number in [0, 1]."""
    number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not number or not 0.0 <= value <= 1.0:  # type: ignore[operator]  # NaN fails too
        raise ValueError(f"{name} must be a number in [0, 1], got {value!r} (0.2 is 20 %)")


def budget_for(keep: float, n_samples: int) -> int:
    """Samples to keep: keep · n_samples, rounded half to even.

    Raises:
        ValueError: `keep` is not a number in [0, 1].

    >>> budget_for(0.5, 5), budget_for(0.5, 7)
    (2, 4)
    """
    check_ratio("keep", keep)
    return round(float(keep) * n_samples)
