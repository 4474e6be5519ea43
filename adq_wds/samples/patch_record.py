"""Writes mask and geometry of a patch-dropped image, and checks them when they are read.

The layout is stated in `patch_file`. Here are its bytes, and where they lie in a JPEG.
"""

from __future__ import annotations

import re
import struct
import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adq_wds.core.patches import Grid
from adq_wds.errors import SampleError, shorten
from adq_wds.samples.plain_jpeg import plain_jpeg_size

IDENTIFIER = b"ADQP\0"
VERSION = 1
MAX_RECORD_BYTES = 65_533  # a JPEG segment's length has 16 bits and counts itself
# Markers of a JPEG: scan header; frame headers, with the size; JFIF and Adobe; those that no length follows
_APP9, _SCAN = 0xE9, 0xDA
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_COLOURS = frozenset({0xE0, 0xEE})
_WITHOUT_LENGTH = frozenset({0x00, 0x01, *range(0xD0, 0xDA)})
_HEAD = struct.Struct(">5sBHHHH")
MAX_SEGMENTS = 10_000  # before a JPEG's pixels: each costs a step in Python
_FILL = re.compile(b"\xff*(?=\xff[^\xff])")
_REMEDY = "write it again from the original image"


@dataclass(frozen=True, eq=False)
class Record:
    """What is stored beside the pixels.

    Attributes:
        patch: P, side of a patch in pixels.
        grid: rows and columns of patches of the whole image.
        columns: patches in a row of the stored image.
        kept: (k,) int64, numbers of the kept patches, ascending.
    """

    patch: int
    grid: Grid
    columns: int
    kept: NDArray[np.int64]

    @property
    def stored_size(self) -> tuple[int, int]:
        """Width and height of the stored image, in pixels."""
        return self.columns * self.patch, -(-len(self.kept) // self.columns) * self.patch

    def to_bytes(self) -> bytes:
        """The record.

        Raises:
            ValueError: it would not fit into a segment, or one of its numbers into 16 bits.
        """
        if max(self.patch, *self.grid) > 0xFFFF:
            raise ValueError(
                f"{self.grid[0]} x {self.grid[1]} patches of {self.patch}: each at most 65535 can be stored"
            )
        mask = np.zeros(self.grid[0] * self.grid[1], np.bool_)
        mask[self.kept] = True
        head = _HEAD.pack(IDENTIFIER, VERSION, self.patch, *self.grid, self.columns)
        body = head + np.packbits(mask).tobytes()
        if len(body) + 4 > MAX_RECORD_BYTES:
            raise ValueError(
                f"the mask of {len(mask)} patches takes {len(body) + 4} bytes, a segment holds {MAX_RECORD_BYTES}; "
                "use a larger patch or smaller images"
            )
        return body + zlib.crc32(body).to_bytes(4, "big")


def parse_record(data: bytes) -> Record:
    """The record that `data` is, to its last byte.

    Raises:
        SampleError: truncated, another version, damaged, or it contradicts itself.
    """
    if len(data) > MAX_RECORD_BYTES:
        raise SampleError(
            f"damaged patch mask: {len(data)} bytes or more, at most {MAX_RECORD_BYTES} are written; {_REMEDY}"
        )
    if len(data) < _HEAD.size or not data.startswith(IDENTIFIER):
        raise SampleError(
            f"damaged patch mask: {shorten(data[:16])} is no record of {_HEAD.size + 5} bytes; {_REMEDY}"
        )
    _, version, patch, rows, columns, stored_columns = _HEAD.unpack_from(data)
    if version != VERSION:
        raise SampleError(
            f"patch mask of version {version}, this program reads version {VERSION}; update adq-wds"
        )
    n_patches = rows * columns
    end = _HEAD.size + -(-n_patches // 8)
    if len(data) != end + 4:
        raise SampleError(
            f"damaged patch mask: {len(data)} bytes, {end + 4} expected for {rows} x {columns} patches; {_REMEDY}"
        )
    stated, computed = int.from_bytes(data[end:], "big"), zlib.crc32(data[:end])
    if stated != computed:
        raise SampleError(f"damaged patch mask: crc32 {computed:08x}, it states {stated:08x}; {_REMEDY}")
    bits = np.unpackbits(np.frombuffer(data, np.uint8, end - _HEAD.size, _HEAD.size))
    kept = np.flatnonzero(bits)
    possible = patch >= 1 and len(kept) >= 1 and kept[-1] < n_patches and 1 <= stored_columns <= len(kept)
    if not possible:
        raise SampleError(
            f"impossible patch mask: {len(kept)} bits set of {n_patches} patches of {patch} pixels, "
            f"{stored_columns} in a stored row; {_REMEDY}"
        )
    return Record(patch, (rows, columns), stored_columns, kept)


def put_into_jpeg(data: bytes, record: bytes) -> bytes:
    """A JPEG with the record in an APP9 segment, behind the JFIF segment, which must be the first."""
    end = 4 + int.from_bytes(data[4:6], "big") if data[2:4] == b"\xff\xe0" else 2
    return data[:end] + b"\xff\xe9" + (len(record) + 2).to_bytes(2, "big") + record + data[end:]


def split_as_written(data: bytes) -> tuple[bytes, bytes, tuple[int, int]] | None:
    """As `split_jpeg`, of a JPEG as `put_into_jpeg` makes it, and plain besides: one walk for both. None of every other."""
    if (data[2:6], data[20:22], data[24:29]) != (b"\xff\xe0\0\x10", b"\xff\xe9", IDENTIFIER):
        return None
    end = 22 + (data[22] << 8 | data[23])
    plain = data[:20] + data[end:]
    size = plain_jpeg_size(plain)
    return None if size is None else (data[24:end], plain, size)


def split_jpeg(data: bytes) -> tuple[bytes, bytes, tuple[int, int]]:
    """The record in a JPEG; the JPEG without all that might turn or colour its pixels; its width and height.

    Of the application's segments only JFIF and Adobe's are left, which say how colours are stored: an EXIF
    orientation, put in by some program, would turn the tiled image before it is cut.

    Raises:
        SampleError: no record, several, or a broken chain of segments before the first scan.
    """
    records: list[bytes] = []
    plain: list[bytes] = []
    size, start, copied, last = (0, 0), 2, 0, len(data) - 4
    for _ in range(MAX_SEGMENTS):
        if data[start : start + 2] == b"\xff\xff" and (fill := _FILL.match(data, start)):
            start = fill.end()
        marker, end = _segment(data, start) if start <= last else (0, 0)
        if not start + 4 <= end <= len(data):
            head = data[start : start + 4]
            raise SampleError(
                f"malformed JPEG: {shorten(head)} at byte {start} of {len(data)} starts no segment before its pixels; {_REMEDY}"
            )
        if marker == _SCAN:
            return _only(records), b"".join([*plain, data[copied:]]), size
        if marker in _FRAMES and end >= start + 9:
            size = data[start + 7] << 8 | data[start + 8], data[start + 5] << 8 | data[start + 6]
        elif marker >= 0xE0 and marker not in _COLOURS:
            plain.append(data[copied:start])
            copied = end
            if marker == _APP9 and data.startswith(IDENTIFIER, start + 4):
                records.append(data[start + 4 : end])
        start = end
    raise SampleError(f"more than {MAX_SEGMENTS} segments before this JPEG's pixels; {_REMEDY}")


def _segment(data: bytes, start: int) -> tuple[int, int]:
    """Marker and end of the segment that starts there; an end of 0 where none does."""
    marker = data[start + 1]
    if data[start] != 0xFF or marker in _WITHOUT_LENGTH:
        return marker, 0
    return marker, start + 2 + (data[start + 2] << 8 | data[start + 3])


def _only(records: list[bytes]) -> bytes:
    if not records:
        raise SampleError(
            "no patch mask: this JPEG has no APP9 segment 'ADQP', so what its patches show is unknown; a program that "
            f"strips metadata may have taken it out: {_REMEDY}, or read it as an ordinary image"
        )
    if len(records) > 1:
        raise SampleError(f"{len(records)} patch masks in one JPEG, expected one; {_REMEDY}")
    return records[0]
