"""Where do samples lie in their shards? The columns every table of samples starts with, and the index file."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from adq_wds.errors import PlanError, ShardError, shorten
from adq_wds.remote.backend import Stamp
from adq_wds.remote.fetch import Fetch
from adq_wds.remote.open_shard import open_shard
from adq_wds.shards.names import base_name, check_shard_name, is_url
from adq_wds.shards.samples_in_tar import DEFAULT_LIMITS, Buffer, Ignored, Span, iter_spans, payload_crc32
from adq_wds.tables.parquet import GroupFile, column_hashes, write_groups

logger = logging.getLogger("adq_wds")

VERSION = 1
SPAN_FIELDS = [
    pa.field("shard", pa.string(), nullable=False),
    pa.field("index", pa.int32(), nullable=False),
    pa.field("key", pa.string(), nullable=False),
    pa.field("byte_offset", pa.int64(), nullable=False),
    pa.field("n_bytes", pa.int64(), nullable=False),
    pa.field("crc32", pa.uint32(), nullable=False),
]


@dataclass(frozen=True)
class Spans:
    """Where samples lie in their shard, in the shard's order.

    Attributes:
        index: (n,) int32, position in the shard, ascending.
        keys: n keys.
        byte_offset: (n,) int64, first byte of the sample in the tar.
        n_bytes: (n,) int64, bytes of all its members, headers and padding included.
        crc32: (n,) uint32, over its members' payloads in tar order.
    """

    index: NDArray[np.int32]
    keys: list[str]
    byte_offset: NDArray[np.int64]
    n_bytes: NDArray[np.int64]
    crc32: NDArray[np.uint32]

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, rows: NDArray[np.int64]) -> Spans:
        """Some of the samples."""
        return Spans(
            self.index[rows],
            [self.keys[i] for i in rows],
            self.byte_offset[rows],
            self.n_bytes[rows],
            self.crc32[rows],
        )

    def rows(self) -> list[tuple[int, str, int, int, int]]:
        """One (index, key, byte_offset, n_bytes, crc32) per sample."""
        numbers = (c.tolist() for c in (self.byte_offset, self.n_bytes, self.crc32))
        return list(zip(self.index.tolist(), self.keys, *numbers, strict=True))

    @classmethod
    def from_rows(cls, rows: Sequence[tuple[Any, ...]]) -> Spans:
        """The way back from `rows`."""
        index, keys, byte_offset, n_bytes, crc32 = zip(*rows, strict=True) if rows else ((),) * 5
        return cls(
            np.array(index, dtype=np.int32),
            list(keys),
            np.array(byte_offset, dtype=np.int64),
            np.array(n_bytes, dtype=np.int64),
            np.array(crc32, dtype=np.uint32),
        )

    @classmethod
    def joined(cls, parts: Sequence[Spans]) -> Spans:
        """Several, one after another."""
        return cls(
            np.concatenate([part.index for part in parts]),
            [key for part in parts for key in part.keys],
            np.concatenate([part.byte_offset for part in parts]),
            np.concatenate([part.n_bytes for part in parts]),
            np.concatenate([part.crc32 for part in parts]),
        )

    def columns(self, shard: str) -> dict[str, Any]:
        """As the columns that every table of samples starts with."""
        return {
            "shard": [shard] * len(self),
            "index": self.index,
            "key": self.keys,
            "byte_offset": self.byte_offset,
            "n_bytes": self.n_bytes,
            "crc32": self.crc32,
        }

    @classmethod
    def from_table(cls, table: pa.Table) -> Spans:
        """The way back from `columns`."""
        return cls(
            table["index"].to_numpy(),
            table["key"].to_pylist(),
            table["byte_offset"].to_numpy(),
            table["n_bytes"].to_numpy(),
            table["crc32"].to_numpy(),
        )


def walk_shard(
    buffer: Buffer, *, shard: str, limit: int | None = None, level: int = logging.INFO
) -> Iterator[Span]:
    """Every sample of a shard, in order; at the end it logs how many members belong to none, or that the shard is empty.

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
    """Find every sample of a shard by walking its headers; nothing is decoded.

    Args:
        path: the shard.
        shard: its name.
        fetch: how it is fetched; see `open_shard`.
        checksums: read the payloads too, for their crc32; else these are 0, and payloads are not touched.

    Raises:
        ShardError: damaged or truncated, a key twice, a member that is not a plain file.
    """
    with open_shard(path, fetch=fetch) as buffer:
        return Spans.from_rows(
            [
                (i, s.key, s.byte_offset, s.n_bytes, payload_crc32(buffer, s) if checksums else 0)
                for i, s in enumerate(walk_shard(buffer, shard=shard))
            ]
        )


def warn_empty(shard: str, ignored: Ignored | None = None) -> None:
    """Say that a shard counts as 0 samples."""
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
    except ShardError:  # who asks has an error of its own
        return False


def no_samples(n_shards: int) -> ShardError:
    """The error of a set without any sample."""
    return ShardError(
        f"no samples in {n_shards} shards: nothing can be read, embedded or planned; name others"
    )


@dataclass(frozen=True)
class IndexedShard:
    """What an index knows of one shard.

    Attributes:
        spans: where its samples lie.
        source: size and date of its file when it was scanned; None in an index that does not say.
    """

    spans: Spans
    source: Stamp | None


def source_stamp(path: str | os.PathLike[str]) -> Stamp:
    """Size and date of a shard, by which a change is noticed.

    Raises:
        ShardError: the file cannot be looked at, or is a command's output.
    """
    if is_url(os.fspath(path)):
        return Fetch().stamp(os.fspath(path), shard=base_name(os.fspath(path)))
    try:
        status = os.stat(path)
    except OSError as error:
        raise ShardError(f"shard {os.fspath(path)}: cannot be opened: {error.strerror}") from error
    return {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns}


def save_index(
    path: str | os.PathLike[str],
    shards: Sequence[tuple[str, Spans]],
    *,
    sources: Mapping[str, Stamp] | None = None,
) -> None:
    """Write where every sample of some shards lies: one Parquet file, a row group per shard.

    `sources` are the stamps of their files, by shard name, taken before they were scanned.
    """
    schema = pa.schema(SPAN_FIELDS)
    groups = [pa.table(spans.columns(name), schema=schema) for name, spans in shards]
    entries = [
        {
            "name": name,
            "n": len(spans),
            "columns": column_hashes(group),
            **({} if sources is None else {"source": sources[name]}),
        }
        for (name, spans), group in zip(shards, groups, strict=True)
    ]
    header = {"format": "adq_wds.index", "version": VERSION, "shards": entries}
    write_groups(path, schema, groups, header)


def load_index(
    path: str | os.PathLike[str], *, files: Mapping[str, str | os.PathLike[str]] | None = None
) -> dict[str, Spans]:
    """Read an index back, by shard name.

    Args:
        path: the index.
        files: where the shards to be read are now, by shard name; only these are given, each held against what was
            indexed: by size, and where the date is another one, by its headers. Payloads are not read.

    Raises:
        ShardError: the file is damaged or of another kind; a shard of `files` is not in it, or changed since.
    """
    indexed = read_index(path)
    if files is None:
        return {name: shard.spans for name, shard in indexed.items()}
    for name, file in files.items():
        if name not in indexed:
            raise ShardError(
                f"shard {shorten(name)} is not in the index {os.fspath(path)}; index it with the others"
            )
        check_source(file, name, indexed[name])
    return {name: indexed[name].spans for name in files}


def read_index(path: str | os.PathLike[str]) -> dict[str, IndexedShard]:
    """All that an index knows, by shard name.

    Raises:
        ShardError: the file is damaged or of another kind.
    """
    file = GroupFile(path, kind="index", version=VERSION, error=ShardError)
    schema = pa.schema(SPAN_FIELDS)
    names: list[str] = []
    for entry in file.header["shards"]:
        try:
            names.append(check_shard_name(entry.get("name")))
        except PlanError as cause:
            raise ShardError(f"{file.path}: damaged header: {cause}") from cause
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ShardError(f"{file.path}: damaged header: shard {twice[0]} is listed twice")
    found: dict[str, IndexedShard] = {}
    for i, name in enumerate(names):
        table = file.group(i, schema)
        spans, source = Spans.from_table(table), file.header["shards"][i].get("source")
        fault = _fault(spans)
        if table["shard"].unique().to_pylist() not in ([name], []):
            fault = "rows of another shard"
        if source is not None and not _is_stamp(source):
            fault = f"source {shorten(source)}, expected bytes and mtime_ns"
        if fault is not None:
            raise ShardError(f"{file.path}, shard {name}: damaged: {fault}; make it again")
        found[name] = IndexedShard(spans, source)
    return found


def _fault(spans: Spans) -> str | None:
    """Why spans cannot be those of one shard; None when they can."""
    ends = spans.byte_offset + spans.n_bytes
    if len(set(spans.keys)) != len(spans):
        return "a key is listed twice"
    if (spans.index != np.arange(len(spans))).any():
        return "positions are not 0, 1, 2, …"
    if (spans.byte_offset < 0).any() or (spans.n_bytes <= 0).any() or (ends < 0).any():
        return "a span is empty or out of range"
    if (spans.byte_offset[1:] < ends[:-1]).any():
        return "spans overlap"
    return None


def _is_stamp(value: object) -> bool:
    names = ("bytes", "mtime_ns")
    return (
        isinstance(value, dict) and sorted(value) == sorted(names) and {*map(type, value.values())} == {int}
    )


def check_source(path: str | os.PathLike[str], name: str, indexed: IndexedShard) -> None:
    """Raise `ShardError` unless the file at `path` still is the shard that was indexed."""
    now, then = source_stamp(path), indexed.source
    if now == then:
        return
    if then is not None and now["bytes"] != then["bytes"]:
        text = (
            f"{now['bytes']:,} bytes, {then['bytes']:,} when it was indexed: it changed since; index it again"
        )
        raise ShardError(f"shard {name}: {text}")
    spans = indexed.spans
    listed = zip(spans.keys, spans.byte_offset.tolist(), spans.n_bytes.tolist(), strict=True)
    with open_shard(path) as buffer:
        found = ((span.key, span.byte_offset, span.n_bytes) for span in iter_spans(buffer, shard=name))
        for i, (was, is_now) in enumerate(zip_longest(listed, found)):
            if was != is_now:
                text = (
                    f"sample {i} is {_described(is_now)}, {_described(was)} when it was indexed: it changed since; "
                    "index it again"
                )
                raise ShardError(f"shard {name}: {text}")


def _described(span: tuple[str, int, int] | None) -> str:
    return "nothing" if span is None else f"{shorten(span[0])} at byte {span[1]} ({span[2]} bytes)"
