"""How does an encoder's network look at whole images whose patches are to be judged?"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import PIL.Image
import timm.data
import torch

from adq_wds.core.patches import Grid, patch_grid
from adq_wds.models.builtin import SIDE, BuiltinEncoder, normalised, resized
from adq_wds.models.timm_encoder import TimmEncoder
from adq_wds.samples.image import check_rgb

Classifier = TimmEncoder | BuiltinEncoder


def check_patch(patch: object) -> None:
    """Raise `ValueError` unless this is a side in pixels."""
    if type(patch) is not int or patch < 1:
        raise ValueError(f"patch={patch!r}: expected the side of a patch in pixels, >= 1")


def grid_of(images: Sequence[PIL.Image.Image], patch: int) -> Grid:
    """Rows and columns of patches of RGB images of one size.

    Raises:
        ValueError: not RGB, several sizes, or sides that `patch` does not divide.
    """
    check_rgb(images)
    for i, image in enumerate(images):
        if image.size != images[0].size:
            raise ValueError(
                f"image {i} of the batch is {image.width} x {image.height}, the first one {images[0].width} x "
                f"{images[0].height}; resize them to one size first"
            )
    return patch_grid(images[0].height, images[0].width, patch)


def input_size(encoder: Classifier) -> tuple[int, int]:
    """Height and width at which the network looks at images."""
    if isinstance(encoder, BuiltinEncoder):
        return SIDE, SIDE
    data: Any = timm.data
    args = {"img_size": encoder._arguments["image_size"]}
    _, height, width = data.resolve_model_data_config(encoder.model, args=args)["input_size"]
    return height, width


def network_input(encoder: Classifier, images: Sequence[PIL.Image.Image]) -> torch.Tensor:
    """Images as the network takes them: each whole, unlike for embedding, where the borders may be cut off."""
    if isinstance(encoder, BuiltinEncoder):
        pixels = torch.from_numpy(np.stack([np.asarray(resized(image)) for image in images]))
        return normalised(pixels.to(encoder.device))
    height, width = input_size(encoder)
    whole = [
        image
        if image.size == (width, height)
        else image.resize((width, height), PIL.Image.Resampling.BICUBIC)
        for image in images
    ]
    x = torch.from_numpy(np.stack([np.asarray(image) for image in whole])).to(encoder.device)
    return x.permute(0, 3, 1, 2).float().sub_(encoder._mean).div_(encoder._std)


@contextlib.contextmanager
def running(encoder: Classifier) -> Iterator[None]:
    """Run parts of an encoder's network as the encoder itself would."""
    amp = torch.autocast(encoder.device.type, torch.bfloat16, enabled=encoder._forward.options.amp)
    alone = encoder._lock if encoder.device.type != "cpu" else contextlib.nullcontext()
    with alone, torch.no_grad(), amp:
        yield
