"""What is shown of a plan is what is in it."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adq_wds as adq
from adq_wds.report.text import describe_codebook, describe_plan, show_codebook, show_plan
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


def test_what_was_left_out_and_why_is_said_above_the_numbers(
    make_features: MakeFeatures, tmp_path: Path
) -> None:
    label = [0] * 30 + [1] * 30 + [2]
    rows = np.eye(3)[label] + np.random.default_rng(0).normal(0, 0.05, (61, 3))
    rows[5] = rows[40]  # labelled 0, and among those of 1
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    make_features("a.tar", label, embedding=rows, contents=[*range(60), 59])
    options: Any = {"dedup": "exact", "clean": 0.02, "exclude": ["k0010", "k0011"]}
    plan = adq.build_plan(tmp_path / "features", bins=2, keep=0.5, **options)
    about, text = describe_plan(plan), show_plan(plan)
    assert about["reasons"]["duplicate"] == 1
    assert about["copies_of_other_label"] == 1
    assert "1 copies are left out, 1 of them with another label than the sample that stays" in text
    assert "2 samples on the exclude list, or of other classes, are left out" in text
    n = sum(about["clean"]["left_out"])
    assert n == about["reasons"]["label"] > 0
    assert f"{n} samples are left out whose labels are doubted" in text


@pytest.mark.parametrize("options", [{}, {"clean": 0.05, "dedup": "exact", "balance": "equal"}])
def test_a_codebook_is_shown_with_the_rates_that_it_gives(
    options: dict[str, Any], make_features: MakeFeatures, tmp_path: Path
) -> None:
    make_features(
        "a.tar", [0] * 80 + [1] * 40 + [2] * 3, contents=range(123), names=["cat", "dog", "owl"], signed=True
    )
    codebook = adq.fit_codebook(tmp_path / "features", bins=3, pilot=20, **options)
    about, lines = describe_codebook(codebook, 0.25), show_codebook(codebook, 0.25).splitlines()
    assert json.loads(json.dumps(about)) == about
    table = [cells(line) for line in lines]
    frequency, rates = codebook.frequency(), codebook.class_rates(0.25)
    assert lines[0].startswith(f"3 bins; {len(about['rows']) - 1} of 3 classes have rules of their own")
    for row, of_bin in zip(about["rows"], frequency, strict=True):
        assert row["frequency"] == of_bin.tolist()
        name = "pooled" if row["label"] is None else row["name"]
        assert any(name in line and line[-3:] == [f"{v:.3f}" for v in of_bin] for line in table)
        c = 0 if row["label"] is None else 1 + codebook.header["classes"].index(row["label"])
        assert ["rate", *(f"{v:.3f}" for v in rates[c])] in table
    assert ("of_classes" in about) == bool(options)
    for entry in about.get("of_classes", []):
        counts = [f"{entry['n']:,}", f"{entry['doubted']:,}", f"{entry['keep']:.3f}"]
        assert [str(entry["label"]), entry["name"], *counts] in table
    with pytest.raises(ValueError, match="keep"):
        show_codebook(codebook, 2)
