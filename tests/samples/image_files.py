"""Image files for tests: a whole one of each format, damaged ones, those that are none, and small ones that claim much."""

import io
import struct
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, features

H, W = 96, 128
rng = np.random.default_rng(8)
COARSE = Image.fromarray(rng.integers(0, 256, (H // 4, W // 4, 3), dtype=np.uint8))
RGB = np.asarray(COARSE.resize((W, H), Image.Resampling.BICUBIC))


def encode(pixels: Image.Image | NDArray[Any], form: str, **options: Any) -> bytes:
    pixels = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = io.BytesIO()
    pixels.save(file, form, **options)
    return file.getvalue()


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def black_png(side: int) -> bytes:
    """An RGB PNG of side × side pixels; about a thousandth of their bytes."""
    pump = zlib.compressobj(1)
    rows = b"".join(pump.compress(bytes(side * 3 + 1)) for _ in range(side)) + pump.flush()
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


WHOLE = {  # one good file of each format
    "JPEG": encode(RGB, "JPEG", quality=90),
    "PNG": encode(RGB, "PNG"),
    "WEBP": encode(RGB, "WEBP", quality=90),
    "GIF": encode(RGB, "GIF"),
    "BMP": encode(RGB, "BMP"),
    "TIFF": encode(RGB, "TIFF", compression="tiff_lzw"),
    "PPM": encode(RGB, "PPM"),
}
if features.check("avif"):
    WHOLE["AVIF"] = encode(RGB, "AVIF", quality=90)

NOT_IMAGES = {
    "empty": (b"", r"not an image \(0 bytes\)"),
    "garbage": (bytes(range(1, 200)), r"not an image \(starts with b'\\x01"),
    "HTML page": (b"<html>404</html>", r"not an image \(starts with b'<html>404.*; read are JPEG, PNG"),
    "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', r"not an image \(starts with b'<svg"),
    "EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", r"not an image \(starts with b'%!PS-Adobe"),
    "WMF": (b"\xd7\xcd\xc6\x9a\0\0" + bytes(100), r"not an image \(starts with"),
    "half a JPEG": (
        WHOLE["JPEG"][: len(WHOLE["JPEG"]) // 2],
        "cannot decode this JPEG: OSError: .*truncated",
    ),
    "JPEG cut in its tables": (WHOLE["JPEG"][:300], "cannot decode this JPEG"),
    "truncated PNG": (WHOLE["PNG"][: len(WHOLE["PNG"]) // 2], "cannot decode this PNG: OSError: .*truncated"),
    "AVIF of nothing": (b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf" + bytes(64), "cannot decode this AVIF"),
    "PNG of no size": (black_png(0), "cannot decode this PNG"),
}


def tiff(width: int, height: int, compression: int = 1, tile: int = 0) -> bytes:
    """A grey TIFF with 100 bytes of pixels, whatever its header says."""
    tags = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, compression), (262, 3, 1, 1)]
    place = [(322, 4, 1, tile), (323, 4, 1, tile), (324, 4, 1, 8), (325, 4, 1, 100)]
    tags += place if tile else [(273, 4, 1, 8), (277, 3, 1, 1), (278, 4, 1, height), (279, 4, 1, 100)]
    body = zlib.compress(bytes(90_000)).ljust(100, b"\0")[:100]
    ifd = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    return b"II*\0" + struct.pack("<I", 108) + body + ifd


def bombs() -> dict[str, bytes]:
    lossless = bytearray(encode(RGB, "WEBP", lossless=True))
    lossless[21:25] = struct.pack("<I", 16382 | 16382 << 14)
    lossy = bytearray(WHOLE["WEBP"])
    lossy[26:30] = struct.pack("<HH", 10_000, 10_000)
    canvas = bytearray(encode(RGB, "WEBP", exif=b"Exif\0\0MM"))
    canvas[24:30] = b"\xff\x3f\0" * 2
    screen = b"GIF89a\1\0\1\0\x80\0\0\0\0\0\xff\xff\xff"
    frame = b",\0\0\0\0\1\0\1\0\0\x02\x02\x44\x01\0"
    jpeg_size = struct.pack(">HH", H, W)
    assert WHOLE["JPEG"].count(jpeg_size) == 1
    return {
        "WEBP lossless": bytes(lossless),
        "WEBP lossy": bytes(lossy),
        "WEBP canvas": bytes(canvas),
        "TIFF": tiff(20_000, 20_000),
        "TIFF deflated": tiff(20_000, 20_000, 8),
        "TIFF of one tile": tiff(100, 100, 8, tile=40_000),
        "GIF of 10,000 frames": screen + frame * 10_000 + b";",
        "GIF of a large frame": screen + b",\0\0\0\0\x60\xea\x60\xea" + frame[9:] + b";",
        "BMP": b"BM" + struct.pack("<IIIIiiHHIIIIII", 99, 0, 54, 40, 30_000, 30_000, 1, 24, 0, 0, 0, 0, 0, 0),
        "PPM": b"P6 30000 30000 255 " + bytes(100),
        "JPEG": WHOLE["JPEG"].replace(jpeg_size, struct.pack(">HH", 60_000, 60_000)),
    }


REASONS = {"GIF of 10,000 frames": "several frames", "GIF of a large frame": "DecompressionBombError"}
