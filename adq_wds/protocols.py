"""Defines the protocols of plug-ins: encoders, importances of patches, engines of variants, allocation rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Label = int | str | None
Answer = tuple[NDArray[np.float32], NDArray[np.float32] | None]
"""An encoder's: embeddings (B, D), and logits (B, C) where there is a head."""


class Encoder(Protocol):
    """Maps images to embeddings. Its three names are stored in every features file, so that encoders are
    never mixed."""

    @property
    def name(self) -> str: ...
    @property
    def revision(self) -> str: ...
    @property
    def preprocessing_hash(self) -> str: ...
    def __call__(self, images: Sequence[Image.Image]) -> Answer:
        """Embeddings (B, D), and logits (B, C) where there is a head, of B upright RGB images of any size."""


class Importance(Protocol):
    """Images to the importance of their patches."""

    def __call__(
        self, images: Sequence[Image.Image], labels: Sequence[Label], seeds: Sequence[int]
    ) -> NDArray[np.float32]:
        """(B, L) importances of L patches, row by row from the top left, of B upright RGB images of one size."""


class VariantEngine(Protocol):
    """Images to variants of themselves, for `Vary`.

    It may also have the attributes `side`, the (height, width) that it takes, `n_classes`, the classes that it knows, and
    `draws_itself`: then `noise` is (B,) uint64, a seed for each image.
    """

    def __call__(
        self, images: NDArray[np.float32], labels: NDArray[np.int64] | None, noise: NDArray[Any]
    ) -> NDArray[np.float32]:
        """(B, 3, H, W) variants of (B, 3, H, W) RGB images, both in [-1, 1].

        Args:
            images: all of one size.
            labels: (B,) classes; None where there are none.
            noise: (B, 3, H, W) float32, standard normal.
        """


Allocation = Callable[[NDArray[np.int64], NDArray[np.float64], float], NDArray[np.float64]]
