"""Does the thumbnail encoder give the mean colours of 8×8 cells, for any sizes, without torch?"""

import pickle
import subprocess
import sys
from itertools import pairwise

import numpy as np
import PIL.Image
import pytest
from numpy.typing import NDArray

from adq_wds.models.thumbnail import CHUNK_BYTES, Thumbnail


def noise(width: int, height: int, seed: int = 0) -> PIL.Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


def cell_means(image: PIL.Image.Image) -> NDArray[np.float64]:
    """The slow oracle: cell by cell, colour by colour."""
    pixels = np.asarray(image).astype(np.float64) / 255
    rows = np.linspace(0, image.height, 9, dtype=int)
    columns = np.linspace(0, image.width, 9, dtype=int)
    means = [
        pixels[top:bottom, left:right, colour].mean()
        for top, bottom in pairwise(rows)
        for left, right in pairwise(columns)
        for colour in range(3)
    ]
    return np.array(means)


@pytest.mark.parametrize("size", [(8, 8), (32, 32), (64, 24), (8, 160), (224, 224), (1024, 768)])
def test_sides_divisible_by_8_give_the_exact_cell_means(size: tuple[int, int]) -> None:
    images = [noise(*size, seed=seed) for seed in range(3)]
    assert Thumbnail()([])[0].shape == (0, 192)
    h, logits = Thumbnail()(images)
    assert h.shape == (3, 192)
    assert h.dtype == np.float32
    assert logits is None
    np.testing.assert_allclose(h, [cell_means(image) for image in images], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("size", [(33, 32), (32, 31), (500, 375), (3, 5), (1, 1)])
def test_other_sides_give_pillows_box_filter(size: tuple[int, int]) -> None:
    image = noise(*size)
    expected = np.asarray(image.resize((8, 8), PIL.Image.Resampling.BOX)).ravel() / 255
    np.testing.assert_allclose(Thumbnail()([image])[0][0], expected, rtol=1e-6)


def test_other_images_of_the_batch_change_nothing() -> None:
    n_small = 2 * CHUNK_BYTES // (3 * 32 * 32) + 1  # more than two chunks of one size
    images = [noise(32, 32, seed) for seed in range(n_small)]
    for at, size in ((0, (500, 375)), (7, (224, 224)), (8, (40, 41)), (100, (224, 224))):
        images.insert(at, noise(*size, seed=at))
    together = Thumbnail()(images)[0]
    alone = np.concatenate([Thumbnail()([image])[0] for image in images])
    np.testing.assert_array_equal(together, alone)


def test_an_image_that_is_not_rgb_is_named() -> None:
    with pytest.raises(ValueError, match=r"image 1 of the batch has mode 'L', not 'RGB'"):
        Thumbnail()([noise(8, 8), noise(8, 8).convert("L")])


def test_it_pickles() -> None:
    assert pickle.loads(pickle.dumps(Thumbnail())) == Thumbnail()  # noqa: S301 - our own bytes


def test_importing_it_does_not_import_torch() -> None:
    code = "import sys, adq_wds.models.thumbnail; assert not {'torch', 'timm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
