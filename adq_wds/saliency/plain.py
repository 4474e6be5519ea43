"""Scores patches without a network, by texture or at random, and checks batches of images for all importances."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from adq_wds.core.importance import random_importance, texture_importance
from adq_wds.core.patches import Grid, patch_grid
from adq_wds.protocols import Label
from adq_wds.samples.image import check_rgb


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


@dataclass(frozen=True)
class _OfPatches:
    """An importance whose only setting is the side of its patches.

    Attributes:
        patch: side P in pixels of the images' patches.
    """

    patch: int

    def __post_init__(self) -> None:
        patch_grid(self.patch, self.patch, self.patch)


@dataclass(frozen=True)
class TextureImportance(_OfPatches):
    """The texture level of each patch; see `core.importance.texture_importance`. Labels and seeds are ignored."""

    def __call__(
        self, images: Sequence[PIL.Image.Image], labels: Sequence[Label], seeds: Sequence[int]
    ) -> NDArray[np.float32]:
        """(B, L) float32, >= 0, of B RGB images of one size, whose sides P divides."""
        check_rgb(images)
        if not len(images):
            return np.empty((0, 0), np.float32)
        rows = [texture_importance(np.asarray(image)[None], self.patch) for image in images]
        return np.concatenate(rows)


@dataclass(frozen=True)
class RandomImportance(_OfPatches):
    """Uniform draws by each image's seed; see `core.importance.random_importance`. Pixels and labels are ignored."""

    def __call__(
        self, images: Sequence[PIL.Image.Image], labels: Sequence[Label], seeds: Sequence[int]
    ) -> NDArray[np.float32]:
        """(B, L) float32 in [0, 1), of B images of one size, whose sides P divides."""
        if not len(images):
            return np.empty((0, 0), np.float32)
        rows, columns = patch_grid(images[0].height, images[0].width, self.patch)
        return random_importance(seeds, rows * columns)
