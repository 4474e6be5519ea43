"""Finds near copies: rows whose cosine with an earlier row that stays is at least a threshold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

_BLOCK_ROWS = 2048
_BLOCK_COLUMNS = 8192  # of earlier rows: a float32 block of products takes 64 MiB


def near_copies(
    rows: F64 | NDArray[np.float32], threshold: float, *, progress: Callable[[int], object] | None = None
) -> I64:
    """For each row the first row that stays and has a cosine of at least `threshold` with it; itself where it stays.

    A row stays unless an earlier row that stays is that near, so rows that stay are pairwise below the threshold.
    Products are taken in float32, block by block, and again exactly where they come within float32's error of the
    threshold, so the answer is the double loop's on any machine. Takes N·D·4 bytes beside the rows, and at most
    N²·D operations.

    Args:
        rows: (N, D) from `kernel.unit_rows`, in order; float64, or float32, which holds them exactly. A zero row is
            near none.
        threshold: in (0, 1]; at 1 only rows of equal direction are near.
        progress: called with the number of rows done since its last call; they sum to N.

    Returns:
        (N,) int64, positions.

    Raises:
        ValueError: threshold out of range.

    Source: ours.

    >>> from adq_wds.core.kernel import unit_rows
    >>> near_copies(unit_rows(np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.01], [0.02, 1.0]])), 0.999).tolist()
    [0, 1, 0, 1]
    """
    if not 0.0 < threshold <= 1.0:  # NaN fails too
        raise ValueError(f"threshold must lie in (0, 1], got {threshold!r}")
    N, D = rows.shape
    blocks = (rows[i : i + _BLOCK_ROWS].astype(np.float64, copy=False) for i in range(0, N, _BLOCK_ROWS))
    square = np.concatenate([np.zeros(0), *(np.einsum("nd,nd->n", block, block) for block in blocks)])
    exact = _Cosines(rows, square, float(threshold))
    near = np.float32(threshold - (D + 8) * 2.0**-22)  # a float32 product errs by less than the difference
    first: I64 = np.arange(N)
    staying, position = np.empty((N, D), dtype=np.float32), np.empty(N, dtype=np.int64)
    n_staying = 0
    for begin in range(0, N, _BLOCK_ROWS):
        end = min(begin + _BLOCK_ROWS, N)
        block = exact.scaled(begin, end)
        for left in range(0, n_staying, _BLOCK_COLUMNS):
            right = min(left + _BLOCK_COLUMNS, n_staying)
            candidate = block @ staying[left:right].T >= near
            for i in np.flatnonzero(candidate.any(axis=1)).tolist():
                if first[begin + i] == begin + i:
                    exact.match(begin + i, position[left:right][candidate[i]], first)
        candidate = np.tril(block @ block.T >= near, -1)
        for i in np.flatnonzero(candidate.any(axis=1)).tolist():
            if first[begin + i] == begin + i:
                earlier = begin + np.flatnonzero(candidate[i])
                exact.match(begin + i, earlier[first[earlier] == earlier], first)
        new = np.flatnonzero(first[begin:end] == np.arange(begin, end))
        staying[n_staying : n_staying + len(new)] = block[new]
        position[n_staying : n_staying + len(new)] = begin + new
        n_staying += len(new)
        if progress is not None:
            progress(end - begin)
    return first


@dataclass(frozen=True)
class _Cosines:
    """Exact comparisons: dot products of rounded rows, and squares of their lengths, are exact in float64."""

    rows: F64 | NDArray[np.float32]
    square: F64
    threshold: float

    def scaled(self, begin: int, end: int) -> NDArray[np.float32]:
        """Rows of length 1, but for float32's rounding; zero rows stay zero."""
        length = np.sqrt(self.square[begin:end])
        length[length == 0] = 1.0
        scaled: NDArray[np.float32] = (self.rows[begin:end] / length[:, None]).astype(np.float32)
        return scaled

    def match(self, i: int, among: I64, first: I64) -> None:
        """Set `first[i]` to the first position of `among` whose row is near row i, if there is one."""
        dot = self.rows[among].astype(np.float64) @ self.rows[i].astype(np.float64)
        hit = np.flatnonzero(
            (dot >= self.threshold * np.sqrt(self.square[among] * self.square[i])) & (dot > 0)
        )
        if len(hit):
            first[i] = among[hit[0]]
