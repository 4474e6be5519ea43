"""A plan is exact in its counts, nested in larger ones, and takes classes, names and must-includes as asked."""

import itertools
import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adq_wds as adq
from adq_wds.planning.build_plan import find_bins
from adq_wds.planning.samples import global_labels
from adq_wds.tables.features import Features
from adq_wds.tables.features_file import ShardFeatures
from adq_wds.tables.plan_rows import ALWAYS, NEVER
from tests.planning.conftest import mixed_labels

MakeFeatures = Callable[..., ShardFeatures]
SETTINGS = [
    dict(zip(("allocation", "balance", "draw", "normalise"), values, strict=True))
    for values in itertools.product(
        ("adaptive", "published", "uniform"), ("class", "none"), ("random", "ordered"), ("sum", "minmax")
    )
]


def name_of(settings: dict[str, Any]) -> str:
    return "-".join(settings.values())


# ---- Counts, nesting


@pytest.mark.parametrize("settings", SETTINGS, ids=name_of)
def test_counts_are_exact_and_plans_nested(settings: dict[str, Any], mixed: Path) -> None:
    features = Features(mixed)
    bins = find_bins(features, bins=7)
    for must in ([], ["k0003", "k1001", "k1009"]):
        inside: set[str] = set()
        for keep in (0, 0.1, 0.125, 0.2125, 0.3, 0.5, 0.621, 0.9, 1):
            if must and keep == 0:
                continue
            plan = adq.build_plan(features, bins=bins, keep=keep, must_include=must, **settings)
            kept = set(plan.keys())
            assert len(plan) == len(kept) == round(keep * 120), keep
            assert kept >= inside, (keep, settings)
            assert kept >= set(must)
            assert Counter(plan.table()["rank"].to_pylist())[ALWAYS] == len(must)
            inside = kept


@pytest.mark.parametrize("balance", ["class", "none"])
def test_counts_per_class_and_cell_are_those_the_header_lists(balance: str, mixed: Path) -> None:
    plan = adq.build_plan(mixed, bins=6, keep=0.37, balance=balance, must_include=["k0000", "k1000"])
    rows = plan.table().to_pylist()
    size = Counter((r["label"], r["bin"]) for r in rows if r["rank"] != ALWAYS)
    kept = Counter((r["label"], r["bin"]) for r in rows if r["rank"] != ALWAYS and r["kept"])
    for c, entry in enumerate(plan.header["classes"]):
        label = entry["label"]
        assert plan.header["cells"]["size"][c] == [size[label, k] for k in range(6)]
        assert plan.header["cells"]["quota"][c] == [kept[label, k] for k in range(6)]
        assert entry["n"] == sum(r["label"] == label for r in rows)
        assert entry["kept"] == sum(r["label"] == label and r["kept"] for r in rows)
        assert entry["must_include"] == sum(r["label"] == label and r["rank"] == ALWAYS for r in rows)
        if balance == "class":
            assert abs(entry["kept"] - 0.37 * entry["n"]) < 2
    assert sum(size.values()) == 118
    ranks: dict[tuple[int, int], list[int]] = {}
    for r in rows:
        if r["rank"] != ALWAYS:
            ranks.setdefault((r["label"], r["bin"]), []).append(r["rank"])
    assert all(sorted(of_cell) == list(range(len(of_cell))) for of_cell in ranks.values())


@pytest.mark.parametrize(("keep", "kept"), [(0, 0), (1e-9, 0), (0.004, 0), (1, 120)])
def test_a_ratio_that_keeps_nothing_is_told(
    keep: float, kept: int, mixed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """F34."""
    assert len(adq.build_plan(mixed, keep=keep)) == kept
    assert (f"keep={keep} keeps 0 of 120 samples" in caplog.text) == (0 < keep < 1)


def test_another_seed_draws_other_samples_of_the_same_bins(mixed: Path) -> None:
    a, b = (adq.build_plan(mixed, keep=0.3, seed=seed).table() for seed in (0, 1))
    assert a["bin"].equals(b["bin"])
    assert a["kept"].to_pylist() != b["kept"].to_pylist()
    ordered = [adq.build_plan(mixed, keep=0.3, draw="ordered", seed=s) for s in (0, 1)]
    assert ordered[0].table()["rank"].equals(ordered[1].table()["rank"])
    assert ordered[0].header["cells"]["share"] == ordered[1].header["cells"]["share"]
    assert ordered[0].header["cells"]["quota"] != ordered[1].header["cells"]["quota"]  # odd seats are drawn


def test_a_new_folder_moves_no_sample(make_features: MakeFeatures, tmp_path: Path) -> None:
    for root, prefix in (("here", ""), ("there", "data/train/")):
        for shard in ("x.tar", "y.tar"):
            rows = np.random.default_rng(len(shard)).random((40, 4)) + 0.1
            rows /= np.linalg.norm(rows, axis=1, keepdims=True)
            make_features(prefix + shard, [0] * 40, embedding=rows, folder=tmp_path / root)
    # textures differ with the shard's name in these synthetic features, so leave the rates to the sizes
    a, b = (adq.build_plan(tmp_path / r, keep=0.3, allocation="uniform").table() for r in ("here", "there"))
    for column in ("key", "bin", "pick", "rank", "kept"):
        assert a[column].equals(b[column]), column


# ---- Must-include


@pytest.mark.parametrize(
    ("must", "text"),
    [
        (["nothing"], r"must-include sample 'nothing' is not among the usable samples"),
        ([("y.tar", "k0003")], r"must-include sample \('y.tar', 'k0003'\) is not among"),
        (["k0055"], r"must-include sample 'k0055' is in several shards; give \(shard, key\)"),
        (["k0002"], r"must-include sample 'k0002' is not among the usable samples"),
    ],
)
def test_must_includes_that_are_no_usable_sample_are_refused(
    must: list[Any], text: str, make_features: MakeFeatures, tmp_path: Path
) -> None:
    make_features("x.tar", mixed_labels(70), bad=[2])
    make_features("y.tar", mixed_labels(50), first=50)
    with pytest.raises(adq.PlanError, match=text):
        adq.build_plan(tmp_path / "features", keep=0.5, must_include=must)


def test_must_includes_may_be_json_and_count_in_the_hash(mixed: Path) -> None:
    plan = adq.build_plan(mixed, keep=0.1, must_include=[["x.tar", "k0004"], ("x.tar", "k0004"), "k0004"])
    assert "k0004" in set(plan.keys())
    assert plan.header["classes"][mixed_labels(70)[4]]["must_include"] == 1
    hashes = {adq.build_plan(mixed, keep=1, must_include=m).hash for m in ([], ["k0000"], ["k0001"])}
    assert len(hashes) == 3


def test_a_must_include_sample_of_a_class_left_out_is_refused(mixed: Path) -> None:
    key = f"k{mixed_labels(70).index(2):04d}"
    with pytest.raises(adq.PlanError, match=f"must-include .*{key}.* of class 2, .* add its class"):
        adq.build_plan(mixed, keep=0.5, classes=[0, 1], must_include=[key])


@pytest.mark.parametrize("balance", ["class", "none"])
def test_more_must_includes_than_the_budget_are_refused(balance: str, mixed: Path) -> None:
    sevens = [f"k{i:04d}" for i, c in enumerate(mixed_labels(70)) if c == 7]
    assert len(sevens) > 1
    # more than the class's share of 0.3: the budget has room for them
    plan = adq.build_plan(mixed, keep=0.05, must_include=sevens, balance=balance)
    assert set(plan.keys()) >= set(sevens)
    assert len(plan) == 6
    many = [f"k{i:04d}" for i in range(7)]
    with pytest.raises(adq.PlanError, match=r"7 must-include samples, but keep=0.05 leaves a budget of 6"):
        adq.build_plan(mixed, keep=0.05, must_include=many, balance=balance)
    with pytest.raises(adq.PlanError, match="1 must-include samples, but keep=0 leaves a budget of 0; raise"):
        adq.build_plan(mixed, keep=0, must_include=["k0000"], balance=balance)


# ---- Classes and labels


def test_classes_that_are_not_chosen_are_in_no_bin(mixed: Path) -> None:
    by_number = adq.build_plan(mixed, keep=0.4, classes=[7, 1])
    rows = by_number.table().to_pylist()
    chosen = sum(r["label"] in (1, 7) for r in rows)
    assert len(rows) == by_number.n_samples == 120
    assert len(by_number) == round(0.4 * chosen)
    for r in rows:
        if r["label"] not in (1, 7):
            assert (r["bin"], r["pick"], r["rank"], r["kept"]) == (-1, -1, NEVER, False)
    assert [entry["label"] for entry in by_number.header["classes"]] == [1, 7]
    assert adq.build_plan(mixed, keep=0.4, classes=["1", "7"]).hash == by_number.hash
    assert adq.build_plan(mixed, keep=0.4, classes=iter([np.int64(7), 1, 1])).hash == by_number.hash


def test_leaving_a_class_out_changes_no_bin_of_the_others(mixed: Path) -> None:
    features = Features(mixed)
    whole, part = find_bins(features, bins=5), find_bins(features, bins=5, classes=[0, 2])
    chosen = np.isin(whole.label, [0, 2])
    assert (part.bin[chosen] == whole.bin[chosen]).all()
    assert (part.pick[chosen] == whole.pick[chosen]).all()
    assert set(part.bin[~chosen].tolist()) == {-1}


@pytest.mark.parametrize(
    ("classes", "text"),
    [
        ([5], r"class 5 has no samples here; the classes are \[0, 1, 2, 7\]"),
        (["cat"], "class 'cat' has no samples here"),
        (["²"], "class '²' has no samples here"),
        ([True], "class True has no samples here"),
        ([1.5], "class 1.5 has no samples here"),
        ([-1], "class -1 has no samples here"),
        ([], "classes must name one or more"),
        ("17", r"classes must be a list, got the text '17'; write \['17'\]"),
    ],
)
def test_classes_that_are_not_there_are_refused(classes: Any, text: str, mixed: Path) -> None:
    with pytest.raises(ValueError, match=text):
        adq.build_plan(mixed, classes=classes)


@pytest.fixture
def named(make_features: MakeFeatures, tmp_path: Path) -> Path:
    make_features("a.tar", [0, 1, 2] * 5, names=["bird", "cat", "dog"])
    make_features("b.tar", [0, 1] * 5, names=["ant", "dog"])
    return tmp_path / "features"


def test_names_of_different_shards_become_one_sorted_list(named: Path) -> None:
    features = Features(named)
    label, names = global_labels(features)
    assert names == ["ant", "bird", "cat", "dog"]
    assert [names[c] for c in label] == ["bird", "cat", "dog"] * 5 + ["ant", "dog"] * 5
    plan = adq.build_plan(features, keep=0.4)
    listed = [(c["label"], c["name"], c["n"]) for c in plan.header["classes"]]
    assert listed == [(0, "ant", 5), (1, "bird", 5), (2, "cat", 5), (3, "dog", 10)]


def test_classes_may_be_chosen_by_name(named: Path) -> None:
    by_name = adq.build_plan(named, keep=0.4, classes=["dog", "ant"])
    assert len(by_name) == 6
    assert [c["name"] for c in by_name.header["classes"]] == ["ant", "dog"]
    assert adq.build_plan(named, keep=0.4, classes=[0, 3]).hash == by_name.hash
    with pytest.raises(ValueError, match=r"class 'cow' has no samples here; the classes are \['ant', 'bird'"):
        adq.build_plan(named, classes=["cow"])
    with pytest.raises(ValueError, match="class '3' has no samples here"):
        adq.build_plan(named, classes=["3"])


def test_integer_and_string_labels_do_not_mix(make_features: MakeFeatures, named: Path) -> None:
    make_features("c.tar", [0, 1])
    with pytest.raises(adq.FeaturesError, match="some shards have integer labels and some string labels"):
        adq.build_plan(named)


def test_a_shard_without_samples_has_no_kind_of_label(make_features: MakeFeatures, named: Path) -> None:
    make_features("c.tar", [], bad=[0, 1])
    plan = adq.build_plan(named, keep=0.4)
    assert len(plan) == 10
    assert plan.n_samples == 27


def test_unlabelled_data_is_one_class(
    make_features: MakeFeatures, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_features("a.tar", [-1] * 20)
    with caplog.at_level(logging.INFO, logger="adq_wds"):
        plan = adq.build_plan(tmp_path / "features", bins=3, keep=0.25)
    assert "no labels: all samples are one class" in caplog.text
    assert [(c["label"], c["n"], c["kept"]) for c in plan.header["classes"]] == [(-1, 20, 5)]
    assert plan.header["cells"]["size"] == [[7, 7, 6]]
