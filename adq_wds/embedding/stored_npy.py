"""Reads rows of embeddings by position, from one npy file or a folder of numbered ones; nothing is held in memory."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adq_wds.errors import FeaturesError, shorten
from adq_wds.samples.npy import MAX_HEADER_BYTES, NpyError, NpyHeader, read_header

_NUMBERED = re.compile(r"(.*?)([0-9]+)\.npy")


class NpyRows:
    """The rows of an npy file, or of the files of a folder as if they were one, in the order of their numbers.

    A folder is as clip-retrieval writes it: ``img_emb/img_emb_0.npy``, ``img_emb_1.npy``, ... (with zeros in front of
    the number, or without), no number missing. May be called from several threads.

    Raises:
        FeaturesError: a file is damaged, declares more than it holds, or has another shape, type or width; names in
            the folder have no number, a gap, or two beginnings.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = _numbered_files(path) if path.is_dir() else [path]
        self._files = [_NpyFile(file, _checked_header(file)) for file in self.files]
        self.width = int(self._files[0].header.shape[1])
        for file in self._files:
            width = file.header.shape[1]
            if width != self.width:
                raise FeaturesError(
                    f"embeddings {file.path}: rows of {width} numbers, {self.files[0].name} has rows of {self.width}"
                )
        self._starts = np.cumsum([0, *(file.header.shape[0] for file in self._files)])

    @property
    def n_rows(self) -> int:
        """Rows in all files."""
        return int(self._starts[-1])

    def hash(self) -> str:
        """SHA-256 of the file; of a folder, over those of its files."""
        hashes = []
        for file in self.files:
            with file.open("rb") as handle:
                hashes.append(hashlib.file_digest(handle, "sha256").hexdigest())
        return hashlib.sha256("\n".join(hashes).encode()).hexdigest() if self.path.is_dir() else hashes[0]

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """(stop - start, D) float32; the rows must be there."""
        parts = []
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        for i in range(first, len(self.files)):
            base = int(self._starts[i])
            if base >= stop:
                break
            rows = self._files[i].rows(
                max(0, start - base), min(stop - base, int(self._starts[i + 1]) - base)
            )
            # float64 beyond float32 becomes Inf, which is refused where h is stored
            with np.errstate(over="ignore"):
                parts.append(rows.astype(np.float32))
        return np.concatenate(parts) if parts else np.empty((0, self.width), dtype=np.float32)


def _numbered_files(folder: Path) -> list[Path]:
    """The npy files of a folder in the order of their numbers."""
    files = sorted(folder.glob("*.npy"))
    if not files:
        inside = sorted(path.name for path in folder.iterdir() if path.is_dir() and any(path.glob("*.npy")))
        hint = f"; its folders {shorten(inside)} have some, name one of them" if inside else ""
        raise FeaturesError(f"embeddings {folder}: a folder without .npy files{hint}")
    numbers: dict[int, Path] = {}
    prefixes: dict[str, Path] = {}
    for file in files:
        match = _NUMBERED.fullmatch(file.name)
        if match is None:
            raise FeaturesError(
                f"embeddings {file}: no number at the end of its name, so its place among the others is unknown; "
                "expected names such as img_emb_0.npy, img_emb_1.npy"
            )
        prefixes.setdefault(match[1], file)
        other = numbers.setdefault(int(match[2]), file)
        if len(prefixes) > 1 or other != file:
            first = next(iter(prefixes.values())) if len(prefixes) > 1 else other
            raise FeaturesError(
                f"embeddings {folder}: {first.name} and {file.name} are not of one series; give a folder of one"
            )
    lowest, highest = min(numbers), max(numbers)
    if highest - lowest >= len(numbers):
        missing = next(number for number in range(lowest, highest) if number not in numbers)
        raise FeaturesError(
            f"embeddings {folder}: {len(numbers)} files, numbered {lowest} to {highest}, and number {missing} is missing"
        )
    return [numbers[number] for number in sorted(numbers)]


def _checked_header(path: Path) -> NpyHeader:
    """The header of an npy file of shape (N, D), held against its size: nothing is allocated on its word."""
    size = path.stat().st_size
    try:
        with path.open("rb") as handle:
            header = read_header(handle.read(MAX_HEADER_BYTES), size)
    except NpyError as error:
        raise FeaturesError(f"embeddings {path}: {error}") from error
    if not header.is_floats or len(header.shape) != 2 or header.shape[1] < 1:
        raise FeaturesError(
            f"embeddings {path}: {header.dtype} of shape {header.shape}; expected (N, D) float16, float32 or float64"
        )
    if header.declared_bytes != size - header.start:
        raise FeaturesError(
            f"embeddings {path}: declares {header.declared_bytes} bytes of numbers, shape {header.shape}, and holds "
            f"{size - header.start}; write it again"
        )
    return header


@dataclass(frozen=True)
class _NpyFile:
    """An npy file of shape (N, D) whose rows are read, not mapped: one cut short meanwhile is an error, not a crash."""

    path: Path
    header: NpyHeader

    def rows(self, start: int, stop: int) -> NDArray[np.floating[Any]]:
        """Rows start … stop − 1, which must lie in the file: (stop − start, D), of the file's own type.

        Raises:
            FeaturesError: the file was cut short, or cannot be read.
        """
        n_rows, width = self.header.shape
        try:
            with self.path.open("rb") as handle:
                if not self.header.fortran_order:
                    return self._numbers(handle.fileno(), start * width, (stop - start) * width).reshape(
                        -1, width
                    )
                columns = [
                    self._numbers(handle.fileno(), i * n_rows + start, stop - start) for i in range(width)
                ]
        except OSError as error:
            raise FeaturesError(f"embeddings {self.path}: cannot be read: {error.strerror}") from error
        return np.stack(columns, axis=1)

    def _numbers(self, handle: int, first: int, n: int) -> NDArray[np.floating[Any]]:
        itemsize = self.header.dtype.itemsize
        data = os.pread(handle, n * itemsize, self.header.start + first * itemsize)
        if len(data) != n * itemsize:
            raise FeaturesError(
                f"embeddings {self.path}: truncated while it was read; write it again, and start anew"
            )
        return np.frombuffer(data, dtype=self.header.dtype)
