"""Draws images of any shape to squares of one size."""

from __future__ import annotations

from PIL import Image


def centre_square(image: Image.Image, size: int) -> Image.Image:
    """The largest square in the middle of an image, drawn to size × size pixels.

    By Pillow's bicubic filter, which averages where it shrinks. In one step: the same as shrinking the short side and
    cutting the centre out, but for the rounding of the long side. A smaller image is enlarged.

    Args:
        image: RGB, of any size.
        size: in pixels.

    Returns:
        RGB, size × size; the image itself where it is that already.

    >>> centre_square(Image.new("RGB", (640, 480)), 224).size
    (224, 224)
    """
    if image.size == (size, size):
        return image
    short = min(image.size)
    left, top = (image.width - short) / 2, (image.height - short) / 2
    return image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + short, top + short))
