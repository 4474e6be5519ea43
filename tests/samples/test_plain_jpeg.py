"""Does the short way through a plain JPEG give what the long way gives, image for image and error for error?"""

import io
import random
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFile

from adq_wds.errors import SampleError
from adq_wds.samples import image
from adq_wds.samples.image import MAX_PIXELS, WHITE, decode_image
from adq_wds.samples.plain_jpeg import SCAN, decode_plain_jpeg, plain_jpeg, segments, without_end
from tests.conftest import MonkeyPatch
from tests.samples.image_files import encode

W, H = 43, 29
rng = np.random.default_rng(9)
SMALL = Image.fromarray(rng.integers(0, 256, (H // 3, W // 3, 3), dtype=np.uint8))
SMOOTH = SMALL.resize((W, H), Image.Resampling.BICUBIC)
COARSE_TABLE = [200 + i % 56 for i in range(64)]


def jpeg(pixels: Image.Image = SMOOTH, **options: Any) -> bytes:
    return encode(pixels, "JPEG", **options)


def segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + (len(body) + 2).to_bytes(2, "big") + body


def after_soi(data: bytes, more: bytes) -> bytes:
    """With another segment, first of all."""
    return data[:2] + more + data[2:]


BASE = jpeg()
APP0 = BASE[2:20]
TABLE = BASE[20:89]
assert APP0[:4] == b"\xff\xe0\0\x10"
assert TABLE[:5] == b"\xff\xdb\0\x43\0"
FRAME = BASE[BASE.index(b"\xff\xc0") :][:19]
LARGE = Image.fromarray(rng.integers(0, 256, (300, 500, 3), dtype=np.uint8))  # more than Pillow reads at once
PLAIN = {
    "usual": BASE,
    "fine": jpeg(quality=100, subsampling=0),
    "coarse": jpeg(quality=1),
    "optimized": jpeg(optimize=True),
    "progressive": jpeg(progressive=True),
    "restart markers": jpeg(restart_marker_rows=1),
    "own tables": jpeg(qtables=[COARSE_TABLE, COARSE_TABLE, COARSE_TABLE]),
    "comment": jpeg(comment=b"a \xff\xd9 in here"),
    "fill before a marker": after_soi(BASE, b"\xff"),
    "no JFIF": BASE.replace(APP0, b""),
    "two tables in one segment": BASE.replace(TABLE, segment(0xDB, TABLE[4:] + b"\x03" + TABLE[5:])),
    "one pixel": jpeg(Image.new("RGB", (1, 1), (200, 10, 30))),
    "large": jpeg(LARGE, quality=98),
    "large and progressive": jpeg(LARGE, quality=98, progressive=True),
}
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
EXIF = Image.Exif()
EXIF[0x0112] = 6
NOT_PLAIN = {
    "grey": jpeg(SMOOTH.convert("L")),
    "CMYK": jpeg(SMOOTH.convert("CMYK")),
    "RGB in the file": jpeg(keep_rgb=True),
    "EXIF": jpeg(exif=EXIF.tobytes()),
    "profile": jpeg(icc_profile=PROFILE),
    "Adobe marker": after_soi(BASE, segment(0xEE, b"Adobe\0\x64\0\0\0\0\0")),
    "thumbnail in its JFIF": BASE.replace(APP0, segment(0xE0, APP0[4:16] + b"\1\1abc")),
    "short JFIF": BASE.replace(APP0, segment(0xE0, b"JFIF\0\1")),
    "junk before a marker": after_soi(BASE, b"\0"),
    "something after its end": BASE + b"\0",
    "no end": BASE[:-2],
    "no frame": BASE.replace(FRAME, b""),
    "two frames": BASE.replace(FRAME, FRAME + FRAME),
    "frame of 12 bits": BASE.replace(FRAME, FRAME[:4] + b"\x0c" + FRAME[5:]),
    "frame of no height": BASE.replace(FRAME, FRAME[:5] + b"\0\0" + FRAME[7:]),
    "frame of no width": BASE.replace(FRAME, FRAME[:7] + b"\0\0" + FRAME[9:]),
    "frame cut short": BASE.replace(FRAME, segment(0xC0, FRAME[4:-1])),
    "frame that counts two components": BASE.replace(FRAME, FRAME[:9] + b"\x02" + FRAME[10:]),
    "lossless frame": BASE.replace(FRAME, b"\xff\xc3" + FRAME[2:]),
    "arithmetic coding": BASE.replace(FRAME, b"\xff\xc9" + FRAME[2:]),
    "table cut short": BASE.replace(TABLE, segment(0xDB, TABLE[4:-1])),
    "table of 16 bits": BASE.replace(
        TABLE, segment(0xDB, b"\x10" + b"".join(b"\0" + TABLE[5 + i : 6 + i] for i in range(64)))
    ),
    "table of no number": BASE.replace(TABLE, TABLE[:4] + b"\x04" + TABLE[5:]),
    "empty table segment": BASE.replace(TABLE, segment(0xDB, b"") + TABLE),
    "segment beyond the end": after_soi(BASE, b"\xff\xfe\xff\xff"),
    "scan header beyond the end": BASE[: BASE.index(b"\xff\xda") + 2] + b"\xff\xff" + BASE[-2:],
    "scan header of length 1": BASE.replace(b"\xff\xda\0\x0c", b"\xff\xda\0\1", 1),
    "segment of length 0": after_soi(BASE, b"\xff\xfe\0\0"),
    "another start": b"\xff\xd9" + BASE[2:],
    "only an end": b"\xff\xd8\xff\xd9",
    "half an end": b"\xff\xd8\xff",
    "nothing": b"",
    "another format": b"P6 1 1 255 abc",
}


def outcome(data: bytes, *, long: bool) -> tuple[object, ...]:
    """All that can be seen of an answer."""
    try:
        seen = image._decode_any(data, MAX_PIXELS, WHITE) if long else decode_image(data)
    except SampleError as error:
        return str(error), type(error.__cause__)
    return type(seen), seen.mode, seen.size, seen.info, seen.tobytes(), seen.readonly, sorted(vars(seen))


def both(data: bytes) -> tuple[object, ...]:
    found = outcome(data, long=False)
    assert found == outcome(data, long=True)
    return found


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_jpeg_never_goes_the_long_way_and_is_the_same(name: str, monkeypatch: MonkeyPatch) -> None:
    data = PLAIN[name]
    assert both(data)[0] is Image.Image
    monkeypatch.setattr(image, "_decode_any", lambda *_: pytest.fail("went the long way"))
    with Image.open(io.BytesIO(data)) as theirs:
        assert decode_image(data).tobytes() == theirs.tobytes()
        plain = plain_jpeg(data)
        assert plain is not None
        assert plain.size == theirs.size


@pytest.mark.parametrize("name", NOT_PLAIN)
def test_whatever_is_not_plain_goes_the_long_way(name: str) -> None:
    assert plain_jpeg(NOT_PLAIN[name]) is None
    both(NOT_PLAIN[name])


@pytest.mark.parametrize("name", [name for name in PLAIN if not name.startswith("large")])
def test_damage_has_the_same_answer_on_both_ways(name: str) -> None:
    data, chance, quick = PLAIN[name], random.Random(name), 0
    header = data.index(b"\xff\xda") + 14
    for _ in range(400):
        damaged = bytearray(data)
        for _ in range(chance.choice((1, 1, 3))):
            place = chance.randrange(header if chance.random() < 0.7 else len(data))
            bit_flip = damaged[place] ^ 1 << chance.randrange(8)
            damaged[place] = chance.choice((bit_flip, 0, 0xFF, chance.randrange(256)))
        plain = plain_jpeg(bytes(damaged))
        quick += plain is not None
        if (
            plain is None or plain.size[0] * plain.size[1] < 1 << 22
        ):  # else the two images would take a minute
            both(bytes(damaged))
    assert quick > 50, "most damage must reach the short way"
    for _ in range(60):
        cut = data[: chance.randrange(len(data))]
        both(cut)
        both(cut + b"\xff\xd9")


def test_segments_end_with_the_header_of_the_first_scan() -> None:
    found = list(segments(BASE))
    assert [marker for marker, _, _ in found].index(SCAN) == len(found) - 1
    assert b"\xff\xd8" + b"".join(BASE[start:end] for _, start, end in found) == BASE[: found[-1][2]]


def test_a_large_one_is_refused_by_its_header(monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "frombytes", lambda *_: pytest.fail("decoded"))
    with pytest.raises(SampleError, match=f"too large: {W} x {H} = {W * H} pixels, at most {W * H - 1}"):
        decode_image(BASE, max_pixels=W * H - 1)


def test_what_the_decoder_refuses_is_left_to_the_long_way() -> None:
    tables = BASE.index(b"\xff\xc4")
    broken = BASE[: tables + 4] + b"\x77" + BASE[tables + 5 :]  # a Huffman table of no class
    plain = plain_jpeg(broken)
    assert plain is not None
    assert plain.size == (W, H)
    assert decode_plain_jpeg(broken, plain) is None
    with pytest.raises(SampleError, match="cannot decode this JPEG: OSError") as caught:
        decode_image(broken)
    assert isinstance(caught.value.__cause__, OSError)


def test_with_load_truncated_images_only_the_long_way_is_taken(monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    plain = plain_jpeg(BASE)
    assert plain is not None
    assert decode_plain_jpeg(BASE, plain) is None
    assert decode_image(BASE).tobytes() == outcome(BASE, long=True)[4]


ONE_SCAN = {name: data for name, data in PLAIN.items() if "progressive" not in name}
ONE_SCAN |= {n: NOT_PLAIN[n] for n in ("grey", "CMYK", "RGB in the file", "EXIF", "profile", "Adobe marker")}


@pytest.mark.parametrize("name", ONE_SCAN)
@pytest.mark.parametrize("fill_up", [False, True])
def test_a_scan_without_its_last_block_is_refused(name: str, fill_up: bool, monkeypatch: MonkeyPatch) -> None:
    """libjpeg would fill up with grey and say nothing that Pillow tells."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", fill_up)
    data, chance = ONE_SCAN[name], random.Random(name)
    refused: list[str] = []
    scan, whole = data.rindex(b"\xff\xda") + 14, np.asarray(decode_image(data))
    for _ in range(100):
        cut = data[: chance.randrange(scan, max(scan + 1, len(data) - 2))].removesuffix(b"\xff")
        for closed in (cut + b"\xff\xd9", cut + b"\xff\xd9" + data):
            try:
                seen = np.asarray(decode_image(closed))
            except SampleError as error:
                refused.append(str(error))
            else:  # a part of the last blocks, 16 x 16 pixels and what chroma spreads
                rows, columns = np.nonzero((seen != whole).any(2))
                height, width = whole.shape[:2]
                assert (rows > (height - 1) // 16 * 16 - 3).all()
                assert (columns > (width - 1) // 16 * 16 - 3).all()
    assert len(refused) > (0 if name == "one pixel" else 150)
    assert all("cannot decode this JPEG: OSError: 'image file is truncated" in text for text in refused)


def test_the_padding_changes_no_pixel() -> None:
    for name, data in (PLAIN | ONE_SCAN).items():
        padded = without_end(data)
        assert (padded == data) == ("progressive" in name)
        with Image.open(io.BytesIO(padded)) as ours, Image.open(io.BytesIO(data)) as theirs:
            assert ours.tobytes() == theirs.tobytes(), name


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xd8", b"\xff\xd8" + b"\xff" * 9, BASE[:-2], NOT_PLAIN["two frames"][:300]]
)
def test_what_has_no_end_marker_keeps_its_bytes(data: bytes) -> None:
    assert without_end(data) == data
