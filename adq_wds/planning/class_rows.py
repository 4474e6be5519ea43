"""Makes unit rows of a class: in memory, or where they are too many in a file that is mapped into memory."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from adq_wds.core.kernel import unit_rows
from adq_wds.planning.buckets import DiskRows

_BLOCK_ROWS = 4096


def unit_blocks(embedding: DiskRows) -> Iterator[tuple[slice, NDArray[np.float64]]]:
    """The unit rows of a class, some at a time, and which they are."""
    for start in range(0, len(embedding), _BLOCK_ROWS):
        here = slice(start, min(start + _BLOCK_ROWS, len(embedding)))
        yield here, unit_rows(embedding[here])


def fits(embedding: DiskRows, memory_bytes: int) -> bool:
    """Whether a class's unit rows, and a copy, are held in memory: they take 16·n·D bytes."""
    return 16 * len(embedding) * embedding.width <= memory_bytes


def mapped_unit_rows(embedding: DiskRows) -> NDArray[np.float32]:
    """(n, D) float32 unit rows, which are exact in it, in an unnamed file beside the embeddings' own; may be written.

    Raises:
        OSError: no space for 4·n·D bytes.
    """
    n, D = embedding.shape
    with tempfile.TemporaryFile(dir=embedding.path.parent, prefix=".rows-") as file:
        os.posix_fallocate(
            file.fileno(), 0, max(1, 4 * n * D)
        )  # a full disk is an error here, and a crash later
        rows: NDArray[np.float32] = np.memmap(file, np.float32, "r+", shape=(n, D))
    for here, block in unit_blocks(embedding):
        rows[here] = block
    return rows
