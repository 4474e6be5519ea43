"""What must a batch of images be? RGB, whatever the sizes."""

from __future__ import annotations

from collections.abc import Sequence

import PIL.Image


def check_rgb(images: Sequence[PIL.Image.Image]) -> None:
    """Refuse images that are not RGB: decoding decides how grey, CMYK or alpha become colours, not an encoder.

    Raises:
        ValueError: names the image's position in the batch and its mode.
    """
    for i, image in enumerate(images):
        if image.mode != "RGB":
            raise ValueError(f"image {i} of the batch has mode {image.mode!r}, not 'RGB'; convert it first")
