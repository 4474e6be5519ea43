"""Defines `Spans`, the offsets of samples that every table of samples starts with, and scans shards for them."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from adq_wds.errors import PlanError, ShardError, shorten
from adq_wds.remote.backend import Stamp
from adq_wds.remote.fetch import Fetch
from adq_wds.remote.open_shard import open_shard
from adq_wds.shards.names import base_name, is_url
from adq_wds.shards.samples_in_tar import Buffer, Ignored, Span, iter_spans, payload_crc32, span_crc32
from adq_wds.shards.tar_headers import DEFAULT_LIMITS
from adq_wds.tables.members import MEMBERS, members_text

logger = logging.getLogger("adq_wds")

SPAN_FIELDS = [
    pa.field("shard", pa.string(), nullable=False),
    pa.field("index", pa.int32(), nullable=False),
    pa.field("key", pa.string(), nullable=False),
    pa.field("byte_offset", pa.int64(), nullable=False),
    pa.field("n_bytes", pa.int64(), nullable=False),
    pa.field("crc32", pa.uint32(), nullable=False),
]
_TYPES = {"index": np.int32, "byte_offset": np.int64, "n_bytes": np.int64, "crc32": np.uint32}


@dataclass(frozen=True)
class Spans:
    """The offsets of samples in their shard, in the shard's order.

    Attributes:
        index: (n,) int32, position in the shard, ascending.
        keys: n keys.
        byte_offset: (n,) int64, first byte of the sample in the tar.
        n_bytes: (n,) int64, bytes of all its members, headers and padding included.
        crc32: (n,) uint32, over its members' payloads in tar order.
        members: n texts, see `adq_wds.tables.members`; None in older tables without them.
    """

    index: NDArray[np.int32]
    keys: list[str]
    byte_offset: NDArray[np.int64]
    n_bytes: NDArray[np.int64]
    crc32: NDArray[np.uint32]
    members: pa.Array | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def fault(self) -> str | None:
        """Why they cannot be those of one shard; None when they can."""
        ends = self.byte_offset + self.n_bytes
        if len(set(self.keys)) != len(self):
            return "a key is listed twice"
        if len(self) and (self.index[0] < 0 or (np.diff(self.index) <= 0).any()):
            return "positions are not ascending"
        if (self.byte_offset < 0).any() or (self.n_bytes <= 0).any() or (ends < 0).any():
            return "a span is empty or out of range"
        return "spans overlap" if (self.byte_offset[1:] < ends[:-1]).any() else None

    def take(self, rows: NDArray[np.int64]) -> Spans:
        """Some of the samples."""
        numbers = {name: getattr(self, name)[rows] for name in _TYPES}
        members = None if self.members is None else self.members.take(pa.array(rows))
        return Spans(keys=[self.keys[i] for i in rows.tolist()], members=members, **numbers)

    def rows(self) -> list[tuple[int, str, int, int, int]]:
        """One (index, key, byte_offset, n_bytes, crc32) per sample."""
        index, *numbers = (getattr(self, name).tolist() for name in _TYPES)
        return list(zip(index, self.keys, *numbers, strict=True))

    @classmethod
    def from_rows(cls, rows: Sequence[tuple[Any, ...]], members: Sequence[str] | None = None) -> Spans:
        """The inverse of `rows`."""
        index, keys, *numbers = zip(*rows, strict=True) if rows else ((),) * 5
        columns = zip(_TYPES.items(), (index, *numbers), strict=True)
        arrays = {name: np.array(values, dtype=dtype) for (name, dtype), values in columns}
        return cls(
            keys=list(keys), members=None if members is None else pa.array(members, pa.string()), **arrays
        )

    @classmethod
    def from_walk(cls, buffer: Buffer, spans: Iterable[Span]) -> Spans:
        """All samples of a shard, as a walk finds them, with their checksums."""
        rows, members = [], []
        for i, span in enumerate(spans):
            rows.append((i, span.key, span.byte_offset, span.n_bytes, payload_crc32(buffer, span)))
            members.append(members_text(span.members, span_crc32(buffer, span)))
        return cls.from_rows(rows, members)

    @classmethod
    def without_checksums(cls, spans: Iterable[Span]) -> Spans:
        """All samples of a shard, their crc32 0."""
        return cls.from_rows(
            [(i, span.key, span.byte_offset, span.n_bytes, 0) for i, span in enumerate(spans)]
        )

    @classmethod
    def joined(cls, parts: Sequence[Spans]) -> Spans:
        """Several spans joined; where only some have members, the others get empty texts."""
        numbers = {name: np.concatenate([getattr(part, name) for part in parts]) for name in _TYPES}
        members = None
        if any(part.members is not None for part in parts):
            members = pa.concat_arrays([part._members_or_empty() for part in parts])
        return cls(keys=[key for part in parts for key in part.keys], members=members, **numbers)

    def _members_or_empty(self) -> pa.Array:
        return pa.array(repeat("", len(self)), pa.string()) if self.members is None else self.members

    def columns(self, shard: str, *, members: bool | None = None) -> dict[str, Any]:
        """The columns that every table of samples starts with, with `members` by default where these are known."""
        columns = {
            "shard": [shard] * len(self),
            "index": self.index,
            "key": self.keys,
            "byte_offset": self.byte_offset,
            "n_bytes": self.n_bytes,
            "crc32": self.crc32,
        }
        if members or (members is None and self.members is not None):
            columns[MEMBERS.name] = self._members_or_empty()
        return columns

    @classmethod
    def from_table(cls, table: pa.Table) -> Spans:
        """The inverse of `columns`."""
        members = table[MEMBERS.name].combine_chunks() if MEMBERS.name in table.column_names else None
        numbers = {name: table[name].to_numpy() for name in _TYPES}
        return cls(keys=table["key"].to_pylist(), members=members, **numbers)


def walk_shard(
    buffer: Buffer, *, shard: str, limit: int | None = None, level: int = logging.INFO
) -> Iterator[Span]:
    """Every sample of a shard, in order; logs at the end how many members belong to none, or that the shard is empty.

    Args:
        buffer: the bytes of the tar file.
        shard: its name, for messages.
        limit: samples to stop after.
        level: of the log line of ignored members.

    Raises:
        ShardError: damaged or truncated, a key twice, a member that is not a plain file.
    """
    ignored = Ignored()
    n = 0
    for n, span in enumerate(iter_spans(buffer, shard=shard, ignored=ignored), start=1):
        yield span
        if n == limit:
            break
    if not n:
        warn_empty(shard, ignored)
    elif ignored.n_members:
        logger.log(level, "shard %s: %s", shard, ignored)


def scan_spans(
    path: str | os.PathLike[str], *, shard: str, fetch: Fetch | None = None, checksums: bool = True
) -> Spans:
    """Scan the headers of a shard for its samples; nothing is decoded.

    Args:
        path: the shard.
        shard: its name.
        fetch: how it is fetched; see `open_shard`.
        checksums: read the payloads too, for their crc32; else these are 0, and payloads are not touched.

    Raises:
        ShardError: damaged or truncated, a key twice, a member that is not a plain file.
    """
    with open_shard(path, fetch=fetch) as buffer:
        spans = walk_shard(buffer, shard=shard)
        return Spans.from_walk(buffer, spans) if checksums else Spans.without_checksums(spans)


def find_ids(
    keys_of: Iterable[tuple[str, Sequence[str]]], ids: Iterable[Any], *, kind: str = ""
) -> list[int]:
    """The positions of samples that are named by key or (shard, key); a pair may be a list, as in JSON.

    Args:
        keys_of: shard by shard its name and the keys of its samples.
        ids: the names.
        kind: what the samples are, for errors.

    Raises:
        PlanError: a sample is missing, or in several shards.
    """
    positions: dict[Any, list[int]] = {tuple(name) if isinstance(name, list) else name: [] for name in ids}
    first = 0
    for shard, keys in keys_of if positions else ():
        for i, key in enumerate(keys, first):
            for name in (key, (shard, key)):
                if name in positions:
                    positions[name].append(i)
        first += len(keys)
    for name, where in positions.items():
        if len(where) != 1:
            problem = "is not among the usable samples; expected a key, or (shard, key)"
            if where:
                problem = "is in several shards; give (shard, key)"
            raise PlanError(f"{kind}sample {shorten(name)} {problem}")
    return [i for (i,) in positions.values()]


def warn_empty(shard: str, ignored: Ignored | None = None) -> None:
    """Warn that a shard counts as 0 samples."""
    what = str(ignored) if ignored is not None and ignored.n_members else "an archive of no members"
    logger.warning("shard %s: no samples (%s); it counts as 0", shard, what)


def is_empty(path: str | os.PathLike[str], fetch: Fetch | None = None) -> bool:
    """Whether a shard is a sound tar that holds no sample; a remote one that is larger than such a tar is not fetched."""
    url, fetch = os.fspath(path), fetch or Fetch()
    name = base_name(url)
    try:
        if is_url(url) and fetch.stamp(url, shard=name)["bytes"] > DEFAULT_LIMITS.padding_bytes:
            return False
        with open_shard(path, fetch=fetch, sparse=True) as data:
            return next(iter_spans(data, shard=name), None) is None
    except ShardError:  # the caller raises its own error
        return False


def no_samples(n_shards: int) -> ShardError:
    """The error of a set without any sample."""
    return ShardError(
        f"no samples in {n_shards} shards: nothing can be read, embedded or planned; name others"
    )


def source_stamp(path: str | os.PathLike[str]) -> Stamp:
    """Size and date of a shard, to detect a change.

    Raises:
        ShardError: the file cannot be read, or is a command's output.
    """
    if is_url(os.fspath(path)):
        return Fetch().stamp(os.fspath(path), shard=base_name(os.fspath(path)))
    try:
        status = os.stat(path)
    except OSError as error:
        raise ShardError(f"shard {os.fspath(path)}: cannot be opened: {error.strerror}") from error
    return {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
