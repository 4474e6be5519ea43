"""Is the square in the middle the one that shrinking and cutting out gives?"""

import numpy as np
import pytest
from PIL import Image

from adq_wds.pipes.resize import centre_square


def gradient(width: int, height: int) -> Image.Image:
    rows, columns = np.mgrid[0:height, 0:width]
    values = np.stack([columns * 255 / width, rows * 255 / height, (rows + columns) % 97], axis=2)
    return Image.fromarray(values.astype(np.uint8))


@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (128, 64), (160, 160)])
def test_it_is_the_centre_of_the_shrunk_image(shape: tuple[int, int]) -> None:
    image, size = gradient(*shape), 32
    scale = size / min(shape)
    shrunk = image.resize((round(shape[0] * scale), round(shape[1] * scale)), Image.Resampling.BICUBIC)
    left, top = (shrunk.width - size) // 2, (shrunk.height - size) // 2
    expected = shrunk.crop((left, top, left + size, top + size))
    found = np.asarray(centre_square(image, size)).astype(int)
    assert abs(found - np.asarray(expected)).max() <= 2


def test_an_image_of_the_size_stays_and_a_smaller_one_grows() -> None:
    image = gradient(32, 32)
    assert centre_square(image, 32) is image
    assert centre_square(gradient(7, 5), 32).size == (32, 32)
