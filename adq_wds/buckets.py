"""How is one class's embeddings read, when the features lie shard by shard? Sorted once into a scratch file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from adq_wds.errors import FeaturesError
from adq_wds.tables.features import Features


class ClassBuckets:
    """The embeddings of a set, class by class; at most one shard or one class is in memory.

    One pass over the features writes each row to its class's place in a scratch file of N·D·2 bytes, which
    has no name on the disk and vanishes with the process.

    Args:
        features: the set.
        label: (N,) int32, class of each row over the whole set, rows in the order of `features`.
        classes: the classes wanted; other rows are skipped.
        scratch: folder for the scratch file; the system's temporary folder when None.
        progress: called with the number of rows read since its last call; they sum to N.

    Raises:
        FeaturesError: damaged features, a NaN, or no space for the scratch file.
    """

    def __init__(
        self,
        features: Features,
        label: NDArray[np.int32],
        classes: list[int],
        *,
        scratch: str | os.PathLike[str] | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> None:
        self._width = features.width
        self._order = np.argsort(label, kind="stable")  # within a class, rows stay in their order
        sorted_label = label[self._order]
        self._start = {c: int(np.searchsorted(sorted_label, c)) for c in classes}
        self._end = {c: int(np.searchsorted(sorted_label, c, side="right")) for c in classes}
        try:
            self._file = tempfile.TemporaryFile(dir=scratch, prefix=".adq-buckets-")  # noqa: SIM115 - see close()
            self._fill(features, label, progress)
        except OSError as error:
            raise FeaturesError(
                f"cannot sort {len(label):,} embeddings by class: {error.strerror or error} in "
                f"{scratch or tempfile.gettempdir()}, which needs {len(label) * self._width * 2:,} bytes"
            ) from error

    def _fill(
        self, features: Features, label: NDArray[np.int32], progress: Callable[[int], object] | None
    ) -> None:
        filled = dict(self._start)
        row_bytes = self._width * 2
        first = 0
        for file in features:
            rows = file.embedding()
            mine = label[first : first + file.n]
            order = np.argsort(mine, kind="stable")
            present, starts, counts = np.unique(mine[order], return_index=True, return_counts=True)
            for c, start, n in zip(present.tolist(), starts.tolist(), counts.tolist(), strict=True):
                if c in filled:
                    self._file.seek(filled[c] * row_bytes)
                    self._file.write(rows[order[start : start + n]].data)
                    filled[c] += n
            first += file.n
            if progress is not None:
                progress(file.n)
        self._file.flush()

    def read(self, c: int) -> tuple[NDArray[np.int64], NDArray[np.float16]]:
        """One class: positions (n,) int64 in the set, ascending, and embeddings (n, D) float16."""
        start, end = self._start[c], self._end[c]
        n_bytes = (end - start) * self._width * 2
        self._file.seek(start * self._width * 2)
        data = self._file.read(n_bytes)
        if len(data) != n_bytes:
            raise FeaturesError("the scratch file was cut short while it was in use")
        return self._order[start:end], np.frombuffer(data, dtype=np.float16).reshape(-1, self._width)

    def close(self) -> None:
        """Give the disk space back."""
        self._file.close()
