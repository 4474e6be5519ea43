"""Which JPEGs are so plain that Pillow's decoder may have their bytes at once?

For a small picture, `Image.open` and `load` take as long in Python as the decoder takes in C: they copy each segment,
unpack the quantization tables, and build an object that can do much more. Most JPEGs in shards need none of this.
"""

from __future__ import annotations

from PIL import Image, ImageFile

_SOF, _SOS, _APP0, _DQT = frozenset({0xC0, 0xC2}), 0xDA, 0xE0, 0xDB  # baseline or progressive frame
_MEANINGLESS = frozenset(
    {0xC4, 0xDD, 0xFE}
)  # to Pillow: DHT, DRI and COM are left to the decoder, or to nobody
_END = b"\xff\xd9"


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
    at, last, size = 2, len(data) - 4, None
    while at < last:
        if data[at] != 0xFF:
            return None
        marker, stop = data[at + 1], at + 2 + (data[at + 2] << 8 | data[at + 3])
        if marker == _DQT:
            if (stop - at - 4) % 65 or max(data[at + 4 : stop : 65], default=16) > 3:
                return None  # not whole tables of bytes
        elif marker in _SOF:
            if stop - at != 19 or size is not None or data[at + 4] != 8 or data[at + 9] != 3:
                return None
            size = data[at + 7] << 8 | data[at + 8], data[at + 5] << 8 | data[at + 6]
        elif marker == _SOS:
            return size if size is not None and 0 not in size and at + 4 <= stop < len(data) else None
        elif marker == _APP0:
            if stop - at != 18:  # JFIF's own, with no thumbnail
                return None
        elif marker not in _MEANINGLESS:
            return None
        at = stop
    return None


def decode_plain_jpeg(data: bytes, size: tuple[int, int]) -> Image.Image | None:
    """The RGB image of a JPEG that `plain_jpeg_size` knows; None when the decoder is not content with it.

    Then, and where the program has set `LOAD_TRUNCATED_IMAGES`, the long way decodes it or says what is wrong.
    """
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        return None
    try:
        return Image.frombytes("RGB", size, data, "jpeg", "RGB", "")
    except (ValueError, OSError):
        return None
