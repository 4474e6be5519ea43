"""Says where samples lie: a batch of positions looked up together, and one sample on its way."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from adq_wds.core.order import LANES

HELD_SHARDS = LANES + 8  # shards that a stream reads in turn, and a few that it has just left


Found = tuple[int, int, int, str, int | None, tuple[str, ...] | None, tuple[int, ...], bytes | None]
"""Where a sample lies: shard, byte_offset, n_bytes, key, crc32 to compare with; fields, cuts and bytes of one laid out."""


class Places(NamedTuple):
    """Where the samples of n positions lie, shard by shard.

    Attributes:
        groups: shard, samples listed in it, and from where to where the samples here are its own.
        numbers: (4, n) int64: byte_offset, n_bytes, crc32, place in the shard's list.
        keys: (n,) str.
        at: (n,) int64, where among the samples here each position's is.
    """

    groups: list[tuple[int, int, int, int]]
    numbers: NDArray[np.int64]
    keys: NDArray[np.object_]
    at: NDArray[np.int64]
