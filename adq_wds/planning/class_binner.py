"""What cuts one class into bins: its embeddings alone, unless a kernel needs further columns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from adq_wds.core.graphcut import Binning, graphcut_bins
from adq_wds.planning.buckets import Column


class CutClass(Protocol):
    """Cuts one class of n samples into at most `bins` bins, exactly and in the same way for any memory."""

    def __call__(
        self,
        rows: NDArray[np.float64],
        further: list[NDArray[Any]],
        bins: int,
        *,
        memory_bytes: int,
        progress: Callable[[int], object] | None,
    ) -> Binning:
        """Take unit embeddings (n, D) and the columns asked for, (n, width) each."""


@dataclass(frozen=True)
class ClassBinner:
    """A way to bin a class.

    Attributes:
        cut: does it.
        columns: what it needs beside the embeddings.
        without_matrix: how similarities are found where their matrix exceeds the memory, for the log; {} is that memory in GiB.
    """

    cut: CutClass
    columns: tuple[Column, ...] = ()
    without_matrix: str = "row by row"


def _cut(
    rows: NDArray[np.float64],
    further: list[NDArray[Any]],
    bins: int,
    *,
    memory_bytes: int,
    progress: Callable[[int], object] | None,
) -> Binning:
    assert not further
    return graphcut_bins(rows, bins, memory_bytes=memory_bytes, progress=progress)


BY_EMBEDDINGS = ClassBinner(_cut, without_matrix="up to {:.2f} GiB (pooled)")
