"""Embeddings read class by class are those of the files, row for row; the scratch file leaves no trace."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import adq_wds as adq
from adq_wds.planning.buckets import ClassBuckets
from adq_wds.tables.features import Features
from adq_wds.tables.features_file import ShardFeatures
from tests.programs import run

MakeFeatures = Callable[..., ShardFeatures]


@pytest.fixture
def features(make_features: MakeFeatures, tmp_path: Path) -> Features:
    """Three shards, one of them empty; class 4 in one shard only; class 2 nowhere."""
    make_features("a.tar", [1, 0, 4, 1, 1, 0])
    make_features("b.tar", [])
    make_features("c.tar", [0, 1, 3, 3, 0, 3, 1])
    return Features(tmp_path / "features")


def labels(features: Features) -> np.ndarray:
    return np.concatenate([file.read_columns(["label"])["label"].to_numpy() for file in features])


def test_a_class_is_its_rows_in_their_order(make_features: MakeFeatures, tmp_path: Path) -> None:
    """Also asked a second time, and beside classes that are nowhere; the scratch file has no name."""
    rng, told = np.random.default_rng(0), []
    for i in range(12):
        make_features(f"s{i:02d}.tar", rng.integers(-1, 40, rng.integers(0, 60)).tolist(), width=3)
    features = Features(tmp_path / "features")
    label = labels(features)
    rows = np.concatenate([file.embedding() for file in features])
    asked = list(range(-1, 41))
    buckets = ClassBuckets(features, label, asked[::2], scratch=tmp_path / "features", progress=told.append)
    assert told == [file.n for file in features]
    assert all(name.endswith(".parquet") for name in os.listdir(tmp_path / "features"))
    for c in [*asked[::2], *asked[::2]]:
        where, (embedding,) = buckets.rows_of(c)
        assert embedding.dtype == np.float16
        assert (where == np.flatnonzero(label == c)).all()
        assert (embedding == rows[where]).all()
    buckets.close()


def test_a_scratch_folder_that_cannot_be_used_is_named(features: Features, tmp_path: Path) -> None:
    text = (
        r"cannot sort 13 embeddings by class: No such file or directory in .*nowhere, which needs 156 bytes"
    )
    with pytest.raises(adq.FeaturesError, match=text):
        ClassBuckets(features, labels(features), [0], scratch=tmp_path / "nowhere")


def test_a_full_disk_is_told_with_the_space_needed(make_features: MakeFeatures, tmp_path: Path) -> None:
    """F27, for the scratch file."""
    make_features("a.tar", [0] * 3000, width=32)
    code = (
        "import resource, signal, sys, adq_wds\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))\n"
        "try: adq_wds.build_plan(sys.argv[1])\n"
        "except adq_wds.FeaturesError as error: print(error)\n"
    )
    done = run(code, str(tmp_path / "features"))
    assert "cannot sort 3,000 embeddings by class: File too large in" in done.stdout
    assert "which needs 192,000 bytes" in done.stdout
    assert done.stderr == ""
