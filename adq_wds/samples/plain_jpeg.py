"""Decodes plain JPEGs fast, by passing their bytes directly to Pillow's decoder.

For a small picture, `Image.open` and `load` take as long in Python as the decoder takes in C: they copy each segment,
unpack the quantization tables, and build an object that can do much more. Most JPEGs in shards need none of this.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from PIL import Image, ImageFile

SCAN = 0xDA
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""Markers of a JPEG: the header of a scan, and frame headers, which hold the size."""
_WITHOUT_LENGTH = frozenset({0x00, 0x01, *range(0xD0, 0xDA)})
_APP0, _DQT = 0xE0, 0xDB
_MEANINGLESS = frozenset({0xC4, 0xDD, 0xFE})  # to Pillow: DHT, DRI and COM
_PLAIN_FRAMES = frozenset({0xC0, 0xC2})  # baseline or progressive
_ONE_SCAN = frozenset({0xC0, 0xC1})  # baseline, extended sequential: no other scan must follow
_FILL = re.compile(b"\xff*(?=\xff[^\xff])")
_END = b"\xff\xd9"
_PADDING = b"\xff\x00" * 8  # 64 bits of ones: as many as the decoder looks ahead, and no Huffman code


def segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, start and end of each segment of a JPEG, the header of its first scan last; fewer in a broken file."""
    start, n_bytes = 2, len(data)
    while start + 4 <= n_bytes:
        marker = data[start + 1]
        if marker == 0xFF and (fill := _FILL.match(data, start)):
            start = fill.end()
            marker = data[start + 1]
        end = start + 2 + (data[start + 2] << 8 | data[start + 3])
        if data[start] != 0xFF or marker in _WITHOUT_LENGTH or not start + 4 <= end <= n_bytes:
            return
        yield marker, start, end
        if marker == SCAN:
            return
        start = end


def frame_size(data: bytes, start: int) -> tuple[int, int]:
    """(width, height) in the frame header at a byte."""
    return data[start + 7] << 8 | data[start + 8], data[start + 5] << 8 | data[start + 6]


class Plain(NamedTuple):
    """A JPEG that the decoder alone reads as Pillow would: width and height, the frame's marker, and where the scan is."""

    size: tuple[int, int]
    frame: int
    scan: int


def plain_jpeg(data: bytes) -> Plain | None:
    """A JPEG that the decoder alone reads as Pillow would; None for every other file.

    It has three components of 8 bits, and before its first scan nothing but one frame header, tables, a JFIF header
    and comments: so no EXIF that could turn it, no colour profile, no Adobe marker and no second picture. Each segment
    ends inside the file and passes the checks of Pillow's parser; the file ends where the image does.

    >>> plain_jpeg(b"\\xff\\xd8\\xff\\xe1\\0\\x08Exif\\0\\0 ...") is None
    True
    """
    if not data.endswith(_END) or not data.startswith(b"\xff\xd8"):
        return None
    size, frame = (0, 0), 0
    for marker, start, end in segments(data):
        if marker == _DQT:
            if (end - start - 4) % 65 or max(data[start + 4 : end : 65], default=16) > 3:
                return None  # not whole tables of bytes
        elif marker in _PLAIN_FRAMES:
            if end - start != 19 or frame or data[start + 4] != 8 or data[start + 9] != 3:
                return None
            size, frame = frame_size(data, start), marker
        elif marker == SCAN:
            return Plain(size, frame, end) if 0 not in size and end < len(data) else None
        elif marker not in _MEANINGLESS and (marker != _APP0 or end - start != 18):
            return None  # nor JFIF's header without a thumbnail
    return None


def decode_plain_jpeg(data: bytes, plain: Plain) -> Image.Image | None:
    """The RGB image of a JPEG that `plain_jpeg` accepts; None when the decoder reports a problem.

    Then, and where the program has set `LOAD_TRUNCATED_IMAGES`, the general reader decodes it or raises.
    """
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        return None
    try:
        return Image.frombytes("RGB", plain.size, _padded(data, plain.frame, plain.scan), "jpeg", "RGB", "")
    except (ValueError, OSError):
        return None


def without_end(data: bytes) -> bytes:
    """The same JPEG with padding in place of its end marker, so that its decoder detects a scan that ends early.

    Where a scan ends before a marker, libjpeg fills with grey and counts a warning that Pillow does not report.
    Without the marker it requests more bytes, which Pillow reports as truncated. A whole scan gives the same pixels.
    Bytes behind the first picture are cut. A JPEG of several scans (progressive ones are) comes back unchanged: its
    decoder gives no pixel before it has seen the end marker.

    A part of the last two blocks of 8 × 8 may still be missing: the padding is enough for them.
    """
    frame = 0
    for marker, _, end in segments(data):
        if marker in FRAMES:
            frame = marker
        elif marker == SCAN:
            return _padded(data, frame, end)
    return data


def _padded(data: bytes, frame: int, scan: int) -> bytes:
    end = data.find(_END, scan)  # inside a scan, 0xff is always followed by 0
    if frame not in _ONE_SCAN or end < 0 or data.find(b"\xff\xda", scan, end) >= 0:
        return data
    return data[:end] + _PADDING
