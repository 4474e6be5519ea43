"""Embeddings read class by class are those of the files, row for row; the scratch file leaves no trace."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adq_wds.planning.buckets import Column, embedding_column
from adq_wds.planning.class_tasks import Workplace, run_classes
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


class Copy:
    """A job whose result is its rows."""

    def of_class(self, rows: Any, progress: Any) -> Any:
        return {name: values[:] for name, values in rows.items()}

    def joined(self, parts: Any) -> Any:
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def test_a_class_is_its_rows_in_their_order(make_features: MakeFeatures, tmp_path: Path) -> None:
    """Also beside classes that are nowhere; no scratch file stays."""
    rng, told = np.random.default_rng(0), []
    for i in range(12):
        make_features(f"s{i:02d}.tar", rng.integers(-1, 40, rng.integers(0, 60)).tolist(), width=3)
    features = Features(tmp_path / "features")
    label = labels(features)
    rows = np.concatenate([file.embedding() for file in features])
    asked = list(range(-1, 41))[::2]
    place, columns = Workplace(folder=tmp_path), [embedding_column(features), Column.of_array("label", label)]
    parts = run_classes(
        place, "copy", Copy(), features=features, label=label, classes=asked, names=None, columns=columns,
        depends=0, progress=told.append,
    )  # fmt: skip
    seen = []
    for where, arrays in parts:
        assert arrays["embedding"].dtype == np.float16
        assert (arrays["embedding"] == rows[where]).all()
        assert (arrays["label"].ravel() == label[where]).all()
        seen += where.tolist()
    assert seen == [i for c in asked for i in np.flatnonzero(label == c)]
    assert told[: len(features.files)] == [file.n for file in features]
    assert sum(told) == len(label) + np.isin(label, asked).sum()
    assert [path.name for path in tmp_path.iterdir()] == ["features"]
    assert all(name.endswith(".parquet") for name in os.listdir(tmp_path / "features"))


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
    assert "which needs 204,000 bytes" in done.stdout
    assert done.stderr == ""
