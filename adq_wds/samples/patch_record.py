"""Writes mask and geometry of a patch-dropped image, and checks them when they are read.

The layout is stated in `patch_file`; this module reads and writes its bytes in a JPEG.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adq_wds.core.patches import Grid
from adq_wds.errors import SampleError, shorten
from adq_wds.samples.plain_jpeg import FRAMES, SCAN, Plain, frame_size, plain_jpeg, segments

IDENTIFIER = b"ADQP\0"
VERSION = 1
MAX_RECORD_BYTES = 65_533  # a JPEG segment's length has 16 bits and counts itself
_APP9 = 0xE9
_COLOURS = frozenset({0xE0, 0xEE})  # JFIF and Adobe
_HEAD = struct.Struct(">5sBHHHH")
MAX_SEGMENTS = 10_000  # before a JPEG's pixels: each costs a step in Python
_REMEDY = "write it again from the original image"


@dataclass(frozen=True, eq=False)
class Record:
    """The geometry and mask stored beside the pixels.

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
    """The record in all bytes of `data`.

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


def split_as_written(data: bytes) -> tuple[bytes, bytes, Plain] | None:
    """The record and the JPEG without it of an unchanged, plain JPEG of `put_into_jpeg`; None for every other."""
    if (data[2:6], data[20:22], data[24:29]) != (b"\xff\xe0\0\x10", b"\xff\xe9", IDENTIFIER):
        return None
    end = 22 + (data[22] << 8 | data[23])
    rest = data[:20] + data[end:]
    plain = plain_jpeg(rest)
    return None if plain is None else (data[24:end], rest, plain)


def split_jpeg(data: bytes) -> tuple[bytes, bytes, tuple[int, int]]:
    """The record in a JPEG; the JPEG without metadata that might turn or recolour its pixels; its width and height.

    Of the application segments only JFIF's and Adobe's stay, which define the colours. An EXIF orientation, added by
    some program, would turn the tiled image before it is cut.

    Raises:
        SampleError: no record, several, or a broken chain of segments before the first scan.
    """
    records: list[bytes] = []
    plain: list[bytes] = []
    size, end, copied = (0, 0), 2, 0
    for n_segments, (marker, start, end) in enumerate(segments(data)):
        if n_segments == MAX_SEGMENTS:
            raise SampleError(f"more than {MAX_SEGMENTS} segments before this JPEG's pixels; {_REMEDY}")
        if marker == SCAN:
            return _only(records), b"".join([*plain, data[copied:]]), size
        if marker in FRAMES and end >= start + 9:
            size = frame_size(data, start)
        elif marker >= 0xE0 and marker not in _COLOURS:
            plain.append(data[copied:start])
            copied = end
            if marker == _APP9 and data.startswith(IDENTIFIER, start + 4):
                records.append(data[start + 4 : end])
    raise SampleError(
        f"malformed JPEG: {shorten(data[end : end + 4])} at byte {end} of {len(data)} starts no segment before its pixels; "
        f"{_REMEDY}"
    )


def _only(records: list[bytes]) -> bytes:
    if not records:
        raise SampleError(
            "no patch mask: this JPEG has no APP9 segment 'ADQP', so what its patches show is unknown; a program that "
            f"strips metadata may have taken it out: {_REMEDY}, or read it as an ordinary image"
        )
    if len(records) > 1:
        raise SampleError(f"{len(records)} patch masks in one JPEG, expected one; {_REMEDY}")
    return records[0]
