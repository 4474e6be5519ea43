"""Shares a budget over cells: exact real shares by water-filling, whole seats by a keyed binary tree.

All decisions are made in whole numbers, so that they are equal on every machine. In this file a cell is three of
them: a weight w > 0, and bounds low < high for its share. A budget T is shared as clip(λ·w, low, high) with the level
λ at which the shares sum to T (water-filling).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from adq_wds.core.rng import draws

_WEIGHT_BITS = 40
# Two fractions of different values whose denominators have 40 bits lie more than 2⁻⁸¹ apart, so with 84 more bits
# their whole parts order them exactly.
_KEY_BITS = 84


def integer_weights(weight: NDArray[np.float64]) -> NDArray[np.int64]:
    """Weights as whole numbers below 2⁴⁰, scaled by a power of two; positive ones stay positive.

    Args:
        weight: (K,) float64, finite, >= 0.

    Returns:
        (K,) int64; exact where the weights are whole numbers of at most 40 bits.
    """
    if not len(weight) or weight.max() == 0:
        return np.zeros(len(weight), dtype=np.int64)
    _, exponent = np.frexp(weight.max())
    whole = np.rint(np.ldexp(weight, _WEIGHT_BITS - int(exponent))).astype(np.int64)
    return np.where(weight > 0, np.maximum(whole, 1), 0)


def water_level(w: Sequence[int], low: Sequence[int], high: Sequence[int], total: int) -> tuple[int, int]:
    """The level λ = p/q at which clip(λ·w, low, high) sums to `total`.

    The sum grows with λ, linearly between the levels at which a cell leaves its lower bound or meets its upper one;
    these are passed in order.
    """
    fixed = sum(low)
    free = sum(weight for weight, least in zip(w, low, strict=True) if not least)
    for _, cell, bound, leaves_low in share_events(w, low, high):
        weight = w[cell]
        reached = fixed * weight + free * bound - total * weight
        if reached == 0:
            return bound, weight
        if reached > 0:
            break
        if leaves_low:
            fixed, free = fixed - bound, free + weight
        else:
            fixed, free = fixed + bound, free - weight
    return total - fixed, free


def share_events(
    w: Sequence[int], low: Sequence[int], high: Sequence[int]
) -> list[tuple[int, int, int, bool]]:
    """In the order of their levels, the moments at which a cell meets a bound of its share.

    Returns:
        for each a key of the level, the cell, the bound, and whether it is the lower one, which the cell then leaves;
        cells without a lower bound have left it.
    """
    events = []
    for cell, (weight, least, most) in enumerate(zip(w, low, high, strict=True)):
        events.append(((most << _KEY_BITS) // weight, cell, most, False))
        if least:
            events.append(((least << _KEY_BITS) // weight, cell, least, True))
    return sorted(events)


def clipped_sum(w: Sequence[int], low: Sequence[int], high: Sequence[int], p: int, q: int) -> tuple[int, int]:
    """The sum of clip(w·p/q, low, high) as a whole number and a weight: number + weight·p/q."""
    fixed = free = 0
    for weight, least, most in zip(w, low, high, strict=True):
        share = weight * p
        if share <= least * q:
            fixed += least
        elif share >= most * q:
            fixed += most
        else:
            free += weight
    return fixed, free


def tree_seats(
    w: Sequence[int], low: Sequence[int], high: Sequence[int], total: int, *, seed: int, name: str
) -> list[int]:
    """Give `total` seats to cells by a keyed balanced binary tree.

    A node with T seats gives its left half ⌊f(T) + u⌋ and its right half the rest: f(T) is the left half's part when T
    is shared over the node's cells by water-filling, u in [0, 1) is drawn by seed, name and node. f grows by 0 to 1
    with T, so each half's seats grow with T: a smaller budget lies inside a larger one. Where no bound is met the
    expected seats of a cell are its exact share.

    Args:
        w, low, high: of each cell.
        total: sum(low) <= total <= sum(high).
        seed: of the draws.
        name: of this tree, so that the draws of two are independent.

    Returns:
        seats of each cell, which sum to `total`.
    """
    seats = list(low)
    sums = [list(accumulate(column, initial=0)) for column in (w, low, high)]
    low_keys = [(least << _KEY_BITS) // weight if least else -1 for least, weight in zip(low, w, strict=True)]
    high_keys = [(most << _KEY_BITS) // weight for most, weight in zip(high, w, strict=True)]
    nodes = [(0, len(w), total)] if w else []
    while nodes:
        inner = []
        for a, b, seats_here in nodes:
            if seats_here == sums[1][b] - sums[1][a]:
                continue  # all cells stay at their lower bounds
            if seats_here == sums[2][b] - sums[2][a]:
                seats[a:b] = high[a:b]
            elif b - a == 1:
                seats[a] = seats_here
            else:
                inner.append((a, b, seats_here))
        nodes = []
        draws_here = draws(seed, 0, name, [f"{a}-{b}" for a, b, _ in inner], purpose="seat").tolist()
        for (a, b, seats_here), u in zip(inner, draws_here, strict=True):
            middle, weight = (a + b) // 2, sums[0][b] - sums[0][a]
            level_key = (seats_here << _KEY_BITS) // weight
            if max(low_keys[a:b]) < level_key < min(high_keys[a:b]):  # no bound is met: λ = T / W
                left, of = seats_here * (sums[0][middle] - sums[0][a]), weight
            else:
                p, of = water_level(w[a:b], low[a:b], high[a:b], seats_here)
                fixed, free = clipped_sum(w[a:middle], low[a:middle], high[a:middle], p, of)
                left = fixed * of + free * p
            n_left = ((left << 64) + u * of) // (of << 64)
            nodes += [(a, middle, n_left), (middle, b, seats_here - n_left)]
    return seats


def whole_shares(w: Sequence[int], low: Sequence[int], high: Sequence[int], total: int) -> list[int]:
    """Shares clip(λ·w, low, high), rounded to whole numbers that sum to `total` and keep the bounds."""
    if not w:
        return []
    p, q = water_level(w, low, high, total)
    shares, exact, n_shared = [], 0, 0
    for weight, least, most in zip(w, low, high, strict=True):
        exact += min(max(weight * p, least * q), most * q)  # the sum so far, in q-ths
        shares.append(exact // q - n_shared)
        n_shared += shares[-1]
    return shares


def parts(
    weight: NDArray[np.float64], low: NDArray[np.int64], high: NDArray[np.int64], total: int
) -> Iterator[tuple[str, NDArray[np.int64], list[int], int]]:
    """The two parts that share a budget separately: cells of weight 0 are filled after all others, in
    proportion to size.

    Cells whose bounds leave no choice (low = high) are in neither part.

    Returns:
        for each part its name, the positions of its cells, their whole weights, and its part of `total`.
    """
    positive, open_cells = weight > 0, high > low
    most = int(high[positive].sum())
    first = min(most, total - int(low[~positive].sum()))
    for name, among, left in (("", positive, first), ("0", ~positive, total - first)):
        cells = np.flatnonzero(among & open_cells)
        settled = int(low[among & ~open_cells].sum())
        weights = integer_weights(weight[cells]) if name == "" else high[cells]
        yield name, cells, weights.tolist(), left - settled
