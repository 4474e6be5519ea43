"""Sorts the rows of all shards by class, once, into a scratch file that every process of a job may read."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adq_wds.errors import AdqError, FeaturesError
from adq_wds.files import atomic_path
from adq_wds.tables.features import Features
from adq_wds.tables.features_file import FeaturesFile

LEFT_OUT = -2  # class of a sample that is left out


@dataclass(frozen=True)
class Column:
    """A column of the rows of a set: `width` numbers each.

    Attributes:
        name: of the column.
        read: gives the rows of one shard, of its file and its rows' positions in the set.
        dtype, width: of a row.
    """

    name: str
    read: Callable[[FeaturesFile, slice], NDArray[Any]]
    dtype: np.dtype[Any]
    width: int = 1

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.dtype.itemsize * self.width

    @classmethod
    def of_array(cls, name: str, values: NDArray[Any]) -> Column:
        """A column of (N,) numbers that are in memory."""
        return cls(name, lambda _, rows: values[rows], values.dtype)


def embedding_column(features: Features) -> Column:
    """The embeddings: (n, D) float16."""
    return Column("embedding", lambda file, _: file.embedding(), np.dtype(np.float16), features.width)


@dataclass(frozen=True)
class DiskRows:
    """Rows (n, width) in a file, read when they are sliced; none is kept.

    Raises `FeaturesError` where the file ends early.
    """

    path: Path
    begin: int
    n: int
    width: int
    dtype: np.dtype[Any]

    def __len__(self) -> int:
        return self.n

    @property
    def shape(self) -> tuple[int, int]:
        """(n, width)."""
        return self.n, self.width

    def __getitem__(self, rows: slice) -> NDArray[Any]:
        start, stop, _ = rows.indices(self.n)
        row_bytes = self.width * self.dtype.itemsize
        values = np.empty((max(0, stop - start), self.width), self.dtype)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.begin + start * row_bytes)
            left = values.data.cast("B") if values.size else memoryview(b"")
            while len(left):
                if not (n := file.readinto(left)):
                    raise FeaturesError(f"{self.path}: the scratch file was cut short while it was in use")
                left = left[n:]
        return values


@dataclass(frozen=True)
class Buckets:
    """Columns of a set in a scratch file, the rows of each class side by side.

    Attributes:
        path: the file, there once it is whole.
        n_rows: rows of each column.
        columns: name → dtype and width, in the order of the file.
    """

    path: Path
    n_rows: int
    columns: Mapping[str, tuple[np.dtype[Any], int]]

    @classmethod
    def of(cls, path: Path, n_rows: int, columns: Sequence[Column]) -> Buckets:
        """Those of a file that may not be written yet."""
        return cls(path, n_rows, {column.name: (column.dtype, column.width) for column in columns})

    @property
    def n_bytes(self) -> int:
        """Of the file."""
        return sum(self.n_rows * dtype.itemsize * width for dtype, width in self.columns.values())

    def rows(self, start: int, end: int) -> dict[str, DiskRows]:
        """Rows `start` to `end` of each column, by name."""
        parts, base = {}, 0
        for name, (dtype, width) in self.columns.items():
            row_bytes = dtype.itemsize * width
            parts[name] = DiskRows(self.path, base + start * row_bytes, end - start, width, dtype)
            base += self.n_rows * row_bytes
        return parts

    def write(
        self,
        features: Features,
        label: NDArray[np.int32],
        starts: Mapping[int, int],
        columns: Sequence[Column],
        *,
        durable: bool = True,
        progress: Callable[[int], object] = lambda n: None,
    ) -> None:
        """Write the file in one pass over the features, whole or not at all; one shard's rows are in memory.

        Args:
            features: the set.
            label: (N,) int32, class of each row, in the order of `features`.
            starts: row at which each class starts in the file; rows of other classes are left out.
            columns: those of `self.columns`.
            durable: as in `files.atomic_path`.
            progress: called with the number of rows read since its last call; they sum to N.

        Raises:
            FeaturesError: damaged features, a NaN, no logit gradients, or no space for the file.
        """
        try:
            with (
                atomic_path(self.path, durable=durable) as partial,
                open(partial, "r+b", buffering=0) as file,
            ):
                self._fill(file.fileno(), features, label, dict(starts), columns, progress)
        except OSError as error:
            raise self._error(len(label), error.strerror or str(error)) from error
        except FeaturesError:
            raise
        except AdqError as error:
            cause = error.__cause__
            reason = cause.strerror if isinstance(cause, OSError) else None
            raise self._error(len(label), reason or str(error)) from error

    def _error(self, n: int, reason: str) -> FeaturesError:
        return FeaturesError(
            f"cannot sort {n:,} embeddings by class: {reason} in {self.path.parent.parent}, which needs "
            f"{self.n_bytes:,} bytes"
        )

    def _fill(
        self,
        handle: int,
        features: Features,
        label: NDArray[np.int32],
        filled: dict[int, int],
        columns: Sequence[Column],
        progress: Callable[[int], object],
    ) -> None:
        first = 0
        for file in features:
            here = slice(first, first + file.n)
            order = np.argsort(label[here], kind="stable")  # within a class, rows stay in their order
            present, starts, counts = np.unique(label[here][order], return_index=True, return_counts=True)
            parts = [
                part
                for part in zip(present.tolist(), starts.tolist(), counts.tolist(), strict=True)
                if part[0] in filled
            ]
            base = 0
            for column in columns:
                row_bytes = column.row_bytes
                rows = np.ascontiguousarray(column.read(file, here)[order]).reshape(file.n, column.width)
                for c, start, n in parts:
                    _write_all(handle, rows[start : start + n], base + filled[c] * row_bytes)
                base += self.n_rows * row_bytes
            for c, _, n in parts:
                filled[c] += n
            first += file.n
            progress(file.n)


def _write_all(handle: int, rows: NDArray[Any], offset: int) -> None:
    left = rows.data.cast("B")
    while len(left):
        n = os.pwrite(handle, left, offset)
        left, offset = left[n:], offset + n
