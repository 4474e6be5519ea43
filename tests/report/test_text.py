"""What is shown of a plan is what is in it."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adq_wds as adq
from adq_wds.report.text import describe_plan, show_plan
from adq_wds.tables.features_file import ShardFeatures

MakeFeatures = Callable[..., ShardFeatures]


@pytest.fixture
def features(make_features: MakeFeatures, tmp_path: Path) -> list[ShardFeatures]:
    rng = np.random.default_rng(3)
    return [
        make_features("a.tar", rng.integers(0, 3, 60).tolist(), bad=[4, 9], names=["cat", "dog", "owl"]),
        make_features("b.tar", rng.integers(0, 2, 40).tolist(), first=100, names=["dog", "yak"]),
    ]


@pytest.fixture
def plan(features: list[ShardFeatures], tmp_path: Path) -> adq.Plan:
    options: Any = {"bins": 5, "keep": 0.3, "must_include": ["k0000"]}
    return adq.build_plan(tmp_path / "features", **options, out=tmp_path / "plan.parquet")


def test_described_numbers_are_those_of_the_table(plan: adq.Plan, features: list[ShardFeatures]) -> None:
    rows = plan.table().to_pylist()
    about = describe_plan(plan)
    kept = [r for r in rows if r["kept"]]
    assert (about["n_samples"], about["n_kept"], about["bad"], about["shards"]) == (102, len(kept), 2, 2)
    assert len(kept) == 30
    assert about["bytes"] == {"all": sum(r["n_bytes"] for r in rows), "kept": sum(r["n_bytes"] for r in kept)}
    texture = {
        (f.shard, key): float(t) for f in features for key, t in zip(f.spans.keys, f.texture, strict=True)
    }
    assert about["texture"]["all"] == pytest.approx(np.mean(list(texture.values())), abs=1e-6)
    mean = np.mean([texture[r["shard"], r["key"]] for r in kept])
    assert about["texture"]["kept"] == pytest.approx(mean, abs=1e-6)
    for k, entry in enumerate(about["bins"]):
        of_bin = [r for r in rows if r["bin"] == k and r["rank"] >= 0]
        assert entry["size"] == len(of_bin)
        assert entry["kept"] == sum(r["kept"] for r in of_bin)
        assert entry["rate"] == pytest.approx(entry["kept"] / entry["size"])
        of_bin = [r for r in rows if r["bin"] == k]
        mean = np.mean([texture[r["shard"], r["key"]] for r in of_bin])
        assert entry["texture"] == pytest.approx(mean)
    for entry in about["classes"]:
        of_class = [r for r in rows if r["label"] == entry["label"]]
        assert (entry["n"], entry["kept"]) == (len(of_class), sum(r["kept"] for r in of_class))
    assert [entry["name"] for entry in about["classes"]] == ["cat", "dog", "owl", "yak"]
    assert about["path"] == str(plan.path)
    assert json.loads(json.dumps(about)) == about


def cells(line: str) -> list[str]:
    return re.split(r"\s{2,}", line.strip())


def test_the_text_has_a_row_for_every_bin_and_class(plan: adq.Plan) -> None:
    about, lines = describe_plan(plan), show_plan(plan).splitlines()
    assert lines[0] == "keeps 30 of 102 samples (29.4 %) in 2 shards"
    assert "2 samples could not be used and are not kept" in lines
    assert "features: synthetic, D = 6" in lines
    assert f"hash {plan.hash}" in lines
    start = next(i for i, line in enumerate(lines) if "importance" in line and "size" in line)
    assert cells(lines[start]) == ["bin", "size", "diversity", "texture", "importance", "rate", "kept"]
    for k, entry in enumerate(about["bins"]):
        numbers = [f"{entry[n]:.4f}" for n in ("diversity", "texture", "importance", "rate")]
        assert cells(lines[start + 1 + k]) == [str(k), str(entry["size"]), *numbers, str(entry["kept"])]
    assert lines[start + 6] == ""
    assert cells(lines[start + 7]) == ["class", "name", "samples", "kept", "must include"]
    for c, entry in enumerate(about["classes"]):
        must = ["1"] if entry["must_include"] else []
        row = [str(c), entry["name"], str(entry["n"]), str(entry["kept"]), *must]
        assert cells(lines[start + 8 + c]) == row
    assert len(lines) == start + 12


def test_a_plan_in_memory_is_shown_as_the_one_in_its_file(plan: adq.Plan, tmp_path: Path) -> None:
    built = adq.build_plan(tmp_path / "features", bins=5, keep=0.3, must_include=["k0000"])
    assert show_plan(built) == show_plan(plan)
    assert describe_plan(built) == {**describe_plan(plan), "path": None}


def test_a_plan_of_keys_is_shown(make_shard: Callable[..., Path]) -> None:
    plan = adq.Plan.from_keys(make_shard("a.tar", 4), ["s00001"])
    assert show_plan(plan).splitlines() == [
        "keeps 1 of 4 samples (25.0 %) in 1 shards",
        "settings: source keys",
        f"hash {plan.hash}",
        "",
        "no bins: the keys were given",
    ]
    assert describe_plan(plan)["n_kept"] == 1


def test_unlabelled_data_and_empty_bins_are_shown(make_features: MakeFeatures, tmp_path: Path) -> None:
    make_features("a.tar", [-1] * 3)
    text = show_plan(adq.build_plan(tmp_path / "features", bins=5, keep=0.5))
    assert re.search(r"^ *4  +0 +- +- +0\.0000 +0\.0000 +0$", text, re.MULTILINE)
    assert re.search(r"^ *all +3 +2$", text, re.MULTILINE)
    assert "must include" not in text


def test_only_the_first_classes_are_listed(make_features: MakeFeatures, tmp_path: Path) -> None:
    make_features("a.tar", list(range(25)) * 2)
    plan = adq.build_plan(tmp_path / "features", bins=2, keep=0.5)
    assert show_plan(plan).endswith("… and 5 more classes (--json lists them)")
    assert len(describe_plan(plan)["classes"]) == 25


HOSTILE = ["a\nkeeps 99", "\x1b[31m\n" * 50, "x\u202ey", "\r\x07", "<script>" * 30]


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("place", ["setting", "value", "values", "score", "encoder", "class"])
def test_whatever_a_plan_names_stays_on_its_line(place: str, name: str, plan: adq.Plan) -> None:
    """S3."""
    hostile: dict[str, dict[str, Any]] = {
        "setting": {"settings": {"seed": 0, name: 1}},
        "value": {"settings": {"seed": 0, "a": name}},
        "values": {"settings": {"seed": 0, "a": [name, name]}},
        "score": {"bins": [{**row, name: 0.5} for row in plan.header["bins"]]},
        "encoder": {"features": {**plan.header["features"], "encoder": name}},
        "class": {"classes": [{**entry, "name": name} for entry in plan.header["classes"]]},
    }
    text = show_plan(adq.Plan.from_shards(list(plan), {**plan.header, **hostile[place]}))
    assert all(line.isprintable() and len(line) < 250 for line in text.split("\n"))
    assert text.count("\n") == show_plan(plan).count("\n")


@pytest.mark.parametrize(
    "header",
    [
        {"settings": 5},
        {"bins": [{}]},
        {"bins": [5]},
        {"texture": {"all": "x"}},
        {"bad": "\x1b[2J"},  # a text where a number should be is not shown
        {"features": {"encoder": "a", "width": "\x1b[2J"}},
    ],
)
def test_a_header_that_cannot_be_shown_is_a_plan_error(header: dict[str, Any], plan: adq.Plan) -> None:
    with pytest.raises(adq.PlanError, match="plan: damaged header"):
        show_plan(adq.Plan.from_shards(list(plan), {**plan.header, **header}))
