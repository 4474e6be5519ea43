"""Arrays in memory are matched with samples on disk by key, one to one, or refused with counts and an example."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adq_wds as adq
from adq_wds.tables.spans import scan_spans
from tests.conftest import write_tar

KEYS = [f"k{i}" for i in range(12)]
H = np.random.default_rng(0).normal(size=(12, 5))


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    """Seven samples and five."""
    paths = []
    for name, keys in (("a", KEYS[:7]), ("b", KEYS[7:])):
        members = [(f"{key}.json", json.dumps({"text": key}).encode()) for key in keys]
        paths.append(str(write_tar(tmp_path / f"{name}.tar", members)))
    return paths


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_rows_find_their_samples_whatever_the_order(shards: list[str], tmp_path: Path, dtype: Any) -> None:
    order = np.random.default_rng(1).permutation(12)
    labels = [["x", "y"][i % 2] for i in range(12)]
    h = H.astype(dtype)
    features = adq.Features.from_arrays(
        shards[::-1], [KEYS[i] for i in order], h[order], [labels[i] for i in order], out=tmp_path / "f"
    )
    for file, path, part in zip(features, shards, (slice(0, 7), slice(7, 12)), strict=True):
        assert file.spans().rows() == scan_spans(path, shard=file.shard).rows()
        x = h[part].astype(np.float32).astype(np.float64)
        norm = np.linalg.norm(x, axis=1)
        assert np.array_equal(file.embedding(), (x / norm[:, None]).astype(np.float16))
        assert file.norm() == pytest.approx(norm)
        names = np.array(file.names)[file.read_columns(["label"])["label"].to_numpy()]
        assert names.tolist() == labels[part]
        assert file.digest() is not None
    plan = adq.build_plan(features, keep=0.5, bins=2, out=tmp_path / "plan.parquet")
    assert plan.n_kept == 6
    assert len(list(adq.ShardDataset(shards, plan=plan))) == 6


def test_they_are_what_the_command_makes_of_the_same_numbers(shards: list[str], tmp_path: Path) -> None:
    np.save(tmp_path / "e.npy", H)
    ours = adq.Features.from_arrays(shards, KEYS, H, out=tmp_path / "f")
    theirs = adq.embed_shards(shards, out=tmp_path / "g", label=None, embeddings=tmp_path / "e.npy")
    for a, b in zip(ours, theirs, strict=True):
        assert a.read_columns(a.header["columns"]).equals(b.read_columns(b.header["columns"]))


def test_a_key_of_two_shards_is_given_with_its_shard(tmp_path: Path) -> None:
    shards = [str(write_tar(tmp_path / f"{name}.tar", [("k.txt", name.encode())])) for name in "ab"]
    features = adq.Features.from_arrays(shards, [("b.tar", "k"), ("a.tar", "k")], H[:2], out=tmp_path / "f")
    unit = (
        H[:2].astype(np.float32).astype(np.float64).T / np.linalg.norm(H[:2].astype(np.float32), axis=1)
    ).T
    rows = np.concatenate([file.embedding() for file in features])
    assert np.allclose(rows, unit[::-1], atol=1e-3)
    with pytest.raises(adq.FeaturesError, match=r"'k' stands in shard a\.tar and in shard b\.tar; .* key\)"):
        adq.Features.from_arrays(shards, ["k"], H[:1], out=tmp_path / "f")
    with pytest.raises(adq.FeaturesError, match=r"'k' stands twice, for rows 0 and 1; where two .* have it"):
        adq.Features.from_arrays(shards, ["k", "k"], H[:2], out=tmp_path / "f")


NAN = H.copy()
NAN[[3, 5], 1] = np.nan


@pytest.mark.parametrize(
    ("keys", "h", "labels", "error", "text"),
    [
        (KEYS[:-2], H[:-2], None, adq.FeaturesError, r"2 samples have no row, such as shard b\.tar, key 'k10'"),
        ([*KEYS, "z"], [*H, H[0]], None, adq.FeaturesError, "1 keys name no sample, such as 'z'"),
        ([*KEYS[:-1], ("x.tar", "k11")], H, None, adq.FeaturesError, "1 samples have no row.*; 1 keys name no sample"),
        ([*KEYS[:-1], "k0"], H, None, adq.FeaturesError, "key 'k0' stands twice, for rows 0 and 11"),
        (KEYS, NAN, None, adq.FeaturesError, "2 rows of embeddings hold NaN or infinity, the first row 3, key 'k3'"),
        (KEYS, H * 1e300, None, adq.FeaturesError, "12 rows of embeddings hold NaN or infinity"),
        (KEYS, H[:-1], None, ValueError, r"must be \(12, D\) floats.*got float64 of shape \(11, 5\)"),
        (KEYS, H.astype(int), None, ValueError, "got int64"),
        (KEYS, H[:, 0], None, ValueError, r"of shape \(12,\)"),
        (KEYS, H, [0] * 11, ValueError, "11 labels for 12 keys"),
        (KEYS, H, [0] * 11 + ["a"], ValueError, "all integers >= 0 or all text, got 'a'"),
        (KEYS, H, [0] * 11 + [-1], ValueError, "all integers >= 0 or all text, got -1"),
        (KEYS, H, [0.0] * 12, ValueError, "all integers >= 0 or all text, got 0.0"),
        (KEYS, H, [True] * 12, ValueError, "all integers >= 0 or all text, got True"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named_and_nothing_written(
    shards: list[str], tmp_path: Path, keys: Any, h: Any, labels: Any, error: Any, text: str
) -> None:
    with pytest.raises(error, match=text):
        adq.Features.from_arrays(shards, keys, h, labels, out=tmp_path / "f")
    assert not list((tmp_path / "f").glob("*.parquet"))


def test_labels_may_be_an_array_of_numpy(shards: list[str], tmp_path: Path) -> None:
    features = adq.Features.from_arrays(shards, KEYS, H, np.arange(12) % 3, out=tmp_path / "f")  # type: ignore[arg-type]
    assert features.files[0].read_columns(["label"])["label"].to_pylist() == [0, 1, 2, 0, 1, 2, 0]


def test_features_of_an_encoder_are_not_overwritten(make_shard: Any, tmp_path: Path) -> None:
    shard = make_shard("a.tar", 3)
    adq.embed_shards(shard, "thumbnail", tmp_path / "f")
    keys = scan_spans(shard, shard="a.tar").keys
    with pytest.raises(adq.FeaturesError, match=r"a\.parquet was made by encoder .* give another folder"):
        adq.Features.from_arrays(shard, keys, H[:3], out=tmp_path / "f")
    adq.Features.from_arrays(shard, keys, H[:3], out=tmp_path / "g")
    assert len(adq.Features.from_arrays(shard, keys, H[3:6], out=tmp_path / "g")) == 3
