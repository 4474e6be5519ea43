"""Says where samples lie: a batch of positions looked up together, and one sample on its way."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from adq_wds.core.order import LANES

HELD_SHARDS = LANES + 8  # shards that a stream reads in turn, and a few that it has just left


class Place(NamedTuple):
    """Where a sample lies and what it must be; of one read ahead, its bytes and where its fields lie in them.

    Attributes:
        shard: its shard's number.
        byte_offset: of its first byte in the shard.
        n_bytes: headers and padding included.
        key: the key it must have.
        crc32: what its payloads must have; None takes them as they are.
        fields: names of its fields, in tar order; None where these must be looked for.
        cuts: start and stop of each field's payload in `data`.
        data: its bytes; None where they are not read yet.
    """

    shard: int
    byte_offset: int
    n_bytes: int
    key: str
    crc32: int | None
    fields: tuple[str, ...] | None
    cuts: tuple[int, ...]
    data: bytes | None


def each_place(rows: Iterable[tuple[Any, ...]]) -> Iterator[Place]:
    """The places whose attributes are the items of `rows`."""
    return map(tuple.__new__, repeat(Place), rows)  # half the time of `Place._make`


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
