"""Reads and writes the index: the spans of every sample of some shards."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import NotRequired, TypedDict

import numpy as np
import pyarrow as pa

from adq_wds.errors import PlanError, ShardError, shorten
from adq_wds.remote.backend import Stamp
from adq_wds.remote.open_shard import open_shard
from adq_wds.shards.names import check_shard_names
from adq_wds.shards.samples_in_tar import iter_spans
from adq_wds.tables.headers import Natural, ShardEntry, TableHeader
from adq_wds.tables.members import MEMBERS
from adq_wds.tables.parquet import Header
from adq_wds.tables.spans import SPAN_FIELDS, Spans, source_stamp
from adq_wds.tables.table import open_table
from adq_wds.tables.write_table import write_table

VERSION = 3
"""1: without `members`; 3: without `crc32`, and written only then."""
_SCHEMA = pa.schema([*SPAN_FIELDS, MEMBERS])
_CRC32 = "crc32"


class SourceStamp(TypedDict):
    """Size and date of a shard's file when it was scanned."""

    bytes: Natural
    mtime_ns: int


class IndexEntry(ShardEntry):
    """The header's entry for one shard."""

    source: NotRequired[SourceStamp]


class IndexHeader(TableHeader):
    """The header of an index."""

    shards: list[IndexEntry]  # type: ignore[misc]  # each says more


@dataclass(frozen=True)
class IndexedShard:
    """The content of an index for one shard.

    Attributes:
        spans: of its samples.
        source: size and date of its file when it was scanned; None in an index without it.
        checked: whether crc32 are known; else they are 0.
    """

    spans: Spans
    source: Stamp | None
    checked: bool = True


def save_index(
    path: str | os.PathLike[str],
    shards: Sequence[tuple[str, Spans]],
    *,
    sources: Mapping[str, Stamp] | None = None,
    checksums: bool = True,
) -> None:
    """Write the spans of every sample of some shards: one Parquet file, of more than 10,000 with a folder of parts.

    Args:
        path: the file.
        shards: name and spans of each.
        sources: the stamps of their files, by shard name, taken before they were scanned.
        checksums: whether the spans have crc32; else the file has no such column.
    """
    schema = _SCHEMA if checksums else _without_crc32()

    def groups() -> Iterator[tuple[Header, pa.Table]]:
        for name, spans in shards:
            columns = spans.columns(name, members=True)
            source = {} if sources is None else {"source": sources[name]}
            yield {"name": name, **source}, pa.table([columns[f.name] for f in schema], schema=schema)

    header = {"format": "adq_wds.index", "version": 2 if checksums else 3}
    write_table(path, schema, groups(), header, n_shards=len(shards))


def _without_crc32() -> pa.Schema:
    return pa.schema([field for field in _SCHEMA if field.name != _CRC32])


def read_index(path: str | os.PathLike[str]) -> dict[str, IndexedShard]:
    """The whole content of an index, by shard name.

    Raises:
        ShardError: the file is damaged or of another kind.
    """
    file = open_table(path, kind="index", version=VERSION, error=ShardError, header=IndexHeader)
    try:
        names = check_shard_names(file.names)
    except PlanError as cause:
        raise ShardError(f"{file.path}: damaged header: {cause}") from cause
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ShardError(f"{file.path}: damaged header: shard {twice[0]} is listed twice")
    optional = [_CRC32] if file.header["version"] >= 3 else []
    checked = _CRC32 in file.columns or not optional
    indexed: dict[str, IndexedShard] = {}
    for i, name in enumerate(names):
        table = file.group(i, _SCHEMA, optional=[MEMBERS.name, *optional])
        if not checked:
            zeros = pa.array(np.zeros(len(table), np.uint32))
            table = table.append_column(_SCHEMA.field(_CRC32), zeros)
        spans, source = Spans.from_table(table), file.entry(i).get("source")
        fault = spans.fault()
        if (spans.index != np.arange(len(spans))).any():
            fault = "positions are not 0, 1, 2, …"
        if table["shard"].unique().to_pylist() not in ([name], []):
            fault = "rows of another shard"
        if fault is not None:
            raise ShardError(f"{file.path}, shard {name}: damaged: {fault}; make it again")
        indexed[name] = IndexedShard(spans, source, checked)
    return indexed


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
        in_shard = ((span.key, span.byte_offset, span.n_bytes) for span in iter_spans(buffer, shard=name))
        for i, (was, is_now) in enumerate(zip_longest(listed, in_shard)):
            if was != is_now:
                text = (
                    f"sample {i} is {_described(is_now)}, {_described(was)} when it was indexed: it changed since; "
                    "index it again"
                )
                raise ShardError(f"shard {name}: {text}")


def _described(span: tuple[str, int, int] | None) -> str:
    return "nothing" if span is None else f"{shorten(span[0])} at byte {span[1]} ({span[2]} bytes)"
