"""Embeds an image by its 8×8 mean colours: an encoder that needs neither weights nor torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from adq_wds.samples.image import check_rgb

BOX = PIL.Image.Resampling.BOX
SIDE = 8
CHUNK_BYTES = 1 << 19
"""Images of one size averaged together: enough to share the overhead, small enough for the cache."""


@dataclass(frozen=True)
class Thumbnail:
    """The mean RGB of the 8×8 cells of an image: D = 192, row by row, colours last, values in [0, 1].

    Exact when both sides are multiples of 8; else the image is first resized to 8×8 by Pillow's box filter, which
    rounds to whole grey levels.

    Source: ours; a baseline that costs a few microseconds, so that every step can be tried without weights.

    >>> h, logits = Thumbnail()([PIL.Image.new("RGB", (32, 32), (255, 0, 51))])
    >>> h.shape, h[0, :3], logits is None
    ((1, 192), array([1. , 0. , 0.2], dtype=float32), True)
    """

    name: str = "thumbnail"
    revision: str = "1"
    preprocessing_hash: str = ""
    width: int = SIDE * SIDE * 3
    n_classes: None = None

    def __call__(self, images: Sequence[PIL.Image.Image]) -> tuple[NDArray[np.float32], None]:
        """Average every image.

        Args:
            images: B RGB images of any sizes.

        Returns:
            (B, 192) float32 in [0, 1]; no logits.

        Raises:
            ValueError: an image is not RGB; names its position and mode.
        """
        check_rgb(images)
        h = np.empty((len(images), self.width), dtype=np.float32)
        by_size: dict[tuple[int, int], list[int]] = {}
        for i, image in enumerate(images):
            by_size.setdefault(image.size, []).append(i)
        for (width, height), members in by_size.items():
            exact = width % SIDE == 0 and height % SIDE == 0
            chunk = max(1, CHUNK_BYTES // (3 * width * height)) if exact else len(members)
            for start in range(0, len(members), chunk):
                rows = members[start : start + chunk]
                h[rows] = _means([images[i] if exact else images[i].resize((SIDE, SIDE), BOX) for i in rows])
        return h, None


def _means(images: Sequence[PIL.Image.Image]) -> NDArray[np.float64]:
    """(B, 192) cell means in [0, 1] of images of one size, both sides multiples of 8."""
    width, height = images[0].size
    pixels = np.empty((len(images), height, width, 3), dtype=np.uint8)
    for i, image in enumerate(images):
        pixels[i] = np.asarray(image)
    rows = pixels.reshape(len(images) * SIDE, height // SIDE, width * 3).sum(axis=1, dtype=np.uint32)
    cells = rows.astype(np.float64).reshape(-1, SIDE, width // SIDE, 3)  # (B·8, 8, pixels of a cell, 3)
    sums = np.einsum("rcpk->rck", cells)  # whole numbers below 2^53: exact in any order
    n_pixels = (height // SIDE) * (width // SIDE)
    means: NDArray[np.float64] = sums.reshape(len(images), -1) / (255.0 * n_pixels)
    return means
