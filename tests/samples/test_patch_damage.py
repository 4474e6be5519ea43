"""Does damage to a patch-dropped image end in a `SampleError`, before anything is made on its word? F9, F35, S5."""

import io
import random
import struct
import tracemalloc
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from adq_wds.errors import SampleError
from adq_wds.samples import patch_file as patch_jpeg
from adq_wds.samples.patch_file import decode, encode_patches, keep_patches
from adq_wds.samples.patch_record import parse_record, put_into_jpeg, split_as_written, split_jpeg
from tests.samples.test_patch_file import picture, same_places

IMAGE = keep_patches(picture(5, 7, 16), np.array([0, 1, 2, 5, 8, 9, 13, 20, 21, 22, 30, 34]), 16)
JPEG = encode_patches(IMAGE)


BITS = np.packbits(IMAGE.mask).tobytes()


def record(
    *,
    version: int = 1,
    patch: int = 16,
    rows: int = 5,
    columns: int = 7,
    stored: int = 12,
    mask: bytes = BITS,
) -> bytes:
    """A record whose checksum is right, whatever it says."""
    body = b"ADQP\0" + struct.pack(">BHHHH", version, patch, rows, columns, stored) + mask
    return body + zlib.crc32(body).to_bytes(4, "big")


def plain() -> bytes:
    """The stored image with no record."""
    file = io.BytesIO()
    tiled = IMAGE.patches.swapaxes(0, 1).reshape(16, -1, 3)
    Image.fromarray(tiled).save(file, "JPEG")
    return file.getvalue()


def with_record(content: bytes) -> bytes:
    """The stored image with this for a record."""
    return put_into_jpeg(plain(), content)


@pytest.fixture
def no_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding a pixel fails the test."""

    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("pixels are decoded on the word of a damaged record")

    monkeypatch.setattr(patch_jpeg, "decode_image", refuse)


def harmless(data: bytes) -> bool:
    """Whether `data` is refused, or each patch is where it was."""
    try:
        found = decode(data)
    except SampleError:
        return True
    return same_places(found, IMAGE)


def test_every_bit_of_the_jpegs_segment_matters() -> None:
    start = JPEG.index(b"\xff\xe9")
    end = start + 2 + int.from_bytes(JPEG[start + 2 : start + 4], "big")
    for place in range(start * 8, end * 8):
        damaged = bytearray(JPEG)
        damaged[place // 8] ^= 1 << place % 8
        with pytest.raises(SampleError):
            decode(bytes(damaged))


def test_every_truncation_is_refused() -> None:
    data = JPEG
    for end in [*range(700), *range(700, len(data) - 2, 29), len(data) - 2]:
        with pytest.raises(SampleError):
            decode(data[:end])


def test_damage_anywhere_never_moves_a_patch() -> None:
    draw, data = random.Random(5), JPEG
    for _ in range(600):
        damaged = bytearray(data)
        place = draw.randrange(len(data) if draw.random() < 0.5 else 700)
        kind = draw.randrange(4)
        if kind == 0:
            damaged[place] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del damaged[place : place + draw.randrange(1, 40)]
        elif kind == 2:
            damaged[place:place] = draw.randbytes(draw.randrange(1, 40))
        else:
            damaged[place : place + 20] = damaged[place + 20 : place + 40]
        assert harmless(bytes(damaged)), (kind, place)


LIES = [
    (record(mask=bytes(5)), "impossible patch mask: 0 bits set of 35 patches of 16 pixels, 12 in a stored row"),
    (record(mask=b"\0\0\0\0\x10", stored=1), "impossible patch mask: 1 bits set of 35 patches"),  # bit 35
    (record(patch=0), "impossible patch mask: 12 bits set of 35 patches of 0 pixels"),
    (record(stored=0), "impossible patch mask: .* 0 in a stored row"),
    (record(stored=13), "impossible patch mask: .* 13 in a stored row"),
    (record(rows=0, mask=b""), "impossible patch mask: 0 bits set of 0 patches"),
    (record(rows=5, columns=9), "damaged patch mask: 23 bytes, 24 expected for 5 x 9 patches"),
    (record(version=2), "patch mask of version 2, this program reads version 1; update adq-wds"),
    (record(version=0), "patch mask of version 0"),
    (record(stored=6), r"has 192 x 16 pixels \(width x height\), its patch mask tells of 96 x 32: 12 patches of 16"),
    (record(patch=8), "has 192 x 16 pixels .* tells of 96 x 8: 12 patches of 8 in 12 columns; it was resized"),
    (record(mask=b"\xff\xe0\0\0\0", stored=11), "has 192 x 16 pixels .* tells of 176 x 16: 11 patches"),
    (record(patch=65_535), "too large: 5 x 7 patches of 65535 x 65535, .* are 150319267875 pixels, at most 67108864"),
    (record(patch=4096, rows=1, columns=5, stored=1, mask=b"\x80"), "too large: .* stored as 4096 x 4096, are 83886080"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "said"), LIES)
@pytest.mark.usefixtures("no_pixels")
def test_a_record_that_lies_is_refused_before_decoding(content: bytes, said: str) -> None:
    with pytest.raises(SampleError, match=said):
        decode(with_record(content))


@pytest.mark.usefixtures("no_pixels")
def test_a_file_that_declares_a_huge_image_costs_no_memory() -> None:
    bomb = with_record(record(rows=700, columns=700, stored=1, mask=b"\x80" + bytes(61_249)))
    tracemalloc.start()
    try:
        with pytest.raises(SampleError, match=r"too large: 700 x 700 .* 16 x 16, are 125440000 pixels"):
            decode(bomb)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_blank_cells_count_as_pixels_too() -> None:
    """Twelve patches in eleven columns are two rows."""
    file = io.BytesIO()
    Image.new("RGB", (11 * 16, 2 * 16)).save(file, "JPEG")
    data = put_into_jpeg(file.getvalue(), record(rows=3, columns=4, stored=11, mask=b"\xff\xf0"))
    assert decode(data, max_pixels=22 * 256).kept.tolist() == list(range(12))
    with pytest.raises(SampleError, match="stored as 176 x 32, are 5632 pixels, at most 5631 are read"):
        decode(data, max_pixels=22 * 256 - 1)


@pytest.mark.usefixtures("no_pixels")
def test_no_header_is_walked_for_ever() -> None:
    """F9: each of millions of empty segments would be a step in Python."""
    comments = JPEG[:2] + b"\xff\xfe\0\2" * 10_001 + JPEG[2:]
    with pytest.raises(SampleError, match="more than 10000 segments before this JPEG's pixels"):
        decode(comments)


def test_any_number_of_fill_bytes_is_passed_over_in_one_step() -> None:
    padded = JPEG[:2] + b"\xff" * 1_000_000 + JPEG[2:]
    assert (decode(padded).patches == decode(JPEG).patches).all()


def test_the_cap_is_on_the_image_not_on_what_is_stored() -> None:
    n_pixels = 5 * 7 * 256
    assert same_places(decode(JPEG, max_pixels=n_pixels), IMAGE)
    with pytest.raises(SampleError, match=f"are {n_pixels} pixels, at most {n_pixels - 1} are read"):
        decode(JPEG, max_pixels=n_pixels - 1)


@pytest.mark.usefixtures("no_pixels")
def test_a_header_that_lies_about_the_stored_size_is_refused() -> None:
    frame = JPEG.index(b"\xff\xc0")
    lie = JPEG[: frame + 5] + struct.pack(">HH", 65_500, 65_500) + JPEG[frame + 9 :]
    with pytest.raises(SampleError, match=r"has 65500 x 65500 pixels .* tells of 192 x 16: 12 patches"):
        decode(lie)
    without = JPEG[:frame] + JPEG[frame + 19 :]
    with pytest.raises(SampleError, match="has 0 x 0 pixels"):
        decode(without)


def test_a_file_whose_record_was_stripped_says_what_to_do() -> None:
    said = "no patch mask: this JPEG has no APP9 segment 'ADQP', .* strips metadata .* write it again from the original"
    with pytest.raises(SampleError, match=said):
        decode(plain())


def test_two_records_are_refused() -> None:
    with pytest.raises(SampleError, match="2 patch masks in one JPEG, expected one"):
        decode(put_into_jpeg(JPEG, record()))


def test_the_segments_of_other_programs_are_passed_over() -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    exif = turned.tobytes()
    others = [
        b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif,
        b"\xff\xe9\0\6ADQQ",
        b"\xff\xff\xff\xfe\0\4hi",
    ]
    for other in others:
        for place in (2, JPEG.index(b"\xff\xdb")):
            found = decode(JPEG[:place] + other + JPEG[place:])
            assert same_places(found, IMAGE)
            assert (found.patches == decode(JPEG).patches).all()


@pytest.mark.usefixtures("no_pixels")
@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "no patch-dropped image: 0 bytes that start with b'', expected a JPEG with a patch mask"),
        (b"<html>", "no patch-dropped image: 6 bytes that start with b'<html>'"),
        (b"\xff\xd8\xff", "malformed JPEG: b'.xff' at byte 2 of 3 starts no segment"),
        (b"\xff\xd8\xff\xd9", "malformed JPEG: b'.xff.xd9' at byte 2 of 4"),
        (b"\xff\xd8\xff\xe0\0\1....", "malformed JPEG: b'.xff.xe0.x00.x01' at byte 2 of 10"),
        (b"\xff\xd8\xff\xe0\0\x09....", "malformed JPEG: .* at byte 2 of 10"),
        (b"\xff\xd8\xff\xe0\0\2....", "malformed JPEG: b'....' at byte 6 of 10"),
        (b"\xff\xd8\xff\xd0\0\2....", "malformed JPEG: b'.xff.xd0.x00.x02' at byte 2 of 10"),
        (b"\xff\xd8" + b"\xff" * 50, "malformed JPEG: .* at byte 2 of 52"),
        (b"RIFF\x04\0\0\0WEBP", "no patch-dropped image: .* write it again from the original image"),
    ],
)
def test_what_is_no_such_file_is_refused(data: bytes, said: str) -> None:
    with pytest.raises(SampleError, match=said):
        decode(data)


def test_damaged_pixels_are_an_error_of_the_sample() -> None:
    with pytest.raises(SampleError, match="cannot decode this JPEG"):
        decode(JPEG[: JPEG.index(b"\xff\xda") + 40])


def test_one_walk_and_the_long_way_split_a_file_alike() -> None:
    split = split_as_written(JPEG)
    assert split is not None
    assert (*split[:2], split[2].size) == split_jpeg(JPEG)


@pytest.mark.parametrize(
    "changed",
    [
        with_record(record())[:-2],
        JPEG[:2] + b"\xff\xfe\0\4ok" + JPEG[2:],
        put_into_jpeg(JPEG, record()),
        JPEG.replace(b"\xff\xdb", b"\xff\xe1\0\x08Exif\0\0\xff\xdb", 1),
        JPEG.replace(b"\xff\xe9", b"\xff\xe8", 1),
    ],
    ids=["no end", "comment first", "two records", "EXIF", "another segment"],
)
def test_every_other_file_goes_the_long_way(changed: bytes) -> None:
    assert split_as_written(changed) is None


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "is no record of"),
        (b"x" * 40, "is no record of"),
        (bytes(65_534), "65534 bytes or more, at most 65533"),
    ],
)
def test_what_is_no_record_is_refused(data: bytes, text: str) -> None:
    with pytest.raises(SampleError, match=f"damaged patch mask: .*{text}"):
        parse_record(data)
