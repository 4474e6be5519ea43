"""Bins are read as they were written or not at all."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adq_wds as adq
from adq_wds.planning.build_plan import find_bins
from adq_wds.tables.bins import Bins
from adq_wds.tables.features import Features
from adq_wds.tables.features_file import ShardFeatures

MakeFeatures = Callable[..., ShardFeatures]


@pytest.fixture
def bins(make_features: MakeFeatures, tmp_path: Path) -> Bins:
    """Three shards, one of them empty; class 2 is left out."""
    make_features("a.tar", [0, 1, 0, 2, 1, 0, 0, 1, 2])
    make_features("b.tar", [])
    make_features("c.tar", [1, 1, 0, 2])
    return find_bins(Features(tmp_path / "features"), bins=3, classes=[0, 1])


@pytest.fixture
def path(bins: Bins, tmp_path: Path) -> Path:
    bins.save(tmp_path / "bins.parquet")
    return tmp_path / "bins.parquet"


def test_writing_and_reading_changes_nothing(bins: Bins, path: Path) -> None:
    again = Bins.load(path)
    assert again.shards == bins.shards == [("a.tar", 9), ("b.tar", 0), ("c.tar", 4)]
    for name, kind in (("label", np.int32), ("bin", np.int16), ("pick", np.int32)):
        assert getattr(again, name).dtype == kind
        assert getattr(again, name).tolist() == getattr(bins, name).tolist()
    assert again.header == bins.header
    assert (again.n_bins, again.classes) == (3, [0, 1])
    scores, expected = ({n: s.tolist() for n, s in each.scores().items()} for each in (again, bins))
    assert scores == expected


def test_an_empty_bin_has_no_score_there_and_back(make_features: MakeFeatures, tmp_path: Path) -> None:
    make_features("a.tar", [0, 0])
    bins = find_bins(Features(tmp_path / "features"), bins=4)
    bins.save(tmp_path / "bins.parquet")
    for name, score in Bins.load(tmp_path / "bins.parquet").scores().items():
        assert np.isnan(score).tolist() == [False, False, True, True], name


def test_columns_of_unequal_length_are_refused(bins: Bins) -> None:
    with pytest.raises(adq.PlanError, match="bins of 12 rows for 13 samples"):
        Bins(bins.shards, bins.label, bins.bin[:12], bins.pick, bins.header)


@pytest.mark.parametrize(
    ("margins", "n", "match"),
    [
        (None, 13, "margins and the header contradict each other"),
        ({"fit": "0", "accuracy": 0.9, "wrong": [0.0, 0.0]}, None, "margins and the header contradict each"),
        ({"fit": "0", "accuracy": 0.9, "wrong": [0.0, 0.0]}, 12, "margins and the header contradict each"),
        ({"fit": "0", "accuracy": 0.9, "wrong": [0.0]}, 13, "says of margins what cannot be"),
        ({"fit": "0", "accuracy": 1.5, "wrong": [0.0, 0.0]}, 13, "says of margins what cannot be"),
        ({"fit": "0", "accuracy": 0.9, "wrong": "no"}, 13, "margins.wrong"),
    ],
)
def test_margins_against_the_header_are_refused(margins: Any, n: int | None, match: str, bins: Bins) -> None:
    header: Any = bins.header if margins is None else {**bins.header, "margins": margins}
    margin = None if n is None else np.zeros(n, dtype=np.float32)
    with pytest.raises(adq.PlanError, match=match):
        Bins(bins.shards, bins.label, bins.bin, bins.pick, header, margin)
