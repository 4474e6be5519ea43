"""Embeddings made elsewhere go to the samples they belong to."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import adq_wds as adq
from adq_wds.tables.spans import scan_spans

MakeShard = Callable[..., Path]


@pytest.fixture
def shards(make_shard: MakeShard) -> list[Path]:
    """Three shards of 50, 70 and 3 samples; two of them share keys."""
    return [make_shard("b.tar", 50), make_shard("a.tar", 70, first=20), make_shard("c.tar", 3)]


def stored_parquet(path: Path, shards: list[Path], *, leave_out: int = 0) -> np.ndarray[Any, Any]:
    rows = [(s.name, key) for s in shards for key in scan_spans(s, shard=s.name).keys][leave_out:]
    h = np.random.default_rng(0).normal(size=(len(rows), 6)).astype(np.float32)
    order = np.random.default_rng(1).permutation(len(rows))
    pq.write_table(
        pa.table(
            {
                "shard": [rows[i][0] for i in order],
                "key": [rows[i][1] for i in order],
                "embedding": pa.array(h[order].tolist(), pa.list_(pa.float32())),
            }
        ),
        path,
    )
    return h


def unit(h: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    wide = h.astype(np.float64)
    return (wide / np.linalg.norm(wide, axis=1, keepdims=True)).astype(np.float16)


def test_stored_embeddings_are_found_by_shard_and_key(shards: list[Path], tmp_path: Path) -> None:
    h = stored_parquet(tmp_path / "e.parquet", shards)
    features = adq.embed_shards(shards, out=tmp_path / "f", embeddings=tmp_path / "e.parquet", batch_size=9)
    found = {file.shard: file.embedding() for file in features}
    expected = np.split(unit(h), [50, 120])
    for path, rows in zip(shards, expected, strict=True):
        assert np.array_equal(found[path.name], rows)


def test_more_stored_embeddings_than_samples_are_fine_by_key(shards: list[Path], tmp_path: Path) -> None:
    stored_parquet(tmp_path / "e.parquet", shards)
    assert len(adq.embed_shards(shards[:1], out=tmp_path / "f", embeddings=tmp_path / "e.parquet")) == 50


def test_a_sample_without_stored_embedding_is_named(shards: list[Path], tmp_path: Path) -> None:
    stored_parquet(tmp_path / "e.parquet", shards, leave_out=1)
    with pytest.raises(adq.FeaturesError, match=r"shard b.tar, key 's00000': not in embeddings"):
        adq.embed_shards(shards, out=tmp_path / "f", embeddings=tmp_path / "e.parquet")


def test_rows_of_an_npy_file_are_the_samples_in_order(shards: list[Path], tmp_path: Path) -> None:
    h = np.random.default_rng(0).normal(size=(123, 5)).astype(np.float32)
    np.save(tmp_path / "e.npy", h)
    features = adq.embed_shards(shards, out=tmp_path / "f", embeddings=tmp_path / "e.npy", batch_size=16)
    found = {file.shard: file.embedding() for file in features}
    for path, rows in zip(shards, np.split(unit(h), [50, 120]), strict=True):
        assert np.array_equal(found[path.name], rows)


@pytest.mark.parametrize(
    ("n", "text"),
    [(122, r"holds 122 embeddings|122 rows for 123 samples"), (124, r"124 rows for 123 samples")],
)
def test_an_npy_file_of_another_length_is_refused(
    shards: list[Path], tmp_path: Path, n: int, text: str
) -> None:
    np.save(tmp_path / "e.npy", np.ones((n, 4), np.float32))
    with pytest.raises(adq.FeaturesError, match=text):
        adq.embed_shards(shards, out=tmp_path / "f", embeddings=tmp_path / "e.npy")
