"""Finds JPEGs so plain that Pillow's decoder can have their bytes at once, and decodes them.

For a small picture, `Image.open` and `load` take as long in Python as the decoder takes in C: they copy each segment,
unpack the quantization tables, and build an object that can do much more. Most JPEGs in shards need none of this.
"""

from __future__ import annotations

from PIL import Image, ImageFile

_SOF, _SOS, _APP0, _DQT = frozenset({0xC0, 0xC2}), 0xDA, 0xE0, 0xDB  # baseline or progressive frame
_MEANINGLESS = frozenset({0xC4, 0xDD, 0xFE})  # to Pillow: DHT, DRI and COM
_END = b"\xff\xd9"
_ONE_SCAN = frozenset({0xC0, 0xC1})  # baseline, extended sequential: no other scan must follow
_PADDING = b"\xff\x00" * 8  # 64 bits of ones: as many as the decoder looks ahead, and no Huffman code


def plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) of a JPEG that the decoder alone reads as Pillow would; None for every other file.

    It has three components of 8 bits, and before its first scan nothing but one frame header, tables, a JFIF header
    and comments: so no EXIF that could turn it, no colour profile, no Adobe marker and no second picture. Each segment
    ends inside the file and passes the checks of Pillow's parser; the file ends where the image does.

    >>> plain_jpeg_size(b"\\xff\\xd8\\xff\\xe1\\0\\x08Exif\\0\\0 ...") is None
    True
    """
    if not data.endswith(_END) or not data.startswith(b"\xff\xd8"):
        return None
    offset, last, size = 2, len(data) - 4, None
    while offset < last:
        if data[offset] != 0xFF:
            return None
        marker, stop = data[offset + 1], offset + 2 + (data[offset + 2] << 8 | data[offset + 3])
        if marker == _DQT:
            if (stop - offset - 4) % 65 or max(data[offset + 4 : stop : 65], default=16) > 3:
                return None  # not whole tables of bytes
        elif marker in _SOF:
            if stop - offset != 19 or size is not None or data[offset + 4] != 8 or data[offset + 9] != 3:
                return None
            size = data[offset + 7] << 8 | data[offset + 8], data[offset + 5] << 8 | data[offset + 6]
        elif marker == _SOS:
            return size if size is not None and 0 not in size and offset + 4 <= stop < len(data) else None
        elif marker == _APP0:
            if stop - offset != 18:  # JFIF's own, with no thumbnail
                return None
        elif marker not in _MEANINGLESS:
            return None
        offset = stop
    return None


def decode_plain_jpeg(data: bytes, size: tuple[int, int]) -> Image.Image | None:
    """The RGB image of a JPEG that `plain_jpeg_size` knows; None when the decoder is not content with it.

    Then, and where the program has set `LOAD_TRUNCATED_IMAGES`, the long way decodes it or says what is wrong.
    """
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        return None
    try:
        return Image.frombytes("RGB", size, without_end(data), "jpeg", "RGB", "")
    except (ValueError, OSError):
        return None


def without_end(data: bytes) -> bytes:
    """The same JPEG with padding in place of its end marker, so that its decoder finds a scan that ends early.

    libjpeg fills up with grey what a scan lacks before a marker, and counts a warning that Pillow does not tell.
    Without the marker it asks for more bytes, which Pillow reports as truncated. A whole scan gives the same pixels.
    What lies behind the first picture goes. A JPEG of several scans (progressive ones are) comes back unchanged: its
    decoder gives no pixel before it has seen the end marker.

    A part of the last two blocks of 8 × 8 may still be missing: the padding is enough for them.
    """
    offset, frame = 2, 0
    while data[offset : offset + 1] == b"\xff" and offset + 4 <= len(data):
        marker = data[offset + 1]
        if marker == 0xFF:  # a byte of filling
            offset += 1
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # DHT, JPG, DAC
            frame = marker
        offset += 2 + (data[offset + 2] << 8 | data[offset + 3])
        if marker == _SOS:
            end = data.find(_END, offset)  # inside a scan, 0xff is always followed by 0
            if frame not in _ONE_SCAN or end < 0 or data.find(b"\xff\xda", offset, end) >= 0:
                return data
            return data[:end] + _PADDING
    return data
