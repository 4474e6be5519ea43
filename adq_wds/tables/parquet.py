"""Stores checked tables as Parquet: one row group per shard, and a header with a hash of every column.

The header is a JSON text under the key ``adq_wds`` of the file's metadata, its SHA-256 under
``adq_wds.sha256``. It names the format, the version, and for every row group the shard, the number of rows and
one SHA-256 per column, over values and not over file bytes, so that the header's hash does not depend on the version
of pyarrow. A row group is compared with the header when it is read.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from adq_wds.errors import AdqError, shorten
from adq_wds.files import canonical_json, sha256_text
from adq_wds.remote.outputs import atomic_path
from adq_wds.remote.store import RequestError
from adq_wds.remote.url_path import UrlPath, as_path
from adq_wds.tables import bounds
from adq_wds.tables.headers import TableHeader, parse_header

HEADER_KEY = b"adq_wds"
HASH_KEY = b"adq_wds.sha256"
_NAMES_AT_ONCE = 1024

Header = dict[str, Any]
ErrorClass = Callable[[str], AdqError]


def column_hash(column: pa.ChunkedArray | pa.Array) -> str:
    """SHA-256 over a column's values, whatever its chunks and encoding.

    Numbers are hashed as little-endian bytes, booleans as one byte each, strings as their int64 lengths and then
    their UTF-8 bytes, fixed-size lists as their flat values, fixed-size binary values end to end; nulls are refused.
    """
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if array.null_count:
        raise ValueError(f"{array.null_count} empty values in a column of {array.type}")
    digest = hashlib.sha256(f"{array.type}\n{len(array)}\n".encode())
    if pa.types.is_string(array.type):
        text = array.cast(pa.large_string())
        ends = np.frombuffer(text.buffers()[1], dtype="<i8")[text.offset : text.offset + len(text) + 1]
        digest.update(np.diff(ends).astype("<i8").tobytes())
        if len(text) and text.buffers()[2] is not None:
            digest.update(memoryview(text.buffers()[2])[int(ends[0]) : int(ends[-1])])
        return digest.hexdigest()
    if pa.types.is_fixed_size_binary(array.type):
        width = array.type.byte_width
        digest.update(memoryview(array.buffers()[1])[array.offset * width :][: len(array) * width])
        return digest.hexdigest()
    if pa.types.is_fixed_size_list(array.type):
        array = array.flatten()
    values = array.to_numpy(zero_copy_only=False)
    if values.dtype == np.bool_:
        values = values.astype(np.uint8)
    digest.update(np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<")).view(np.uint8).data)
    return digest.hexdigest()


def column_hashes(table: pa.Table) -> dict[str, str]:
    """`column_hash` of every column of a table, by name."""
    return {name: column_hash(table.column(name)) for name in table.column_names}


def write_groups(
    path: str | os.PathLike[str],
    schema: pa.Schema,
    groups: Iterable[pa.Table],
    header: Header | Callable[[], Header],
    *,
    compression: str = "zstd",
) -> str:
    """Write tables of one schema as the row groups of one file, whole or not at all.

    Tables that cannot be written, or are too large to be read back, raise `AdqError`, and the old file stays intact.

    Args:
        path: the file.
        schema: of every table.
        groups: the tables; one at a time is in memory.
        header: the header, or a function that gives it after the last table.
        compression: of Parquet's pages.

    Returns:
        the file's hash.
    """
    try:
        with atomic_path(path) as partial:
            return write_file(partial, schema, groups, header, compression=compression)
    except bounds.TooLargeError as cause:
        raise too_large(path, cause) from None


def too_large(path: str | os.PathLike[str], cause: Exception) -> AdqError:
    """The error of a table that could not be read back."""
    return AdqError(f"cannot write {path}: {cause}; use fewer, larger shards and short keys")


def write_file(
    path: Path,
    schema: pa.Schema,
    groups: Iterable[pa.Table],
    header: Header | Callable[[], Header],
    *,
    compression: str,
) -> str:
    """`write_groups` without care for what was at `path`, or what is left there after an error.

    Raises:
        TooLargeError: it could not be read back.
    """
    options = {"compression": compression, "use_dictionary": False, "write_statistics": False}
    text = "" if callable(header) else _checked_text(header)
    rows = []
    with pq.ParquetWriter(path, schema, **options) as writer:
        for group in groups:
            for column in group.schema:
                if pa.types.is_string(column.type):
                    bounds.check_names(column.name, group[column.name].nbytes, group.num_rows)
            writer.write_table(group, row_group_size=max(1, group.num_rows))
            rows.append(group.num_rows)
        if callable(header):
            text = _checked_text(header())
        raw, digest = text.encode("utf-8"), sha256_text(text)
        writer.add_key_value_metadata({HEADER_KEY: raw, HASH_KEY: digest.encode("ascii")})
    bounds.check_rows(rows, bounds.check_footer(path))
    return digest


def _checked_text(header: Header) -> str:
    """A header's JSON text, not too large to be read back."""
    text = canonical_json(header)
    bounds.check_header(text.encode("utf-8"), len(header["shards"]))
    return text


class GroupFile:
    """A file of `write_groups`: reads its header at once, its row groups on demand.

    Reads by position (no shared file offset), so it may be used from threads and forked workers.

    Args:
        path: the file, or its URL, which is read by ranges.
        kind, version: its format, and the newest version that is known.
        error: the class of all its errors.
        header: the type that its header must be of; see `checked`.
        lists_parts: the type that the header of kind `KIND.parts` must be of, where such a file is taken too.
        keeps_open: else a local file is opened for each read, so that thousands take no descriptors and little memory.

    Attributes:
        header: the header, already compared with its hash.
        hash: the header's SHA-256.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        kind: str,
        version: int,
        error: ErrorClass,
        header: type[Mapping[str, Any]] = TableHeader,
        lists_parts: type[Mapping[str, Any]] | None = None,
        keeps_open: bool = True,
    ) -> None:
        self.path = as_path(path)
        self._error = error
        try:
            file = self._open()
            self._file = file if keeps_open or isinstance(self.path, UrlPath) else None
            self._schema, metadata = file.schema_arrow.remove_metadata(), file.metadata.metadata or {}
            rows = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
            bounds.check_rows(rows, self._size)
        except FileNotFoundError:
            raise error(f"{self.path}: no such file") from None
        except (pa.ArrowException, OSError, ValueError, KeyError, RuntimeError, MemoryError) as cause:
            raise error(f"{self.path}: not a readable Parquet file ({shorten(str(cause))})") from cause
        raw, digest = metadata.get(HEADER_KEY), metadata.get(HASH_KEY)
        if raw is None or digest is None:
            raise error(f"{self.path}: not made by adq_wds (no header); expected a file of {kind}")
        if (
            lists_parts and f'"format":"adq_wds.{kind}.parts"'.encode() in raw
        ):  # no text within has such quotes
            kind, version, header = f"{kind}.parts", 1, lists_parts
        self.hash = digest.decode("ascii", "replace")
        try:
            bounds.check_header(raw, len(rows))
            parsed = parse_header(raw, self.hash, kind=kind, version=version, header=header)
        except bounds.TooLargeError as cause:
            raise error(f"{self.path}: damaged: {cause}") from cause
        except ValueError as cause:
            raise error(f"{self.path}: {cause}") from cause
        self.header: Header = dict(parsed)
        if [shard["n"] for shard in self.header["shards"]] != rows:
            raise error(f"{self.path}: damaged: its row groups are not those its header lists")

    def _open(self) -> pq.ParquetFile:
        source: Any = self.path  # which Arrow opens itself, to read by position
        if isinstance(self.path, UrlPath):
            source = self.path.open()
            self._size = bounds.check_open_footer(source)
        else:
            self._size = bounds.check_footer(self.path)
        return pq.ParquetFile(
            source,
            pre_buffer=False,
            thrift_string_size_limit=bounds.MAX_HEADER_BYTES,
            thrift_container_size_limit=bounds.MAX_GROUPS,
        )

    @property
    def names(self) -> list[str]:
        """Of the shards."""
        return [entry["name"] for entry in self.header["shards"]]

    def entry(self, i: int) -> Header:
        """What the header says of a shard."""
        entry: Header = self.header["shards"][i]
        return entry

    def counts(self, name: str) -> NDArray[np.int64]:
        """(S,) int64: a number of each shard's entry, such as `n`."""
        return np.array([entry[name] for entry in self.header["shards"]], dtype=np.int64)

    @contextmanager
    def reading_header(self) -> Iterator[None]:
        """Turn errors in this block into those of a damaged header."""
        try:
            yield
        except (AdqError, KeyError, TypeError, ValueError, OverflowError) as cause:
            raise self._error(f"{self.path}: damaged header: {shorten(str(cause), 200)}") from cause

    @property
    def columns(self) -> frozenset[str]:
        """Names of the file's columns."""
        return frozenset(self._schema.names)

    def group(
        self,
        i: int,
        schema: pa.Schema,
        columns: Collection[str] | None = None,
        *,
        optional: Collection[str] = (),
    ) -> pa.Table:
        """Row group `i`, or some of its columns, checked against the header.

        Args:
            i: which row group.
            schema: the columns of the format, in the order of the table that is returned. Columns of the file that
                it does not name are ignored, so that a later version may add some.
            columns: names of those to read; all by default.
            optional: names that the file may lack; the table then lacks them too.

        Raises:
            the error class given: a column is missing or of another type, or a value changed.
        """
        entry = self.header["shards"][i]
        place = f"{self.path}, shard {shorten(entry['name'])}"
        try:
            present = self._present(schema, optional)
            wanted = pa.schema([f for f in present if columns is None or f.name in columns])
            table = self._read_group(i, entry["n"], wanted)
            hashes = column_hashes(table)
        except (pa.ArrowException, OSError, ValueError, KeyError, RuntimeError, MemoryError) as cause:
            if isinstance(cause, RequestError):
                raise self._error(f"{place}: cannot be read: {shorten(str(cause), 300)}") from cause
            raise self._error(f"{place}: damaged: {shorten(str(cause), 200)}; make it again") from cause
        for name, digest in hashes.items():
            if entry["columns"].get(name) != digest:
                raise self._error(f"{place}: damaged: column {name!r} does not match its hash; make it again")
        return table

    def _present(self, schema: pa.Schema, optional: Collection[str]) -> pa.Schema:
        """The format's columns that the file has, checked to be unique and of the format's type."""
        names = self._schema.names
        # pyarrow reads "key.x" along with "key", as if it were a part of it
        if len(set(names)) != len(names) or any("." in name for name in names):
            raise ValueError(f"columns named twice or with a dot: {names}")
        present = [field for field in schema if field.name in names or field.name not in optional]
        for field in present:
            if field.name not in names:
                raise ValueError(f"no column {field.name!r}, only {names}")
            in_file = self._schema.field(field.name)
            if not in_file.equals(field):
                kinds = (f"{f.type}{'' if f.nullable else ' not null'}" for f in (in_file, field))
                raise ValueError("column {}: {}, expected {}".format(field.name, *kinds))
        return pa.schema(present)

    def _read_group(self, i: int, n: int, wanted: pa.Schema) -> pa.Table:
        """Some columns of a row group of `n` rows."""
        file = self._file or self._open()
        for field in wanted:
            bounds.check_width(field, n, self._size)
        numbers = [field.name for field in wanted if not pa.types.is_string(field.type)]
        read = {field.name: _names(file, i, n, field.name) for field in wanted if field.name not in numbers}
        if numbers:
            table = file.read_row_group(i, columns=numbers, use_threads=False)
            read |= {name: table[name] for name in numbers}
        table = pa.Table.from_arrays([read[name] for name in wanted.names], schema=wanted)
        table.validate(full=True)
        if table.num_rows != n:
            raise ValueError(f"{table.num_rows} rows, its header lists {n}")
        return table


def list_type(number: pa.DataType, width: int) -> pa.DataType:
    """The Arrow type of a column of lists of `width` numbers, with the element's name that Parquet gives it."""
    return pa.list_(pa.field("element", number, nullable=False), width)


def embedding_type(width: int) -> pa.DataType:
    """The Arrow type of a column of embeddings."""
    return list_type(pa.float16(), width)


def list_array(rows: np.ndarray[Any, Any]) -> pa.FixedSizeListArray:
    """(n, D) numbers as an Arrow column of fixed-size lists."""
    flat = pa.array(np.ascontiguousarray(rows).ravel())
    return pa.FixedSizeListArray.from_arrays(flat, type=list_type(flat.type, rows.shape[1]))


def list_rows(column: pa.ChunkedArray, width: int) -> np.ndarray[Any, Any]:
    """The way back from `list_array`: (n, D) numbers."""
    flat = column.combine_chunks().flatten() if column.num_chunks != 1 else column.chunk(0).flatten()
    rows: np.ndarray[Any, Any] = flat.to_numpy(zero_copy_only=False).reshape(-1, width)
    return rows


def _names(file: pq.ParquetFile, i: int, n: int, name: str) -> pa.ChunkedArray:
    """A column of text, read some rows at a time, since a page of some bytes may unfold to any length of text."""
    chunks, n_bytes = [], 0
    for batch in file.iter_batches(_NAMES_AT_ONCE, row_groups=[i], columns=[name], use_threads=False):
        chunks.append(batch.column(0))
        n_bytes += chunks[-1].nbytes
        bounds.check_names(name, n_bytes, n)
    return pa.chunked_array(chunks, type=pa.string())
