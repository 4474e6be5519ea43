"""A plan is fair: the seed decides odd seats, every sample is reached, copies are left out and said."""

import logging
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adq_wds as adq
from adq_wds.planning.build_plan import find_bins
from adq_wds.planning.leave_out import leave_out
from adq_wds.planning.options import plan_options
from adq_wds.planning.samples import read_samples
from adq_wds.planning.seats import make_cells
from adq_wds.report.text import describe_plan, show_plan
from adq_wds.tables.features import Features
from adq_wds.tables.features_file import ShardFeatures
from tests.conftest import Caplog

MakeFeatures = Callable[..., ShardFeatures]
SEEDS = 2000


@pytest.fixture
def small_classes(make_features: MakeFeatures, tmp_path: Path) -> Features:
    """Four classes of 5, 7, 12 and 30, in two shards."""
    label = [c for c, n in enumerate((5, 7, 12, 30)) for _ in range(n)]
    make_features("a.tar", label[::2])
    make_features("b.tar", label[1::2], first=100)
    return Features(tmp_path / "features")


@pytest.mark.parametrize("must", [[], ["k0000", "k0001", "k0100", "k0026"]], ids=["free", "must"])
@pytest.mark.parametrize("balance", ["class", "none"])
def test_mean_seats_over_seeds_are_the_share(balance: str, must: list[str], small_classes: Features) -> None:
    bins = find_bins(small_classes, bins=4)
    asked: dict[str, Any] = {"bins": bins, "keep": 0.3, "balance": balance, "must_include": must}
    plans = [adq.build_plan(small_classes, seed=seed, **asked) for seed in range(20)]
    options = plan_options(**asked).settled(small_classes)  # to make 2,000 plans would take minutes
    samples = read_samples(small_classes, options)
    leave_out(samples, options)
    importance = np.array([entry["importance"] for entry in plans[0].header["bins"]])
    cells = make_cells(samples, bins, importance, options)
    got = np.array([replace(cells, seed=seed).quota for seed in range(SEEDS)])
    assert got[:20].tolist() == [plan.header["cells"]["quota"] for plan in plans]
    share = np.array(plans[0].header["cells"]["share"])
    assert share.sum() == got[0].sum() == 16 - len(must)
    error = got.std(axis=0) / math.sqrt(SEEDS)
    assert (np.abs(got.mean(axis=0) - share) <= 4.5 * error + 1e-5).all()
    assert (np.abs(got - share) < 2).all()
    of_class = got.sum(axis=2)
    error = of_class.std(axis=0) / math.sqrt(SEEDS)
    assert (np.abs(of_class.mean(axis=0) - share.sum(axis=1)) <= 4.5 * error + 1e-5).all()


def test_classes_of_one_are_drawn_by_the_seed(make_features: MakeFeatures, tmp_path: Path) -> None:
    make_features("a.tar", list(range(200)))
    bins = find_bins(Features(tmp_path / "features"), bins=10)
    plans = [adq.build_plan(tmp_path / "features", bins=bins, keep=0.2, seed=s) for s in range(40)]
    assert {len(plan) for plan in plans} == {40}
    times = Counter(key for plan in plans for key in plan.keys())  # noqa: SIM118 - a plan's own method
    assert len(times) > 190
    assert max(times.values()) < 24


@pytest.mark.parametrize(
    ("label", "keep"), [([i % 100 for i in range(1200)], 0.2), (list(range(200)), 0.2), ([0] * 50, 0.3)]
)
def test_fresh_draws_reach_all(
    label: list[int], keep: float, make_features: MakeFeatures, tmp_path: Path
) -> None:
    half = len(label) // 2
    make_features("a.tar", label[:half])
    make_features("b.tar", label[half:], first=half)
    plan = adq.build_plan(tmp_path / "features", bins=10, keep=keep)
    seen, epochs = np.zeros(len(label), dtype=int), 2 * math.ceil(1 / keep)
    for epoch in range(epochs):
        kept = np.concatenate([plan.kept_in(name, epoch) for name in plan.shards])
        assert kept.sum() == len(plan)
        seen += kept
    assert seen.min() >= 1
    assert plan.kept_in("a.tar", 0).tolist() == plan.shard("a.tar").kept.tolist()


def test_must_includes_are_in_every_epoch(make_features: MakeFeatures, tmp_path: Path) -> None:
    make_features("a.tar", [0, 1] * 20)
    must = ["k0003", "k0005", "k0007", "k0009"]  # as many as their class would keep
    plan = adq.build_plan(tmp_path / "features", bins=2, keep=0.2, must_include=must)
    epochs = [plan.kept_in("a.tar", epoch) for epoch in range(4000)]
    assert all(kept.sum() == 8 for kept in epochs)
    assert all(kept[[3, 5, 7, 9]].all() for kept in epochs)
    share = np.array(plan.header["cells"]["share"])
    assert (share > 0).all()  # reached some day: a class full of must-includes keeps a trace of a share
    assert share.sum() == 4


@pytest.fixture
def copied(make_features: MakeFeatures, tmp_path: Path) -> Path:
    """20 samples of two classes; k0004 is k0000 again, k0107 too, k0103 is k0002 with another label."""
    label = [i % 2 for i in range(10)]
    make_features("a.tar", label, contents=[0, 1, 2, 3, 0, 5, 6, 7, 8, 9])
    more = [10, 11, 12, 2, 14, 15, 16, 0, 18, 19]
    make_features("b.tar", [1, 0, 1, 1, 0, 1, 0, 0, 1, 0], contents=more, first=100, bad=[10])
    return tmp_path / "features"


def reasons(plan: adq.Plan) -> dict[str, tuple[str, str]]:
    rows = plan.table().to_pylist()
    return {row["key"]: (row["reason"], row["duplicate_of"]) for row in rows}


def test_the_first_of_equal_samples_stays_and_is_named(copied: Path, caplog: Caplog) -> None:
    plan = adq.build_plan(copied, bins=2, keep=0.5)
    found = reasons(plan)
    copies = {key: of for key, (reason, of) in found.items() if reason == "duplicate"}
    assert copies == {"k0004": "a.tar/k0000", "k0107": "a.tar/k0000", "k0103": "a.tar/k0002"}
    assert found["k0110"] == ("bad", "")
    n_of = Counter(reason for reason, _ in found.values())
    assert n_of == {"kept": 10, "quota": 7, "duplicate": 3, "bad": 1}
    assert len(plan) == 10  # half of all usable samples, not of what is left
    rows = [row for row in plan.table().to_pylist() if row["reason"] == "duplicate"]
    assert all((row["bin"], row["pick"], row["kept"]) == (-1, -1, False) for row in rows)
    assert "1 copies have another label than the sample that stays, such as 'b.tar/k0103'" in caplog.text
    about = describe_plan(plan)
    assert about["reasons"]["duplicate"] == 3
    assert about["copies_of_other_label"] == 1
    text = "3 copies are left out, 1 of them with another label than the sample that stays"
    assert text in show_plan(plan).splitlines()


def test_what_is_left_is_kept_whole_when_the_budget_is_more(copied: Path, caplog: Caplog) -> None:
    plan = adq.build_plan(copied, bins=2, keep=0.95)
    assert len(plan) == 17
    assert caplog.text.count("keep=0.95 of 20 samples is 19, but 17 are left without copies") == 1


def test_copies_stay_where_they_are_asked_to(copied: Path) -> None:
    plan = adq.build_plan(copied, bins=2, keep=0.5, dedup=None)
    assert plan.header["reasons"]["duplicate"] == 0
    assert plan.header["settings"]["dedup"] is None
    bins = find_bins(Features(copied), bins=2, dedup=None)
    with pytest.raises(ValueError, match="the bins were made with dedup=None, not 'exact'"):
        adq.build_plan(copied, bins=bins)
    assert adq.build_plan(copied, bins=bins, keep=0.5, dedup=None).hash == plan.hash


def test_a_must_include_copy_stays_and_the_first_goes(copied: Path) -> None:
    plan = adq.build_plan(copied, bins=2, keep=0.5, must_include=["k0107"])
    found = reasons(plan)
    assert found["k0107"] == ("kept", "")
    assert found["k0000"] == found["k0004"] == ("duplicate", "b.tar/k0107")
    both = reasons(adq.build_plan(copied, bins=2, keep=0.5, must_include=["k0107", "k0004"]))
    assert both["k0107"] == both["k0004"] == ("kept", "")
    assert both["k0000"] == ("duplicate", "a.tar/k0004")
    for must in ([], ["k0107"]):  # nested with copies and must-includes too
        inside: set[str] = set()
        for keep in np.linspace(0.1, 1, 10):
            kept = set(adq.build_plan(copied, bins=2, keep=float(keep), must_include=must).keys())
            assert inside <= kept
            inside = kept


def test_a_copy_of_a_sample_in_a_class_left_out_is_no_copy(copied: Path) -> None:
    found = reasons(adq.build_plan(copied, bins=2, keep=0.5, classes=[1]))
    assert found["k0103"][0] in ("kept", "quota")  # its twin k0002 is of class 0
    assert found["k0002"] == ("excluded", "")


def test_features_without_digests_keep_their_copies_and_say_so(
    make_features: MakeFeatures, tmp_path: Path, caplog: Caplog
) -> None:
    make_features("a.tar", [0, 1] * 6)
    with caplog.at_level(logging.INFO, logger="adq_wds"):
        plan = adq.build_plan(tmp_path / "features", bins=2, keep=0.5)
    assert caplog.text.count("copies are not looked for") == 1
    assert "holds no digests; embed again" in caplog.text
    assert plan.header["settings"]["dedup"] is None


@pytest.mark.parametrize("contents", [[7] * 12, [i // 4 for i in range(12)]], ids=["all", "by class"])
def test_all_copies_are_defined(contents: list[int], make_features: MakeFeatures, tmp_path: Path) -> None:
    make_features("a.tar", [i // 4 for i in range(12)], contents=contents)
    plan = adq.build_plan(tmp_path / "features", bins=3, keep=0.25)
    n_left = len(set(contents))
    assert len(plan) == min(3, n_left)
    assert [c["n"] for c in plan.header["classes"]] == [1, *[int(n_left > 1)] * 2]
    assert sum(plan.kept_in("a.tar", 3)) == len(plan)


def lines_of(plan: adq.Plan) -> list[str]:
    return show_plan(plan).splitlines()


def test_what_a_user_must_know_is_said(make_features: MakeFeatures, tmp_path: Path) -> None:
    label = [0] * 40 + [1] * 8 + [2] * 2
    make_features("a.tar", label, names=["cat", "dog", "owl"])
    plan = adq.build_plan(tmp_path / "features", bins=1, keep=0.04)
    lines, about = lines_of(plan), describe_plan(plan)
    empty = [c for c in plan.header["classes"] if not c["kept"]]
    assert about["empty_classes"] == [c["label"] for c in empty]
    names = ", ".join(c["name"] for c in empty)
    assert f"{len(empty)} of 3 classes get nothing: {names}" in lines
    assert any(line.startswith("classes hold 2 to 40 samples (20 : 1)") for line in lines)
    assert about["class_ratio"] == 20
    assert about["never_kept"] == 0
    part = adq.build_plan(tmp_path / "features", bins=1, keep=0.5, classes=["cat", "owl"])
    assert "8 samples of other classes are left out" in lines_of(part)


def test_importance_that_made_no_difference_is_said(make_features: MakeFeatures, tmp_path: Path) -> None:
    make_features("a.tar", [0] * 40)
    folder = tmp_path / "features"
    tiny, strong = (adq.build_plan(folder, bins=2, keep=0.5, alpha=alpha) for alpha in (1e-6, 1.0))
    assert tiny.header["equal_to_alpha_0"] is True
    assert "importance made no difference: equal to --alpha 0" in lines_of(tiny)
    plain = adq.build_plan(folder, bins=2, keep=0.5, alpha=0)
    assert plain.keys() == tiny.keys()
    assert plain.header["equal_to_alpha_0"] is None
    assert strong.header["equal_to_alpha_0"] == (strong.keys() == plain.keys())


def test_samples_that_can_never_be_kept_are_said(make_features: MakeFeatures, tmp_path: Path) -> None:
    def first_bin(size: Any, importance: Any, keep: float) -> Any:
        return np.array([1.0, 0.0])

    make_features("a.tar", [0] * 40)
    plan = adq.build_plan(tmp_path / "features", bins=2, keep=0.25, allocation=first_bin)
    assert describe_plan(plan)["never_kept"] == 20
    assert "20 samples can never be kept, not even by fresh draws" in lines_of(plan)
    seen = sum(plan.kept_in("a.tar", epoch) for epoch in range(50))
    assert (seen[plan.shard("a.tar").bin == 1] == 0).all()


def test_nothing_is_said_where_there_is_nothing_to_say(make_features: MakeFeatures, tmp_path: Path) -> None:
    make_features("a.tar", [0, 1] * 40, contents=range(80))
    plan = adq.build_plan(tmp_path / "features", bins=4, keep=0.5, alpha=1.0)
    assert plan.header["equal_to_alpha_0"] is False
    assert lines_of(plan)[3].startswith("settings: ")


def test_published_rates_are_held_against_own_alpha_0(make_features: MakeFeatures, tmp_path: Path) -> None:
    make_features("a.tar", [0] * 7)
    asked: dict[str, Any] = {"bins": 3, "keep": 0.5, "allocation": "published"}
    tiny, plain = (adq.build_plan(tmp_path / "features", alpha=alpha, **asked) for alpha in (1e-9, 0))
    assert tiny.header["equal_to_alpha_0"] is True
    assert plain.header["equal_to_alpha_0"] is None
    assert tiny.keys() == plain.keys()
    share = np.array(plain.header["cells"]["share"][0])
    size = np.array([3, 2, 2])
    assert share == pytest.approx(4 * size**2 / (size**2).sum(), abs=1e-3)  # where bins are unequal, not DQ
