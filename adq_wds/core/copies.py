"""Finds copies: samples of equal digests, of which the first stays unless another must be kept."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def first_of(digest: NDArray[np.uint8], among: NDArray[np.bool_]) -> NDArray[np.int64]:
    """For each sample the first one of an equal digest.

    Args:
        digest: (N, 16) uint8.
        among: (N,) bool, samples that are compared; the others are first themselves.

    Returns:
        (N,) int64, positions; a sample that is no copy has its own.

    >>> digest = np.repeat(np.array([[3], [7], [3], [3]], dtype=np.uint8), 16, axis=1)
    >>> first_of(digest, np.array([True, True, True, False]))
    array([0, 1, 0, 3])
    """
    first = np.arange(len(digest))
    halves = np.ascontiguousarray(digest).view(np.uint64).reshape(-1, 2)
    rows = _of_equal_halves(halves[:, 0], among)
    order = np.lexsort(halves[rows].T)  # stable: equal ones keep their order
    ordered = halves[rows[order]]
    begins = np.ones(len(rows), dtype=bool)
    begins[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    head = np.maximum.accumulate(np.where(begins, np.arange(len(rows)), 0))
    first[rows[order]] = rows[order[head]]
    return first


def _of_equal_halves(half: NDArray[np.uint64], among: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The positions of samples whose half digest is another's too, ascending: few, where few are copies."""
    rows = np.flatnonzero(among)
    order = np.argsort(half[rows])
    rows = rows[order]
    ordered = half[rows]
    equal = ordered[1:] == ordered[:-1]
    chosen = np.zeros(len(rows), dtype=bool)
    chosen[1:] = equal
    chosen[:-1] |= equal
    return np.sort(rows[chosen])


def who_stays(first: NDArray[np.int64], must: NDArray[np.bool_]) -> NDArray[np.int64]:
    """For each sample the copy that stays. Samples that must stay all do; one of them then replaces the first copy.

    Args:
        first: (N,) int64, as `first_of` gives.
        must: (N,) bool.

    Returns:
        (N,) int64, positions; a sample that stays has its own.

    >>> who_stays(np.array([0, 0, 0, 3]), np.array([False, True, True, False]))
    array([1, 1, 2, 3])
    """
    chosen = np.arange(len(first))
    rows = np.flatnonzero(must)
    chosen[first[rows[::-1]]] = rows[::-1]  # of several that must stay, the earliest is written last
    stays = chosen[first]
    stays[rows] = rows
    return stays
