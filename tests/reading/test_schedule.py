"""Another ratio in every epoch draws what plans of these ratios draw, each sample of a cell once before any twice."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import adq_wds as adq
from adq_wds.core.fresh import ONE
from adq_wds.errors import StateError
from adq_wds.planning.build_plan import find_bins
from adq_wds.reading.schedule import Schedule
from adq_wds.tables.features import Features
from adq_wds.tables.plan_header import fresh_start

GOLDEN = Path(__file__).parents[1] / "golden"
GOLDEN_RATIO = 0x9E3779B97F4A7C15


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 samples in two shards, of four unequal classes."""
    from adq_wds.tables.features import file_name
    from tests.conftest import synthetic_features

    out = tmp_path_factory.mktemp("set") / "features"
    out.mkdir()
    labels = np.random.default_rng(0).choice([0, 1, 2, 7], 120, p=[0.5, 0.3, 0.15, 0.05]).tolist()
    for shard, part, first in (("x.tar", labels[:70], 0), ("y.tar", labels[70:], 1000)):
        synthetic_features(shard, part, first=first).save(out / file_name(shard))
    return out


def kept(plan: adq.Plan, epoch: int, draws: Any = None) -> list[bool]:
    return [bool(k) for name in plan.shards for k in plan.kept_in(name, epoch, draws)]


# ---- The ratio of another plan


OPTIONS: list[dict[str, Any]] = [
    {},
    {"balance": "equal", "allocation": "published"},
    {"balance": 0.5, "allocation": "uniform", "seed": 3},
    {"balance": "none", "alpha": 1.0},
    {"must_include": ["k0003", "k1001", "k1009"], "balance": "equal"},
    {"classes": [0, 2]},
    {"exclude": ["k0005", "k0006", "k1007"]},
    {"exclude": ["k0005", "k0006", "k1007"], "classes": [0, 1, 2]},
    {"clean": 0.2},
    {"draw": "ordered", "bins_by": "difficulty"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_constant_ratio_draws_what_a_plan_of_it_draws(folder: Path, options: dict[str, Any]) -> None:
    if "classes" not in options:
        options = {**options, "bins": find_bins(Features(folder), bins=3, **_of_bins(options))}
    plan = adq.build_plan(folder, keep=0.3, **options)
    for ratio in (0.1, 0.3, 0.77, 1):
        other, draws = adq.build_plan(folder, keep=ratio, **options), Schedule(plan, ratio)
        for epoch in (*range(8), 1000):
            assert kept(plan, epoch, draws) == kept(other, epoch)
            assert draws.n_total(epoch) == len(other)


def _of_bins(options: dict[str, Any]) -> dict[str, Any]:
    return {name: options[name] for name in ("exclude", "clean", "bins_by") if name in options}


@pytest.mark.parametrize("version", ["v3", "v4"])
def test_plans_made_before_there_were_schedules_follow_one(version: str) -> None:
    plan = adq.load_plan(GOLDEN / version / "plan.parquet")
    draws = Schedule(plan, 0.5)
    for epoch in (0, 1, 2, 3, 1000):
        assert kept(plan, epoch, draws) == kept(plan, epoch)
    assert sum(kept(plan, 3, Schedule(plan, 1.0))) > len(plan)


def test_a_function_of_the_users_is_stood_for_by_its_shares(folder: Path) -> None:
    plan = adq.build_plan(folder, bins=4, keep=0.3, allocation=lambda size, importance, keep: size**2.0)
    draws = Schedule(plan, lambda epoch: (0.3, 0.6)[epoch % 2])
    for epoch in (0, 1, 2):
        assert sum(kept(plan, epoch, draws)) == draws.n_total(epoch) == round(120 * (0.3, 0.6)[epoch % 2])
    same = Schedule(plan, 0.3)
    assert [kept(plan, epoch, same) for epoch in range(5)] == [kept(plan, epoch) for epoch in range(5)]


# ---- Another ratio in every epoch


def replayed(plans: dict[float, adq.Plan], ratios: list[float]) -> list[list[list[int]]]:
    """The ranks that each epoch takes of each cell: epoch after epoch and seat after seat, by the plan of its ratio."""
    size = np.array(plans[ratios[0]].header["cells"]["size"]).ravel().tolist()
    start = fresh_start(plans[ratios[0]].header)
    place, taken = [0] * len(size), []
    for epoch, ratio in enumerate(ratios):
        cells = plans[ratio].header["cells"]
        quota = np.array(cells["quota"]).ravel().tolist()
        share = [int(s * ONE) for s in np.array(cells["share"]).ravel().tolist()]
        borders = [sum(share[:i]) for i in range(len(share) + 1)]
        u = (start + epoch * GOLDEN_RATIO) % 2**64
        row = []
        for cell, n in enumerate(size):
            a, b = borders[cell] * 2**64, borders[cell + 1] * 2**64
            count = sum(
                a <= (k * 2**64 + u) * ONE < b
                for k in range(borders[cell] // ONE - 1, borders[cell + 1] // ONE + 1)
            )
            count = count if epoch else quota[cell]
            row.append([(place[cell] + i) % n for i in range(count)])
            place[cell] += count
        taken.append(row)
    return taken


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from([0.05, 0.1, 0.3, 0.55, 1.0]), min_size=50, max_size=50))
def test_fifty_epochs_are_those_of_the_slow_replay(
    folder: Path, plans: dict[float, adq.Plan], ratios: list[float]
) -> None:
    plan = plans[0.3]
    draws, jumping = Schedule(plan, ratios.__getitem__), Schedule(plan, ratios.__getitem__)
    size = np.array(plan.header["cells"]["size"]).ravel()
    times = [np.zeros(n, dtype=int) for n in size]
    for epoch, cells in enumerate(replayed(plans, ratios)):
        first, n = draws.seats(epoch)
        got = [[(int(a) + i) % s for i in range(k)] for a, k, s in zip(first, n, size.tolist(), strict=True)]
        assert got == cells
        assert n.sum() == draws.n_total(epoch) == round(120 * ratios[epoch])
        for seen, ranks in zip(times, got, strict=True):
            np.add.at(seen, ranks, 1)
            assert not len(seen) or seen.max() - seen.min() <= 1  # each once before any twice
    for epoch in (49, 20, 0, 33):  # opened at once, and backwards
        assert all((a == b).all() for a, b in zip(jumping.seats(epoch), draws.seats(epoch), strict=True))


@pytest.fixture(scope="module")
def plans(folder: Path) -> dict[float, adq.Plan]:
    bins = find_bins(Features(folder), bins=3)
    return {
        keep: adq.build_plan(folder, bins=bins, keep=keep, balance="equal")
        for keep in (0.05, 0.1, 0.3, 0.55, 1.0)
    }


def test_smaller_ratios_lie_inside_larger_ones_at_first(plans: dict[float, adq.Plan]) -> None:
    inside: set[int] = set()
    for ratio in (0.05, 0.2, 0.4, 0.9):
        rows = set(np.flatnonzero(kept(plans[0.3], 0, Schedule(plans[0.3], ratio))).tolist())
        assert rows >= inside
        inside = rows


# ---- What is refused


@pytest.mark.parametrize(
    ("keep", "text"),
    [
        (float("nan"), r"keep: epoch 0 has nan, expected a number in \(0, 1\]"),
        (0, "keep: epoch 0 has 0, expected"),
        (-0.1, "keep: epoch 0 has -0.1"),
        (1.5, "keep: epoch 0 has 1.5"),
        ("0.3", "keep: epoch 0 has '0.3'"),
        (True, "keep: epoch 0 has True"),
        (lambda epoch: None, "keep: epoch 0 has None"),
        (lambda epoch: 1 / 0, r"keep: epoch 0: ZeroDivisionError: .division by zero"),
        (lambda: 0.3, "keep: epoch 0: TypeError: .* takes 0 positional arguments"),
        (1e-4, "keep: epoch 0 keeps 0.0001 of 120, which is 0; raise it"),
    ],
)
def test_a_ratio_out_of_range_is_refused_with_its_epoch(
    plans: dict[float, adq.Plan], keep: Any, text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        Schedule(plans[0.3], keep)


def test_a_later_ratio_is_refused_when_its_epoch_is_read(plans: dict[float, adq.Plan]) -> None:
    draws = Schedule(plans[0.3], lambda epoch: 0.5 if epoch < 3 else float("nan"))
    draws.seats(2)
    for method in (draws.seats, draws.n_total):
        with pytest.raises(ValueError, match="keep: epoch 3 has nan"):
            method(4)
    with pytest.raises(ValueError, match="keep: epoch 1,048,576 is too far"):
        draws.n_total(1 << 20)
    with pytest.raises(ValueError, match="epoch must be >= 0, got -1"):
        draws.seats(-1)


def test_a_ratio_below_the_must_includes_is_refused(folder: Path) -> None:
    plan = adq.build_plan(folder, bins=2, keep=0.3, must_include=["k0003", "k1001", "k1009"])
    with pytest.raises(ValueError, match=r"keeps 0\.01 of 120, which is 1, and 3 are must-include; raise it"):
        Schedule(plan, 0.01)
    assert sum(kept(plan, 2, Schedule(plan, 3 / 120))) == 3


def test_plans_of_one_ratio_only_are_refused(tmp_path: Path, make_shard: Callable[..., Path]) -> None:
    with pytest.raises(adq.PlanError, match=r"plan\.parquet: version 1 has its quotas only.*plan again"):
        Schedule(adq.load_plan(GOLDEN / "v1" / "plan.parquet"), 0.5)
    with pytest.raises(adq.PlanError, match=r"plan: has no bins.*leave keep= out"):
        Schedule(adq.Plan.from_keys(str(make_shard("a.tar", 3)), None), 0.5)


def test_a_plan_whose_shares_are_of_other_rules_is_refused(plans: dict[float, adq.Plan]) -> None:
    plan = plans[0.3]
    for change, text in (
        ({"alpha": 0.1, "balance": "class"}, "not those that its settings give now"),
        ({"balance": 7}, r"damaged header: .balance must be"),
        ({"alpha": "x"}, "damaged header"),
    ):
        header = {**plan.header, "settings": {**plan.header["settings"], **change}}
        with pytest.raises(adq.PlanError, match=text):
            Schedule(adq.Plan.from_shards(list(plan), header), 0.5)


def test_a_record_is_of_the_numbers_so_far(plans: dict[float, adq.Plan]) -> None:
    a = Schedule(plans[0.3], lambda epoch: 0.1 + epoch / 100)
    b = Schedule(plans[0.3], lambda epoch: 0.1 + epoch / 100 if epoch < 5 else 1)
    assert a.record(4, begun=True) == a.record(5, begun=False)
    assert len(a.record(0, begun=False)) == 16
    b.check(a.record(5, begun=False), 5, begun=False)
    for record, epoch in ((a.record(5, begun=True), 5), (a.record(4, begun=True), 3), ("rates:", 0)):
        with pytest.raises(StateError, match=r"of another schedule: .* use that schedule"):
            b.check(record, epoch, begun=True)
    with pytest.raises(StateError, match="of another schedule"):
        b.check(a.record(0, begun=True), 1 << 30, begun=False)
