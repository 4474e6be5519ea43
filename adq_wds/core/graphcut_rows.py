"""Runs exact GraphCut on a similarity that is no dot product, when its matrix does not fit in memory.

Rows on demand: the sums over V once, block by block, then one row of similarities per pick. Sums of later bins follow
from those of the first, and samples that are in a bin leave the rows, so that later picks cost less. Any similarity
will do whose entries are rounded so that sums are exact; the answer then equals the matrix's bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from adq_wds.core.graphcut import Binning, bin_sizes, binning_of_order

F64 = NDArray[np.float64]


class SimilarityRows(Protocol):
    """A symmetric similarity between n samples, multiples of 2^-33 (so that sums are exact), a row at a time."""

    def __len__(self) -> int: ...

    def sums(self) -> F64:
        """(n,) float64, the sum of each sample's row."""

    def row(self, u: int) -> F64:
        """(n,) float64, sample u's similarity with all."""

    def take(self, keep: NDArray[np.int64]) -> SimilarityRows:
        """The similarity between some of the samples, in the order given."""


def graphcut_bins_rows(
    similarity: SimilarityRows, bins: int, *, progress: Callable[[int], object] | None = None
) -> Binning:
    """Split samples into GraphCut bins by rows of similarities on demand: n rows, never more than one at a time.

    Args:
        similarity: of n samples, in the order that breaks ties (lowest position first); never written.
        bins: K, 1 to 32,767.
        progress: called with the number of picks made since its last call; they sum to n.

    Returns:
        The bin and the pick order of every sample, as `graphcut_bins_gram` gives them for the matrix.

    Source: as `graphcut_bins`; rows on demand are ours.

    >>> from adq_wds.core.gradient import GradientKernel
    >>> from adq_wds.core.kernel import unit_rows
    >>> grad = np.array([[1.0, -1.0], [-1.0, 1.0], [1.0, -1.0]], dtype=np.float16)
    >>> kernel = GradientKernel.from_rows(unit_rows(grad), np.ones(3, dtype=np.float32), np.ones((3, 1)))
    >>> graphcut_bins_rows(kernel, 2)
    Binning(bin=array([0, 0, 1], dtype=int16), pick=array([0, 1, 0], dtype=int32))
    """
    sizes, free, n = bin_sizes(len(similarity), bins), similarity, len(similarity)
    position = np.arange(n)  # (m,) where each free sample stands in the caller's, ascending
    start: F64 = 0.5 * free.sums()  # sums over V, halved as with a matrix
    order: list[int] = []
    for size in sizes.tolist():
        gain = start.copy()
        for _ in range(size):
            u = int(gain.argmax())
            order.append(int(position[u]))
            gain -= free.row(u)
            gain[u] = -np.inf
            if 0 < (n - len(order)) * 8 <= len(gain) * 7:
                keep = np.flatnonzero(gain > -np.inf)
                free, position = free.take(keep), position[keep]
                start, gain = start[keep], gain[keep]
            if progress is not None:
                progress(1)
        start = 0.5 * (start + gain)  # the next V is V without S
    return binning_of_order(np.array(order, dtype=np.int64), sizes)
