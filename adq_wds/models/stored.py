"""How are embeddings used that were made elsewhere? Rows of a Parquet or npy file, found by key or by position."""

from __future__ import annotations

import hashlib
import io
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adq_wds.errors import FeaturesError
from adq_wds.models.stored_parquet import ParquetRows

NPY_MAGIC = b"\x93NUMPY"
MAX_NPY_HEADER_BYTES = 10_000  # NumPy's own limit
# header length: its width in bytes and its reader, by format version
_NPY_VERSIONS: dict[tuple[int, int], tuple[int, Any]] = {
    (1, 0): (2, np.lib.format.read_array_header_1_0),
    (2, 0): (4, np.lib.format.read_array_header_2_0),
}


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


def open_embeddings(path: str | os.PathLike[str]) -> StoredEmbeddings:
    """Open a file of embeddings.

    Parquet (`.parquet`): columns `key`, `embedding` (a list of numbers each), optional `shard` (needed when a key
    stands in two shards), optional `norm` (then h = embedding · norm). npy (`.npy`): (N, D) float16, float32 or
    float64, one row for every sample in the order of the shards, read from the disk as needed.

    Raises:
        ValueError: no such file, or another suffix.
        FeaturesError: the file is damaged, declares more than it holds, or has other columns, shapes or types.
    """
    path = Path(path).absolute()
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
    opened = open_embeddings(path)
    if opened.revision != revision:
        raise FeaturesError(f"embeddings {path}: the file changed while it was in use; run again")
    return opened


def _open_npy(path: Path) -> NDArray[np.floating[Any]]:
    """Map an npy file, after its header has been held against its size: nothing is allocated on its word."""
    size = path.stat().st_size
    with path.open("rb") as handle:
        start = handle.read(12)
        version = (start[6], start[7]) if len(start) == 12 and start.startswith(NPY_MAGIC) else (0, 0)
        if version not in _NPY_VERSIONS:
            raise FeaturesError(
                f"embeddings {path}: not an npy file of version 1 or 2 (starts with {start!r})"
            )
        length_bytes, read_header = _NPY_VERSIONS[version]
        data_start = 8 + length_bytes + int.from_bytes(start[8 : 8 + length_bytes], "little")
        if data_start > min(size, MAX_NPY_HEADER_BYTES):
            raise FeaturesError(
                f"embeddings {path}: declares a header of {data_start} bytes in a file of {size}"
            )
        handle.seek(8)
        header = handle.read(data_start - 8)
    try:
        shape, _, dtype = read_header(io.BytesIO(header))
    except (
        Exception
    ) as error:  # NumPy hands the text to Python's tokenizer and literal reader: any may object
        text = " ".join(str(error).split())[:160]
        raise FeaturesError(f"embeddings {path}: damaged npy header ({text})") from error
    fits = (
        len(shape) == 2 and all(type(length) is int for length in shape) and shape[1] >= 1
    )  # True is an int
    if dtype.kind != "f" or dtype.itemsize not in (2, 4, 8) or not fits:
        raise FeaturesError(
            f"embeddings {path}: {dtype} of shape {shape}; expected (N, D) float16, float32 or float64"
        )
    declared = math.prod(shape) * dtype.itemsize
    if declared != size - data_start:
        raise FeaturesError(
            f"embeddings {path}: declares {declared} bytes of numbers, shape {shape}, and holds {size - data_start}; "
            "write it again"
        )
    mapped: NDArray[np.floating[Any]] = np.load(path, mmap_mode="r", allow_pickle=False)
    return mapped
