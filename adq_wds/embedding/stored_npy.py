"""Reads embeddings by position from one npy file or a folder of numbered ones, without loading them into memory."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adq_wds.embedding.source import StoredEmbeddings
from adq_wds.errors import FeaturesError, shorten
from adq_wds.samples.fields import Sample
from adq_wds.samples.npy import MAX_HEADER_BYTES, NpyError, NpyHeader, checked_header

_NUMBERED = re.compile(r"(.*?)([0-9]+)\.npy")


class NpyEmbeddings(StoredEmbeddings):
    """The rows of an npy file, or of the files of a folder as if they were one, in the order of their numbers.

    A folder is as clip-retrieval writes it: ``img_emb/img_emb_0.npy``, ``img_emb_1.npy``, ... (with zeros in front of
    the number, or without), no number missing. May be called from several threads.
    """

    by_position = True

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, f"stored:{path.name}"
        self._files = [_NpyFile.open(file) for file in (_numbered_files(path) if path.is_dir() else [path])]
        first = self._files[0]
        self.width = int(first.header.shape[1])
        for file in self._files:
            if file.header.shape[1] != self.width:
                raise FeaturesError(
                    f"embeddings {file.path}: rows of {file.header.shape[1]} numbers, {first.path.name} has rows of "
                    f"{self.width}"
                )
        self._starts = np.cumsum([0, *(file.header.shape[0] for file in self._files)])
        self.n_rows = int(self._starts[-1])
        hashes = [file_hash(file.path) for file in self._files]
        whole = hashlib.sha256("\n".join(hashes).encode()).hexdigest()
        self.revision = whole if path.is_dir() else hashes[0]

    def row(self, sample: Sample, *, shard: str, position: int) -> NDArray[np.float32]:
        """The row at a sample's position; see `StoredEmbeddings.row`."""
        if not 0 <= position < self._starts[-1]:
            raise FeaturesError(
                f"shard {shard}: {self.path} holds {self.n_rows} embeddings, and sample {position} is asked; its rows "
                "must be all samples in the order of the shards"
            )
        i = int(np.searchsorted(self._starts, position, side="right")) - 1
        with np.errstate(over="ignore"):
            return self._files[i].row(position - int(self._starts[i])).astype(np.float32)


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _numbered_files(folder: Path) -> list[Path]:
    """The npy files of a folder in the order of their numbers."""
    files = sorted(folder.glob("*.npy"))
    if not files:
        inside = sorted(path.name for path in folder.iterdir() if path.is_dir() and any(path.glob("*.npy")))
        hint = f"; its folders {shorten(inside)} have some, name one of them" if inside else ""
        raise FeaturesError(f"embeddings {folder}: a folder without .npy files{hint}")
    numbered: list[tuple[int, str, Path]] = []
    for file in files:
        match = _NUMBERED.fullmatch(file.name)
        if match is None:
            raise FeaturesError(
                f"embeddings {file}: no number at the end of its name, so its place among the others is unknown; "
                "expected names such as img_emb_0.npy, img_emb_1.npy"
            )
        numbered.append((int(match[2]), match[1], file))
    numbered.sort()
    numbers, names = [number for number, _, _ in numbered], sorted({name for _, name, _ in numbered})
    if len(names) > 1 or numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        raise FeaturesError(
            f"embeddings {folder}: files called {shorten(names)}, numbered {shorten(numbers)}; expected one series, no "
            "number missing, such as img_emb_0.npy, img_emb_1.npy"
        )
    return [file for _, _, file in numbered]


@dataclass(frozen=True)
class _NpyFile:
    """An npy file of shape (N, D); rows are read, not mapped, so that a file cut short meanwhile is an error, not a
    crash."""

    path: Path
    header: NpyHeader

    @classmethod
    def open(cls, path: Path) -> _NpyFile:
        try:
            with path.open("rb") as handle:
                start = handle.read(MAX_HEADER_BYTES)
            is_matrix = lambda header: len(header.shape) == 2 and header.shape[1] >= 1  # noqa: E731
            return cls(path, checked_header(start, path.stat().st_size, is_matrix, "(N, D)"))
        except NpyError as error:
            raise FeaturesError(f"embeddings {path}: {error}") from error

    def row(self, i: int) -> NDArray[np.floating[Any]]:
        """Row i, which must lie in the file: (D,), of the file's own type."""
        n_rows, width = self.header.shape
        try:
            with self.path.open("rb") as handle:
                if not self.header.fortran_order:
                    return self._numbers(handle.fileno(), i * width, width)
                parts = [self._numbers(handle.fileno(), column * n_rows + i, 1) for column in range(width)]
        except OSError as error:
            raise FeaturesError(f"embeddings {self.path}: cannot be read: {error.strerror}") from error
        return np.concatenate(parts)

    def _numbers(self, handle: int, first: int, n: int) -> NDArray[np.floating[Any]]:
        itemsize = self.header.dtype.itemsize
        data = os.pread(handle, n * itemsize, self.header.start + first * itemsize)
        if len(data) != n * itemsize:
            raise FeaturesError(
                f"embeddings {self.path}: truncated while it was read; write it again, and start anew"
            )
        return np.frombuffer(data, dtype=self.header.dtype)
