"""Do kept patches come back from their file, in their places, and does every viewer open it?"""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from adq_wds.core.patches import cut_patches
from adq_wds.samples.image import decode_image
from adq_wds.samples.patch_file import (
    PatchImage,
    Subsampling,
    decode,
    encode,
    encode_patches,
    encode_whole,
    keep_patches,
)
from adq_wds.samples.patch_record import Record, parse_record

SUBSAMPLINGS: list[Subsampling] = ["4:2:0", "4:4:4"]


def picture(rows: int, columns: int, patch: int, seed: int = 0) -> NDArray[np.uint8]:
    """A smooth, colourful image of rows × columns patches."""
    coarse = np.random.default_rng(seed).integers(0, 256, (rows * 2 + 1, columns * 2 + 1, 3), dtype=np.uint8)
    size = (columns * patch, rows * patch)
    return np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC))


@st.composite
def cases(draw: st.DrawFn, patches: tuple[int, ...]) -> PatchImage:
    rows, columns, patch = draw(st.integers(1, 5)), draw(st.integers(1, 5)), draw(st.sampled_from(patches))
    kept = draw(st.sets(st.integers(0, rows * columns - 1), min_size=1))
    return keep_patches(picture(rows, columns, patch, len(kept)), np.array(sorted(kept)), patch)


def same_places(a: PatchImage, b: PatchImage) -> bool:
    return a.kept.tolist() == b.kept.tolist() and a.grid == b.grid and a.patch == b.patch


@given(cases((16, 32)), st.sampled_from(SUBSAMPLINGS), st.integers(1, 100))
def test_places_come_back_and_patches_are_what_viewers_show(
    image: PatchImage, subsampling: Subsampling, quality: int
) -> None:
    data = encode_patches(image, quality=quality, subsampling=subsampling)
    found = decode(data)
    assert same_places(found, image)
    shown = Image.open(io.BytesIO(data))
    assert shown.format == "JPEG"
    assert shown.size == (len(image.kept) * image.patch, image.patch)  # one row
    assert (found.patches == cut_patches(np.asarray(shown)[None], image.patch)[0]).all()


@pytest.mark.parametrize(("subsampling", "patch"), [("4:2:0", 16), ("4:4:4", 8), ("4:4:4", 24)])
def test_a_patch_decodes_as_it_would_from_the_whole_images_jpeg(subsampling: Subsampling, patch: int) -> None:
    image = picture(6, 7, patch)
    kept = np.array([0, 1, 5, 8, 9, 20, 33, 41])
    found = decode(encode(image, kept, patch, quality=90, subsampling=subsampling)).patches
    whole = np.asarray(decode_image(encode_whole(image, quality=90, subsampling=subsampling)))
    expected = cut_patches(whole[None], patch)[0][kept]
    inner = slice(1, -1) if subsampling == "4:2:0" else slice(None)  # chroma is smoothed across borders
    assert (found[:, inner, inner] == expected[:, inner, inner]).all()


def test_the_dropped_bytes_are_saved_and_tables_are_optimised() -> None:
    image = picture(14, 14, 16)
    whole, data = encode_whole(image), encode(image, np.arange(0, 196, 2), 16)
    assert len(data) < 0.6 * len(whole)
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=90, subsampling="4:2:0")
    assert len(whole) < len(file.getvalue())


def spelt_out(patch: int, rows: int, columns: int, stored_columns: int, mask: list[int]) -> bytes:
    """A record, from the words that specify it."""
    bits = "".join(map(str, mask)).ljust(-(-len(mask) // 8) * 8, "0")
    body = b"ADQP\0" + bytes([1]) + struct.pack(">4H", patch, rows, columns, stored_columns)
    body += bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8))
    return body + struct.pack(">I", zlib.crc32(body))


def test_the_record_lies_where_the_specification_says_in_a_jpeg() -> None:
    data = encode(picture(2, 5, 16), np.array([1, 2, 9]), 16)
    record = spelt_out(16, 2, 5, 3, [0, 1, 1, 0, 0, 0, 0, 0, 0, 1])
    jfif = 4 + int.from_bytes(data[4:6], "big")
    assert data[2:4] == b"\xff\xe0"
    assert data[jfif:].startswith(b"\xff\xe9" + struct.pack(">H", len(record) + 2) + record + b"\xff")
    assert Image.open(io.BytesIO(data)).applist[1] == ("APP9", record)  # type: ignore[attr-defined]


def test_a_record_of_version_1_is_read_for_ever() -> None:
    data = bytes.fromhex("41445150000100100002000500036040" + "2d2d2d2d")
    data = data[:-4] + zlib.crc32(data[:-4]).to_bytes(4, "big")
    found = parse_record(data)
    assert (found.patch, found.grid, found.columns, found.kept.tolist()) == (16, (2, 5), 3, [1, 2, 9])
    assert found.to_bytes() == data


def test_a_mask_that_spells_the_identifier_is_read() -> None:
    bits = np.unpackbits(np.frombuffer(b"\xffADQP\0ADQP\0\xff", np.uint8))
    kept = np.flatnonzero(bits)
    image = keep_patches(picture(8, 12, 16), kept, 16)
    assert decode(encode_patches(image)).kept.tolist() == kept.tolist()


def test_more_patches_than_one_row_holds_take_the_fewest_rows() -> None:
    image = np.zeros((8, 8 * 8192, 3), np.uint8)
    image[:, :, 0] = np.arange(8 * 8192) // 8 % 251
    data = encode(image, np.arange(8192), 8, subsampling="4:4:4", quality=100)
    assert Image.open(io.BytesIO(data)).size == (4096 * 8, 16)
    assert np.abs(decode(data).to_image() - image.astype(int)).max() <= 2


def test_noise_is_written_too() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    data = encode(noise, np.arange(256), 16, subsampling="4:4:4", quality=100)
    assert np.abs(decode(data).to_image().astype(int) - noise).max() <= 4


@given(cases((2, 3)))
def test_an_image_has_kept_pixels_and_the_fill_elsewhere(image: PatchImage) -> None:
    rows, columns = image.grid
    size = (rows * image.patch, columns * image.patch, 3)
    fill = np.random.default_rng(1).integers(0, 256, size, dtype=np.uint8)
    colour = np.broadcast_to(np.uint8([1, 2, 255]), size)
    for filled, other in ((image.to_image(fill), fill), (image.to_image((1, 2, 255)), colour)):
        cells = cut_patches(filled[None], image.patch)[0]
        assert (cells[image.mask] == image.patches).all()
        assert (cells[~image.mask] == cut_patches(other[None], image.patch)[0][~image.mask]).all()
    assert np.flatnonzero(image.mask).tolist() == image.kept.tolist()
    assert len(image.mask) == rows * columns


@pytest.mark.parametrize(
    "fill", [(0, 0), (0, 0, 256), (-1, 0, 0), (0.5, 0.5, 0.5), np.zeros((4, 4, 3), np.uint8)]
)
def test_a_fill_that_is_neither_colour_nor_image_is_refused(fill: tuple[int, int, int]) -> None:
    image = keep_patches(picture(1, 2, 4), np.array([1]), 4)
    with pytest.raises(ValueError, match=r"fill must be three values .* or an image \(4, 8, 3\) uint8, got"):
        image.to_image(fill)


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        ([], "kept must be from 1 to 4 patch numbers, got"),
        ([0, 1, 2, 3, 3], r"kept must be from 1 to 4 patch numbers, got \(5,\) int64"),
        ([[0, 1]], r"kept must be from 1 to 4 patch numbers, got \(1, 2\) int64"),
        ([0.0, 1.0], r"kept must be from 1 to 4 patch numbers, got \(2,\) float64"),
        ([True, False], r"kept must be from 1 to 4 patch numbers, got \(2,\) bool"),
        ([1, 0], r"kept must ascend without repeats inside 0 to 3, got \[1, 0\]"),
        ([1, 1], r"kept must ascend without repeats inside 0 to 3, got \[1, 1\]"),
        ([2, 4], r"kept must ascend without repeats inside 0 to 3, got \[2, 4\]"),
        ([-1, 2], r"kept must ascend without repeats inside 0 to 3, got \[-1, 2\]"),
    ],
)
def test_patch_numbers_that_are_none_are_refused(kept: list[int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        keep_patches(picture(2, 2, 4), np.array(kept), 4)


def test_patches_that_do_not_fit_their_description_are_refused() -> None:
    patches = np.zeros((2, 4, 4, 3), np.uint8)
    for wrong in (patches[:1], patches[:, :3], patches.astype(np.int64)):
        with pytest.raises(ValueError, match=r"patches must be \(2, 4, 4, 3\) uint8, got"):
            PatchImage(wrong, np.array([0, 1]), (1, 2), 4)


@pytest.mark.parametrize(
    ("subsampling", "patch", "unit"), [("4:2:0", 4, 16), ("4:2:0", 24, 16), ("4:4:4", 4, 8)]
)
def test_patches_sharing_coding_units_are_refused(subsampling: Subsampling, patch: int, unit: int) -> None:
    text = rf"patch={patch} .* {subsampling}: .* multiple of {unit} .* \d+ bytes against \d+ whole"
    with pytest.raises(ValueError, match=text):
        encode(picture(2, 2, patch), np.array([0]), patch, subsampling=subsampling)


def test_unknown_settings_are_refused() -> None:
    image = keep_patches(picture(1, 1, 16), np.array([0]), 16)
    for quality in (0, 101, 50.5, True, "90"):
        with pytest.raises(ValueError, match=f"quality must be an integer from 1 to 100, got {quality!r}"):
            encode_patches(image, quality=quality)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="subsampling must be '4:2:0' or '4:4:4', got '4:2:2'"):
        encode_patches(image, subsampling="4:2:2")  # type: ignore[arg-type]


def test_a_mask_that_fits_into_no_segment_is_refused() -> None:
    assert len(Record(16, (8, 65_515), 1, np.array([0])).to_bytes()) == 65_533
    with pytest.raises(ValueError, match="mask of 524128 patches takes 65534 bytes, a segment holds 65533"):
        Record(16, (8, 65_516), 1, np.array([0])).to_bytes()
    for patch, grid in ((65_536, (1, 1)), (1, (65_536, 1)), (1, (1, 65_536))):
        with pytest.raises(ValueError, match=f"{grid[0]} x {grid[1]} patches of {patch}: each at most 65535"):
            Record(patch, grid, 1, np.array([0])).to_bytes()
