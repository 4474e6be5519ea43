"""Defines the sources of embeddings: an encoder, or stored embeddings."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adq_wds.protocols import Encoder
from adq_wds.samples.fields import Sample


class StoredEmbeddings(ABC):
    """Embeddings made elsewhere, one for each sample; opened by `open_embeddings`.

    Attributes:
        name: `stored:` and the name of the file or folder; `field:` and the field's name.
        revision: SHA-256 of the file, or over those of the folder's files; `field=` and the field's name.
        width: D; None where only the samples hold it.
        n_rows: rows in all; None where each sample holds its own.
        by_position: whether rows are indexed by the sample's position in the set (npy); then there must be `n_rows`
            samples.
    """

    name: str
    revision: str
    preprocessing_hash = ""
    width: int | None = None
    n_rows: int | None = None
    by_position = False

    @abstractmethod
    def row(self, sample: Sample, *, shard: str, position: int) -> NDArray[np.float32]:
        """The embedding of a sample: (D,) float32. Not checked for NaN; float64 beyond float32 is infinite.

        `position` is the sample's place among all samples, in the order of the shards. A missing or damaged embedding
        in a sample raises `SampleError`, a file without its row `FeaturesError`.
        """


Source = Encoder | StoredEmbeddings


def gpus_of(source: Source) -> float:
    """Accelerators that a process with this source needs."""
    device: Any = getattr(source, "device", None)
    return 0.0 if getattr(device, "type", "cpu") == "cpu" else 1.0
