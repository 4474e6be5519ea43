"""Assigns new samples to bins, and solves for the rates that keep a given part of a stream.

While GraphCut fills a bin, it ranks candidates by one vector, q = (sum of V) - 2 (sum of S): the gain of x is
0.5 (|V| - 2 |S|) + 0.5 x . q. A checkpoint stores this vector, divided by the number of rows, with the value
x . q of the sample picked there. A few per bin tell whether any other sample would have been picked by then.
So assigning needs one embedding and nothing else: no order, no state.

Answers never depend on the samples around, on the BLAS or on threads. Rows are multiples of 2^-16 (`core.kernel`) and
queries of 2^-23, so products in float64 are exact. Most samples are decided before that in float32, where the distance
to every threshold that matters is larger than float32 can be wrong by.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adq_wds.core.graphcut import Binning
from adq_wds.core.kernel import ROW_STEP, unit_rows

I64 = NDArray[np.int64]
F64 = NDArray[np.float64]

QUERY_STEP = 2.0**-23  # a query's entries are below 2, so float32 holds them exactly
_UNIT_ROUNDOFF = 2.0**-24  # of float32
_BLOCK_BYTES = 16 << 20  # float32 scratch of one block of samples


def bin_checkpoints(rows: F64, binning: Binning, checkpoints: int) -> tuple[NDArray[np.float32], F64]:
    """The query at each checkpoint of every bin but the last, and the value of the sample picked there.

    The checkpoints of a bin of s samples are its picks ceil(s/M), ceil(2s/M), ..., s, counted from 1.

    Args:
        rows: (n, D) float64 from `unit_rows`.
        binning: their bins and picks; no bin is empty.
        checkpoints: M, checkpoints of each bin, >= 1.

    Returns:
        (K-1, M, D) float32 queries divided by n, multiples of 2^-23; and (K-1, M) float64 thresholds.

    Source: ours; the greedy is that of Zhou et al. 2023 (arXiv 2308.10524).

    >>> rows = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    >>> binning = Binning(bin=np.array([0, 1, 0], np.int16), pick=np.array([0, 0, 1], np.int32))
    >>> query, threshold = bin_checkpoints(rows, binning, 2)
    >>> np.round(3 * query.astype(float), 5).tolist(), np.round(3 * threshold, 5).tolist()
    ([[[2.0, 1.0], [0.0, 1.0]]], [[2.0, 0.0]])
    """
    n, width = rows.shape
    sizes = np.bincount(binning.bin)
    order = np.lexsort((binning.pick, binning.bin))
    query = np.empty((len(sizes) - 1, checkpoints, width), dtype=np.float32)
    threshold = np.empty(query.shape[:2])
    left: F64 = rows.sum(axis=0)
    for k, members in enumerate(np.split(order, np.cumsum(sizes)[:-1])[:-1]):
        taken, done = np.zeros(width), 0
        for j in range(checkpoints):
            last = -(-(j + 1) * len(members) // checkpoints) - 1
            taken += rows[members[done:last]].sum(axis=0)
            done = last
            query[k, j] = np.rint((left - 2.0 * taken) / (n * QUERY_STEP)) * QUERY_STEP
            threshold[k, j] = rows[members[last]] @ query[k, j].astype(np.float64)
        left -= taken + rows[members[done:]].sum(axis=0)
    return query, threshold


@dataclass(frozen=True, eq=False)
class Checkpoints:
    """Rules that assign samples to K bins, one rule a row: a class, or all classes together.

    A sample is in the first bin with a checkpoint whose query it meets or beats, x . q >= threshold; else in the last.

    Attributes:
        query: (R, K-1, M, D) float32, multiples of 2^-23, below 2.
        threshold: (R, K-1, M) float64.
    """

    query: NDArray[np.float32]
    threshold: F64

    def assign(self, embedding: NDArray[np.float16], row: NDArray[np.integer]) -> NDArray[np.int16]:
        """The bin of every sample, by the rule of its row; the answer for one does not depend on the others.

        Args:
            embedding: (N, D) float16, finite, of any length.
            row: (N,) integers, 0 ... R-1.

        Returns:
            (N,) int16, 0 ... K-1.

        Raises:
            ValueError: shapes or dtype differ, a row is out of range, or an embedding holds NaN or Inf (one is named).

        >>> one = Checkpoints(np.array([[[[0.5, 0.25]]]], np.float32), np.array([[[0.5]]]))
        >>> one.assign(np.array([[2, 0], [0, 2], [0, 0]], np.float16), np.zeros(3, int))
        array([0, 1, 1], dtype=int16)
        """
        self._check(embedding, row)
        bins = np.empty(len(embedding), dtype=np.int16)
        order = np.argsort(row, kind="stable")  # class by class: one product for all samples of a row
        n_queries, width = self.threshold[0].size, self.query.shape[-1]
        step = max(1, _BLOCK_BYTES // (4 * (width + 2 * n_queries)))
        for start in range(0, len(order), step):
            block = order[start : start + step]
            bins[block] = self._block(embedding[block], row[block], block)
        return bins

    def _check(self, embedding: NDArray[np.float16], row: NDArray[np.integer]) -> None:
        width, n_rows = self.query.shape[-1], len(self.query)
        if embedding.ndim != 2 or embedding.shape[1] != width or embedding.dtype != np.float16:
            raise ValueError(
                f"embedding has shape {embedding.shape} and dtype {embedding.dtype}, expected (N, {width}) float16"
            )
        if row.shape != (len(embedding),) or (len(row) and not 0 <= row.min() <= row.max() < n_rows):
            raise ValueError(f"row must hold {len(embedding)} integers in 0 ... {n_rows - 1}")

    def _block(self, embedding: NDArray[np.float16], row: NDArray[np.integer], position: I64) -> I64:
        """(n,) bins of samples sorted by row: by float32 where that decides, else exactly."""
        x = np.take(_float32_of_half(), embedding.view(np.uint16))  # ten times as fast as astype
        norm = np.sqrt(np.einsum("nd,nd->n", x, x))
        if not np.isfinite(norm).all():
            raise ValueError(
                f"embedding {position[~np.isfinite(norm)].min()} holds NaN or Inf, expected finite numbers"
            )
        norm[norm == 0] = 1.0
        bins = np.empty(len(x), dtype=np.int64)
        unsure = np.empty(len(x), dtype=bool)
        for r, part in _runs(row):
            with np.errstate(
                invalid="ignore"
            ):  # all are finite; some BLAS raise the flag on lanes they do not use
                excess = self._flat(r) @ x[part].T  # (J, n), J = (K-1)·M
            excess /= norm[part]
            excess -= self._threshold32[r]
            best = self._by_bin(excess).max(axis=1)  # (K-1, n)
            bins[part] = _first(best >= -self._margin[r])
            unsure[part] = bins[part] != _first(best >= self._margin[r])
        bins[unsure] = self._exact(x[unsure], row[unsure])
        return bins

    def _exact(self, x: NDArray[np.float32], row: NDArray[np.integer]) -> I64:
        """(n,) bins of samples sorted by row."""
        bins = np.empty(len(x), dtype=np.int64)
        rows = unit_rows(x)
        for r, part in _runs(row):
            product = self._flat(r).astype(np.float64) @ rows[part].T  # (J, n)
            met = self._by_bin(product) >= self.threshold[r][:, :, None]
            bins[part] = _first(met.max(axis=1))
        return bins

    def _flat(self, r: int) -> NDArray[np.float32]:
        flat: NDArray[np.float32] = self.query[r].reshape(-1, self.query.shape[-1])
        return flat

    def _by_bin(self, values: NDArray[Any]) -> NDArray[Any]:
        """(J, n) as (K-1, M, n)."""
        return values.reshape(*self.threshold.shape[1:], values.shape[1])

    @cached_property
    def _threshold32(self) -> NDArray[np.float32]:
        """(R, J, 1) float32."""
        return self.threshold.reshape(len(self.threshold), -1, 1).astype(np.float32)

    @cached_property
    def _margin(self) -> NDArray[np.float32]:
        """(R, K-1, 1) float32: how far x . q / ‖x‖ - threshold may be off in float32, at most, over a bin's checkpoints.

        Whatever the order of the additions, a dot product of D terms is off by at most D units of roundoff times the
        product of the lengths, the length of x by half of that; the entries of x are rounded by up to half a step.
        A tenth is added for products of such terms.
        """
        width = self.query.shape[-1]
        margin = np.empty(self.threshold.shape)
        for r, query in enumerate(self.query):  # row by row: all queries as float64 may be large
            q = np.abs(query.astype(np.float64))
            length = np.sqrt(np.einsum("kmd,kmd->km", q, q)) + np.abs(self.threshold[r])
            margin[r] = 1.5 * (width + 16) * _UNIT_ROUNDOFF * length + 0.5 * ROW_STEP * q.sum(axis=2)
        most: NDArray[np.float32] = (1.1 * margin.max(axis=2, keepdims=True)).astype(np.float32)
        return most


@cache
def _float32_of_half() -> NDArray[np.float32]:
    """(65536,) float32: the value of every float16, by its bits."""
    values: NDArray[np.float32] = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    return values


def _runs(row: NDArray[np.integer]) -> Iterator[tuple[int, slice]]:
    """Each distinct row with its slice; `row` is (n,) integers, ascending."""
    edges = [0, *(np.flatnonzero(np.diff(row)) + 1).tolist(), len(row)]
    return ((int(row[start]), slice(start, stop)) for start, stop in pairwise(edges) if stop > start)


def _first(met: NDArray[np.bool_]) -> I64:
    """(K-1, n) bool to (n,): the first bin that is met, the last one, K-1, where none is."""
    with_last: NDArray[np.bool_] = np.concatenate([met, np.ones((1, met.shape[1]), dtype=bool)])
    first: I64 = with_last.argmax(axis=0)
    return first


def solve_rates(frequency: F64, weight: F64, keep: float) -> F64:
    """Rates of K bins, in proportion to their weights and at most 1, that keep a given part of a stream.

    Args:
        frequency: (K,) float64, part of the stream that falls into each bin; >= 0, sums to 1.
        weight: (K,) float64, finite, >= 0; bins of weight 0 are kept from only when all others are kept whole.
        keep: ratio kept, in [0, 1].

    Returns:
        (K,) float64 in [0, 1] with sum(frequency * rate) = keep. No rate falls when `keep` rises.

    Source: ours; the weights are those of Li et al. 2024 (arXiv 2412.16895), bin sampling.

    >>> solve_rates(np.array([0.5, 0.25, 0.25]), np.array([1.0, 2.0, 4.0]), 0.5)
    array([0.25, 0.5 , 1.  ])
    """
    if keep >= 1.0:
        return np.ones(len(weight))
    first = weight > 0
    rate = np.where(first, _water_fill(frequency, weight, keep), 0.0)
    if not first.all() and (rate[first] == 1.0).all():
        rest = _water_fill(frequency, (~first).astype(np.float64), keep - float(frequency[first].sum()))
        rate[~first] = rest[~first]
    return rate


def _water_fill(frequency: F64, weight: F64, amount: float) -> F64:
    """min(1, level * weight) with sum(frequency * rate) = amount; 1 in all bins with a weight where that is not enough."""
    order = np.argsort(-weight, kind="stable")
    f, w = frequency[order], weight[order]
    full = np.cumsum(f) - f  # (k,) kept of the bins before, when these are full
    rest = np.cumsum((f * w)[::-1])[::-1]  # (k,) what one more unit of level adds then
    with np.errstate(divide="ignore", invalid="ignore"):
        level = np.where(rest > 0, (amount - full) / rest, np.inf)
        enough = level * w <= 1.0  # the first bin that need not be full decides
    if not enough.any():
        return (weight > 0).astype(np.float64)
    return np.minimum(1.0, max(0.0, float(level[enough.argmax()])) * weight)
