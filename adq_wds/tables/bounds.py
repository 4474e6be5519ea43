"""Bounds what a table's file may declare, by its size and our format, before anything is allocated for it.

A Parquet file of some kB can unfold to GB: by dictionaries, by compression, by rows or lists of nothing. Our files
have rows of some bytes each, uncompressed embeddings, and names no longer than those in a tar.
"""

from __future__ import annotations

import os
from typing import BinaryIO

import pyarrow as pa

MAX_HEADER_BYTES = 1 << 26
"""Bytes of the JSON header: plans of about 55,000 shards. Parquet readers give up somewhat above it."""
MAX_HEADER_WEIGHT = 1 << 28
"""Bytes that a header may take as Python values, by `header_weight`."""
MAX_FOOTER_BYTES = 1 << 28
"""Bytes of the Parquet footer: the header, and about 1,200 bytes for each row group of a plan."""
MAX_GROUPS = 1 << 18
"""Row groups, which are shards, of a file."""
MAX_ROWS = 100_000_000
"""Rows of a row group."""
MAX_NAME_BYTES = 4096
"""Mean bytes of a column's names, as `Limits.name_bytes` of a tar's members."""

_MAX_FOOTER_WEIGHT = 1 << 29  # Parquet's own numbers weigh something too, by chance
_FREE_ROWS = 1 << 20  # rows of a row group that any file may have; beyond them a row costs a byte at least
_FREE_TOTAL_ROWS = 1 << 24
_ROWS_PER_BYTE = 64  # of the whole file: bins of a set of which nearly all classes are left out
_FREE_TEXT_BYTES, _TEXT_BYTES_PER_ROW = 1 << 26, 64


class TooLargeError(ValueError):
    """A file declares more than a file of ours may hold."""


def check_footer(path: str | os.PathLike[str]) -> int:
    """`check_open_footer` of a local file."""
    with open(path, "rb") as handle:
        return check_open_footer(handle)


def check_open_footer(handle: BinaryIO) -> int:
    """The size of a Parquet file in bytes, whose footer is not larger than ours are.

    Parquet readers copy a footer several times before its header can be read, so its size is checked first.

    Raises:
        OSError: it cannot be read.
        TooLargeError: the footer is too large, larger than the file, or full of JSON values.
    """
    size = handle.seek(0, os.SEEK_END)
    handle.seek(max(0, size - 8))
    left = int.from_bytes(handle.read(8)[:4], "little")
    if left > min(size, MAX_FOOTER_BYTES):
        raise TooLargeError(f"a footer of {left:,} bytes in a file of {size:,}, at most {MAX_FOOTER_BYTES:,}")
    handle.seek(max(0, size - 8 - left))
    weight = 0
    while left > 0 and (part := handle.read(min(left, 1 << 20))):
        weight += header_weight(part)
        left -= len(part)
    if weight > _MAX_FOOTER_WEIGHT:
        raise TooLargeError(f"header of values of about {weight:,} bytes, at most {MAX_HEADER_WEIGHT:,}")
    return size


def header_weight(raw: bytes) -> int:
    """About the bytes that a JSON text takes as Python values, never far below.

    >>> header_weight(b'{"shards":[{},{}]}')
    928
    """
    return len(raw) + 240 * raw.count(b"{") + 90 * raw.count(b"[") + 100 * raw.count(b",")


def check_header(raw: bytes, n_groups: int) -> None:
    """Raise `TooLargeError` for a header that is larger, or lists more row groups, than can be read back."""
    if len(raw) > MAX_HEADER_BYTES:
        raise TooLargeError(f"header of {len(raw):,} bytes, at most {MAX_HEADER_BYTES:,}")
    weight = header_weight(raw)
    if weight > MAX_HEADER_WEIGHT:
        raise TooLargeError(f"header of values of about {weight:,} bytes, at most {MAX_HEADER_WEIGHT:,}")
    if n_groups > MAX_GROUPS:
        raise TooLargeError(f"{n_groups:,} shards in one file, at most {MAX_GROUPS:,}")


def check_rows(rows: list[int], size: int) -> None:
    """Raise `TooLargeError` for more rows, in a row group or in all, than our format fits into `size` bytes."""
    most = min(MAX_ROWS, _FREE_ROWS + size)
    if rows and max(rows) > most:
        raise TooLargeError(f"{max(rows):,} rows in one shard, at most {most:,} in a file of {size:,} bytes")
    most = _FREE_TOTAL_ROWS + _ROWS_PER_BYTE * size
    if sum(rows) > most:
        raise TooLargeError(f"{sum(rows):,} rows, at most {most:,} in a file of {size:,} bytes")


def check_names(name: str, n_bytes: int, rows: int) -> None:
    """Raise `TooLargeError` for more bytes of names, in a column of a row group, than so many rows may have."""
    most = _most_text(rows)
    if n_bytes > most:
        raise TooLargeError(f"column {name!r} has over {most:,} bytes of names in {rows:,} rows")


def check_width(field: pa.Field, rows: int, size: int) -> None:
    """Raise `TooLargeError` for lists or fixed-size bytes that a file of `size` bytes cannot hold uncompressed.

    Embeddings and digests do not compress, so a file of ours has about as many bytes as they do.
    """
    if pa.types.is_fixed_size_list(field.type):
        width, bits, what = field.type.list_size, field.type.value_type.bit_width, "numbers"
    elif pa.types.is_fixed_size_binary(field.type):
        width, bits, what = field.type.byte_width, 8, "bytes"
    else:
        return
    if rows * width * bits // 8 > size:
        raise TooLargeError(
            f"column {field.name!r} claims {rows:,} rows of {width:,} {what} in a file of {size:,} bytes"
        )


def _most_text(rows: int) -> int:
    """Most bytes of a column of names, each with its length of 4 bytes."""
    return 4 * (rows + 1) + min(MAX_NAME_BYTES * rows, _FREE_TEXT_BYTES + _TEXT_BYTES_PER_ROW * rows)
