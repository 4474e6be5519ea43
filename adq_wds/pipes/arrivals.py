"""Counts the samples of each shard in one pass of a stream, and lists kept samples that are missing.

Some tar readers, such as WebDataset's, stop at the first bad header without an error.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from adq_wds.errors import shorten

FULL = 255  # a row's count stays here


class Lost(NamedTuple):
    """Missing kept samples of one shard."""

    shard: str
    keys: list[str]
    n_kept: int


class Arrivals:
    """How often each row of one shard arrived in a pass.

    A shard may be read several times with overlap, as in a pipeline that repeats and shuffles.

    Attributes:
        counts: a byte for each row, up to `FULL`.
        epochs: those whose samples arrived.
    """

    def __init__(self, n_rows: int) -> None:
        self.counts = bytearray(n_rows)
        self.epochs: set[int | None] = set()

    def equally_often(self) -> bool:
        """Whether all rows arrived equally often, at least once; then no kept row is missing."""
        levels = set(self.counts)
        return len(levels) <= 1 and 0 not in levels

    def missing(self, kept: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Kept rows that arrived never, or less often than other kept ones.

        Only kept rows are compared: a sample that a foreign file splits arrives twice.
        """
        counts = np.frombuffer(self.counts, dtype=np.uint8)
        due = max(int(counts[kept].max(initial=0)), 1)
        return np.flatnonzero(kept & (counts < due))


def lost_text(lost: list[Lost]) -> str:
    """The error text for missing kept samples; the caller puts the first one's place in front."""
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
