"""Runs exact GraphCut when the Gram matrix does not fit in memory.

All in units of dot products: with q = (sum of V) - 2 (sum of S), candidates are ranked by x . q, and a pick u takes
2 u from q. A refresh computes x . q for all rows, picks the best outright, and holds the next best rows in a pool
with their own small Gram matrix. Picks go on inside the pool for as long as its best is strictly above anything a row
outside can have by now (`Outside`); then comes the next refresh. Only how often that happens depends on the data.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

logger = logging.getLogger("adq_wds")

F64 = NDArray[np.float64]
Rows = NDArray[np.float32] | F64

POOL_FACTOR = 4  # pool = factor * sqrt(rows left): its Gram matrix then costs about as much as the refresh
WHOLE_POOL = 2048  # so few rows left go into the pool together, and no refresh is needed any more
FEW_PICKS = 2  # a pool that gave no more picks than this cost more than rows on demand
# Picks by rows on demand before the pool is tried again; doubles each time.
FIRST_BREAK, LONGEST_BREAK = 8, 4096
WARN_BREAK, WARN_SECONDS = 256, 10.0  # from both of these on, falling back is worth a line in the log
_BLOCK_ROWS = 4096


@dataclass(frozen=True)
class Outside:
    """Upper bound on the gains of rows outside the pool.

    At the refresh each such x had x . query <= threshold, and |x| <= radius. After picks with sum Q the query is
    q' = query - 2 Q. For every multiplier m >= 0

        x . q'  =  m (x . query) + x . (q' - m query)  <=  m threshold + radius * |q' - m query|,

    and where all entries of x are >= 0, the positive part of the last vector will do. The best m on the sphere is in
    closed form: it keeps the part of q' beside the query from counting twice. Any other m is only looser, so rounding
    in m does no harm; rounding in the bound itself is covered by `slack`.

    Source: ours.
    """

    query: F64
    threshold: float
    radius: float
    nonnegative: bool

    @cached_property
    def length(self) -> float:
        """|query|."""
        return math.sqrt(float(self.query @ self.query))

    def bound(self, picked: F64) -> float:
        """Upper bound on x . (query - 2 picked) over the rows outside; `picked` is the (D,) sum of the picks."""
        m = self._multiplier(picked)
        rest = (1.0 - m) * self.query - 2.0 * picked
        if self.nonnegative:
            np.maximum(rest, 0.0, out=rest)
        reach = self.radius * math.sqrt(float(rest @ rest))
        slack = (
            len(rest) * 2.0**-50 * (abs(m * self.threshold) + (1.0 + m) * self.radius * self.length + reach)
        )
        best = m * self.threshold + reach + slack
        return min(best, self.threshold) if self.nonnegative else best

    def _multiplier(self, picked: F64) -> float:
        if self.length == 0.0:
            return 0.0
        edge = self.threshold / self.length  # how far along the query an outsider can lie
        width = self.radius * self.radius - edge * edge
        if width <= 0.0:
            return 0.0
        along = float(self.query @ picked) / self.length
        beside = math.sqrt(max(0.0, float(picked @ picked) - along * along))
        return max(0.0, 1.0 - 2.0 * (along + beside * edge / math.sqrt(width)) / self.length)


class _FreeRows:
    """The rows no bin has taken yet: moved together as samples leave, so that later bins cost less."""

    def __init__(self, rows: Rows, *, in_place: bool) -> None:
        self.rows = rows if in_place else np.ascontiguousarray(rows)
        self.total = np.zeros(rows.shape[1])  # exact
        longest, least = 0.0, 0.0
        for part in self._parts():
            longest = max(longest, float(np.einsum("nd,nd->n", part, part).max()))
            least = min(least, float(part.min(initial=0.0)))
            self.total += part.sum(axis=0)
        self.radius = math.sqrt(longest) * (1.0 + 2.0**-40)  # rounded up
        self.nonnegative = least >= 0.0
        self.position = np.arange(len(rows))  # (m,) where each row stands in the caller's, ascending
        self.left = np.ones(len(rows), dtype=bool)
        self.n_left = len(rows)
        self._may_write = in_place  # else the first move copies: the caller's rows are never written

    def take(self, row: int) -> int:
        self.left[row] = False
        self.n_left -= 1
        return int(self.position[row])

    def some(self, rows: Any) -> F64:
        """Some of the rows, (p, D), or one."""
        some: F64 = self.rows[rows].astype(np.float64)
        return some

    def gains(self, query: F64) -> F64:
        """(m,) x . query of the free rows, -inf for those already taken."""
        if self.n_left * 8 <= len(self.rows) * 7:
            self._move()
        gain = np.concatenate([part @ query for part in self._parts()])
        gain[~self.left] = -np.inf
        return gain

    def _parts(self) -> Iterator[F64]:
        """The rows in float64: as they are, or block by block where they are float32."""
        step = len(self.rows) if self.rows.dtype == np.float64 else _BLOCK_ROWS
        for start in range(0, len(self.rows), step):
            yield self.rows[start : start + step].astype(np.float64, copy=False)

    def _move(self) -> None:
        keep = np.flatnonzero(self.left)
        target = self.rows[: len(keep)]
        if not self._may_write:
            target = np.empty((len(keep), self.rows.shape[1]), self.rows.dtype)
        for start in range(0, len(keep), _BLOCK_ROWS):  # in place: a row only ever moves towards the front
            part = keep[start : start + _BLOCK_ROWS]
            target[start : start + len(part)] = self.rows[part]
        self.rows, self._may_write = target, True
        self.position = self.position[keep]
        self.left = np.ones(len(keep), dtype=bool)


class _Pace:
    """Decides whether a pool pays: after a pool with few picks, rows come on demand for a while before the next try."""

    def __init__(self, largest: int) -> None:
        self.largest = largest
        self._break = FIRST_BREAK
        self._wait = 0
        self._on_demand_s: list[float] = []  # what each pick of the last break took
        self._warned = False

    def pool_size(self, n_left: int) -> int:
        """Rows to hold in the next pool; 0 for a pick by rows on demand."""
        if self._wait > 0:
            self._wait -= 1
            return 0
        if n_left <= min(WHOLE_POOL, self.largest):
            return n_left
        return min(POOL_FACTOR * math.isqrt(n_left), self.largest, n_left)

    def on_demand(self, seconds: float) -> None:
        self._on_demand_s.append(seconds)

    def pooled(self, n_picks: int, n_left: int) -> None:
        """Learn from a pool that ran until an outsider might have been better."""
        if n_picks > FEW_PICKS:
            self._break = FIRST_BREAK
            return
        self._wait = self._break
        self._break = min(2 * self._break, LONGEST_BREAK)
        # A pick costs less as rows leave: half of today's on average.
        seconds = statistics.median(self._on_demand_s or [0.0]) * n_left / 2
        self._on_demand_s.clear()
        if self._wait >= WARN_BREAK and seconds >= WARN_SECONDS and not self._warned:
            self._warned = True
            logger.warning(
                "GraphCut: gains lie too close together for a pool (%d picks from the last one), so rows are taken "
                "on demand: %s samples are left, about %.0f s. Bins per class take far less",
                n_picks, f"{n_left:,}", seconds,
            )  # fmt: skip


def pool_order(
    rows: Rows,
    sizes: NDArray[np.int64],
    *,
    memory_bytes: int,
    in_place: bool = False,
    progress: Callable[[int], object] | None = None,
) -> NDArray[np.int64]:
    """Positions in the order GraphCut picks them, in O(n * D) memory.

    Args:
        rows: (n, D) from `unit_rows`, in float64, or in float32, which holds them exactly: then a block at a time is
            in float64, and the rows may lie in a file that is mapped into memory.
        sizes: (K,) int64, bin sizes, summing to n.
        memory_bytes: the pool's Gram matrix takes at most a quarter of it. With 0 there is no pool: rows on demand.
        in_place: `rows` may be overwritten. Else a copy of most of them is made.
        progress: called with the number of picks made since its last call.

    Returns:
        (n,) int64; the first sizes[0] are bin 0, and so on.

    Source: ours.

    >>> pool_order(np.array([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]), np.array([2, 1]), memory_bytes=1 << 20)
    array([0, 1, 2])
    """
    if len(rows) == 0:
        return np.empty(0, dtype=np.int64)
    free = _FreeRows(rows, in_place=in_place)
    pace = _Pace(largest=math.isqrt(memory_bytes // 32))
    order: list[int] = []
    total = free.total  # sum of V
    for size in sizes.tolist():
        query, end = total.copy(), len(order) + size
        while len(order) < end:
            n_picks, picked = _refresh(free, query, pace, order, end)
            query -= 2.0 * picked
            if progress is not None:
                progress(n_picks)
        total = 0.5 * (total + query)  # query is now (sum of V) - 2 (sum of S), the next V is V without S
    return np.array(order, dtype=np.int64)


def _refresh(free: _FreeRows, query: F64, pace: _Pace, order: list[int], end: int) -> tuple[int, F64]:
    """Append the best of all rows to `order`, then what a pool gives; how many picks, and the (D,) sum of them."""
    began, before = time.perf_counter(), len(order)
    gain = free.gains(query)
    first = int(gain.argmax())  # over all rows: needs no bound, and ties go to the lowest position
    picked = free.some(first)
    gain[first] = -np.inf
    order.append(free.take(first))
    size = pace.pool_size(free.n_left) if len(order) < end else 0
    if size == 0:
        pace.on_demand(time.perf_counter() - began)
    else:
        _pick_in_pool(free, query, picked, gain, size, order, end)
        if len(order) < end:  # else the bin's end cut it short, which says nothing about the pool
            pace.pooled(len(order) - before, free.n_left)
    return len(order) - before, picked


def _pick_in_pool(
    free: _FreeRows, query: F64, picked: F64, gain: F64, size: int, order: list[int], end: int
) -> None:
    """Append picks to `order`, and add their rows to `picked`, while nothing outside the pool can be as good."""
    cut = len(gain) - size
    by_gain = np.argpartition(gain, cut)
    pool = np.sort(by_gain[cut:])  # (P,) ascending, so that argmax gives ties to the lowest position
    outside = None
    if size < free.n_left:
        outside = Outside(query, float(gain[by_gain[:cut]].max()), free.radius, free.nonnegative)
    rows = free.some(pool)
    gram = rows @ rows.T
    gram *= 2.0
    inside = gain[pool] - 2.0 * (rows @ picked)
    while len(order) < end:
        u = int(inside.argmax())
        if outside is not None and not inside[u] > outside.bound(picked):
            return
        picked += rows[u]
        inside -= gram[u]
        inside[u] = -np.inf
        order.append(free.take(int(pool[u])))
