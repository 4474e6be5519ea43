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

from adq_wds.embedding.stored_field import PREFIX, FieldEmbeddings
from adq_wds.embedding.stored_npy import NpyRows
from adq_wds.embedding.stored_parquet import ParquetRows
from adq_wds.errors import FeaturesError


@dataclass(frozen=True, eq=False)
class StoredEmbeddings:
    """Embeddings read from a file, or a folder of npy files; made by `open_embeddings`. Pickles as its path and hash.

    Attributes:
        name: `stored:` and the name of the file or folder.
        revision: SHA-256 of the file, or over those of the folder's files.
        width: D.
        n_rows: rows in all; for npy this must be the number of all samples.
    """

    path: Path
    name: str
    revision: str
    width: int
    n_rows: int
    _rows: ParquetRows | NpyRows = field(repr=False)
    preprocessing_hash: str = ""
    n_classes: None = None

    @property
    def by_position(self) -> bool:
        """Whether a row is found by its sample's position in the set (npy), and not by its key."""
        return isinstance(self._rows, NpyRows)

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
        return self._rows.rows(start, stop)

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (self.path, self.revision)


def open_embeddings(path: str | os.PathLike[str]) -> StoredEmbeddings | FieldEmbeddings:
    """Open a file or a folder of embeddings, or name the field of the samples that holds them.

    Parquet (`.parquet`): columns `key`, `embedding` (a list of numbers each), optional `shard` (needed when a key
    stands in two shards), optional `norm` (then h = embedding · norm). npy (`.npy`): (N, D) float16, float32 or
    float64, one row for every sample in the order of the shards, read from the disk as needed. A folder of numbered
    npy files, as clip-retrieval writes it (``img_emb/img_emb_0.npy``, ...), is read as one, in the order of the numbers.
    A text ``field:emb.npy`` is no file: every sample's embedding is in that field of the shards.

    Raises:
        ValueError: no such file or folder, another suffix, or not the name of an npy field.
        FeaturesError: the file is damaged, declares more than it holds, or has other columns, shapes or types.
    """
    if isinstance(path, str) and path.startswith(PREFIX):
        return FieldEmbeddings(path.removeprefix(PREFIX))
    return _open_file(Path(path).absolute())


def _open_file(path: Path) -> StoredEmbeddings:
    if not path.exists():
        raise ValueError(f"embeddings {path}: no such file or folder")
    if path.is_dir() or path.suffix == ".npy":
        by_position = NpyRows(path)
        return _stored(path, by_position, by_position.hash())
    if path.suffix != ".parquet":
        raise ValueError(
            f"embeddings {path}: expected a name in .parquet or .npy, or a folder of .npy files (such as img_emb)"
        )
    by_key = ParquetRows(path)
    with path.open("rb") as handle:
        return _stored(path, by_key, hashlib.file_digest(handle, "sha256").hexdigest())


def _stored(path: Path, rows: ParquetRows | NpyRows, revision: str) -> StoredEmbeddings:
    return StoredEmbeddings(path, f"stored:{path.name}", revision, rows.width, rows.n_rows, rows)


def _again(path: Path, revision: str) -> StoredEmbeddings:
    """Unpickle: open anew, and insist on the same file."""
    opened = _open_file(path)
    if opened.revision != revision:
        raise FeaturesError(f"embeddings {path}: the file changed while it was in use; run again")
    return opened
