"""Stores an image without some of its patches, as one small file that every viewer opens.

Version 1. The kept patches, in the order they have in the image, are tiled row by row into one image, stored as one
JPEG (baseline, optimised Huffman tables). As many columns as leave the fewest cells blank: up to 65,500 pixels, one row
of all patches. Cells that stay blank, at the end, mean nothing. The patch side P is a multiple of JPEG's coding unit, 16
(4:2:0) or 8 (4:4:4), so no unit holds pixels of two patches. A record, all numbers big-endian, lists the kept patches:

    bytes  5  identifier "ADQP\\0"
           1  version, 1
           2  P, in pixels
       2 + 2  rows and columns of patches of the whole image; their product is L
           2  columns of the stored image, in patches
    ⌈L / 8⌉  mask: a bit per patch, row by row, most significant bit first, 1 where kept, unused bits 0
           4  CRC-32 (zlib) of all bytes before

It is the content of an APP9 segment before the first scan, right behind JFIF's, so L <= 524,120. Readers find it there
by its identifier. All metadata besides it is ignored, an EXIF orientation too. A program that strips metadata makes an
ordinary picture of the file; reading it is then an error, as the places of patches are stored nowhere else.

Each patch decodes as from the whole image's JPEG, except the halved chroma of 4:2:0, which decoders smooth across
borders; tiled in one row, a patch touches only two others. Sizes and losses: benchmarks/patch_jpeg.py.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from adq_wds.checks import integer
from adq_wds.core.patches import Grid, cut_patches, patch_grid, tile, tile_columns, untile
from adq_wds.errors import SampleError
from adq_wds.samples.image import MAX_PIXELS, decode_image
from adq_wds.samples.patch_record import (
    Record,
    parse_record,
    put_into_jpeg,
    split_as_written,
    split_jpeg,
)
from adq_wds.samples.plain_jpeg import decode_plain_jpeg

Subsampling = Literal["4:2:0", "4:4:4"]

CODING_UNIT: dict[str, int] = {"4:2:0": 16, "4:4:4": 8}
"""Side in pixels of what a JPEG codes at once; a patch is a multiple of it."""
MAX_JPEG_SIDE = 65_500
GREY = (128, 128, 128)


@dataclass(frozen=True, eq=False)
class PatchImage:
    """The kept patches of an image, and their positions.

    Attributes:
        patches: (k, P, P, 3) uint8, k >= 1.
        kept: (k,) int64, their numbers in the image, ascending.
        grid: rows and columns of patches in the image, L in all.
        patch: P, in pixels.
    """

    patches: NDArray[np.uint8]
    kept: NDArray[np.int64]
    grid: Grid
    patch: int

    def __post_init__(self) -> None:
        _check_kept(self.kept, self.grid[0] * self.grid[1])
        expected = (len(self.kept), self.patch, self.patch, 3)
        if self.patches.shape != expected or self.patches.dtype != np.uint8:
            raise ValueError(
                f"patches must be {expected} uint8, got {self.patches.shape} {self.patches.dtype}"
            )

    @property
    def mask(self) -> NDArray[np.bool_]:
        """(L,) bool, True where a patch is kept."""
        mask = np.zeros(self.grid[0] * self.grid[1], np.bool_)
        mask[self.kept] = True
        return mask

    def to_image(self, fill: tuple[int, int, int] | NDArray[np.uint8] = GREY) -> NDArray[np.uint8]:
        """The image: kept patches as they are, the others from `fill`.

        Args:
            fill: one colour, or an image (H, W, 3) uint8.

        Returns:
            (H, W, 3) uint8.

        Raises:
            ValueError: `fill` is neither.
        """
        size = (self.grid[0] * self.patch, self.grid[1] * self.patch, 3)
        values = np.asarray(fill)
        if (
            values.shape not in ((3,), size)
            or values.dtype.kind not in "iu"
            or values.min() < 0
            or values.max() > 255
        ):
            raise ValueError(
                f"fill must be three values from 0 to 255 or an image {size} uint8, got {values.shape} {values.dtype}"
            )
        image = np.empty(size, np.uint8)
        if values.shape == (3,):  # a row at a time: numpy is slow to repeat three values pixel by pixel
            image.reshape(size[0], -1)[:] = np.tile(values.astype(np.uint8), size[1])
        else:
            image[:] = values
        cells = image.reshape(self.grid[0], self.patch, self.grid[1], self.patch, 3)
        row, column = np.divmod(self.kept, self.grid[1])
        cells[row, :, column] = self.patches  # a view: of 64 million pixels one copy is enough
        return image


def keep_patches(image: NDArray[np.uint8], kept: NDArray[np.int64], patch: int) -> PatchImage:
    """An image without all but some patches.

    Args:
        image: (H, W, 3) uint8 RGB, H and W multiples of `patch`.
        kept: (k,) integers, numbers of patches, ascending; `core.patches.top_patches` gives them.
        patch: P, in pixels.

    Raises:
        ValueError: sides, shapes or numbers do not fit, or nothing is kept.

    >>> half = keep_patches(np.full((16, 32, 3), 9, np.uint8), np.array([1]), 16)
    >>> half.grid, half.patches.shape, half.to_image((0, 0, 0))[0, [15, 16]].tolist()
    ((1, 2), (1, 16, 16, 3), [[0, 0, 0], [9, 9, 9]])
    """
    kept, cells = np.asarray(kept), cut_patches(image[None], patch)[0]
    _check_kept(kept, len(cells))
    return PatchImage(cells[kept], kept, patch_grid(image.shape[0], image.shape[1], patch), patch)


def _check_kept(kept: NDArray[np.int64], n_patches: int) -> None:
    if kept.ndim != 1 or kept.dtype.kind not in "iu" or not 1 <= len(kept) <= n_patches:
        raise ValueError(f"kept must be from 1 to {n_patches} patch numbers, got {kept.shape} {kept.dtype}")
    if kept[0] < 0 or kept[-1] >= n_patches or not (kept[1:] > kept[:-1]).all():
        raise ValueError(f"kept must ascend without repeats inside 0 to {n_patches - 1}, got {kept.tolist()}")


def encode(
    image: NDArray[np.uint8],
    kept: NDArray[np.int64],
    patch: int,
    *,
    quality: int = 90,
    subsampling: Subsampling = "4:2:0",
) -> bytes:
    """The file of an image without all but some patches; `keep_patches` and `encode_patches` in one."""
    return encode_patches(keep_patches(image, kept, patch), quality=quality, subsampling=subsampling)


def encode_patches(image: PatchImage, *, quality: int = 90, subsampling: Subsampling = "4:2:0") -> bytes:
    """The JPEG of kept patches, with their places.

    Args:
        image: the patches; P a multiple of 16 with 4:2:0, of 8 with 4:4:4.
        quality: 1 ... 100, as libjpeg counts.
        subsampling: "4:2:0" (chroma halved) or "4:4:4".

    Raises:
        ValueError: P is no such multiple, quality or subsampling unknown, or too many patches for one file.

    >>> picture = np.zeros((32, 32, 3), np.uint8)
    >>> decode(encode(picture, np.array([0, 3]), 16)).kept
    array([0, 3])
    """
    unit = CODING_UNIT.get(subsampling)
    if unit is not None and image.patch % unit:
        raise ValueError(
            f"patch={image.patch} does not work with JPEG {subsampling}: patches that are no multiple of {unit} pixels share "
            f"coding units with strangers, which enlarges files (4 x 4 patches of 32 x 32 images at keep 0.75: 740 bytes "
            f"against 673 whole); use a multiple of {unit}, {'4:4:4 with a multiple of 8, ' if unit == 16 else ''}"
            "or drop patches while training"
        )
    columns = tile_columns(len(image.kept), image.patch, max_side=MAX_JPEG_SIDE)
    record = Record(image.patch, image.grid, columns, image.kept).to_bytes()
    tiled = tile(image.patches, columns)
    return put_into_jpeg(encode_whole(tiled, quality=quality, subsampling=subsampling), record)


def encode_whole(image: NDArray[np.uint8], *, quality: int = 90, subsampling: Subsampling = "4:2:0") -> bytes:
    """The JPEG of a whole image (H, W, 3) with the same settings and optimised tables, for comparison.

    Noise that takes more than a byte a pixel (two from quality 95 on) has the standard's tables.

    Raises:
        ValueError: quality or subsampling unknown.
    """
    quality = integer("quality", quality, least=1, most=100)
    if subsampling not in CODING_UNIT:
        raise ValueError(f"subsampling must be {' or '.join(map(repr, CODING_UNIT))}, got {subsampling!r}")
    picture, options = Image.fromarray(image), {"quality": quality, "subsampling": subsampling}
    file = io.BytesIO()
    try:
        picture.save(file, "JPEG", optimize=True, **options)
    except OSError:  # Pillow's buffer for optimised tables is too small for pure noise, and for nothing else
        file = io.BytesIO()
        picture.save(file, "JPEG", **options)
    return file.getvalue()


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS) -> PatchImage:
    """The kept patches in a file that `encode` or `encode_patches` wrote.

    All entries are checked against the file's bytes and its header before pixels are decoded.

    Args:
        data: one whole file.
        max_pixels: pixels of the image, with those of dropped patches, above which it is refused.

    Returns:
        the patches as views of the decoded image, read-only and mostly not contiguous; batching copies them.

    Raises:
        SampleError: not a JPEG; no record, several, a damaged one, or of another version; sizes that
            contradict each other; too large; pixels damaged or truncated.
    """
    as_written = split_as_written(data)
    record_bytes, rest, size = _split(data) if as_written is None else (*as_written[:2], as_written[2].size)
    record = parse_record(record_bytes)
    width, height = record.stored_size  # with blank cells, which are decoded too
    n_pixels = max(record.grid[0] * record.grid[1] * record.patch**2, width * height)
    if n_pixels > max_pixels:
        raise SampleError(
            f"too large: {record.grid[0]} x {record.grid[1]} patches of {record.patch} x {record.patch}, stored as {width} x "
            f"{height}, are {n_pixels} pixels, at most {max_pixels} are read; raise max_pixels if its source is trusted"
        )
    _check_size(size, record)
    pixels = None if as_written is None else decode_plain_jpeg(rest, as_written[2])
    if pixels is None:
        pixels = decode_image(rest, max_pixels=size[0] * size[1])
    _check_size(pixels.size, record)
    patches = untile(np.asarray(pixels), len(record.kept), record.patch)
    return PatchImage(patches, record.kept, record.grid, record.patch)


def _split(data: bytes) -> tuple[bytes, bytes, tuple[int, int]]:
    if data.startswith(b"\xff\xd8\xff"):
        return split_jpeg(data)
    earlier = data.startswith(b"RIFF")  # a lossless WebP, which earlier versions could write
    remedy = "write it again from the original image" if earlier else "read other images with Decode"
    raise SampleError(
        f"no patch-dropped image: {len(data)} bytes that start with {data[:16]!r}, expected a JPEG with a patch mask; {remedy}"
    )


def _check_size(size: tuple[int, int], record: Record) -> None:
    if size != record.stored_size:
        raise SampleError(
            f"the stored image has {size[0]} x {size[1]} pixels (width x height), its patch mask tells of {record.stored_size[0]} x "
            f"{record.stored_size[1]}: {len(record.kept)} patches of {record.patch} in {record.columns} columns; it was resized "
            "or cropped, so write it again from the original image"
        )
