"""Computes exact shares of many budgets at once, from the order in which cells meet their bounds."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from adq_wds.core.allocation import exact_shares
from adq_wds.core.seats import integer_weights, share_events

_NEVER = np.iinfo(np.int64).max
_EXACT = 1 << 50  # below it a quotient in floating point is off by 2 at most
_BLOCK = 1 << 18  # cells that are computed together


class ShareTable:
    """`exact_shares` of R rows of K cells, for many budgets of each row.

    As the level of water-filling rises with the budget, cells leave their lower bound and meet their upper one in
    an order that does not depend on the budget. It is computed once; a budget then needs one search in it.

    Args:
        size: (R, K) int64, >= 0, in the unit of the budgets.
        weight: (R, K) float64, finite, >= 0.
        low: (R, K) int64, 0 <= low <= size.

    Source: ours.

    >>> size, weight = np.array([[500, 500, 200]]), np.array([[1.0, 2.0, 1.0]])
    >>> ShareTable(size, weight, np.zeros_like(size)).at(np.array([[100], [900]]))[:, 0].tolist()
    [[25, 50, 25], [233, 467, 200]]
    """

    def __init__(self, size: NDArray[np.int64], weight: NDArray[np.float64], low: NDArray[np.int64]) -> None:
        self._size, self._weight, self._low = size, weight, low
        n_rows, n_cells = size.shape
        self._whole = np.zeros((n_rows, n_cells), dtype=np.int64)
        # numbers of the events of a row at which a cell leaves its lower bound, and meets its upper one
        self._leaves, self._fills = (np.full((n_rows, n_cells), _NEVER) for _ in range(2))
        self._passed = np.full((n_rows, 2 * n_cells), _NEVER)  # budgets above which each event lies behind
        for row in range(n_rows):
            self._sort_events(row)
        self._most = np.where(weight > 0, size, low).sum(axis=1)  # beyond it cells of weight 0 are filled

    def _sort_events(self, row: int) -> None:
        cells = np.flatnonzero((self._weight[row] > 0) & (self._size[row] > self._low[row]))
        whole = integer_weights(self._weight[row, cells])
        low, size = self._low[row, cells], self._size[row, cells]
        self._whole[row, cells] = whole
        self._leaves[row, cells[low == 0]] = -1
        w, least, most = whole.tolist(), low.tolist(), size.tolist()
        fixed = int(self._low[row].sum())
        free = sum(weight for weight, bound in zip(w, least, strict=True) if bound == 0)
        for number, (_, cell, bound, leaves_low) in enumerate(share_events(w, least, most)):
            self._passed[row, number] = fixed + free * bound // w[cell]
            (self._leaves if leaves_low else self._fills)[row, cells[cell]] = number
            sign = 1 if leaves_low else -1
            fixed, free = fixed - sign * bound, free + sign * w[cell]

    def at(self, budgets: NDArray[np.int64]) -> NDArray[np.int64]:
        """The shares of (E, R) int64 budgets of the rows, low.sum() <= budget <= size.sum(): (E, R, K) int64."""
        step = max(1, _BLOCK // max(1, self._size.size))
        blocks = [self._block(budgets[i : i + step]) for i in range(0, len(budgets), step)]
        return np.concatenate([np.empty((0, *self._size.shape), dtype=np.int64), *blocks])

    def _block(self, budgets: NDArray[np.int64]) -> NDArray[np.int64]:
        n_passed = (self._passed < np.minimum(budgets, self._most)[:, :, None]).sum(axis=2)[:, :, None]
        full, free = self._fills < n_passed, self._leaves < n_passed
        fixed = np.where(full, self._size, np.where(free, 0, self._low)).cumsum(axis=2)
        weight = np.where(free & ~full, self._whole, 0).cumsum(axis=2)
        level = (np.minimum(budgets, self._most)[:, :, None] - fixed[:, :, -1:], weight[:, :, -1:])
        ends = fixed + _floor_of_product(weight, *level)
        shares = np.diff(ends, axis=2, prepend=0)
        for e, row in np.argwhere(budgets > self._most).tolist():
            shares[e, row] = exact_shares(
                self._size[row], self._weight[row], int(budgets[e, row]), low=self._low[row]
            )
        return shares


def _floor_of_product(a: NDArray[np.int64], p: NDArray[np.int64], q: NDArray[np.int64]) -> NDArray[np.int64]:
    """⌊a·p/q⌋ for 0 <= a <= q < 2⁶¹ and p >= 0; 0 where q is 0."""
    q = np.maximum(q, 1)
    if p.max(initial=0) >= _EXACT:
        exact: NDArray[np.int64] = (a.astype(object) * p // q).astype(np.int64)
        return exact
    near = (a / q * p).astype(np.int64)
    rest = a.view(np.uint64) * p.view(np.uint64) - near.view(np.uint64) * q.view(np.uint64)  # modulo 2⁶⁴
    return near + rest.view(np.int64) // q
