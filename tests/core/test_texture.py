"""Texture equals a plain Sobel filter, pixel by pixel."""

import numpy as np
import pytest
from numpy.typing import NDArray

from adq_wds.core.texture import texture


def pixel_by_pixel(image: NDArray[np.uint8]) -> float:
    """The definition, with the border mirrored by index."""
    luma = (0.299 * image[..., 0] + 0.587 * image[..., 1] + 0.114 * image[..., 2]) / 255
    height, width = luma.shape

    def at(y: int, x: int) -> float:
        y, x = abs(y), abs(x)
        y = 2 * (height - 1) - y if y >= height else y
        x = 2 * (width - 1) - x if x >= width else x
        return float(luma[max(y, 0), max(x, 0)])

    total = 0.0
    for y in range(height):
        for x in range(width):
            dx = sum(w * (at(y + k, x + 1) - at(y + k, x - 1)) for k, w in ((-1, 1), (0, 2), (1, 1)))
            dy = sum(w * (at(y + 1, x + k) - at(y - 1, x + k)) for k, w in ((-1, 1), (0, 2), (1, 1)))
            total += 0.5 * abs(dx) + 0.5 * abs(dy)
    return total / (height * width)


@pytest.mark.parametrize("shape", [(2, 2), (3, 5), (8, 8), (17, 11), (32, 32)])
def test_texture_is_the_mean_sobel_strength(shape: tuple[int, int]) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, *shape, 3), dtype=np.uint8)
    assert texture(images) == pytest.approx([pixel_by_pixel(image) for image in images], rel=1e-5)


@pytest.mark.parametrize("shape", [(16, 20), (1, 7), (5, 3), (13, 31)])
def test_an_image_has_the_same_texture_in_any_batch(shape: tuple[int, int]) -> None:
    images = np.random.default_rng(1).integers(0, 256, (9, *shape, 3), dtype=np.uint8)
    alone = np.concatenate([texture(image[None]) for image in images])
    assert (texture(images) == alone).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (40, 30), (3, 13)])
def test_a_flat_image_has_none_whatever_its_colour(shape: tuple[int, int]) -> None:
    colours = np.random.default_rng(2).integers(0, 256, (50, 1, 1, 3), dtype=np.uint8)
    images = np.broadcast_to(colours, (50, *shape, 3)).copy()
    assert texture(images).tolist() == [0.0] * 50


def test_other_arrays_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(B, H, W, 3\) uint8, got \(4, 4, 3\) uint8"):
        texture(np.zeros((4, 4, 3), np.uint8))
