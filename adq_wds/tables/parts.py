"""Reads tables in parts: a folder of files of 250 shards each, beside a file that lists them.

The listing file has the names and counts of all shards as columns and the hash of each part, so that opening reads
nothing else; a part is opened when one of its shards is first needed.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from adq_wds.errors import shorten
from adq_wds.files import canonical_json, sha256_text
from adq_wds.remote.url_path import AnyPath
from adq_wds.shards.names import MAX_SHARDS
from adq_wds.tables.bounds import MAX_ROWS
from adq_wds.tables.headers import TableHeader, check_entries, checked
from adq_wds.tables.parquet import ErrorClass, GroupFile, Header, column_hashes

ONE_FILE = 10_000
"""Shards of a table that is one file; one of more is in parts."""
PART_SHARDS = 250
"""Shards of a part; the last one has the rest."""
_OPEN_PARTS = 16
_LIST = pa.schema(
    [
        pa.field("name", pa.string(), nullable=False),
        pa.field("n", pa.int64(), nullable=False),
        pa.field("kept", pa.int64(), nullable=False),
    ]
)
_PART_FORMAT = "adq_wds.part"


class PartsHeader(TableHeader):
    """The header of a file that lists parts: the table's own header, the hash of each part, and its columns."""

    header: dict[str, Any]
    parts: list[str]
    columns: list[str]


def table_hash(header: Header) -> str:
    """The hash of a table that has its whole header, of all shards, in memory."""
    entries: Sequence[Header] = header["shards"]
    if len(entries) <= ONE_FILE:
        return sha256_text(canonical_json(header))
    parts = [entries[i : i + PART_SHARDS] for i in range(0, len(entries), PART_SHARDS)]
    hashes = [sha256_text(canonical_json(part_header(part))) for part in parts]
    rest = {name: value for name, value in header.items() if name != "shards"}
    return sha256_text(canonical_json(listing_header(rest, hashes, listed(entries), entries[0]["columns"])))


def noted(groups: Iterable[tuple[Header, pa.Table]], entries: list[Header]) -> Iterator[pa.Table]:
    """The tables of shards; the entry of each in the header is added to `entries` as it passes, with rows and hashes."""
    for entry, table in groups:
        entries.append({**entry, "n": table.num_rows, "columns": column_hashes(table)})
        yield table


def part_header(entries: Sequence[Header]) -> Header:
    """The header of a part."""
    return {"format": _PART_FORMAT, "version": 1, "shards": entries}


def listing_header(header: Header, hashes: list[str], shards: pa.Table, columns: Iterable[str]) -> Header:
    """The header of the file that lists parts; `header` is the table's own."""
    return {
        "format": f"{header['format']}.parts",
        "version": 1,
        "header": header,
        "parts": hashes,
        "columns": sorted(columns),
        "shards": [{"name": "shards", "n": shards.num_rows, "columns": column_hashes(shards)}],
    }


def listed(entries: Sequence[Header]) -> pa.Table:
    """The columns that the listing file has of some shards."""
    fields = [field for field in _LIST if field.name in entries[0]]
    return pa.table([[entry[f.name] for entry in entries] for f in fields], schema=pa.schema(fields))


def count_parts(n_shards: int) -> int:
    """Parts of so many shards."""
    return -(-n_shards // PART_SHARDS)


def part_name(i: int) -> str:
    """The file of part `i`."""
    return f"part-{i:05d}.parquet"


def parts_folder(path: AnyPath, digest: str) -> AnyPath:
    """Where the parts of a table at `path` with this hash are; for a link, beside the file that it leads to."""
    if isinstance(path, Path) and path.is_symlink():
        path = Path(os.path.realpath(path))
    return path.parent / f"{stem_of(path)}-{digest[:16]}"


def stem_of(path: AnyPath) -> str:
    """A file's name without its ending."""
    return path.with_suffix("").name


class Parts:
    """A table in parts, opened: the counterpart of `GroupFile`, whose methods it has.

    Args:
        file: the file that lists the parts.
        kind, version, error, header: as in `GroupFile`, of the table.

    Attributes:
        path, hash: of the listing file.
        header: of the table, without `shards`.
        names: S names of shards.
        columns: names of the parts' columns.
    """

    def __init__(
        self, file: GroupFile, *, kind: str, version: int, error: ErrorClass, header: type[Mapping[str, Any]]
    ) -> None:
        self.path, self.hash, self._error, self._kind = file.path, file.hash, error, kind
        self.reading_header = file.reading_header
        whole = {**file.header["header"], "shards": []}
        try:
            known = check_entries(whole, kind=kind, version=version, header=header)
        except ValueError as cause:
            raise error(f"{self.path}: {cause}") from cause
        with file.reading_header():
            self.header: Header = {name: value for name, value in known.items() if name != "shards"}
            self._entries = get_type_hints(header, include_extras=True)["shards"]
            (entry,) = file.header["shards"]
            self._hashes, self.columns = file.header["parts"], frozenset(file.header["columns"])
            if entry["n"] > MAX_SHARDS or len(self._hashes) != count_parts(entry["n"]):
                raise ValueError(
                    f"{entry['n']:,} shards in {len(self._hashes):,} parts, at most {MAX_SHARDS:,} shards"
                )
        table = file.group(0, _LIST, optional=["kept"])
        self.names: list[str] = table["name"].to_pylist()
        self._counts: dict[str, NDArray[Any]] = {
            name: table[name].to_numpy() for name in table.column_names if name != "name"
        }
        if any(((column < 0) | (column > MAX_ROWS)).any() for column in self._counts.values()):
            raise error(f"{self.path}: damaged: a shard of less than no samples, or over {MAX_ROWS:,}")
        self._part = lru_cache(_OPEN_PARTS)(self._open)

    def counts(self, name: str) -> NDArray[np.int64]:
        """See `GroupFile.counts`."""
        if name not in self._counts:
            raise ValueError(f"its list of shards has no column {name!r}")
        counts: NDArray[np.int64] = self._counts[name]
        return counts

    def entry(self, i: int) -> Header:
        """See `GroupFile.entry`."""
        return self._part(i // PART_SHARDS).entry(i % PART_SHARDS)

    def group(
        self,
        i: int,
        schema: pa.Schema,
        columns: Collection[str] | None = None,
        *,
        optional: Collection[str] = (),
    ) -> pa.Table:
        """See `GroupFile.group`."""
        return self._part(i // PART_SHARDS).group(i % PART_SHARDS, schema, columns, optional=optional)

    def _open(self, i: int) -> GroupFile:
        """Part `i`, checked against the listing file."""
        path = parts_folder(self.path, self.hash) / part_name(i)
        if not path.exists():
            raise self._error(
                f"{self.path}: its part {path.parent.name}/{path.name} is missing; copy the folder of its parts with "
                "it, under this name"
            )
        file = GroupFile(path, kind="part", version=1, error=self._error)
        if file.hash != self._hashes[i]:
            raise self._error(
                f"{path}: not the part that {self.path.name} lists, but of another {self._kind} or place; copy the folder "
                "again"
            )
        with file.reading_header():
            if file.columns != self.columns:
                raise ValueError(f"its columns are not those that {self.path.name} lists")
            entries: Any = checked(file.header["shards"], self._entries, "shards")
            rows = slice(i * PART_SHARDS, (i + 1) * PART_SHARDS)
            listed = {"name": self.names[rows]} | {k: v[rows].tolist() for k, v in self._counts.items()}
            for name, values in listed.items():
                if [entry.get(name) for entry in entries] != values:
                    raise ValueError(f"{shorten(name)} of its shards are not what {self.path.name} lists")
        return file
