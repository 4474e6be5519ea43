"""Tells copies of samples that a fit has seen, by what they hold and without any state."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]


@dataclass(frozen=True, eq=False)
class KnownCopies:
    """The contents of a fit's samples, and which sample of equal contents stays: 16 bytes for each distinct content.

    Whether a sample is a copy depends on itself alone, so answers are equal in any order and on any worker. Two samples
    of a stream that the fit has not seen are not compared with each other.

    Attributes:
        digest: (n,) uint64, the first eight bytes of each distinct content's digest, ascending.
        stays: (n,) uint64, the draw of the sample that stays.
    """

    digest: U64
    stays: U64

    @classmethod
    def of(cls, digest: NDArray[np.uint8], first: NDArray[np.int64], draw: U64) -> KnownCopies:
        """Of N samples.

        Args:
            digest: (N, 16) uint8.
            first: (N,) int64, as `core.copies.first_of` gives.
            draw: (N,) uint64, a draw for each sample, of its shard and key.
        """
        stay = np.flatnonzero(first == np.arange(len(first)))
        unique, where = np.unique(halves(digest)[stay], return_index=True)
        return cls(unique, draw[stay[where]])

    def faults(self) -> Iterator[str]:
        """What is wrong with arrays from a file."""
        if self.digest.ndim != 1 or self.stays.shape != self.digest.shape:
            yield f"{self.digest.shape} digests for {self.stays.shape} samples"
        if (self.digest[1:] <= self.digest[:-1]).any():
            yield "the digests are not ascending"

    def are_copies(self, digest: NDArray[np.uint8], draw: U64) -> NDArray[np.bool_]:
        """(N,) bool: samples that hold what a sample of the fit holds, and are not the one that stays.

        Args:
            digest: (N, 16) uint8.
            draw: (N,) uint64.

        >>> digest = np.repeat(np.array([[3], [7], [3]], dtype=np.uint8), 16, axis=1)
        >>> draw = np.array([10, 11, 12], dtype=np.uint64)
        >>> KnownCopies.of(digest, np.array([0, 1, 0]), draw).are_copies(digest, draw).tolist()
        [False, False, True]
        """
        if not len(self.digest):
            return np.zeros(len(digest), dtype=bool)
        wanted = halves(digest)
        at = np.minimum(np.searchsorted(self.digest, wanted), len(self.digest) - 1)
        copies: NDArray[np.bool_] = (self.digest[at] == wanted) & (self.stays[at] != draw)
        return copies


def halves(digest: NDArray[np.uint8]) -> U64:
    """(N,) uint64: the first eight bytes of (N, 16) digests, little-endian."""
    return np.ascontiguousarray(digest[:, :8]).view("<u8").ravel().astype(np.uint64, copy=False)
