"""Reads features class by class: sorts the rows of all shards once into a scratch file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adq_wds.core.graphcut import Binning, graphcut_bins
from adq_wds.errors import FeaturesError
from adq_wds.tables.features import Features
from adq_wds.tables.features_file import FeaturesFile


@dataclass(frozen=True)
class Column:
    """A column of features files: rows of `width` numbers."""

    read: Callable[[FeaturesFile], NDArray[Any]]
    dtype: np.dtype[Any]
    width: int

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.dtype.itemsize * self.width


@dataclass(frozen=True)
class ClassBinner:
    """A way to bin a class.

    Attributes:
        cut: takes unit embeddings (n, D), the further columns, the number of bins, `memory_bytes` and `progress`.
        columns: what it needs beside the embeddings.
        without_matrix: how similarities are computed where their matrix exceeds the memory, for the log; {}
            is that memory in GiB.
    """

    cut: Callable[..., Binning]
    columns: tuple[Column, ...]
    without_matrix: str


BY_EMBEDDINGS = ClassBinner(graphcut_bins, (), without_matrix="up to {:.2f} GiB (pooled)")


class ClassBuckets:
    """Columns of a set, class by class; at most one shard or one class is in memory.

    One pass over the features writes each row to its class's region of a scratch file. The file has no name
    on the disk and vanishes with the process.

    Args:
        features: the set.
        label: (N,) int32, class of each row over the whole set, rows in the order of `features`.
        classes: those wanted; other rows are skipped.
        columns: sorted too, beside the embeddings.
        scratch: folder for the scratch file; the system's temporary folder when None.
        progress: called with the number of rows read since its last call; they sum to N.

    Raises:
        FeaturesError: damaged features, a NaN, no logit gradients, or no space for the scratch file.
    """

    def __init__(
        self,
        features: Features,
        label: NDArray[np.int32],
        classes: list[int],
        *,
        columns: Sequence[Column] = (),
        scratch: str | os.PathLike[str] | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> None:
        embedding = Column(FeaturesFile.embedding, np.dtype(np.float16), features.width)
        self._columns = (embedding, *columns)
        sizes = [len(label) * column.row_bytes for column in self._columns]
        self._bases = [sum(sizes[:i]) for i in range(len(sizes))]  # the byte where each column begins
        self._order = np.argsort(label, kind="stable")  # within a class, rows stay in their order
        sorted_label = label[self._order]
        self._start = {c: int(np.searchsorted(sorted_label, c)) for c in classes}
        self._end = {c: int(np.searchsorted(sorted_label, c, side="right")) for c in classes}
        try:
            self._file = tempfile.TemporaryFile(dir=scratch, prefix=".adq-buckets-")  # noqa: SIM115 - see close()
            self._fill(features, label, progress)
        except OSError as error:
            n_bytes = sum(sizes)
            raise FeaturesError(
                f"cannot sort {len(label):,} embeddings by class: {error.strerror or error} in "
                f"{scratch or tempfile.gettempdir()}, which needs {n_bytes:,} bytes"
            ) from error

    def _fill(
        self, features: Features, label: NDArray[np.int32], progress: Callable[[int], object] | None
    ) -> None:
        filled = dict(self._start)
        first = 0
        for file in features:
            of_file = label[first : first + file.n]
            order = np.argsort(of_file, kind="stable")
            present, starts, counts = np.unique(of_file[order], return_index=True, return_counts=True)
            parts = list(zip(present.tolist(), starts.tolist(), counts.tolist(), strict=True))
            for column, base in zip(self._columns, self._bases, strict=True):
                rows = column.read(file)[order]
                for c, start, n in parts:
                    if c in filled:
                        self._file.seek(base + filled[c] * column.row_bytes)
                        self._file.write(rows[start : start + n].data)
            for c, _, n in parts:
                if c in filled:
                    filled[c] += n
            first += file.n
            if progress is not None:
                progress(file.n)
        self._file.flush()

    def rows_of(self, c: int) -> tuple[NDArray[np.int64], list[NDArray[Any]]]:
        """One class: positions (n,) int64 in the set, ascending; embeddings (n, D) float16, and the further columns."""
        columns = [self._read_column(c, i) for i in range(len(self._columns))]
        return self._order[self._start[c] : self._end[c]], columns

    def _read_column(self, c: int, i: int) -> NDArray[Any]:
        column = self._columns[i]
        n_bytes = (self._end[c] - self._start[c]) * column.row_bytes
        self._file.seek(self._bases[i] + self._start[c] * column.row_bytes)
        data = self._file.read(n_bytes)
        if len(data) != n_bytes:
            raise FeaturesError("the scratch file was cut short while it was in use")
        return np.frombuffer(data, dtype=column.dtype).reshape(-1, column.width)

    def close(self) -> None:
        """Delete the scratch file."""
        self._file.close()
