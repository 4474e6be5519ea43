"""Opens tables, whatever their form: one file, parts, or rows in memory."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from adq_wds.tables.headers import TableHeader
from adq_wds.tables.parquet import ErrorClass, GroupFile, Header
from adq_wds.tables.parts import Parts, PartsHeader, noted, table_hash


class InMemory:
    """A table that is not in a file: its whole header, and the rows of each shard."""

    def __init__(self, header: Header, tables: Sequence[pa.Table]) -> None:
        self.header, self._tables = header, tables
        self.names: list[str] = [entry["name"] for entry in header["shards"]]

    @classmethod
    def of(cls, header: Header, groups: Iterable[tuple[Header, pa.Table]]) -> InMemory:
        """Arguments as of `write_table`."""
        entries = list[Header]()
        tables = list(noted(groups, entries))
        return cls({**header, "shards": entries}, tables)

    @cached_property
    def hash(self) -> str:
        """Which it has as a file, too."""
        return table_hash(self.header)

    def counts(self, name: str) -> NDArray[np.int64]:
        """See `GroupFile.counts`."""
        return np.array([entry[name] for entry in self.header["shards"]], dtype=np.int64)

    @property
    def columns(self) -> frozenset[str]:
        """See `GroupFile.columns`."""
        return frozenset(self._tables[0].schema.names if self._tables else ())

    def group(
        self,
        i: int,
        schema: pa.Schema,
        columns: Collection[str] | None = None,
        *,
        optional: Collection[str] = (),
    ) -> pa.Table:
        """All columns of a shard."""
        return self._tables[i]


Table = GroupFile | Parts | InMemory


def open_table(
    path: str | os.PathLike[str],
    *,
    kind: str,
    version: int,
    error: ErrorClass,
    header: type[Mapping[str, Any]] = TableHeader,
) -> GroupFile | Parts:
    """Open a table that `write_table` wrote: one file, or the file that lists its parts; arguments as in `GroupFile`."""
    file = GroupFile(path, kind=kind, version=version, error=error, header=header, lists_parts=PartsHeader)
    if file.header["format"] == f"adq_wds.{kind}":
        return file
    return Parts(file, kind=kind, version=version, error=error, header=header)
