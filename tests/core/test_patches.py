"""Patches: cutting and tiling lose nothing, the count and the choice are those that are stated."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from adq_wds.core.patches import (
    cut_patches,
    join_patches,
    n_kept,
    patch_grid,
    tile,
    tile_columns,
    top_patches,
    untile,
)

sides = st.integers(1, 5)


def noise(*shape: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@given(B=st.integers(0, 3), rows=sides, columns=sides, P=sides)
def test_joining_cut_patches_gives_the_image_back(B: int, rows: int, columns: int, P: int) -> None:
    images = noise(B, rows * P, columns * P, 3)
    patches = cut_patches(images, P)
    assert patches.shape == (B, rows * columns, P, P, 3)
    for place in range(rows * columns):
        y, x = divmod(place, columns)
        assert (patches[:, place] == images[:, y * P : (y + 1) * P, x * P : (x + 1) * P]).all()
    assert (join_patches(patches, (rows, columns)) == images).all()


def test_patches_are_copies() -> None:
    images = noise(1, 4, 4, 3)
    before = images.copy()
    cut_patches(images, 4)[:] = 0
    cut_patches(images, 2)[:] = 0
    assert (images == before).all()


@pytest.mark.parametrize("shape", [(0, 4), (4, 3), (6, 4), (3, 4)])
def test_a_patch_that_does_not_divide_the_image_is_refused(shape: tuple[int, int]) -> None:
    text = rf"image of {shape[0]} x {shape[1]} pixels .* patches of 4 x 4; resize or crop"
    with pytest.raises(ValueError, match=text):
        patch_grid(*shape, 4)


@pytest.mark.parametrize("patch", [0, -1, 1.0, True, "16"])
def test_a_patch_side_that_is_no_positive_integer_is_refused(patch: int) -> None:
    with pytest.raises(ValueError, match=f"patch must be a positive integer .* got {patch!r}"):
        patch_grid(16, 16, patch)


@pytest.mark.parametrize(
    "images", [np.zeros((4, 4, 3), np.uint8), np.zeros((1, 4, 4, 3)), np.zeros((1, 4, 4, 4), np.uint8)]
)
def test_other_images_are_refused(images: NDArray[np.uint8]) -> None:
    with pytest.raises(ValueError, match=r"images must be \(B, H, W, 3\) uint8, got"):
        cut_patches(images, 2)


def test_the_number_kept_is_the_floor_of_the_exact_product() -> None:
    for L in range(300):
        for percent in range(101):
            assert n_kept(L, percent / 100) == L * percent // 100


@given(st.integers(1, 4), st.integers(1, 12), st.data())
def test_no_patch_left_out_comes_before_a_kept_one(B: int, L: int, data: st.DataObject) -> None:
    values = data.draw(st.lists(st.sampled_from([-1.0, -0.0, 0.0, 2.0, 3.5]), min_size=B * L, max_size=B * L))
    importance = np.array(values, np.float32).reshape(B, L)
    k = data.draw(st.integers(0, L))
    kept = top_patches(importance, k)
    assert kept.shape == (B, k)
    assert kept.dtype == np.int64
    for row, chosen in zip(importance, kept.tolist(), strict=True):
        best = sorted(range(L), key=lambda place: (-row[place], place))[:k]
        assert chosen == sorted(best)


def test_importances_that_overflowed_are_refused_by_their_place() -> None:
    importance = np.zeros((3, 4), np.float16)
    importance[2, 1] = np.inf
    with pytest.raises(ValueError, match=r"importance of patch 1 of image 2 is inf, .*; half prec"):
        top_patches(importance, 2)
    importance[1, 3] = np.nan
    with pytest.raises(ValueError, match="importance of patch 3 of image 1 is nan"):
        top_patches(importance, 2)
    for wrong in (np.zeros(4), np.zeros((1, 4), np.int64)):
        with pytest.raises(ValueError, match=r"importance must be \(B, L\) floats, got"):
            top_patches(wrong, 1)


@given(k=st.integers(1, 300), P=st.sampled_from([1, 8, 16]), cells=st.integers(1, 40), odd=st.integers(0, 7))
def test_columns_leave_the_fewest_cells_blank(k: int, P: int, cells: int, odd: int) -> None:
    max_side = cells * P + min(odd, P - 1)
    fits = [c for c in range(1, k + 1) if c * P <= max_side and -(-k // c) * P <= max_side]
    if not fits:
        with pytest.raises(ValueError, match=f"{k} patches of {P} x {P} pixels do not tile an image of at"):
            tile_columns(k, P, max_side=max_side)
        return
    expected = min(fits, key=lambda c: (-(-k // c) * c - k, -c))
    assert tile_columns(k, P, max_side=max_side) == expected


def test_nothing_to_tile_and_large_patches_are_refused() -> None:
    for k, P in ((0, 16), (1, 200)):
        with pytest.raises(ValueError, match=f"{k} patches of {P} x {P} pixels do not tile"):
            tile_columns(k, P, max_side=100)


@given(k=st.integers(1, 9), columns=st.integers(1, 9), P=sides)
def test_tiled_patches_come_back_and_lie_row_by_row(k: int, columns: int, P: int) -> None:
    patches = noise(k, P, P, 3)
    image = tile(patches, columns)
    assert image.shape == (-(-k // columns) * P, columns * P, 3)
    assert (untile(image, k, P) == patches).all()
    y, x = divmod(k - 1, columns)
    assert (image[y * P : (y + 1) * P, x * P : (x + 1) * P] == patches[-1]).all()


def test_blank_cells_have_the_mean_colour_of_the_last_patch() -> None:
    patches = np.zeros((3, 2, 2, 3), np.uint8)
    patches[2, 0] = (200, 100, 4)
    assert tile(patches, 2)[2:, 2:].tolist() == [[[100, 50, 2]] * 2] * 2
    with pytest.raises(ValueError, match="an image of 4 cells does not hold 5 patches"):
        untile(noise(4, 4, 3), 5, 2)
