"""Where do samples lie in their shards? The columns every table of samples starts with, and the index file."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from adq_wds.errors import PlanError, ShardError
from adq_wds.shards import check_shard_name
from adq_wds.tables.parquet import GroupFile, column_hashes, write_groups
from adq_wds.tar import Ignored, iter_spans, open_shard, payload_crc32

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


def scan_spans(path: str | os.PathLike[str], *, shard: str) -> Spans:
    """Find every sample of a local shard by walking its headers; nothing is decoded.

    Raises:
        ShardError: damaged or truncated, a key twice, a member that is not a plain file.
    """
    ignored = Ignored()
    keys, numbers = [], []
    with open_shard(path) as buffer:
        for span in iter_spans(buffer, shard=shard, ignored=ignored):
            keys.append(span.key)
            numbers.append((span.byte_offset, span.n_bytes, payload_crc32(buffer, span)))
    if ignored.n_members:
        logger.info("shard %s: %s", shard, ignored)
    columns = np.array(numbers, dtype=np.int64).reshape(-1, 3)
    return Spans(
        np.arange(len(keys), dtype=np.int32),
        keys,
        columns[:, 0].copy(),
        columns[:, 1].copy(),
        columns[:, 2].astype(np.uint32),
    )


def save_index(path: str | os.PathLike[str], shards: Sequence[tuple[str, Spans]]) -> None:
    """Write where every sample of some shards lies: one Parquet file, a row group per shard."""
    schema = pa.schema(SPAN_FIELDS)
    groups = [pa.table(spans.columns(name), schema=schema) for name, spans in shards]
    entries = [
        {"name": name, "n": len(spans), "columns": column_hashes(group)}
        for (name, spans), group in zip(shards, groups, strict=True)
    ]
    header = {"format": "adq_wds.index", "version": VERSION, "shards": entries}
    write_groups(path, schema, groups, header)


def load_index(path: str | os.PathLike[str]) -> dict[str, Spans]:
    """Read an index back, by shard name.

    Raises:
        ShardError: the file is damaged or of another kind.
    """
    file = GroupFile(path, kind="index", version=VERSION, error=ShardError)
    schema = pa.schema(SPAN_FIELDS)
    found: dict[str, Spans] = {}
    for i, entry in enumerate(file.header["shards"]):
        try:
            name = check_shard_name(entry.get("name"))
        except PlanError as cause:
            raise ShardError(f"{file.path}: damaged header: {cause}") from cause
        if name in found:
            raise ShardError(f"{file.path}: damaged header: shard {name} is listed twice")
        found[name] = Spans.from_table(file.group(i, schema))
    return found
