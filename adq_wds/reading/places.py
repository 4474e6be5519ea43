"""Defines the places of kept samples: as columns of one shard, and as single `Place`s for readers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from adq_wds.tables.members import payload_places
from adq_wds.tables.spans import Spans

_ONE_READ = 1 << 20  # bytes: of longer ones a read's own cost does not count


class Place(NamedTuple):
    """A sample's offset and what to verify.

    Attributes:
        shard: its shard's number.
        byte_offset: of its first byte in the shard.
        n_bytes: headers and padding included.
        key: the key it must have.
        crc32: what its payloads must have; None takes them as they are.
        fields: names of its fields, in tar order; None where its headers must tell.
        cuts: start and stop of each field's payload in the sample's bytes; there may be more, which mean nothing.
        span_crc32: what all its bytes must have for these to hold.
    """

    shard: int
    byte_offset: int
    n_bytes: int
    key: str
    crc32: int | None
    fields: tuple[str, ...] | None = None
    cuts: tuple[int, ...] = ()
    span_crc32: int = 0


def are_neighbours(places: Sequence[Place]) -> bool:
    """Whether places follow each other in one shard without a gap, and together are short enough for one read."""
    if len(places) < 2:
        return False
    (shard, stop, *_), last = places[0], places[-1]
    if last[0] != shard or not 0 < last[1] + last[2] - stop <= _ONE_READ:
        return False
    for place in places:
        if place[1] != stop or place[0] != shard:
            return False
        stop += place[2]
    return True


@dataclass(frozen=True)
class ShardPlaces:
    """The places of the k kept samples of a shard, in the shard's order.

    Attributes:
        numbers: (4 + 2F, k) int64: byte_offset, n_bytes, crc32, that of the whole span, and start and stop of F payloads.
        keys: (k,) str.
        fields: (k,) tuples of field names; None for a sample whose headers must be read.
    """

    numbers: NDArray[np.int64]
    keys: NDArray[np.object_]
    fields: NDArray[np.object_]

    @classmethod
    def from_spans(cls, spans: Spans) -> ShardPlaces:
        """Of all samples in `spans`."""
        fields, cuts = np.full(len(spans), None, dtype=object), np.zeros((0, len(spans)), np.int64)
        crc32 = np.zeros(len(spans), np.int64)
        if spans.members is not None:
            fields, cuts, crc32 = payload_places(spans.members, spans.n_bytes)
        numbers = np.stack([spans.byte_offset, spans.n_bytes, spans.crc32.astype(np.int64), crc32, *cuts])
        return cls(numbers, np.array(spans.keys, dtype=object), fields)


def each_place(
    parts: Sequence[tuple[int, ShardPlaces, NDArray[np.int64]]], order: NDArray[np.int64], *, verify: bool
) -> Iterator[Place]:
    """The places of n samples.

    Args:
        parts: for each shard its number, its places, and the selected rows.
        order: (n,) position of each sample among all parts.
        verify: compare payloads with their crc32. Else headers are read, since only they can be verified.
    """
    n, height = len(order), max([len(places.numbers) for _, places, _ in parts], default=4)
    shard, numbers = np.empty(n, np.int64), np.zeros((height, n), np.int64)
    keys, fields = np.empty((2, n), dtype=object)
    stop = 0
    for i, places, rows in parts:
        here = slice(stop, stop := stop + len(rows))
        shard[here], keys[here], fields[here] = i, places.keys[rows], places.fields[rows]
        numbers[: len(places.numbers), here] = places.numbers[:, rows]
    offset, n_bytes, crc32, span_crc32, *cuts = numbers[:, order].tolist()
    columns = shard[order].tolist(), offset, n_bytes, keys[order].tolist()
    if verify and cuts:
        known = zip(*columns, crc32, fields[order].tolist(), zip(*cuts, strict=True), span_crc32, strict=True)
        return map(tuple.__new__, repeat(Place), known)  # half the time of `Place._make`
    return map(Place, *columns, crc32 if verify else repeat(None))
