"""Bins by difficulty: each class in strata of equal size by margin, the easiest first."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adq_wds as adq
from adq_wds.cli.main import main
from adq_wds.planning.build_plan import find_bins, make_plan
from adq_wds.planning.options import plan_options
from adq_wds.tables.bins import Bins
from adq_wds.tables.features import Features
from adq_wds.tables.features_file import ShardFeatures


@pytest.fixture
def folder(make_features: Callable[..., ShardFeatures], tmp_path: Path) -> Path:
    """Two shards, 200 samples of three classes; the smallest has fewer samples than bins."""
    rng = np.random.default_rng(5)
    y = rng.permutation(np.repeat([0, 1, 2], [130, 66, 4]))
    x = rng.normal(size=(3, 8))[y] + 0.6 * rng.normal(size=(200, 8))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    make_features("a.tar", y[:120].tolist(), embedding=x[:120], bad=[9])
    make_features("b.tar", y[120:].tolist(), embedding=x[120:], first=1000)
    return tmp_path / "features"


@pytest.mark.parametrize("options", [{}, {"clean": 0.2, "must_include": ["k0003"]}, {"exclude": ["k0004"]}])
def test_strata_are_those_of_a_plain_sort(options: dict[str, Any], folder: Path) -> None:
    plan = adq.build_plan(folder, bins=5, keep=0.4, bins_by="difficulty", **options)
    rows = [row for row in plan.table().to_pylist() if row["bin"] >= 0]
    for label in (0, 1, 2):
        of_class = [row for row in rows if row["label"] == label]
        of_class.sort(key=lambda row: -row["margin"])  # stable
        sizes = [len(part) for part in np.array_split(np.arange(len(of_class)), min(5, len(of_class)))]
        wanted = [(k, place) for k, size in enumerate(sizes) for place in range(size)]
        assert [(row["bin"], row["pick"]) for row in of_class] == wanted
    assert plan.header["settings"]["bins_by"] == "difficulty"
    assert len(plan) == 80


def test_smaller_plans_lie_inside_larger_ones(folder: Path) -> None:
    bins, inside = find_bins(Features(folder), bins=4, bins_by="difficulty"), set[str]()
    for keep in (0.1, 0.3, 0.8):
        plan = adq.build_plan(folder, bins=bins, bins_by="difficulty", keep=keep, draw="ordered")
        same = adq.build_plan(folder, bins=4, bins_by="difficulty", keep=keep, draw="ordered")
        assert plan.hash == same.hash
        assert inside <= set(plan.keys())
        inside = set(plan.keys())


def test_bins_made_otherwise_are_refused(folder: Path, tmp_path: Path) -> None:
    made: dict[Any, Bins] = {}
    for by in ("graphcut", "difficulty"):
        find_bins(Features(folder), bins=3, bins_by=by).save(tmp_path / by)
        made[by] = Bins.load(tmp_path / by)
    assert made["difficulty"].header["bins_by"] == "difficulty"
    assert "bins_by" not in made["graphcut"].header
    assert "bins_by" not in adq.build_plan(folder, bins=made["graphcut"]).header["settings"]
    for by, other in (("graphcut", "difficulty"), ("difficulty", "graphcut")):
        with pytest.raises(ValueError, match=f"made with bins_by='{other}', not '{by}'"):
            adq.build_plan(folder, bins=made[other], bins_by=by)


def test_a_file_of_bins_made_otherwise_is_made_again(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "bins.parquet"
    for by in ("graphcut", "difficulty", "graphcut"):
        options: dict[str, Any] = {"bins": 3, "bins_by": by}
        plan = make_plan(Features(folder), plan_options(**options), bins_file=file).plan()
        assert plan.hash == adq.build_plan(folder, **options).hash
        assert Bins.load(file).header.get("bins_by", "graphcut") == by


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"bins_by": "margin"}, r"bins_by must be one of \('graphcut', 'difficulty'\), got 'margin'"),
        ({"bins_by": "difficulty", "kernel": "gradient"}, "leave kernel='gradient' out"),
    ],
)
def test_what_does_not_go_with_it_is_refused(options: dict[str, Any], match: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=match):
        adq.build_plan(folder, **options)


def test_the_command_makes_the_same_plan(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.parquet"
    assert main(["plan", str(folder), "--bins", "3", "--bins-by", "difficulty", "-o", str(out)]) == 0
    assert adq.load_plan(out).hash == adq.build_plan(folder, bins=3, bins_by="difficulty").hash
