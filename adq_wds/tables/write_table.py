"""Writes tables: of few shards as one file, of many in parts."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from adq_wds.errors import AdqError
from adq_wds.remote.outputs import atomic_path
from adq_wds.remote.url_path import AnyPath, as_path
from adq_wds.shards.names import MAX_SHARDS
from adq_wds.tables import bounds, parts
from adq_wds.tables.parquet import HASH_KEY, Header, too_large, write_file, write_groups


def write_table(
    path: str | os.PathLike[str],
    schema: pa.Schema,
    groups: Iterable[tuple[Header, pa.Table]],
    header: Header | Callable[[], Header],
    *,
    n_shards: int,
    compression: str = "zstd",
) -> str:
    """Write a table, whole or not at all: one file, or a file and a folder of parts beside it.

    Args:
        path: the file.
        schema: of every shard's rows.
        groups: for each shard its entry in the header, without rows and hashes, and its rows; one at a time is in
            memory.
        header: the header without shards, or a function that gives it after the last shard.
        n_shards: S.
        compression: of Parquet's pages.

    Returns:
        the table's hash.

    Raises:
        AdqError: it cannot be written, or could not be read back.
    """
    if n_shards > MAX_SHARDS:
        raise AdqError(f"cannot write {path}: {n_shards:,} shards, at most {MAX_SHARDS:,}; use larger shards")
    path, entries = as_path(path), list[Header]()
    replaced = _folder_of_table(path)
    if n_shards <= parts.ONE_FILE:

        def whole() -> Header:
            return {**(header() if callable(header) else header), "shards": entries}

        digest = write_groups(path, schema, parts.noted(groups, entries), whole, compression=compression)
    else:
        digest = _write_with_parts(path, schema, groups, header, n_shards, compression)
    if replaced is not None and replaced != parts.parts_folder(path, digest):
        _remove(replaced)
    return digest


def remove_table(path: AnyPath) -> None:
    """Remove a table, if there is one: the file, and the folder of its parts."""
    folder = _folder_of_table(path)
    path.unlink(missing_ok=True)
    if folder is not None:
        _remove(folder)


def _write_with_parts(
    path: AnyPath,
    schema: pa.Schema,
    groups: Iterable[tuple[Header, pa.Table]],
    header: Header | Callable[[], Header],
    n_shards: int,
    compression: str,
) -> str:
    """Write the parts into a hidden folder, give them their names, then write the file that lists them."""
    try:
        with atomic_path(path) as hidden:
            scratch = hidden.with_name(f"{hidden.name}.parts")  # nobody else's, as `hidden` is locked
            shutil.rmtree(scratch, ignore_errors=True)  # of a writer that was killed
            scratch.mkdir()
            try:
                hashes, shards = _write_parts(scratch, schema, groups, n_shards, compression)
                of_table = header() if callable(header) else header
                whole = parts.listing_header(of_table, hashes, shards, schema.names)
                digest = write_file(hidden, shards.schema, [shards], whole, compression="zstd")
                _move(scratch, parts.parts_folder(path, digest))
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    except bounds.TooLargeError as cause:
        raise too_large(path, cause) from None
    return digest


def _write_parts(
    folder: Path,
    schema: pa.Schema,
    groups: Iterable[tuple[Header, pa.Table]],
    n_shards: int,
    compression: str,
) -> tuple[list[str], pa.Table]:
    """Write the parts, flushed to the disk; the hash of each, and the list of all shards."""
    groups, hashes, shards = iter(groups), list[str](), list[pa.Table]()
    for i in range(parts.count_parts(n_shards)):
        entries = list[Header]()
        tables = parts.noted(islice(groups, parts.PART_SHARDS), entries)
        header = partial(parts.part_header, entries)  # called once the tables have filled them
        hashes.append(
            write_file(folder / parts.part_name(i), schema, tables, header, compression=compression)
        )
        shards.append(parts.listed(entries))
        with open(folder / parts.part_name(i), "rb") as handle:
            os.fsync(handle.fileno())
    return hashes, pa.concat_tables(shards)


def _move(folder: Path, to: AnyPath) -> None:
    """Give the parts in a folder their final names."""
    if isinstance(to, Path):
        to.mkdir(exist_ok=True)
    for part in sorted(folder.iterdir()):
        if isinstance(to, Path):
            part.replace(to / part.name)
        else:
            (to / part.name).put(part)


def _folder_of_table(path: AnyPath) -> AnyPath | None:
    """The folder of the parts of the table that is at `path` now; None where it has none."""
    try:
        with path.open("rb") as handle:
            bounds.check_open_footer(handle)
            metadata = pq.read_metadata(handle).metadata or {}
        digest = metadata.get(HASH_KEY, b"").decode("ascii")
    except (OSError, ValueError, pa.ArrowException):
        return None
    folder = parts.parts_folder(path, digest)
    return folder if re.fullmatch("[0-9a-f]{64}", digest) and folder.is_dir() else None


def _remove(folder: AnyPath) -> None:
    """Remove the parts in a folder, and the folder if nothing else is in it."""
    with suppress(OSError):
        for part in folder.glob("part-*.parquet"):
            part.unlink()
        if isinstance(folder, Path):
            folder.rmdir()
