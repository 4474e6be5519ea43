"""Measures the texture of an image: the mean strength of its edges."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

SHORT_SIDE = 256  # larger images are scaled down to it first, by the caller, who has the decoder
# Luma times 255,000: whole numbers, which float32 holds exactly through the filters below. So a BLAS library may add
# them in any order, and an image's texture depends neither on its place in the batch nor on the machine's BLAS.
_LUMA = np.array([299, 587, 114], dtype=np.float32)


def texture(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Texture level of each image: the mean of 0.5·|dx| + 0.5·|dy| of its luma.

    dx and dy are the unnormalised 3×3 Sobel filters; the border is mirrored without repeating the edge pixel.
    A flat image has 0; the largest possible value is about 4.

    Args:
        images: (B, H, W, 3) uint8 RGB of one size, short side <= 256.

    Returns:
        (B,) float32, each the same whatever else is in the batch.

    Source: Li et al. 2024 (arXiv 2412.16895), representativeness. The paper averages over 32×32 tiles; taking
    the whole image at once is ours, and needs no tiles.

    >>> step = np.zeros((1, 4, 4, 3), np.uint8); step[:, :, 2:] = 255
    >>> texture(step)
    array([1.], dtype=float32)
    """
    if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8:
        raise ValueError(f"images must be (B, H, W, 3) uint8, got {images.shape} {images.dtype}")
    luma = images.astype(np.float32) @ _LUMA  # (B, H, W)
    padded = np.pad(luma, ((0, 0), (1, 1), (1, 1)), mode="reflect")
    rows = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]  # (B, H, W + 2), smoothed down the columns
    columns = padded[:, :, :-2] + 2 * padded[:, :, 1:-1] + padded[:, :, 2:]  # (B, H + 2, W)
    edges = np.abs(rows[:, :, 2:] - rows[:, :, :-2])
    edges += np.abs(columns[:, 2:] - columns[:, :-2])
    level: NDArray[np.float32] = np.float32(0.5 / 255_000) * edges.reshape(len(images), -1).mean(axis=1)
    return level
