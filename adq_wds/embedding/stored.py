"""Opens embeddings that were made elsewhere: a Parquet file, npy files, or a field of the samples."""

from __future__ import annotations

import os
from pathlib import Path

from adq_wds.embedding.source import StoredEmbeddings
from adq_wds.embedding.stored_field import FieldEmbeddings
from adq_wds.embedding.stored_npy import NpyEmbeddings
from adq_wds.embedding.stored_parquet import ParquetEmbeddings
from adq_wds.samples.npy import FIELD_PREFIX


def open_embeddings(path: str | os.PathLike[str]) -> StoredEmbeddings:
    """Open a file or a folder of embeddings, or name the field of the samples that holds them.

    Parquet (`.parquet`): columns `key`, `embedding` (a list of numbers each), optional `shard` (needed when a key
    stands in two shards), optional `norm` (then h = embedding · norm). npy (`.npy`): (N, D) float16, float32 or
    float64, one row for every sample in the order of the shards, read from the disk as needed. A folder of numbered
    npy files, as clip-retrieval writes it (``img_emb/img_emb_0.npy``, ...), is read as one, in the order of the numbers.
    The text ``field:emb.npy`` names a field: every sample's embedding is in that field of the shards.

    Raises:
        ValueError: no such file or folder, another suffix, or not the name of an npy field.
        FeaturesError: the file is damaged, declares more than it holds, or has other columns, shapes or types.
    """
    if isinstance(path, str) and path.startswith(FIELD_PREFIX):
        return FieldEmbeddings(path.removeprefix(FIELD_PREFIX))
    path = Path(path).absolute()
    if not path.exists():
        raise ValueError(f"embeddings {path}: no such file or folder")
    if path.is_dir() or path.suffix == ".npy":
        return NpyEmbeddings(path)
    if path.suffix == ".parquet":
        return ParquetEmbeddings(path)
    raise ValueError(
        f"embeddings {path}: expected a name in .parquet or .npy, or a folder of .npy files (such as img_emb)"
    )
