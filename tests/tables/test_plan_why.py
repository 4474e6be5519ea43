"""A plan says of every sample why it is kept or not, and what would have kept it."""

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adq_wds as adq
from adq_wds.cli.main import main
from adq_wds.core.kernel import unit_rows
from adq_wds.tables.features import Features
from tests.conftest import Capsys, MakeFeatures, MakeShard
from tests.tables.test_exchange import HOSTILE, tar_of
from tests.tampering import explained, small_plan


@pytest.fixture
def folder(make_features: MakeFeatures, tmp_path: Path) -> Path:
    """Two shards of three classes; a copy across shards, two bad samples; the key k0000 stands in both."""
    make_features("a.tar", [0, 1, 2] * 14, bad=[3], contents=range(42))
    make_features("b.tar", [0, 0, 1, 2] * 9, bad=[0], contents=[7, *range(100, 135)])
    return tmp_path / "features"


@pytest.fixture
def plan(folder: Path) -> adq.Plan:
    return adq.build_plan(
        folder, bins=3, keep=0.3, must_include=[("b.tar", "k0005")], exclude=[("b.tar", "k0006")]
    )


def rows_of(plan: adq.Plan) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = plan.table().to_pylist()
    return rows


def test_it_says_what_the_rows_say(plan: adq.Plan) -> None:
    for row in rows_of(plan):
        why = plan.why((row["shard"], row["key"]))
        assert (why.shard, why.key, why.index) == (row["shard"], row["key"], row["index"])
        assert (why.kept, why.reason) == (row["kept"], row["reason"])
        assert (why.duplicate_of or "") == row["duplicate_of"]
        in_bin = row["bin"] >= 0
        assert (why.bin, why.pick) == ((row["bin"], row["pick"]) if in_bin else (None, None))
        if in_bin and row["rank"] >= 0:
            assert why.quota is not None
            assert why.rank == row["rank"]
            assert why.kept == (why.rank < why.quota)
            assert why.ranks_short == (None if why.kept else why.rank - why.quota + 1)
            assert plan.why(f"{row['shard']}/{row['key']}") == why
    assert {plan.why((row["shard"], row["key"])).reason for row in rows_of(plan)} == {
        "kept", "quota", "duplicate", "bad", "excluded",
    }  # fmt: skip


@pytest.mark.parametrize("balance", ["class", "equal", "none", 0.5])
@pytest.mark.parametrize("allocation", ["adaptive", "uniform"])
def test_the_least_keep_ratio_is_the_least_that_keeps_it(allocation: str, balance: Any, folder: Path) -> None:
    options: dict[str, Any] = {"bins": 3, "allocation": allocation, "balance": balance}
    options |= {"must_include": [("b.tar", "k0005")], "exclude": [("b.tar", "k0006")]}
    plan = adq.build_plan(folder, keep=0.2, **options)
    n = len(Features(folder))
    for row in [row for row in rows_of(plan) if row["reason"] == "quota"][::12]:
        name = (row["shard"], row["key"])
        needed = plan.why(name).keep_needed
        assert needed is not None
        assert adq.build_plan(folder, keep=needed, **options).why(name).kept
        assert not adq.build_plan(folder, keep=needed - 1 / n, **options).why(name).kept


def test_rules_that_hang_on_the_ratio_name_none(folder: Path) -> None:
    for allocation in ("published", lambda size, importance, keep: size):
        plan = adq.build_plan(folder, keep=0.2, bins=3, allocation=allocation)
        (row, *_) = [row for row in rows_of(plan) if row["reason"] == "quota"]
        assert plan.why((row["shard"], row["key"])).keep_needed is None


def test_the_nearest_kept_sample_has_the_largest_cosine(plan: adq.Plan, folder: Path) -> None:
    features = Features(folder)
    rows = [row for row in rows_of(plan) if row["reason"] != "bad"]
    unit = unit_rows(np.concatenate([file.embedding() for file in features]))
    for i, row in enumerate(rows):
        nearest = plan.why((row["shard"], row["key"]), features=features).nearest
        others = [j for j, o in enumerate(rows) if o["kept"] and o["label"] == row["label"] and j != i]
        best = max(others, key=lambda j: unit[i] @ unit[j])
        assert nearest is not None
        assert (nearest.shard, nearest.key) == (rows[best]["shard"], rows[best]["key"])
        assert nearest.cosine == unit[i] @ unit[best]


def test_it_reads_well(plan: adq.Plan, folder: Path) -> None:
    first = {row["reason"]: (row["shard"], row["key"]) for row in reversed(rows_of(plan))}
    texts = {reason: str(plan.why(name, features=folder)) for reason, name in first.items()}
    assert re.fullmatch(
        r"a\.tar/k\d+ is kept: its rank \d is below the quota \d\nclass \d\n"
        r"bin \d keeps \d of \d+ of its class; pick \d+, rank \d, from 0\n"
        r"nearest kept sample of its class [ab]\.tar/k\d+, cosine 0\.\d{4}",
        texts["kept"],
    )
    assert re.search(r"is not kept: its rank \d+ is not below the quota \d, \d+ short\n", texts["quota"])
    assert re.search(r"\nkept from a keep ratio of 0\.\d+ on; the plan's is 0\.3\n", texts["quota"])
    assert texts["duplicate"].startswith("b.tar/k0001 is not kept: it is a copy of a.tar/k0008\n")
    assert texts["bad"] == "a.tar/k0003 is not kept: it could not be used: not an image"
    assert "k0006 is not kept: it is on the list of those to exclude\n" in texts["excluded"]
    assert "is kept: it is on the list of those to include\n" in str(plan.why(("b.tar", "k0005")))
    few = adq.build_plan(folder, bins=3, keep=0.3, classes=[1])
    assert "a.tar/k0001 is kept" in str(few.why("a.tar/k0001")) or few.why("a.tar/k0001").reason == "quota"
    assert "is not kept: its class was not planned\n" in str(few.why("a.tar/k0000"))


def test_a_doubted_label_has_its_margin(tmp_path: Path) -> None:
    plan = adq.load_plan(Path(__file__).parents[1] / "golden/v4/cleaned.parquet")
    for row in rows_of(plan):
        why = plan.why((row["shard"], row["key"]))
        assert why.margin == (None if np.isnan(row["margin"]) else row["margin"])
        assert (why.reason == "label") == (row["reason"] == "label")
        assert json.loads(json.dumps(asdict(why), allow_nan=False)) == asdict(why)
        if why.reason == "label":
            assert f"its label is doubted\nclass {why.label}" in str(why)
            assert f"margin of its label {why.margin:.3f}" in str(why)
    margins = [row["margin"] for row in rows_of(plan)]
    assert np.isnan(margins).any()
    assert not np.isnan(margins).all()


def test_plans_of_version_1_and_of_keys_say_what_they_know(make_shard: MakeShard) -> None:
    old = small_plan()
    assert old.why("k0").words == "its rank 0 is below the quota 1"
    assert (old.why("k5").reason, old.why("k5").keep_needed) == ("quota", None)
    assert str(old.why("a.tar/k11")) == (
        "a.tar/k11 is not kept: it is in no bin, and a plan of version 1 does not say why"
    )
    chosen = adq.Plan.from_keys(make_shard("a.tar", 4), ["s00001"])
    assert str(chosen.why("s00001")) == "a.tar/s00001 is kept: it was chosen by hand"
    assert str(chosen.why("s00002")) == "a.tar/s00002 is not kept: it was not chosen by hand"


def test_a_key_that_is_not_there_names_close_ones(make_shard: MakeShard) -> None:
    plan = adq.Plan.from_keys(make_shard("a.tar", 40), None)
    for key, close in (
        ("s0017", "'s00017'"),
        ("s00017.jpg", "'s00017'"),
        ("S00017", "'s00017'"),
        ("17", "'s00017'"),
    ):
        with pytest.raises(adq.PlanError, match=f"sample '{key}' is not in the plan; did you mean .*{close}"):
            plan.why(key)
    with pytest.raises(adq.PlanError, match=r"'\?' is not in the plan; `adq show --keys` lists those kept$"):
        plan.why("?")
    for pair in (("b.tar", "s00017"), ("a.tar", "x"), ("a.tar", "")):
        with pytest.raises(adq.PlanError, match="is not in the plan"):
            plan.why(pair)
    with pytest.raises(adq.PlanError, match="is not in the plan"):
        plan.why("")


def test_a_key_in_several_shards_lists_them(plan: adq.Plan) -> None:
    with pytest.raises(
        adq.PlanError, match=r"sample 'k0001' stands in 2 shards, a.tar, b.tar; give SHARD/KEY"
    ):
        plan.why("k0001")


def test_features_of_other_bytes_are_refused(
    plan: adq.Plan, make_features: MakeFeatures, tmp_path: Path
) -> None:
    make_features("a.tar", [0, 1, 2] * 3, folder=tmp_path / "other")
    with pytest.raises(adq.FeaturesError, match=r"b\.parquet"):
        plan.why("a.tar/k0000", features=tmp_path / "other")
    make_features("b.tar", [0] * 3, folder=tmp_path / "other", first=50)
    with pytest.raises(adq.PlanError, match=r"shard a.tar, key 'k\d+': is not among these features"):
        plan.why("a.tar/k0000", features=tmp_path / "other")


@pytest.mark.parametrize("key", [*HOSTILE, "new\nline", "\u200fمفتاح"])
def test_any_key_is_found_and_shown_on_one_line(key: str, tmp_path: Path) -> None:
    shard = tar_of(tmp_path / "a.tar", [key, "other"])
    plan = adq.Plan.from_keys(str(shard), [key])
    why = plan.why(key)
    assert why == plan.why(("a.tar", key)) == plan.why(f"a.tar/{key}")
    assert why.key == key
    assert str(why).isprintable()
    assert str(why).endswith("is kept: it was chosen by hand")


def test_the_command_explains(plan: adq.Plan, folder: Path, capsys: Capsys) -> None:
    plan.save(folder.parent / "plan.parquet")
    words = ["why", "a.tar/k0000", "--plan", str(folder.parent), "--features", str(folder.parent)]
    assert main([*words, "-q"]) == 0
    why = plan.why("a.tar/k0000", features=folder)
    assert capsys.readouterr().out == f"{why}\n"
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == asdict(why) | {"ranks_short": why.ranks_short}
    assert main(["why", "k0", "--plan", str(folder.parent)]) == 1
    assert re.fullmatch(
        r"adq: PlanError: sample 'k0' is not in the plan; did you mean .*\?\n", capsys.readouterr().err
    )


def test_a_plan_of_a_header_alone_names_what_lacks(tmp_path: Path) -> None:
    plan = adq.load_plan(explained(tmp_path / "plan.parquet"))
    assert plan.why("k2").words == "it is a copy of a.tar/k0"
    assert plan.why("k3").words == "its class was not planned"
    assert plan.why("k1").keep_needed is None


@pytest.mark.parametrize(
    ("entry", "value"), [("names", ["x"]), ("settings", {"seed": 0, "keep": "much"}), ("names", 7)]
)
def test_a_damaged_header_is_named(entry: str, value: Any, plan: adq.Plan) -> None:
    damaged = adq.Plan.from_shards(list(plan), {**plan.header, entry: value})
    with pytest.raises(adq.PlanError, match="plan: damaged header: "):
        damaged.why("a.tar/k0002")


def test_features_of_fewer_shards_are_named(plan: adq.Plan, folder: Path) -> None:
    with pytest.raises(adq.PlanError, match=r"shard b.tar is not among the features"):
        plan.why("a.tar/k0000", features=Features(folder, shards=["a.tar"]))
