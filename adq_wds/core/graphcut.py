"""Cuts samples into bins by GraphCut, exactly.

For each bin, V is what no earlier bin took and S starts empty. Until the bin is full, pick the x in V outside S with
the largest marginal gain

    gain(x) = sum over v in V of s(v, x)  -  2 * sum over u in S of s(u, x),

ties to the lowest position. The last bin takes what is left, in the order of the same greedy run to its end.
Recomputing the sums is cubic. After a pick u only one row changes the gains, gain -= 2 s(u, .), and because all dot
products are exact (`core.kernel`), running sums equal recomputed sums bit for bit.

Two evaluators give the same order. Here: a Gram matrix, n * n * 8 bytes. In `core.graphcut_pool`: O(n * D) memory
(for a similarity that is no dot product of rows, `core.graphcut_rows`).
The order alone gives back every query: with q = (sum of V) - 2 (sum of S), gain(x) = 0.5 (|V| - 2 |S|) + 0.5 x . q.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adq_wds.core.graphcut_pool import pool_order
from adq_wds.core.kernel import gram

EXACT_ROWS = 1_000_000  # gains are multiples of 2^-33 of size up to n: 2^20 rows fill float64's 53 bits
MAX_BINS = int(np.iinfo(np.int16).max)


@dataclass(frozen=True)
class Binning:
    """Where each sample fell.

    Attributes:
        bin: (n,) int16, 0 ... K-1 in the order the bins were filled.
        pick: (n,) int32, position inside its bin, 0 for the first picked.
    """

    bin: NDArray[np.int16]
    pick: NDArray[np.int32]


def bin_sizes(n: int, bins: int) -> NDArray[np.int64]:
    """How many samples each bin takes: n // K each, the remainder one per bin from the first.

    Args:
        n: samples, >= 0.
        bins: K, 1 to 32,767; more bins than samples give n bins of one.

    Returns:
        (min(K, n),) int64, sums to n.

    Source: ours; the papers do not say where the remainder goes.

    >>> bin_sizes(11, 4)
    array([3, 3, 3, 2])
    """
    k = min(bins, n)
    sizes = np.full(k, n // max(k, 1), dtype=np.int64)
    sizes[: n - int(sizes.sum())] += 1
    return sizes


def graphcut_bins(
    rows: NDArray[np.float64] | NDArray[np.float32],
    bins: int,
    *,
    memory_bytes: int = 1 << 30,
    in_place: bool = False,
    progress: Callable[[int], object] | None = None,
) -> Binning:
    """Split samples into non-overlapping GraphCut bins, exactly.

    Args:
        rows: (n, D) from `unit_rows`, in the order that breaks ties (lowest position first); float64, or float32, which
            holds them exactly.
        bins: K, 1 to 32,767.
        memory_bytes: a Gram matrix is used when its n * n * 8 bytes fit in here, else the pool. The pool needs at most
            a quarter of this beside the rows and their copy. The answer is the same bit for bit.
        in_place: `rows` may be overwritten: then the pool needs no copy of them.
        progress: called with the number of picks made since its last call; they sum to n.

    Returns:
        The bin and the pick order of every row.

    Warns:
        UserWarning: above 1,000,000 rows sums may round, so near-ties may depend on the machine.

    Source: Zhou et al. 2023 (arXiv 2308.10524), eq. 3, as used by Li et al. 2024 (arXiv 2412.16895); exact sums,
    ties and both evaluators are ours.

    >>> from adq_wds.core.kernel import unit_rows
    >>> graphcut_bins(unit_rows(np.array([[0.0, 1.0], [1.0, 1.0], [1.0, 0.0], [1.0, 1.0]])), 2)
    Binning(bin=array([1, 0, 1, 0], dtype=int16), pick=array([0, 0, 1, 1], dtype=int32))
    """
    n = len(rows)
    warn_above_exact_rows(n)
    if n * n * 8 <= memory_bytes:
        exact = rows.astype(np.float64, copy=False)
        return graphcut_bins_gram(gram(exact), bins, progress=progress)
    sizes = bin_sizes(n, bins)
    order = pool_order(rows, sizes, memory_bytes=memory_bytes, in_place=in_place, progress=progress)
    return binning_of_order(order, sizes)


def graphcut_bins_gram(
    similarity: NDArray[np.float64], bins: int, *, progress: Callable[[int], object] | None = None
) -> Binning:
    """Split samples into GraphCut bins by a matrix of similarities.

    0.5 + 0.5 * cos and cos itself give the same bins: gains only differ by a factor and by a number that all
    candidates share.

    Args:
        similarity: (n, n) float64, symmetric, multiples of 2^-33 (so that sums are exact); only read.
        bins: K, 1 to 32,767.
        progress: called with the number of picks made since its last call.

    Returns:
        The bin and the pick order of every row.

    Source: as `graphcut_bins`.

    >>> graphcut_bins_gram(np.array([[1.0, 0.5, 0.0], [0.5, 1.0, 0.5], [0.0, 0.5, 1.0]]), 3).bin
    array([1, 0, 2], dtype=int16)
    """
    sizes = bin_sizes(len(similarity), bins)
    order: list[int] = []
    # sums over V, halved: a pick is one subtraction of a row
    start: NDArray[np.float64] = 0.5 * similarity.sum(axis=1)
    for size in sizes.tolist():
        gain = start.copy()
        for _ in range(size):
            u = int(gain.argmax())
            order.append(u)
            gain -= similarity[u]
            gain[u] = -np.inf  # picked rows stay at -inf, also in the bins that follow
        # The sum over the next V is (sum over V) - (sum over S), and gain = start - (sum over S).
        start = 0.5 * (start + gain)
        if progress is not None:
            progress(size)
    return binning_of_order(np.array(order, dtype=np.int64), sizes)


def binning_of_order(order: NDArray[np.int64], sizes: NDArray[np.int64]) -> Binning:
    """The bins that an order of picks fills: (n,) int64 positions and (K,) int64 sizes, which sum to n.

    >>> binning_of_order(np.array([2, 0, 1]), np.array([2, 1]))
    Binning(bin=array([0, 1, 0], dtype=int16), pick=array([1, 0, 0], dtype=int32))
    """
    n = len(order)
    bins = np.empty(n, dtype=np.int16)
    pick = np.empty(n, dtype=np.int32)
    bins[order] = np.repeat(np.arange(len(sizes)), sizes)
    pick[order] = np.arange(n) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return Binning(bin=bins, pick=pick)


def warn_above_exact_rows(n: int) -> None:
    """Warn the caller's caller when n rows are more than their sums are exact for."""
    if n > EXACT_ROWS:
        warnings.warn(
            f"{n:,} rows in one GraphCut, exact up to {EXACT_ROWS:,}: sums may round and near-ties may depend "
            "on the machine; split by class, or fit a codebook on a sample",
            stacklevel=3,
        )
