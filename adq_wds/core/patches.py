"""Cuts images into patches, chooses those to keep, and tiles them into a smaller image.

An image of H × W pixels is a grid of (H / P, W / P) patches, numbered 0 … L−1 row by row from the top left.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from adq_wds.core.allocation import check_ratio

Grid = tuple[int, int]
"""Rows and columns of patches."""


PATCH = 16
"""Default side of a patch in pixels."""
KEEP = 0.75
"""Default part of an image's patches that are kept."""


def patch_grid(height: int, width: int, patch: int) -> Grid:
    """Rows and columns of the patches of an image of height × width pixels.

    Raises:
        ValueError: `patch` is no positive integer, or does not divide both sides.

    >>> patch_grid(224, 160, 16)
    (14, 10)
    """
    if isinstance(patch, bool) or not isinstance(patch, (int, np.integer)) or patch < 1:
        raise ValueError(f"patch must be a positive integer (a side in pixels), got {patch!r}")
    if height < patch or width < patch or height % patch or width % patch:
        raise ValueError(
            f"an image of {height} x {width} pixels (height x width) does not fall into patches of {patch} x {patch}; "
            "resize or crop it to a multiple of them"
        )
    return height // int(patch), width // int(patch)


def cut_patches(images: NDArray[np.uint8], patch: int) -> NDArray[np.uint8]:
    """Cut images into their patches.

    Args:
        images: (B, H, W, 3) uint8 of one size, H and W multiples of `patch`.
        patch: P, side of a patch in pixels.

    Returns:
        (B, L, P, P, 3) uint8, a copy.

    Raises:
        ValueError: another shape or dtype, or `patch` does not divide both sides.

    >>> cut_patches(np.arange(12, dtype=np.uint8).reshape(1, 2, 2, 3), 1)[0, :, 0, 0, 0]
    array([0, 3, 6, 9], dtype=uint8)
    """
    if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8:
        raise ValueError(f"images must be (B, H, W, 3) uint8, got {images.shape} {images.dtype}")
    rows, columns = patch_grid(images.shape[1], images.shape[2], patch)
    lines = _lines(images, patch).reshape(len(images), rows, patch, columns)
    return lines.swapaxes(2, 3).copy().view(np.uint8).reshape(len(images), rows * columns, patch, patch, 3)


def join_patches(patches: NDArray[np.uint8], grid: Grid) -> NDArray[np.uint8]:
    """The images that `cut_patches` would cut into these.

    Args:
        patches: (B, L, P, P, 3) uint8.
        grid: rows and columns, whose product is L.

    Returns:
        (B, H, W, 3) uint8, a copy.
    """
    (n_images, _, patch), (rows, columns) = patches.shape[:3], grid
    lines = _lines(patches, patch).reshape(n_images, rows, columns, patch)
    return lines.swapaxes(2, 3).copy().view(np.uint8).reshape(n_images, rows * patch, columns * patch, 3)


def n_kept(n_patches: int, keep: float) -> int:
    """How many of L patches a keep ratio keeps: ⌊L·keep + 1e-9⌋.

    The added 1e-9 is for products like 0.7 · 10, which rounding may leave just below their integer.

    Raises:
        ValueError: `keep` is not a number in [0, 1].

    >>> n_kept(196, 0.75), n_kept(100, 0.29), n_kept(4, 0.2)
    (147, 29, 0)
    """
    check_ratio("keep", keep)
    return math.floor(n_patches * float(keep) + 1e-9)


def top_patches(importance: NDArray[np.floating], k: int) -> NDArray[np.int64]:
    """The k most important patches of each image; of equal ones, those that come first.

    Fewer patches are always among more: the k of an image contain the k − 1.

    Args:
        importance: (B, L) floats, finite.
        k: patches to keep, 0 <= k <= L.

    Returns:
        (B, k) int64, patch numbers ascending in each row.

    Raises:
        ValueError: no matrix of floats, or an importance that is not finite.

    >>> top_patches(np.array([[0.5, 2.0, 0.5, 1.0]]), 3)
    array([[0, 1, 3]])
    """
    if importance.ndim != 2 or importance.dtype.kind != "f":
        raise ValueError(f"importance must be (B, L) floats, got {importance.shape} {importance.dtype}")
    finite = np.isfinite(importance)
    if not finite.all():
        row, place = np.argwhere(~finite)[0].tolist()
        raise ValueError(
            f"importance of patch {place} of image {row} is {importance[row, place]}, expected a finite number; "
            "half precision overflows like this, so try without AMP"
        )
    best = np.argsort(-importance, axis=1, kind="stable")[:, :k]
    return np.sort(best, axis=1).astype(np.int64, copy=False)


def tile_columns(n_patches: int, patch: int, *, max_side: int) -> int:
    """The number of columns to tile k patches in: no side is too long, and the fewest cells stay blank.

    Of equally good numbers the largest: one row, wherever it fits. Each patch then touches two others instead of
    four, mostly its neighbours in the image, and neither of them above or below: what a codec smears across
    borders (JPEG's halved chroma) is less than a third of what it is in a square.

    Args:
        n_patches: k, >= 1.
        patch: P, in pixels.
        max_side: longest side of the tiled image, in pixels.

    Raises:
        ValueError: they do not fit into max_side × max_side pixels.

    >>> tile_columns(147, 16, max_side=65_500), tile_columns(147, 16, max_side=800), tile_columns(97, 16, max_side=800)
    (147, 49, 49)
    """
    most = max_side // patch  # columns, and rows
    if n_patches < 1 or most < 1 or -(-n_patches // most) > most:
        raise ValueError(
            f"{n_patches} patches of {patch} x {patch} pixels do not tile an image of at most {max_side} x {max_side}"
        )
    columns = range(min(most, n_patches), -(-n_patches // most) - 1, -1)
    return min(columns, key=lambda c: -n_patches % c)  # of equals the first, the largest


def tile(patches: NDArray[np.uint8], columns: int) -> NDArray[np.uint8]:
    """Lay k patches out row by row in one image. Blank cells, at its end, repeat the mean colour of the last patch.

    Args:
        patches: (k, P, P, 3) uint8, k >= 1.
        columns: cells in a row, >= 1.

    Returns:
        (⌈k / columns⌉·P, columns·P, 3) uint8.
    """
    rows = -(-len(patches) // columns)
    if blank := rows * columns - len(patches):
        colour = patches[-1].mean(axis=(0, 1)).round().astype(np.uint8)
        patches = np.concatenate([patches, np.broadcast_to(colour, (blank, *patches.shape[1:]))])
    image: NDArray[np.uint8] = join_patches(patches[None], (rows, columns))[0]
    return image


def untile(image: NDArray[np.uint8], n_patches: int, patch: int) -> NDArray[np.uint8]:
    """The patches in an image that `tile` made; a view, without a copy, where the image has one row of cells.

    Args:
        image: (H, W, 3) uint8.
        n_patches: k, cells to take.
        patch: P, side of a patch in pixels.

    Returns:
        (k, P, P, 3) uint8.

    Raises:
        ValueError: `patch` does not divide the sides, or there are fewer than k cells.
    """
    rows, columns = patch_grid(image.shape[0], image.shape[1], patch)
    if not 0 <= n_patches <= rows * columns:
        raise ValueError(f"an image of {rows * columns} cells does not hold {n_patches} patches")
    cells = image.reshape(rows, patch, columns, patch, 3).swapaxes(1, 2)  # (rows, columns, P, P, 3)
    first: NDArray[np.uint8] = cells.reshape(-1, patch, patch, 3)[:n_patches]
    return first


def _lines(pixels: NDArray[np.uint8], patch: int) -> NDArray[np.void]:
    """Each line of a patch as one opaque value of 3·P bytes: NumPy moves it at once, in half the time of its pixels."""
    lines: NDArray[np.void] = np.ascontiguousarray(pixels).reshape(-1).view(f"V{3 * patch}")
    return lines
