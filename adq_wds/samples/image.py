"""Decodes the bytes of an image file into an upright RGB image.

Eight formats, recognised by their first bytes and handed to Pillow's own reader classes by name. `Image.open` would
also try plug-ins that a program has registered, and would warn about a decompression bomb instead of raising;
`warnings` and Pillow's limits are globals, so a thread cannot set them.
"""

from __future__ import annotations

import io
import logging
import re
import struct
from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from adq_wds.errors import SampleError, shorten
from adq_wds.samples.plain_jpeg import decode_plain_jpeg, plain_jpeg, without_end

logger = logging.getLogger("adq_wds")

MAX_PIXELS = 64 * 1024 * 1024
"""Pixels (width × height) above which an image is refused: 256 MiB once Pillow has decoded it."""

WHITE = (255, 255, 255)


class _Jpeg(JpegImagePlugin.JpegImageFile):
    """Pillow's JPEG reader without its parsing of EXIF, which would warn about damaged blocks for an unused DPI. A
    camera's file of several pictures (MPO) is its first picture."""

    def _read_dpi_from_exif(self) -> None:
        return


_READERS: dict[str, Callable[[io.BytesIO], ImageFile.ImageFile]] = {
    "JPEG": _Jpeg,
    "PNG": PngImagePlugin.PngImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
    "AVIF": AvifImagePlugin.AvifImageFile,
    "PPM": PpmImagePlugin.PpmImageFile,
}
_SIGNATURE = re.compile(
    rb"(?P<JPEG>\xff\xd8\xff)|(?P<PNG>\x89PNG\r\n\x1a\n)|(?P<WEBP>RIFF....WEBP)|(?P<GIF>GIF8[79]a)|(?P<BMP>BM)"
    rb"|(?P<TIFF>II[*+]\0|MM\0[*+])|(?P<AVIF>....ftyp(?:avif|avis|mif1|msf1))|(?P<PPM>P[1-6f]\s)",
    re.DOTALL,
)
IMAGE_FORMATS: tuple[str, ...] = tuple(_READERS)
"""The formats that are read. None of them runs a program or follows a link, as EPS, WMF and SVG can."""

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_image(
    data: bytes, *, max_pixels: int = MAX_PIXELS, background: tuple[int, int, int] = WHITE
) -> Image.Image:
    """The image in `data`: mode RGB, upright by its EXIF orientation, loaded, and free of `data`.

    Transparency shows `background`. Greys of 16 bits (also 32-bit integers in 0 ... 65535) become
    (x + 128) // 257; floats must lie in 0 ... 1 and become floor(255 x + 1/2). `info` keeps an RGB colour
    profile, so that writing the image again does not change its colours, and nothing else: no EXIF
    that would turn it twice. May be called from several threads at once.

    Args:
        data: one whole file in one of `IMAGE_FORMATS`.
        max_pixels: >= 1; an image whose header states more is an error before a pixel is decoded.
        background: red, green, blue, each 0 ... 255.

    Raises:
        SampleError: empty; none of the formats; truncated or damaged; too large; several frames; a value
            out of range. Whatever Pillow raised is its cause. Where the program has set
            `PIL.ImageFile.LOAD_TRUNCATED_IMAGES`, truncation is still detected, other damage may pass. Damage without
            a checksum is not detected: changed bytes (zeros too) inside the scan of a JPEG that still decode to as
            many blocks, and a missing end of a progressive JPEG before its end marker.
        ValueError: `max_pixels` or `background` out of range.

    >>> decode_image(b"P6 1 1 255 abc").getpixel((0, 0))
    (97, 98, 99)
    """
    if max_pixels < 1:
        raise ValueError(f"max_pixels={max_pixels} allows no image; expected at least 1")
    if background != WHITE and (len(background) != 3 or min(background) < 0 or max(background) > 255):
        raise ValueError(f"background={background!r} is no colour; expected three values from 0 to 255")
    plain = plain_jpeg(data)
    if plain is not None and plain.size[0] * plain.size[1] <= max_pixels:
        image = decode_plain_jpeg(data, plain)
        if image is not None:
            return image
    return _decode_any(data, max_pixels, background)


def _decode_any(data: bytes, max_pixels: int, background: tuple[int, int, int]) -> Image.Image:
    """`decode_image` by Pillow's reader of the format."""
    name = image_format(data)
    try:
        image = _open(name, data, max_pixels)
        image.load()
        rgb = _to_rgb(image, background)
        if "exif" in image.info:  # never in a TIFF, which Pillow turns itself while loading
            turn = _UPRIGHT.get(exif_orientation(image.info["exif"]))
            rgb = rgb if turn is None else rgb.transpose(turn)
    except SampleError:
        raise
    except Exception as error:  # hostile bytes raise almost anything: OSError, SyntaxError, struct.error ...
        reason = shorten(str(error), 200)
        raise SampleError(f"cannot decode this {name}: {type(error).__name__}: {reason}") from error
    profile = image.info.get("icc_profile")
    rgb.info = {"icc_profile": profile} if profile and profile[16:20] == b"RGB " else {}
    return rgb


def exif_orientation(exif: bytes) -> int:
    """The orientation, 1 ... 8, that an EXIF block states; 1 when it states none or is damaged.

    Pillow's own parser reads every tag, slower than decoding a small image, and warns of damage.

    >>> exif_orientation(b"MM\\0*\\0\\0\\0\\x08" + b"\\0\\1" + b"\\1\\x12\\0\\3\\0\\0\\0\\1\\0\\6\\0\\0")
    6
    """
    body = exif.removeprefix(b"Exif\0\0").removeprefix(b"Exif\0\0")
    order = "<" if body.startswith(b"II") else ">"
    try:
        magic, start = struct.unpack_from(order + "2xHI", body)
        (n_tags,) = struct.unpack_from(order + "H", body, start)
        if magic != 42 or body[:2] not in (b"II", b"MM"):
            raise struct.error(f"starts with {body[:4]!r}")
        for place in range(start + 2, start + 2 + 12 * n_tags, 12):
            tag, kind = struct.unpack_from(order + "HH", body, place)
            if tag == 0x0112:
                (value,) = struct.unpack_from(order + ("I" if kind == 4 else "H"), body, place + 8)
                return value if 1 <= value <= 8 else 1
    except struct.error as error:
        logger.debug("damaged EXIF read as upright: %s", error)
    return 1


def image_format(data: bytes) -> str:
    """One of `IMAGE_FORMATS`, by the first bytes of a file.

    Raises:
        SampleError: empty, or none of the formats.
    """
    match = _SIGNATURE.match(data)
    if match is None:
        if not data:
            raise SampleError("not an image (0 bytes); write the file again or drop the sample")
        raise SampleError(f"not an image (starts with {data[:16]!r}); read are {', '.join(IMAGE_FORMATS)}")
    assert match.lastgroup is not None
    return match.lastgroup


class _WholeFile(io.BytesIO):
    """A file that raises at its end, for programs that let Pillow fill missing pixels with grey."""

    def read(self, size: int | None = -1, /) -> bytes:
        got = super().read(size)
        if not got and size != 0:
            raise OSError("image file is truncated")
        return got


def _open(name: str, data: bytes, max_pixels: int) -> ImageFile.ImageFile:
    """The image with its header read and no pixel decoded; checked to be one frame of at most `max_pixels`."""
    if name == "WEBP":  # its reader makes room for the canvas at once
        _refuse_large(_webp_size(data), max_pixels)
    elif name == "JPEG":
        data = without_end(data)
    elif name == "AVIF":  # turned by its own boxes, never by EXIF; hidden, or damage to it would be an error
        head, mdat, pixels = data.partition(b"mdat")
        data = head.replace(b"Exif", b"exif") + mdat + pixels
    image = _READERS[name](_WholeFile(data) if ImageFile.LOAD_TRUNCATED_IMAGES else io.BytesIO(data))
    _refuse_large(image.size, max_pixels)
    if isinstance(image, TiffImagePlugin.TiffImageFile):  # room is made for a whole tile, whatever its size
        _refuse_large((image.tag_v2.get(322, 1), image.tag_v2.get(323, 1)), max_pixels)
    if getattr(image, "is_animated", False):  # a GIF looks for its second frame; n_frames would walk them all
        raise SampleError(f"this {name} has several frames; expected one still image, so write out one frame")
    if name == "PNG" and "transparency" in image.info:
        image.info["transparency"] = _png_key(image, depth=data[24])
    return image


def _refuse_large(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise SampleError(
            f"too large: {width} x {height} = {width * height} pixels, at most {max_pixels} are read; "
            "shrink it, or raise max_pixels if its source is trusted"
        )


def _webp_size(data: bytes) -> tuple[int, int]:
    """Width and height from a WebP's first chunk, (0, 0) where the reader would refuse it."""
    head = data[:30].ljust(30, b"\0")
    if head[12:16] == b"VP8X":
        return 1 + int.from_bytes(head[24:27], "little"), 1 + int.from_bytes(head[27:30], "little")
    if head[12:16] == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if head[12:16] == b"VP8 ":
        return struct.unpack_from("<H", head, 26)[0] & 0x3FFF, struct.unpack_from("<H", head, 28)[0] & 0x3FFF
    return 0, 0


def _png_key(image: ImageFile.ImageFile, *, depth: int) -> int | bytes | tuple[int, ...]:
    """The transparent colour in the scale of the decoded pixels; Pillow gives it in the file's scale."""
    key = cast("int | bytes | tuple[int, ...]", image.info["transparency"])
    top = (1 << depth) - 1
    if image.mode in ("1", "L") and isinstance(key, int):
        return (key & top) * 255 // top
    if image.mode == "RGB" and isinstance(key, tuple):
        return tuple(part >> 8 if depth == 16 else part & 0xFF for part in key)
    return key


def _to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _grey_to_rgb(image, background)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        canvas = Image.new("RGB", image.size, background)
        canvas.paste(layer, mask=layer)
        return canvas
    return image.convert("RGB")


def _grey_to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """RGB of a grey image whose values are wider than a byte (modes I;16, I;16B, I and F)."""
    values: NDArray[np.generic] = np.asarray(image)  # (H, W)
    low, high = values.min().item(), values.max().item()
    top = 1 if image.mode == "F" else 65535
    if not (low >= 0 and high <= top):  # NaN too: no comparison with it is true
        raise SampleError(f"grey values from {low} to {high} (mode {image.mode}), expected 0 to {top}")
    grey = Image.fromarray(_scale_rows(values)).convert("RGB")
    if "transparency" in image.info:
        opaque = Image.fromarray((values != image.info["transparency"]).astype(np.uint8) * np.uint8(255))
        canvas = Image.new("RGB", image.size, background)
        canvas.paste(grey, mask=opaque)
        return canvas
    return grey


def _scale_rows(values: NDArray[np.generic], block: int = 1 << 20) -> NDArray[np.uint8]:
    """(H, W) values as bytes, about `block` values at a time, so that the wide temporaries stay small."""
    scaled = np.empty(values.shape, np.uint8)
    step = max(1, block // values.shape[1])
    for top in range(0, len(values), step):
        rows = values[top : top + step]
        if rows.dtype.kind == "f":
            scaled[top : top + step] = np.floor(rows.astype(np.float64) * 255 + 0.5)
        else:
            scaled[top : top + step] = (rows.astype(np.uint32) + 128) // 257
    return scaled


def check_rgb(images: Sequence[Image.Image]) -> None:
    """Refuse images that are not RGB; decoding, not the encoder, converts grey, CMYK and alpha.

    Raises:
        ValueError: names the image's position in the batch and its mode.
    """
    for i, image in enumerate(images):
        if image.mode != "RGB":
            raise ValueError(f"image {i} of the batch has mode {image.mode!r}, not 'RGB'; convert it first")
