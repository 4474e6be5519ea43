"""Counts the samples that each epoch takes from each cell; an epoch continues where the last one ended.

Shares of cells lie end to end on a line. Epoch e takes one sample from a cell for each point k + u_e, k a
whole number, on the cell's interval, where u_e = frac(u + e/φ) and φ is the golden ratio: every cell and
every run of cells gets its share, rounded down or up, and the multiples of 1/φ are spread so evenly that no
cell waits long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

I64 = NDArray[np.int64]

ONE = 1 << 20
"""Shares are whole multiples of 1/ONE, which floats and JSON hold exactly."""
_GOLDEN = 0x9E3779B97F4A7C15  # 2⁶⁴/φ, odd
_TURN = 1 << 64
CACHED_EPOCHS = 4  # whose seats in all cells are cached: workers of one stream may be in two
_SORTED = 1 << 16  # so many epochs are sorted to be counted; more are counted one border at a time


class Draws(Protocol):
    """Says which samples of each cell an epoch takes."""

    def seats(self, epoch: int) -> tuple[I64, I64]:
        """See `FreshDraws.seats`."""


class FreshDraws:
    """The seats of M cells in every epoch from 1 on.

    Args:
        size: (M,) int64, samples in each cell.
        quota: (M,) int64, what epoch 0 takes of each: its first samples.
        share: (M,) int64, the mean of the other epochs in units of 1/ONE, 0 <= share <= size · ONE; sums to a whole
            number of samples.
        start: u, in units of 2⁻⁶⁴.

    Source: ours. RS2 (Okanovic et al., ICLR 2024) is this with one cell.
    """

    def __init__(self, size: I64, quota: I64, share: I64, start: int) -> None:
        self._size, self._quota, self._start = size, quota, start
        self._whole, self._part = _borders(share)

    def seats(self, epoch: int) -> tuple[I64, I64]:
        """Where an epoch begins in each cell, and how many samples it takes there.

        Args:
            epoch: >= 0.

        Returns:
            (M,) int64, rank of the first sample taken, and (M,) int64, how many; they go on at rank 0 after the last.

        Raises:
            ValueError: `epoch` is below 0.
        """
        epoch = _checked(epoch)
        if epoch == 0:
            return np.zeros_like(self._quota), self._quota
        # ⌈c − u⌉ = ⌊c⌋ + [frac(c) > u]; a cell has the difference of its two borders
        u = np.uint64((self._start + epoch * _GOLDEN) % _TURN)
        n = np.diff(self._whole + (self._part > u))
        taken = np.diff((epoch - 1) * self._whole.astype(object) + self._n_below(epoch - 1))
        first = (self._quota + taken) % np.maximum(self._size, 1)
        return first.astype(np.int64), n

    def _n_below(self, n: int) -> NDArray[np.object_]:
        """(M + 1,) Python integers: how many of u_1 … u_n lie below the fraction of each border."""
        if n <= _SORTED:
            steps = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(self._start)
            return np.searchsorted(np.sort(steps), self._part, side="left").astype(object)
        fractions, where = np.unique(self._part, return_inverse=True)
        counts = [_multiples_below(self._start + _GOLDEN, n, fraction) for fraction in fractions.tolist()]
        return np.array(counts, dtype=object)[where]


class VaryingDraws:
    """As `FreshDraws`, where each epoch from 1 on has shares of its own.

    Args:
        size: (M,) int64, samples in each cell.
        start: u, in units of 2⁻⁶⁴.
        quota: gives (M,) int64, what epoch 0 takes of each cell.
        shares: gives, for a range of epochs, each group of epochs of equal shares, (n,) int64, and these shares, (M,)
            int64 in units of 1/ONE. Asked only for epochs that are not counted yet.

    Source: ours.
    """

    def __init__(
        self,
        size: I64,
        start: int,
        quota: Callable[[], I64],
        shares: Callable[[range], Iterable[tuple[I64, I64]]],
    ) -> None:
        self._size, self._start, self._quota, self._shares = size, start, quota, shares
        self._before_all = 1, np.zeros_like(size)
        self._counted = self._before_all  # the seats of each cell in epochs 1 to, not with, the first number
        self._cached: dict[int, tuple[I64, I64]] = {}

    def forget(self, since: int = 0) -> None:
        """Count the epochs from this one on again, since their shares have changed."""
        if since < self._counted[0]:
            self._counted = self._before_all
        self._cached = {epoch: seats for epoch, seats in self._cached.items() if epoch < since}

    def seats(self, epoch: int) -> tuple[I64, I64]:
        """See `FreshDraws.seats`; the last few epochs are cached."""
        epoch = _checked(epoch)
        if epoch not in self._cached:
            seats = self._count(epoch) if epoch else (np.zeros_like(self._size), self._quota())
            self._cached[epoch] = seats
            while len(self._cached) > CACHED_EPOCHS:
                del self._cached[next(iter(self._cached))]
        return self._cached[epoch]

    def _count(self, epoch: int) -> tuple[I64, I64]:
        last, taken = self._counted if self._counted[0] <= epoch else self._before_all
        for epochs, share in self._shares(range(last, epoch)):
            taken = taken + self._seats_in(epochs, share)
        self._counted = epoch, taken
        ((epochs, share),) = self._shares(range(epoch, epoch + 1))
        return (self.seats(0)[1] + taken) % np.maximum(self._size, 1), self._seats_in(epochs, share)

    def _seats_in(self, epochs: I64, share: I64) -> I64:
        """(M,) int64: the seats of each cell in some epochs together."""
        whole, part = _borders(share)
        steps = epochs.astype(np.uint64) * np.uint64(_GOLDEN) + np.uint64(self._start)
        return np.diff(len(epochs) * whole + np.searchsorted(np.sort(steps), part, side="left"))


def _checked(epoch: int) -> int:
    if epoch < 0:
        raise ValueError(f"epoch must be >= 0, got {epoch}")
    return int(epoch)  # a numpy integer would overflow


def _borders(share: I64) -> tuple[I64, NDArray[np.uint64]]:
    """(M + 1,) the borders of the cells on the line: whole seats, and what is left in units of 2⁻⁶⁴."""
    borders = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(share)])
    return borders // ONE, (borders % ONE).astype(np.uint64) << np.uint64(44)


def _multiples_below(start: int, n: int, limit: int) -> int:
    """How many of start + i·G mod 2⁶⁴, 0 <= i < n, are below `limit`."""
    # x mod M < R exactly where ⌊x/M⌋ and ⌊(x − R)/M⌋ differ, by one
    below = _floor_sum(n, _TURN, _GOLDEN, start + _TURN - limit) - n
    return _floor_sum(n, _TURN, _GOLDEN, start) - below


def _floor_sum(n: int, m: int, a: int, b: int) -> int:
    """Σ ⌊(a·i + b)/m⌋ over 0 <= i < n, by the steps of Euclid's algorithm."""
    total = 0
    while n > 0:
        total += (n - 1) * n // 2 * (a // m) + n * (b // m)
        a, b = a % m, b % m
        top = a * n + b
        if top < m:
            break
        n, b, m, a = top // m, top % m, a, m
    return total
