"""Measures the shift of an encoder's feature as an image loses patches, and the fewest patches within a tolerance."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from adq_wds.core.patches import Grid, cut_patches, join_patches, n_kept, top_patches
from adq_wds.core.unit_rows import unit_rows
from adq_wds.protocols import Encoder

KEEPS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
"""Keep ratios that are tried."""


class Look(NamedTuple):
    """Some images of a chunk, all of one size, and the importance of their patches.

    Attributes:
        positions: (B,) their positions in the chunk.
        images: B of them, RGB.
        pixels: (B, H, W, 3) uint8.
        scores: (B, L) floats.
        grid: rows and columns of patches.
    """

    positions: list[int]
    images: list[Image.Image]
    pixels: NDArray[np.uint8]
    scores: NDArray[np.floating]
    grid: Grid

    @property
    def patch(self) -> int:
        """P, side of a patch in pixels."""
        return int(self.pixels.shape[1]) // self.grid[0]

    @property
    def kept_counts(self) -> NDArray[np.int64]:
        """`kept_counts` of these images."""
        return kept_counts(self.scores.shape[1])


def kept_counts(n_patches: int) -> NDArray[np.int64]:
    """(R,) numbers of patches that are tried, descending: all L, then those of `KEEPS`, at least one.

    >>> kept_counts(8).tolist()
    [8, 7, 6, 5, 4, 3, 2, 1]
    """
    counts = {n_patches, *(n_kept(n_patches, keep) for keep in KEEPS)} - {0}
    return np.array(sorted(counts, reverse=True), dtype=np.int64)


def fewest_patches(encoder: Encoder, look: Look, tolerance: float) -> NDArray[np.int64]:
    """(B,) how many patches to keep: the last of `kept_counts` down to which no shift exceeds `tolerance`."""
    counts = look.kept_counts
    kept = np.full(len(look.positions), counts[0])
    left = np.arange(len(look.positions))  # images that may lose more
    whole = _units(encoder, look.images)
    for k in counts[1:].tolist():
        left = left[_shift(encoder, look, left, k, whole) <= tolerance]
        kept[left] = k
        if not len(left):
            break
    return kept


def shift_table(encoder: Encoder, look: Look) -> NDArray[np.float32]:
    """(B, R) shifts at each of `kept_counts`, the first 0.

    A shift is 1 − cos between the encoder's features of the whole image and of the image whose dropped patches have
    the mean colour of the kept ones, rounded to 9 decimals; 1 where one of the two is zero.

    Source: ours.
    """
    everywhere, whole = np.arange(len(look.positions)), _units(encoder, look.images)
    columns = [_shift(encoder, look, everywhere, k, whole) for k in look.kept_counts[1:].tolist()]
    return np.stack([np.zeros(len(look.positions), np.float32), *columns], axis=1)


def _shift(
    encoder: Encoder, look: Look, rows: NDArray[np.int64], k: int, whole: NDArray[np.float64]
) -> NDArray[np.float32]:
    """(n,) shifts of some of the images with k patches kept."""
    cells = cut_patches(look.pixels[rows], look.patch)  # (n, L, P, P, 3)
    keep = np.zeros(cells.shape[:2], np.bool_)
    np.put_along_axis(keep, top_patches(look.scores[rows], k), True, axis=1)
    for patches, kept in zip(cells, keep, strict=True):
        patches[~kept] = patches[kept].mean(axis=(0, 1, 2)).round().astype(np.uint8)
    filled = [Image.fromarray(image) for image in join_patches(cells, look.grid)]
    cosine = np.einsum("nd,nd->n", whole[rows], _units(encoder, filled))
    shift: NDArray[np.float32] = np.maximum((1 - cosine).round(9), 0).astype(np.float32)
    return shift


def _units(encoder: Encoder, images: list[Image.Image]) -> NDArray[np.float64]:
    """(B, D) features of length 1, or 0.

    Raises:
        ValueError: one is not finite.
    """
    h: NDArray[np.float64] = np.asarray(encoder(images)[0], np.float64)
    if not np.isfinite(h).all():
        raise ValueError(
            "a feature holds NaN or infinity; half precision overflows like this, so try without AMP"
        )
    return unit_rows(h)[0]
