"""Defines the protocols of plug-ins: encoders, importances of patches, allocation rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

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


Allocation = Callable[[NDArray[np.int64], NDArray[np.float64], float], NDArray[np.float64]]
