"""Counts the samples that one pass of a stream brings of each shard, and lists the kept ones that never came.

Tar readers that read to the first bad header, such as WebDataset's, end there without an error.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from adq_wds.errors import shorten

_FULL = 255  # a row's count stays here


class Lost(NamedTuple):
    """Kept samples of one shard that never came."""

    shard: str
    keys: list[str]
    n_kept: int


class Arrivals:
    """How often each row of one shard came in a pass, a byte for each; and the epochs whose choice was asked for.

    A shard may come several times, its visits overlapping, as in a pipeline that repeats and shuffles.
    """

    def __init__(self, n_rows: int) -> None:
        self._counts = bytearray(n_rows)
        self.epochs: set[int | None] = set()

    def count(self, row: int) -> None:
        """Count one arrival."""
        if self._counts[row] < _FULL:
            self._counts[row] += 1

    def equally_often(self) -> bool:
        """Whether every row came, and as often as every other: then nothing is missing, whatever is kept."""
        levels = set(self._counts)
        return len(levels) <= 1 and 0 not in levels

    def missing(self, kept: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Kept rows that never came, or less often than other kept ones.

        Others do not say how often: one that a foreign file between its members splits comes twice.
        """
        counts = np.frombuffer(self._counts, dtype=np.uint8)
        due = max(int(counts[kept].max(initial=0)), 1)
        return np.flatnonzero(kept & (counts < due))


def lost_text(lost: list[Lost]) -> str:
    """What to say of kept samples that never came; the place of the first stands in front of it."""
    first, *others = lost
    more = f", nor did {len(first.keys) - 1} more of its {first.n_kept} kept samples" * (len(first.keys) > 1)
    if others:
        n = sum(len(each.keys) for each in others)
        names = ", ".join(shorten(each.shard) for each in others[:3]) + ", ..." * (len(others) > 3)
        more += f", nor {n} kept samples of other shards ({names})"
    return (
        f"never came{more}: a tar reader such as WebDataset's ends without an error at a damaged header. `adq verify PLAN "
        "SHARDS` finds it; write or fetch the shard again. If a stage before this one leaves samples out on purpose, "
        "pass missing='warn'"
    )
