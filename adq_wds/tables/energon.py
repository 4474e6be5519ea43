"""Reads the members of a shard from the index of Megatron-Energon, ``.nv-meta/.info.json`` and ``index.sqlite``."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any, TypedDict

from adq_wds.errors import shorten
from adq_wds.shards.tar_headers import BLOCK, Entry
from adq_wds.tables.headers import Natural31, checked, parse_json

FOLDER = ".nv-meta"
INFO, DATABASE = f"{FOLDER}/.info.json", f"{FOLDER}/index.sqlite"
_MAX_VALUE_BYTES = 1 << 13  # of a key, or of a table's definition
_TABLES = """SELECT count(*) FROM sqlite_master WHERE type = 'table' AND rootpage > 0 AND name = ?1
AND NOT EXISTS (SELECT * FROM pragma_table_xinfo(?1) WHERE hidden)"""  # computed columns may never end
_SAMPLES = """SELECT sample_index, sample_key, byte_offset, byte_size FROM samples
WHERE tar_file_id = ? ORDER BY sample_index LIMIT ?"""
_PARTS = """SELECT sample_index, part_name, content_byte_offset, content_byte_size FROM sample_parts
WHERE tar_file_id = ? ORDER BY sample_index, content_byte_offset LIMIT ?"""


class _Info(TypedDict):
    shard_counts: dict[str, Natural31]


def read_numbers(raw: bytes) -> dict[str, tuple[int, int]]:
    """The number of each shard in the database and its samples, by the shard's path below the data set's folder.

    Raises:
        ValueError: `raw` is no ``.info.json``.
    """
    counts = checked(parse_json(raw), _Info, "info")["shard_counts"]
    return {name: (number, n) for number, (name, n) in enumerate(counts.items())}


def read_members(database: Path, number: int, n_samples: int, n_bytes: int) -> tuple[list[Entry], int]:
    """The members of a shard's samples, in the order of the tar, and the end of the last member of the tar.

    The database is opened read-only and without any lock; of its statements only the two tables' are run.

    Args:
        database: ``index.sqlite`` of Energon 7 or later.
        number: of the shard.
        n_samples: in the shard, by ``.info.json``.
        n_bytes: size of the shard's file, which bounds what is read.

    Returns:
        entries; a sample's first one has the sample's offset as its `start`, the others the end of the one before.

    Raises:
        ValueError: no such database, or its rows are not of this form.
    """
    uri = f"{database.absolute().as_uri()}?mode=ro&immutable=1"
    try:
        with closing(sqlite3.connect(uri, uri=True)) as connection:
            connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _MAX_VALUE_BYTES)
            connection.execute("PRAGMA trusted_schema = OFF")
            for name in ("samples", "sample_parts"):
                if connection.execute(_TABLES, (name,)).fetchone() != (1,):
                    raise ValueError(
                        f"it has no table {name}: an older Energon's? energon prepare makes it anew"
                    )
            samples = _rows(connection.execute(_SAMPLES, (number, n_samples + 1)), database)
            parts = _rows(connection.execute(_PARTS, (number, n_bytes // BLOCK + 1)), database)
    except (sqlite3.Error, OverflowError) as error:
        raise ValueError(f"it is no database that can be read ({shorten(str(error))})") from None
    return _joined(samples, parts, n_samples)


def _rows(cursor: sqlite3.Cursor, database: Path) -> list[tuple[Any, ...]]:
    """All rows, whose text takes no more than the database does: rows of a damaged one may share their bytes."""
    rows: list[tuple[Any, ...]] = []
    left = database.stat().st_size
    for row in cursor:
        left -= len(row[1]) if isinstance(row[1], (str, bytes)) else 0
        if left < 0:
            raise ValueError("it has more text than bytes")
        rows.append(row)
    return rows


def _joined(
    samples: list[tuple[Any, ...]], parts: list[tuple[Any, ...]], n_samples: int
) -> tuple[list[Entry], int]:
    for rows in (samples, parts):
        for index, name, offset, size in rows:
            if not (type(index) is type(offset) is type(size) is int and type(name) is str):
                raise ValueError(f"it has a row {shorten((index, name, offset, size))}")
            if min(index, offset, size) < 0:
                raise ValueError(f"it has a negative number: {shorten((index, name, offset, size))}")
    if [row[0] for row in samples] != list(range(n_samples)):
        raise ValueError(f"it does not have the {n_samples:,} samples that {INFO} lists")
    entries, before, end = [], -1, 0
    for index, field, payload, size in parts:
        if index not in (before, before + 1) or index >= n_samples:
            raise ValueError(f"it has a sample without members, or members without a sample: {before + 1:,}")
        _, key, offset, _ = samples[index]
        entries.append(Entry(end if index == before else offset, f"{key}.{field}", payload, size))
        before, end = index, payload + size + -size % BLOCK
    if before != n_samples - 1:
        raise ValueError(f"it has a sample without members: {before + 1:,}")
    _, _, offset, size = samples[-1] if samples else (0, "", 0, 0)
    return entries, max(end, offset + size)
