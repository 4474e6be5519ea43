"""How are embeddings used that were made elsewhere? Rows of a Parquet or npy file, found by key or by position."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adq_wds.errors import FeaturesError
from adq_wds.models.stored_field import PREFIX, FieldEmbeddings
from adq_wds.models.stored_parquet import ParquetRows
from adq_wds.npy import MAX_HEADER_BYTES, NpyError, read_header


@dataclass(frozen=True, eq=False)
class StoredEmbeddings:
    """Embeddings read from a file; made by `open_embeddings`. Pickles as its path and hash.

    Attributes:
        name: `stored:` and the file's name.
        revision: SHA-256 of the file.
        width: D.
        n_rows: rows in the file; for npy this must be the number of all samples.
    """

    path: Path
    name: str
    revision: str
    width: int
    n_rows: int
    _rows: ParquetRows | NDArray[np.floating[Any]] = field(repr=False)
    preprocessing_hash: str = ""
    n_classes: None = None

    def rows(self, shard: str, keys: Sequence[str], start: int) -> NDArray[np.float32]:
        """The embeddings of consecutive samples of one shard.

        Args:
            shard: the shard's name; only its file name counts, with or without `.tar`.
            keys: n sample keys.
            start: position of the first of them among all samples, in the order of the shards; used by npy only.

        Returns:
            (n, D) float32, in the order of `keys`. Not checked for NaN.

        Raises:
            FeaturesError: a key, a shard or a position is not in the file; names shard and key.
        """
        if isinstance(self._rows, ParquetRows):
            return self._rows.find(shard, keys)
        stop = start + len(keys)
        if start < 0 or stop > self.n_rows:
            raise FeaturesError(
                f"shard {shard}: {self.path} holds {self.n_rows} embeddings, and samples {start} to {stop - 1} are "
                "asked; its rows must be all samples in the order of the shards"
            )
        # float64 beyond float32 becomes Inf, which is refused where h is stored
        with np.errstate(over="ignore"):
            return self._rows[start:stop].astype(np.float32)

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (self.path, self.revision)


def open_embeddings(path: str | os.PathLike[str]) -> StoredEmbeddings | FieldEmbeddings:
    """Open a file of embeddings, or name the field of the samples that holds them.

    Parquet (`.parquet`): columns `key`, `embedding` (a list of numbers each), optional `shard` (needed when a key
    stands in two shards), optional `norm` (then h = embedding · norm). npy (`.npy`): (N, D) float16, float32 or
    float64, one row for every sample in the order of the shards, read from the disk as needed.
    A text ``field:emb.npy`` is no file: every sample's embedding is in that field of the shards.

    Raises:
        ValueError: no such file, another suffix, or not the name of an npy field.
        FeaturesError: the file is damaged, declares more than it holds, or has other columns, shapes or types.
    """
    if isinstance(path, str) and path.startswith(PREFIX):
        return FieldEmbeddings(path.removeprefix(PREFIX))
    return _open_file(Path(path).absolute())


def _open_file(path: Path) -> StoredEmbeddings:
    if not path.is_file():
        raise ValueError(f"embeddings {path}: no such file")
    if path.suffix == ".parquet":
        parquet = ParquetRows(path)
        rows: ParquetRows | NDArray[np.floating[Any]] = parquet
        n_rows, width = parquet.n_rows, parquet.width
    elif path.suffix == ".npy":
        rows = _open_npy(path)
        n_rows, width = rows.shape
    else:
        raise ValueError(f"embeddings {path}: expected a name in .parquet or .npy")
    with path.open("rb") as handle:
        revision = hashlib.file_digest(handle, "sha256").hexdigest()
    return StoredEmbeddings(path, f"stored:{path.name}", revision, width, n_rows, rows)


def _again(path: Path, revision: str) -> StoredEmbeddings:
    """Unpickle: open anew, and insist on the same file."""
    opened = _open_file(path)
    if opened.revision != revision:
        raise FeaturesError(f"embeddings {path}: the file changed while it was in use; run again")
    return opened


def _open_npy(path: Path) -> NDArray[np.floating[Any]]:
    """Map an npy file, after its header has been held against its size: nothing is allocated on its word."""
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
    mapped: NDArray[np.floating[Any]] = np.load(path, mmap_mode="r", allow_pickle=False)
    return mapped
