"""Does `decode_image` give every good image pixel for pixel, upright? F10.

The references are worked out with numpy from the values that were put in; Pillow only writes the files.
"""

import io
import logging
import struct
import warnings
import zlib
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageCms, TiffImagePlugin, features

from adq_wds.errors import SampleError
from adq_wds.samples.image import decode_image, exif_orientation
from tests.samples.image_files import chunk, encode

BACKGROUND = (200, 100, 0)
H, W = 24, 40
rng = np.random.default_rng(7)
RGB = rng.integers(0, 256, (H, W, 3), dtype=np.uint8)
GREY = rng.integers(0, 256, (H, W), dtype=np.uint8)
GREY16 = rng.integers(0, 65536, (H, W), dtype=np.uint16)
ALPHA = rng.integers(0, 256, (H, W), dtype=np.uint8)
BITS = rng.integers(0, 2, (H, W), dtype=np.uint8)
SMOOTH = np.asarray(Image.fromarray(RGB[:6, :10]).resize((W, H), Image.Resampling.BICUBIC))


Chunks = tuple[tuple[bytes, bytes], ...]


def png(rows: NDArray[np.uint8], *, width: int, depth: int, colour: int, extra: Chunks = ()) -> bytes:
    """A PNG from its raw rows (H, bytes a row)."""
    header = struct.pack(">IIBBBBB", width, len(rows), depth, colour, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    middle = b"".join(chunk(name, body) for name, body in extra)
    head = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    return head + middle + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def grey_png(values: NDArray[Any], depth: int, key: int | None = None) -> bytes:
    """Grey PNG of 1 to 16 bits, `key` its transparent value."""
    if depth == 16:
        rows = values.astype(">u2").view(np.uint8)
    else:
        bits = np.unpackbits(values.astype(np.uint8)[..., None], axis=2)[..., 8 - depth :]
        rows = np.packbits(bits.reshape(len(values), -1), axis=1)
    extra = () if key is None else ((b"tRNS", struct.pack(">H", key)),)
    return png(rows, width=values.shape[1], depth=depth, colour=0, extra=extra)


def three(grey: NDArray[Any]) -> NDArray[np.float64]:
    return np.repeat(np.asarray(grey, np.float64)[..., None], 3, axis=2)


def over(colour: NDArray[Any], alpha: NDArray[Any]) -> NDArray[np.float64]:
    """`colour` laid on BACKGROUND, alpha 0 ... 255."""
    share = np.asarray(alpha, np.float64)[..., None] / 255
    return colour * share + np.array(BACKGROUND, np.float64) * (1 - share)


def from_cmyk(cmyk: NDArray[np.uint8]) -> NDArray[np.float64]:
    ink = cmyk.astype(np.float64) / 255
    return 255 * (1 - ink[..., :3]) * (1 - ink[..., 3:])


def from_ycbcr(ycc: NDArray[np.uint8]) -> NDArray[np.float64]:
    """JFIF 1.02, page 3."""
    y, cb, cr = (ycc[..., i].astype(np.float64) - (0, 128, 128)[i] for i in range(3))
    return np.clip(np.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], 2), 0, 255)


def from_lab(lab: NDArray[np.uint8]) -> NDArray[np.float64]:
    """CIE L*a*b* (D50, a and b offset by 128) to sRGB through the Bradford-adapted matrix."""
    light = lab[..., 0] / 255 * 100
    fy = (light + 16) / 116
    f = np.stack([fy + (lab[..., 1] - 128.0) / 500, fy, fy - (lab[..., 2] - 128.0) / 200], 2)
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * [0.9642, 1.0, 0.8249]
    red, green, blue = (3.1338561, -1.6168667, -0.4906146), (-0.9787684, 1.9161415, 0.0334540), (0.0719453, -0.2289914, 1.4052427)  # fmt: skip
    linear = np.clip(xyz @ np.array([red, green, blue]).T, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


PALETTE = rng.integers(0, 256, (16, 3), dtype=np.uint8)
INDEX = rng.integers(0, 16, (H, W), dtype=np.uint8)
PALETTE_ALPHA = rng.integers(0, 256, 16, dtype=np.uint8)
PALETTE_ALPHA[[0, 1]] = 0
CMYK = rng.integers(0, 256, (H, W, 4), dtype=np.uint8)
YCC = rng.integers(0, 256, (H, W, 3), dtype=np.uint8)
LAB = np.stack([rng.integers(60, 200, (H, W)), *(rng.integers(118, 139, (2, H, W)))], 2).astype(np.uint8)
UNIT = rng.random((H, W), dtype=np.float32)
UNIT[0, :3] = [0.0, 1.0, np.float32(0.5)]
RGB16 = rng.integers(0, 65536, (H, W, 3), dtype=np.uint16)
FOUR = rng.integers(0, 16, (H, W), dtype=np.uint8)
PLTE = (b"PLTE", PALETTE.tobytes())


def palette_with_alpha() -> bytes:
    image = Image.fromarray(INDEX)
    image.putpalette(PALETTE.tobytes())
    image = image.convert("PA")
    image.putalpha(Image.fromarray(ALPHA))
    assert image.mode == "PA"
    return encode(image, "TIFF")


def palette_png(*extra: tuple[bytes, bytes]) -> bytes:
    return png(INDEX, width=W, depth=8, colour=3, extra=(PLTE, *extra))


def raw_tiff(mode: str, pixels: NDArray[np.uint8], **options: Any) -> bytes:
    return encode(Image.frombytes(mode, (W, H), pixels.tobytes()), "TIFF", **options)


def without(colour: NDArray[Any], clear: NDArray[np.bool_]) -> NDArray[np.float64]:
    return over(colour, np.where(clear, 0, 255))


WIDE = RGB16.astype(">u2").reshape(H, -1).view(np.uint8)
KEY = (b"tRNS", RGB[3, 4].astype(">u2").tobytes())
LA = Image.merge("LA", (Image.fromarray(GREY), Image.fromarray(ALPHA)))
MODES: dict[str, tuple[bytes, NDArray[np.float64]]] = {
    "1": (grey_png(BITS, 1), three(BITS * 255.0)),
    "L": (encode(GREY, "PNG"), three(GREY)),
    "L of 4 bits": (grey_png(FOUR, 4), three(FOUR * 17.0)),
    "P": (palette_png(), PALETTE[INDEX].astype(float)),
    "RGB": (encode(RGB, "PNG"), RGB.astype(float)),
    "RGB of 16 bits": (png(WIDE, width=W, depth=16, colour=2), RGB16 / 257.0),
    "RGBA": (encode(np.dstack([RGB, ALPHA]), "PNG"), over(RGB, ALPHA)),
    "LA": (encode(LA, "PNG"), over(three(GREY), ALPHA)),
    "PA": (palette_with_alpha(), over(PALETTE[INDEX], ALPHA)),
    "P with alphas": (palette_png((b"tRNS", PALETTE_ALPHA.tobytes())), over(PALETTE[INDEX], PALETTE_ALPHA[INDEX])),
    "P with a clear colour": (palette_png((b"tRNS", b"\xff\xff\0")), without(PALETTE[INDEX], INDEX == 2)),
    "RGB with a key": (
        png(RGB.reshape(H, -1), width=W, depth=8, colour=2, extra=(KEY,)), without(RGB, (RGB[3, 4] == RGB).all(2))
    ),
    "1 with a key": (grey_png(BITS, 1, key=1), without(three(BITS * 255.0), BITS == 1)),
    "L with a key": (grey_png(GREY, 8, key=int(GREY[0, 0])), without(three(GREY), GREY[0, 0] == GREY)),
    "L of 4 bits with a key": (grey_png(FOUR, 4, key=15), without(three(FOUR * 17.0), FOUR == 15)),
    "I;16": (grey_png(GREY16, 16), three(GREY16 / 257.0)),
    "I;16 with a key": (
        grey_png(GREY16, 16, key=int(GREY16[0, 0])), without(three(GREY16 / 257.0), GREY16[0, 0] == GREY16)
    ),
    "I": (encode(GREY16.astype(np.int32), "TIFF"), three(GREY16 / 257.0)),
    "I of a PGM": (b"P5 40 24 65535\n" + GREY16.astype(">u2").tobytes(), three(GREY16 / 257.0)),
    "F": (encode(UNIT, "TIFF"), three(UNIT * 255.0)),
    "CMYK": (raw_tiff("CMYK", CMYK), from_cmyk(CMYK)),
    "YCbCr": (raw_tiff("YCbCr", YCC, compression="tiff_lzw"), from_ycbcr(YCC)),
    "LAB": (raw_tiff("LAB", LAB ^ np.uint8([0, 128, 128])), from_lab(LAB)),
}  # fmt: skip
needs_avif = pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_within_one_step_of_the_arithmetic(mode: str) -> None:
    data, expected = MODES[mode]
    image = decode_image(data, background=BACKGROUND)
    assert (image.mode, image.size) == ("RGB", (W, H))
    off = 3 if mode == "LAB" else 1  # littlecms interpolates in a table
    assert np.abs(np.asarray(image) - expected).max() <= off


def test_greys_of_16_bits_are_rounded_not_clipped_or_cut() -> None:
    every = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = three((every.astype(np.int64) + 128) // 257)
    for data in (grey_png(every, 16), encode(every.astype(np.int32), "TIFF")):
        assert np.array_equal(np.asarray(decode_image(data)), expected)


def test_floats_round_half_up() -> None:
    values = np.array([[0.0, 0.5 / 255, 127.5 / 255, 1.0]], np.float64).astype(np.float32)
    halves = [int(np.floor(float(v) * 255 + 0.5)) for v in values[0]]
    assert np.asarray(decode_image(encode(values, "TIFF")))[0, :, 0].tolist() == halves


@pytest.mark.parametrize("value", [-1, 65536, 2**31 - 1])
def test_wide_integers_beyond_16_bits_are_refused(value: int) -> None:
    with pytest.raises(SampleError, match=r"grey values from .*mode I\), expected 0 to 65535"):
        decode_image(encode(np.full((2, 2), value, np.int32), "TIFF"))


@pytest.mark.parametrize("value", [-0.01, 1.01, np.nan, np.inf])
def test_floats_outside_0_to_1_are_refused(value: float) -> None:
    pixels = np.full((2, 3), 0.5, np.float32)
    pixels[1, 1] = value
    with pytest.raises(SampleError, match=r"grey values from .*mode F\), expected 0 to 1"):
        decode_image(encode(pixels, "TIFF"))


# ------------------------------------------------------------------------------- which way is up
DISPLAY = {  # from the stored array to the one a viewer shows (EXIF 2.32, tag 0x0112)
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


def exif(orientation: int, order: str = "<", kind: int = 3) -> bytes:
    """An EXIF block with a maker's tag before the orientation."""
    value = struct.pack(order + "I", orientation) if kind == 4 else struct.pack(order + "HH", orientation, 0)
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HIH", 42, 8, 2)
    maker = struct.pack(order + "HHI4s", 0x010F, 2, 4, b"abc\0")
    return b"Exif\0\0" + head + maker + struct.pack(order + "HHI", 0x0112, kind, 1) + value + b"\0\0\0\0"


@pytest.mark.parametrize("orientation", DISPLAY)
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_an_image_stands_upright_by_its_exif_orientation(form: str, order: str, orientation: int) -> None:
    plain = np.asarray(decode_image(encode(SMOOTH, form)))
    image = decode_image(encode(SMOOTH, form, exif=exif(orientation, order)))
    assert np.array_equal(np.asarray(image), DISPLAY[orientation](plain))
    assert not image.getexif(), "a second exif_transpose would turn it again"


@pytest.mark.parametrize("orientation", DISPLAY)
def test_a_tiff_is_turned_once(orientation: int) -> None:
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[0x0112] = orientation
    for compression in ("raw", "tiff_lzw"):
        image = decode_image(encode(RGB, "TIFF", tiffinfo=tags, compression=compression))
        assert np.array_equal(np.asarray(image), DISPLAY[orientation](RGB))


@needs_avif
@pytest.mark.parametrize("orientation", DISPLAY)
def test_an_avif_is_turned_by_its_boxes(orientation: int) -> None:
    plain = np.asarray(decode_image(encode(SMOOTH, "AVIF")))
    image = decode_image(encode(SMOOTH, "AVIF", exif=exif(orientation)))
    assert np.array_equal(np.asarray(image), DISPLAY[orientation](plain))


def test_the_orientation_is_read_as_short_or_long() -> None:
    for order in "<>":
        for kind in (3, 4):
            read = [exif_orientation(exif(n, order, kind)) for n in range(11)]
            assert read == [1, *range(1, 9), 1, 1]
    for nonsense in (b"", b"Exif\0\0", b"XX" + exif(6)[8:]):
        assert exif_orientation(nonsense) == 1


MAKER = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x0f\x01\x02\0\x04\0\0\0abc\0" + bytes(60)
DAMAGED_EXIF = [
    b"Exif\0\0garbage",
    b"Exif\0\0II*\0\xff\xff\xff\xff",
    exif(6)[:30] + b"\xff" * 60,
    b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x13\x01\x03\0\xff\xff\xff\xff\xff\xff\xff\xff" * 5,
    b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x1a\0\x05\0\0\0\x01\xff\xff\xff\xff",
]


def with_exif(form: str, block: bytes) -> bytes:
    """SMOOTH in a file whose EXIF block is exactly `block`, checksum and all; Pillow would not write it."""
    good = encode(SMOOTH, form, exif=MAKER)
    assert good.count(MAKER[6:]) == 1
    data = good.replace(MAKER[6:], block[6:].ljust(len(MAKER) - 6, b"\0")[: len(MAKER) - 6])
    if form == "PNG":
        at = data.index(b"eXIf")
        end = at + 4 + int.from_bytes(data[at - 4 : at], "big")
        data = data[:end] + struct.pack(">I", zlib.crc32(data[at:end])) + data[end + 4 :]
    return data


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", pytest.param("AVIF", marks=needs_avif)])
@pytest.mark.parametrize("block", DAMAGED_EXIF)
def test_damaged_exif_neither_fails_nor_turns_nor_warns(
    form: str, block: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    data = with_exif(form, block)
    with warnings.catch_warnings(), caplog.at_level(logging.DEBUG, "adq_wds"):
        warnings.simplefilter("error")
        assert np.array_equal(np.asarray(decode_image(data)), np.asarray(decode_image(encode(SMOOTH, form))))
    levels = [record.levelno for record in caplog.records if record.name == "adq_wds"]
    assert set(levels) <= {logging.DEBUG}


def test_damaged_exif_leaves_a_line_for_whoever_looks(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "adq_wds"):
        decode_image(with_exif("JPEG", DAMAGED_EXIF[0]))
    assert "damaged EXIF read as upright" in caplog.text


def test_a_colour_profile_stays_only_with_its_colours() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert decode_image(encode(RGB, "PNG", icc_profile=profile, dpi=(72, 72))).info == {
        "icc_profile": profile
    }
    other = profile[:16] + b"CMYK" + profile[20:]
    assert decode_image(encode(RGB, "PNG", icc_profile=other)).info == {}


def test_a_cameras_file_of_several_pictures_is_its_first() -> None:
    file = encode(SMOOTH, "MPO", save_all=True, append_images=[Image.new("RGB", (W, H))])
    first = Image.open(io.BytesIO(file))
    assert first.format == "MPO"
    assert np.array_equal(np.asarray(decode_image(file)), np.asarray(first))


def test_the_image_is_plain_loaded_and_free_of_its_bytes() -> None:
    for form in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"):
        image = decode_image(encode(RGB, form))
        assert type(image) is Image.Image, form
        assert not hasattr(image, "fp"), form
