"""Do texture and chance judge each image by itself, whatever else is in the batch?"""

import numpy as np
import pytest
from PIL import Image

from adq_wds.core.texture import texture
from adq_wds.protocols import Importance
from adq_wds.saliency.plain import RandomImportance, TextureImportance


def pictures(n: int, size: tuple[int, int] = (24, 16)) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)) for _ in range(n)]


def test_the_texture_of_a_patch_is_that_of_its_crop_alone() -> None:
    (image,) = pictures(1)
    crops = [image.crop((x, y, x + 8, y + 8)) for y in (0, 8) for x in (0, 8, 16)]
    expected = [float(texture(np.asarray(crop)[None])[0]) for crop in crops]
    assert TextureImportance(8)([image], [None], [0])[0].tolist() == expected


def test_chance_goes_by_the_seed_alone() -> None:
    images = pictures(3)
    one, two, again = RandomImportance(8)(images, [None] * 3, [5, 6, 5])
    assert one.shape == (6,)
    assert one.tolist() == again.tolist() != two.tolist()


@pytest.mark.parametrize("importance", [TextureImportance(8), RandomImportance(8)])
def test_no_other_image_matters(importance: Importance) -> None:
    images, seeds = pictures(4), [3, 1, 4, 1]
    whole = importance(images, [None] * 4, seeds)
    assert whole.dtype == np.float32
    for i in range(4):
        assert np.array_equal(importance([images[i]], [None], [seeds[i]])[0], whole[i])
    assert importance([], [], []).shape == (0, 0)


@pytest.mark.parametrize("kind", [TextureImportance, RandomImportance])
def test_a_side_that_is_none_is_refused(kind: type) -> None:
    with pytest.raises(ValueError, match=r"patch must be a positive integer \(a side in pixels\), got 0"):
        kind(0)
