"""How many samples of each bin are kept? Weights by an allocation rule, seats by highest averages."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_SMALL = 4096  # samples in all cells: so few rounds are sorted as they are


def split_budget(size: NDArray[np.int64], weight: NDArray[np.float64], budget: int) -> NDArray[np.int64]:
    """Split `budget` picks over K cells in proportion to their weights.

    Seat by seat to the cell with the largest weight / (2·seats + 1) (highest averages, Webster): the sum is
    `budget` exactly, a full cell is skipped, and a larger budget never takes a pick away. Ties go to the lowest
    index; cells of weight 0 are filled last, in order.

    Args:
        size: (K,) int64, samples in each cell, >= 0.
        weight: (K,) float64, finite, >= 0.
        budget: picks to give out, 0 <= budget <= size.sum().

    Returns:
        (K,) int64, sums to `budget`, 0 <= quota <= size.

    Raises:
        ValueError: shapes differ, a size or weight is negative or not finite, or the budget is out of range.

    Source: Li et al. 2024 (arXiv 2412.16895), bin sampling; the rounding by highest averages is ours.

    >>> split_budget(np.array([5, 5, 2]), np.array([1.0, 2.0, 1.0]), 6)
    array([2, 3, 1])
    """
    size = np.asarray(size, dtype=np.int64)
    weight = np.asarray(weight, dtype=np.float64)
    if size.shape != weight.shape or size.ndim != 1:
        raise ValueError(f"size {size.shape} and weight {weight.shape} must both be (K,)")
    if (size < 0).any():
        raise ValueError(f"sizes must be >= 0, got {size.min()}")
    if not np.isfinite(weight).all() or (weight < 0).any():
        raise ValueError(f"weights must be finite and >= 0, got {weight.tolist()[:10]}")
    total = int(size.sum())
    if not 0 <= budget <= total:
        raise ValueError(f"budget must lie in 0 … {total} (the samples there are), got {budget}")
    if budget == 0:
        return np.zeros_like(size)
    if budget == total:
        return size.copy()
    quota = _surely_won(size, weight, budget) if total > _SMALL else np.zeros_like(size)
    missing = budget - int(quota.sum())
    # The remaining candidates, each with its quotient; one stable sort plays all remaining rounds at once,
    # since quotients fall with every seat and so a cell's seats come in order.
    room = np.minimum(size - quota, missing)
    cell = np.repeat(np.arange(len(size)), room)
    seat = np.arange(len(cell)) - np.repeat(np.cumsum(room) - room, room) + quota[cell]
    quotient = weight[cell] / (2 * seat + 1)
    winners = np.argsort(-quotient, kind="stable")[:missing]  # stable: ties to the lowest index
    return quota + np.bincount(cell[winners], minlength=len(size))


def _surely_won(size: NDArray[np.int64], weight: NDArray[np.float64], budget: int) -> NDArray[np.int64]:
    """Seats that each cell has won for certain, before any rounding or tie could matter: (K,) int64.

    With a price per seat, every cell takes the seats whose quotient reaches it. At a price, found by bisection,
    where the cells together take at most `budget` seats, each of those is won; one a cell is left out, so that
    rounding here cannot give a seat away.
    """
    seats = np.zeros_like(size)
    low, high = 0.0, float(weight.max())
    for _ in range(60):
        price = 0.5 * (low + high)
        if price <= 0.0:
            break
        with np.errstate(over="ignore"):
            reached = np.floor(0.5 * (weight / price - 1.0)) + 1.0
        reached = np.clip(reached, 0.0, size)
        if reached.sum() <= budget:
            seats, high = np.maximum(reached.astype(np.int64) - 1, 0), price
        else:
            low = price
    return seats


def fresh_draw(
    rank: NDArray[np.int32], size: NDArray[np.int64], quota: NDArray[np.int64], epoch: int
) -> NDArray[np.bool_]:
    """Which samples does this epoch keep, when every epoch takes the next ones of each cell?

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


def adaptive(
    size: NDArray[np.int64], importance: NDArray[np.float64], keep: float, *, alpha: float = 0.65
) -> NDArray[np.float64]:
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
    check_alpha(alpha)
    weight: NDArray[np.float64] = size * (alpha * len(size) * importance + (1.0 - alpha))
    return weight


def uniform(size: NDArray[np.int64], importance: NDArray[np.float64], keep: float) -> NDArray[np.float64]:
    """DQ's weights: every bin in proportion to its size.

    Source: Zhou et al. 2023 (arXiv 2308.10524).

    >>> uniform(np.array([10, 20]), np.array([0.9, 0.1]), 0.5)
    array([10., 20.])
    """
    return size.astype(np.float64)


def check_alpha(alpha: float) -> None:
    """Raise `ValueError` unless alpha is a number in [0, 1]."""
    number = isinstance(alpha, (int, float, np.integer, np.floating)) and not isinstance(alpha, bool)
    if not number or not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must be a number in [0, 1], got {alpha!r}")


def budget_for(keep: float, n_samples: int) -> int:
    """Samples to keep: keep · n_samples, rounded half to even.

    Raises:
        ValueError: `keep` is not a number in [0, 1].

    >>> budget_for(0.5, 5), budget_for(0.5, 7)
    (2, 4)
    """
    if isinstance(keep, bool) or not isinstance(keep, (int, float, np.integer, np.floating)):
        raise ValueError(f"keep must be a number in [0, 1], got {keep!r}")
    if not 0.0 <= keep <= 1.0:  # NaN fails too
        raise ValueError(f"keep must be a number in [0, 1], got {keep!r} (0.2 keeps 20 %)")
    return round(float(keep) * n_samples)
