"""What other balances would keep is what plans with them keep."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import adq_wds as adq
from adq_wds.report.text import describe_plan, show_plan
from adq_wds.tables.features_file import ShardFeatures

MakeFeatures = Callable[..., ShardFeatures]
SIZES = [60, 25, 12, 5]


@pytest.fixture
def folder(make_features: MakeFeatures, tmp_path: Path) -> Path:
    """Four classes of 60 to 5 samples, four copies beside them and a sample that cannot be used."""
    label = [c for c, n in enumerate(SIZES) for _ in range(n)]
    contents = [*range(len(label)), 0, 0, 1, 70]
    make_features("a.tar", [*label, 0, 0, 0, 1], contents=contents, bad=[3])
    return tmp_path / "features"


@pytest.mark.parametrize("keep", [0.05, 0.3, 0.7])
@pytest.mark.parametrize("must", [[], ["k0102", "k0101"]], ids=["", "must"])
@pytest.mark.parametrize("allocation", ["adaptive", "published", "uniform"])
def test_counts_are_those_of_such_plans(keep: float, must: list[str], allocation: str, folder: Path) -> None:
    asked: dict[str, Any] = {
        "bins": 3, "keep": keep, "must_include": must, "exclude": ["k0001"], "allocation": allocation, "alpha": 0.9,
    }  # fmt: skip
    kept = describe_plan(adq.build_plan(folder, **asked))["balances"]["kept"]
    assert list(kept) == ["class", "0.5", "equal", "none"]
    for balance, counts in kept.items():
        value: Any = 0.5 if balance == "0.5" else balance
        plan = adq.build_plan(folder, balance=value, **asked)
        assert counts == [entry["kept"] for entry in plan.header["classes"]], balance


def test_weights_of_a_function_say_nothing_of_no_balance(folder: Path) -> None:
    plan = adq.build_plan(folder, bins=3, allocation=lambda size, *_: size)
    assert list(describe_plan(plan)["balances"]["kept"]) == ["class", "0.5", "equal"]


@pytest.mark.parametrize(
    "options", [{}, {"exclude": ["k0001"]}, {"classes": [0, 1, 3]}, {"classes": [0, 3], "exclude": ["k0001"]}]
)
def test_equal_is_equal_up_to_the_ratio_that_is_said(options: dict[str, Any], folder: Path) -> None:
    up_to = describe_plan(adq.build_plan(folder, bins=1, keep=0.2, **options))["balances"]["equal_up_to"]
    plan = adq.build_plan(folder, bins=1, keep=up_to, balance="equal", **options)
    assert {entry["kept"] for entry in plan.header["classes"]} == {5}
    more = adq.build_plan(folder, bins=1, keep=up_to + 0.05, balance="equal", **options)
    assert len({entry["kept"] for entry in more.header["classes"]}) > 1


def test_unequal_classes_are_said_below_their_table(folder: Path) -> None:
    plan = adq.build_plan(folder, bins=2, keep=0.5)
    lines = show_plan(plan).splitlines()
    counts = [str(of_class[-1]) for of_class in describe_plan(plan)["balances"]["kept"].values()]
    said = "classes hold 5 to 60 samples (12 : 1); by --balance the smallest would keep "
    assert lines[-2] == said + "{} with class, {} with 0.5, {} with equal, {} with none".format(*counts)
    assert lines[-1] == (
        "--balance equal gives classes equal numbers up to --keep 0.19; "
        "at this ratio 2 of 4 classes would give all they have"
    )
    alike = show_plan(adq.build_plan(folder, bins=2, keep=0.5, classes=[0, 1]))
    assert "--balance" not in alike


@pytest.mark.parametrize("change", [{"n": 1}, {"must_include": -1}, {"must_include": 99}, {"n": 2**70}])
def test_counts_that_contradict_are_a_plan_error(change: dict[str, int], folder: Path) -> None:
    plan = adq.build_plan(folder, bins=2, keep=0.5)
    classes = [{**entry, **change} for entry in plan.header["classes"]]
    with pytest.raises(adq.PlanError, match="plan: damaged header"):
        show_plan(adq.Plan.from_shards(list(plan), {**plan.header, "classes": classes}))


def test_an_importance_that_cannot_be_is_a_plan_error(folder: Path) -> None:
    plan = adq.build_plan(folder, bins=2, keep=0.5)
    for value in (1e308, -1, None):
        bins = [{**entry, "importance": value} for entry in plan.header["bins"]]
        with pytest.raises(adq.PlanError, match="plan: damaged header"):
            show_plan(adq.Plan.from_shards(list(plan), {**plan.header, "bins": bins}))
