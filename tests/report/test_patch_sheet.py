"""A sheet of patches shows each picture in its cell, what was dropped, and where importance is high."""

import numpy as np
import pytest
from PIL import Image

from adq_wds.report.patch_sheet import CELL, Panel, draw_sheet, heat, holes, psnr

RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (8, 12, 3), dtype=np.uint8)
GRID, PATCH = (2, 3), 4


def patches(pixels: np.ndarray) -> np.ndarray:
    """(L, P, P, 3): the patches of an image, row after row."""
    return pixels.reshape(2, 4, 3, 4, 3).swapaxes(1, 2).reshape(6, 4, 4, 3)


def test_kept_patches_stay_and_dropped_ones_are_pink() -> None:
    kept = np.array([0, 4, 5])
    shown = patches(holes(IMAGE, kept, GRID, PATCH))
    assert (shown[kept] == patches(IMAGE)[kept]).all()
    assert {tuple(pixel) for pixel in shown[[1, 2, 3]].reshape(-1, 3).tolist()} == {(255, 205, 220)}


def test_importance_is_bright_where_it_is_high() -> None:
    grey = np.full((8, 12, 3), 128, np.uint8)
    importance = np.array([0.1, 0.5, 0.2, 0.9, 0.3, 0.4], np.float32)
    brightness = patches(heat(importance, GRID, PATCH, grey))[..., 0].reshape(6, -1)
    assert (brightness == brightness[:, :1]).all()
    assert np.argsort(brightness[:, 0]).tolist() == np.argsort(importance).tolist()
    assert len(np.unique(heat(np.ones(6), GRID, PATCH, grey).reshape(-1, 3), axis=0)) == 1


def test_the_ratio_of_signal_to_noise_is_that_of_the_formula() -> None:
    other = np.clip(IMAGE.astype(int) + RNG.integers(-9, 10, IMAGE.shape), 0, 255).astype(np.uint8)
    error = np.square(IMAGE.astype(float) - other)
    assert psnr(IMAGE, other) == pytest.approx(10 * np.log10(255**2 / error.mean()))
    where = np.zeros((8, 12), bool)
    assert psnr(IMAGE, other, where) == psnr(IMAGE, IMAGE) == float("inf")
    where[2:5] = True
    assert psnr(IMAGE, other, where) == pytest.approx(10 * np.log10(255**2 / error[2:5].mean()))


@pytest.mark.parametrize("size", [(8, 12), (CELL, CELL), (700, 350), (1, 1)])
def test_every_picture_lies_whole_in_its_cell(size: tuple[int, int]) -> None:
    """Enlarged by whole factors, or made smaller; titles above, lines beneath."""
    red = np.zeros((*size, 3), np.uint8) + np.array([255, 0, 0], np.uint8)
    sheet = draw_sheet([[Panel(red, ("one", "two")), Panel(red, ())]] * 3, ["a", "b"])
    found = (np.asarray(sheet) == [255, 0, 0]).all(axis=2)
    factor = CELL // max(size) or CELL / max(size)
    assert found.sum() == 6 * int(size[0] * factor) * int(size[1] * factor)
    ink = (np.asarray(sheet.convert("L")) < 100) & ~found
    assert ink.any()
    assert isinstance(sheet, Image.Image)
