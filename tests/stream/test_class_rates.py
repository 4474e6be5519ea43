"""Rates by class follow the losses within their bound, exactly repeatable from a state, equal in all workers and ranks."""

import base64
import json
import math
import pickle
from collections import Counter
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import adq_wds as adq
from adq_wds.core.allocation import exact_shares
from adq_wds.core.fresh import ONE
from adq_wds.stream import rate_history
from adq_wds.stream.clock import Clock
from adq_wds.stream.ranks import Ranks
from adq_wds.stream.state import sealed
from adq_wds.tables.plan_cells import plan_cells
from adq_wds.tables.plan_header import fresh_start
from tests.embedded import shard_of
from tests.stream.conftest import LOADERS, Names, ids, played, slow

Planned = tuple[list[str], adq.Plan]
GOLDEN_RATIO = 0x9E3779B97F4A7C15
UP = {0: 0.4, 1: 0.8, 2: 2.4}  # losses that rise with the class


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Planned:
    """Three shards of 40 samples of classes 0, 1 and 2, with 48, 48 and 24 samples, and a plan of 36."""
    folder = tmp_path_factory.mktemp("set")
    third = {i: {"cls": b"2"} for i in range(0, 120, 5)}
    shards = [str(shard_of(folder / f"f-{i}.tar", range(40 * i, 40 * i + 40), third)) for i in range(3)]
    features = adq.embed_shards(shards, "thumbnail", folder / "features")
    return shards, adq.build_plan(features, bins=3, keep=0.3, out=folder / "plan.parquet")


def stream(planned: Planned, rates: Any, **options: Any) -> adq.ShardDataset:
    shards, plan = planned
    defaults = {"plan": plan, "fresh": True, "keep": rates, "shuffle": True, "batch_size": 6, "seed": 3}
    return adq.ShardDataset(shards, **{**defaults, **options})


def alone(plan: adq.Plan, **options: Any) -> tuple[adq.ClassRates, Clock]:
    """Rates without a data set, and the clock that gives them the epoch."""
    rates, clock = adq.ClassRates(plan, **options), Clock()
    rates.join(clock, Ranks(0, 1))
    return rates, clock


def classes_of(planned: Planned, names: Names) -> list[int]:
    """How many samples of each class."""
    rows = planned[1].table().to_pydict()
    label = dict(zip(zip(rows["shard"], rows["key"], strict=True), rows["label"], strict=True))
    return [Counter(label[name] for name in names)[c] for c in range(3)]


def losses_after(epoch: int) -> dict[int, float]:
    return {c: 0.5 + math.sin(epoch + c) ** 2 for c in range(3)}


def trained(planned: Planned, kind: str, n_epochs: int, **options: Any) -> list[Names]:
    """The samples of each epoch of a training with an update after each."""
    rates = adq.ClassRates(planned[1])
    loader = LOADERS[kind](stream(planned, rates), **options)
    epochs = []
    for epoch in range(n_epochs):
        epochs.append(ids(loader))
        rates.update(losses_after(epoch))
    return epochs


# ---- What an update does


def test_higher_losses_get_more_seats_within_the_bound(planned: Planned) -> None:
    rates, clock = alone(planned[1], bound=1.5)
    before, plans = rates.rates, planned[1].header["cells"]["share"]
    clock.epoch = 1
    rates.update(UP)
    shares = [sum(row) for row in plans]
    assert before == pytest.approx(
        {c: n / size for c, n, size in zip(range(3), shares, (48, 48, 24), strict=True)}
    )
    after = rates.rates
    assert after[2] == pytest.approx(1.5 * before[2])
    assert after[0] == pytest.approx(before[0] / 1.5, abs=1e-5)
    seats = [
        np.diff(np.cumsum([0, *n.reshape(3, -1).sum(axis=1)]))
        for _, n in (rates.seats(e) for e in range(1, 60))
    ]
    assert np.mean(seats, axis=0) == pytest.approx(
        [after[c] * n for c, n in ((0, 48), (1, 48), (2, 24))], abs=0.1
    )
    assert {int(each.sum()) for each in seats} == {36}


def test_equal_losses_are_the_plans_draws(planned: Planned) -> None:
    rates = adq.ClassRates(planned[1])
    follows, fixed = stream(planned, rates), stream(planned, None)
    for loss in (0.0, 0.7, 1e-9, 1e300, 2.0):
        assert ids(follows) == ids(fixed)
        rates.update([loss] * 3)


def test_sums_and_counts_tensors_arrays_and_labels_say_the_same(planned: Planned) -> None:
    updates: list[tuple[Any, ...]] = [
        ({0: 1.0, 1: 2.0, 2: 1.5},),  # the last is the mean of the others
        ({0: 1.0, np.int64(1): torch.tensor(2.0, requires_grad=True)},),
        ([1.0, 2.0, 1.5],),
        (torch.tensor([1.0, 2.0, 1.5], dtype=torch.bfloat16, requires_grad=True),),
        tuple(torch.tensor([[10.0, 6.0, 0.0], [10, 3, 0]])),
        (np.array([10.0, 6.0, 4.5]), [10, 3, 3]),
    ]
    all_rates = []
    for update in updates:
        rates, _ = alone(planned[1])
        rates.update(*update)
        all_rates.append(rates.rates)
    assert all(each == all_rates[0] for each in all_rates)
    assert rates.classes == [0, 1, 2]


@settings(max_examples=10, deadline=None)
@given(st.data())
def test_fifty_epochs_are_those_of_the_slow_replay(planned: Planned, data: st.DataObject) -> None:
    """Seat after seat, where an update comes after some of the epochs."""
    plan, cells = planned[1], plan_cells(planned[1])
    rates, clock = alone(plan)
    jumps, _ = alone(plan)
    size, share = cells.size.ravel().tolist(), cells.share
    place = cells.quota.ravel().tolist()
    assert (rates.seats(0)[1] == place).all()
    loss = st.lists(st.floats(0, 10), min_size=3, max_size=3)
    for epoch in range(1, 51):
        if data.draw(st.booleans()):
            clock.epoch = epoch
            rates.begin(epoch - 1)
            rates.update(data.draw(loss))
            since, of_class = rates._history.unpacked(rates.record(epoch, begun=True))
            assert since[-1] == epoch
            share = np.stack([
                exact_shares(cells.size[c] * ONE, cells.weight[c], n, low=cells.least[c])
                for c, n in enumerate(of_class[-1].tolist())
            ])  # fmt: skip
        borders = [0, *np.cumsum(share.ravel()).tolist()]
        u = (fresh_start(plan.header) + epoch * GOLDEN_RATIO) % 2**64
        first, n = rates.seats(epoch)
        for cell, n_cell in enumerate(size):
            a, b = borders[cell] * 2**64, borders[cell + 1] * 2**64
            count = sum(a <= (k * 2**64 + u) * ONE < b for k in range(-1, borders[-1] // ONE + 1))
            assert (int(first[cell]), int(n[cell])) == (place[cell] % n_cell, count)
            place[cell] += count
        assert n.sum() == 36
    jumps.check(rates.record(50, begun=True), 50, begun=True)
    jumps.restore(rates.record(50, begun=True), 50, begun=True)
    for epoch in (50, 7, 0, 33):  # at once and backwards, from a state
        assert all((a == b).all() for a, b in zip(jumps.seats(epoch), rates.seats(epoch), strict=True))


# ---- When it counts


def test_an_update_counts_from_the_next_epoch_on(planned: Planned) -> None:
    rates = adq.ClassRates(planned[1])
    loader = adq.Loader(stream(planned, rates))
    rates.update(UP)  # before the first epoch, which is the plan
    first = ids(loader)
    assert sorted(first) == sorted(ids(stream(planned, None)))
    batches = iter(loader)  # epoch 1 has begun, though no batch of it was given out
    rates.update({0: 9.0, 1: 0.1, 2: 0.1})
    second = ids(batches)
    other = adq.ClassRates(planned[1])
    again = adq.Loader(stream(planned, other))
    other.update(UP)
    assert [ids(again), ids(again)] == [first, second]
    third = classes_of(planned, ids(loader))
    assert third[0] > classes_of(planned, second)[0]
    assert classes_of(planned, ids(loader))[0] == pytest.approx(
        third[0], abs=1
    )  # without an update the rates stay


def test_a_second_update_before_an_epoch_replaces_the_first(planned: Planned) -> None:
    a, b = (alone(planned[1])[0] for _ in range(2))
    a.update({0: 9.0, 1: 1.0, 2: 0.1})
    a.seats(3)  # looked at before
    for rates in (a, b):
        rates.update(UP)
    assert a.record(0, begun=True) == b.record(0, begun=True)
    assert all((x == y).all() for x, y in zip(a.seats(3), b.seats(3), strict=True))


def test_a_node_follows_the_updates_and_resumes(planned: Planned) -> None:
    whole, rates = trained(planned, "adq", 3), adq.ClassRates(planned[1])
    node = adq.as_node(stream(planned, rates, batch_size=None))
    for epoch in range(2):
        node.reset()
        assert Counter(ids(node)) == Counter(whole[epoch])
        rates.update(losses_after(epoch))
    node.reset()
    read = ids([next(node) for _ in range(10)])
    other = adq.as_node(stream(planned, adq.ClassRates(planned[1]), batch_size=None))
    other.reset(node.state_dict())
    assert Counter(read + ids(other)) == Counter(whole[2])


@pytest.mark.parametrize(
    ("kind", "persistent", "start"),
    [
        *product(("adq", "torch", "torchdata"), (True, False), ("fork",)),
        slow("adq", True, "spawn"),
        slow("adq", False, "spawn"),
        slow("torch", True, "spawn"),
    ],
)
def test_workers_follow_the_updates(planned: Planned, kind: str, persistent: bool, start: str) -> None:
    options = {"num_workers": 2, "persistent_workers": persistent, "multiprocessing_context": start}
    assert trained(planned, kind, 4, **options) == trained(planned, "adq", 4)


def _rank(rank: int, store: str, dataset: adq.ShardDataset, rates: adq.ClassRates, out: Any) -> None:
    """Two epochs of one of two ranks, each with losses of its own, added up; then updates that must be refused."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=300)
    )
    loader = adq.Loader(dataset)
    read = [ids(loader)]
    totals = torch.tensor([[2.0, 6, 20 * rank], [4, 2, 4]])
    torch.distributed.all_reduce(totals)
    rates.update(*totals)
    read.append(ids(loader))
    texts = []
    for wrong in ([1.0, 1.0, rank], [1.0, 1.0, math.nan if rank else 1.0]):
        try:
            rates.update(wrong)
        except ValueError as error:
            texts.append(str(error))
    out.put((rank, read, texts))
    torch.distributed.destroy_process_group()


def test_ranks_agree_or_are_refused(planned: Planned, tmp_path: Path) -> None:
    """Two forked processes, with a data set that was made before; the sums are (4, 12, 20) over (8, 4, 8)."""
    context = torch.multiprocessing.get_context("fork")
    rates, out = adq.ClassRates(planned[1]), context.Queue()
    dataset = stream(planned, rates)
    programs = [
        context.Process(target=_rank, args=(rank, tmp_path / "store", dataset, rates, out))
        for rank in range(2)
    ]
    for program in programs:
        program.start()
    results = sorted(out.get(timeout=300) for _ in programs)
    for program in programs:
        program.join()
    one = adq.ClassRates(planned[1])
    loader = adq.Loader(stream(planned, one))
    expected = [ids(loader)]
    one.update([0.5, 3.0, 2.5])
    expected.append(ids(loader))
    for epoch in range(2):
        assert Counter(results[0][1][epoch] + results[1][1][epoch]) == Counter(expected[epoch])
    for _, _, texts in results:
        start = "ClassRates.update: rank 1"
        assert texts[0].startswith(f"{start} has other losses than rank 0; sum them up over all ranks")
        assert texts[1:] == [f"{start}: ValueError: loss of class 2 is nan, expected a finite number >= 0"]
    assert rates.rates == adq.ClassRates(planned[1]).rates  # of the process that made it


# ---- Its state


def test_killed_and_resumed_on_other_ranks_epochs_are_the_same(planned: Planned) -> None:
    """Three ranks, killed at each step of the third epoch, resumed as two with workers; the epoch after follows."""
    whole = trained(planned, "adq", 4)
    for step in range(3):
        read: Names = []
        for rank in range(3):
            rates = adq.ClassRates(planned[1])
            loader = adq.Loader(stream(planned, rates, rank=rank, world=3))
            for epoch in range(2):
                list(loader)
                rates.update(losses_after(epoch))
            batches = iter(loader)
            for _ in range(step):
                read += ids([next(batches)])
        state = json.loads(json.dumps(loader.state_dict()))
        rest: Names = []
        for rank in range(2):
            rates = adq.ClassRates(planned[1], bound=3)  # of later updates
            resumed = stream(planned, rates, rank=rank, world=2)
            resumed.start_from(state)
            if resumed.epoch == 2:
                rest += ids(played(resumed, 2))
        assert Counter(read + rest) == Counter(whole[2])
        rates = adq.ClassRates(planned[1])
        loader = adq.Loader(stream(planned, rates), num_workers=2 * (step == 1), persistent_workers=step == 1)
        if step == 1:
            list(loader)  # workers that have counted epochs of other rates
        loader.load_state_dict(state)
        if step < 2:
            assert len(ids(loader)) == 36 - 18 * step
        rates.update(losses_after(2))
        assert ids(loader) == whole[3]


def test_a_state_takes_at_most_16_bytes_a_class_and_epoch(planned: Planned) -> None:
    rates = adq.ClassRates(planned[1])
    dataset = stream(planned, rates)
    small = len(json.dumps(adq.Loader(dataset).state_dict()))
    assert small < 400
    for epoch in range(1, 101):
        dataset.set_epoch(epoch)
        rates.update(losses_after(epoch))
    assert len(json.dumps(adq.Loader(dataset).state_dict())) <= small + 16 * 3 * 100


def test_states_of_other_draws_are_refused(planned: Planned) -> None:
    def state(keep: Any) -> dict[str, Any]:
        dataset = stream(planned, keep)
        batches = iter(dataset)
        next(batches)
        return adq.Loader(dataset).state_dict()

    rated = state(adq.ClassRates(planned[1]))
    with pytest.raises(
        adq.StateError, match="state is of a schedule of ratios, not of ClassRates: give that"
    ):
        stream(planned, adq.ClassRates(planned[1])).start_from(state(0.3))
    with pytest.raises(adq.StateError, match="state is of another schedule"):
        stream(planned, 0.3).start_from(rated)
    with pytest.raises(adq.StateError, match="state has keep='rates:', this stream keep=None"):
        stream(planned, None).start_from(rated)


@pytest.mark.parametrize(
    "rows",
    [
        [(1, [12, 12])],
        [(1, [12, 12, 13])],
        [(1, [60, -36, 12])],
        [(1, [0, 12, 24])],
        [(0, [12, 12, 12])],
        [(2, [12, 12, 12])],
        [(1, [12, 12, 12]), (1, [12, 12, 12])],
        [(1, [12, 12, 12])] * 5000,
        None,
    ],
)
def test_a_damaged_record_is_refused_and_changes_nothing(planned: Planned, rows: Any) -> None:
    rates = adq.ClassRates(planned[1])
    dataset = stream(planned, rates)
    rates.update(UP)
    before = adq.Loader(dataset).state_dict()
    packed = [
        np.uint32(since).tobytes() + (np.array(n) * ONE).astype("<i8").tobytes() for since, n in rows or []
    ]
    text = "rates:" + base64.b64encode(b"".join(packed)).decode() if rows else "rates:~"
    state = sealed({name: v for name, v in {**before, "keep": text}.items() if name != "checksum"})
    with pytest.raises(
        adq.StateError, match=r"damaged state: its rates (by class contradict|are not of) the plan"
    ):
        dataset.start_from(state)
    assert adq.Loader(dataset).state_dict() == before


# ---- What is refused


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        ({3: 1.0}, r"loss of class 3, which the plan lacks; its classes are \[0, 1, 2\]"),
        ({"cat": 1.0}, "loss of class 'cat', which the plan lacks"),
        ({1: math.nan}, "loss of class 1 is nan, expected a finite number >= 0"),
        ({1: -0.5}, r"loss of class 1 is -0\.5"),
        ([1.0, 1.0, math.inf], "loss of class 2 is inf"),
        ([1.0, 1.0], r"loss must be 3 numbers, in the order of ClassRates\.classes; got shape \(2,\)"),
        (["a", "b", "c"], "loss must be 3 numbers, got"),
        ({1: None}, "loss of class 1 is nan"),
        ({1: "low"}, "loss must be 3 numbers, got"),
        (0.5, r"loss must be 3 numbers, .* got shape \(\)"),
        ({}, "no class has a loss"),
    ],
)
def test_wrong_losses_are_refused_and_the_rates_stay(planned: Planned, loss: Any, text: str) -> None:
    rates, _ = alone(planned[1])
    rates.update(UP)
    before = rates.rates
    with pytest.raises(ValueError, match=text):
        rates.update(loss)
    assert rates.rates == before


@pytest.mark.parametrize(
    ("counts", "text"),
    [
        ([1, 1, -1], r"count of class 2 is -1\.0"),
        ([1, math.nan, 1], "count of class 1 is nan"),
        ([1, 1], "counts must be 3 numbers"),
        ([0, 0, 0], "no class has a loss"),
    ],
)
def test_wrong_counts_are_refused(planned: Planned, counts: Any, text: str) -> None:
    rates, _ = alone(planned[1])
    with pytest.raises(ValueError, match=text):
        rates.update([1.0, 1.0, 1.0], counts)
    with pytest.raises(ValueError, match="counts go with an array of sums"):
        rates.update(UP, [1, 1, 1])


@pytest.mark.parametrize("bound", [1, 0.5, -2, math.nan, math.inf, True, "2", None])
def test_a_wrong_bound_is_refused(planned: Planned, bound: Any) -> None:
    with pytest.raises(ValueError, match="bound must be a number above 1, got"):
        adq.ClassRates(planned[1], bound=bound)


@pytest.mark.parametrize("bound", [1e12, 1e300, 10**400, np.float32(100), np.int64(100)])
def test_a_large_bound_leaves_the_losses_to_decide(planned: Planned, bound: Any) -> None:
    expected, rates = (alone(planned[1], bound=each)[0] for each in (100.0, bound))
    for each in (expected, rates):
        each.update({0: 1.0, 1: 2.0, 2: 3.0})
    assert rates.rates == expected.rates != adq.ClassRates(planned[1]).rates


def test_rates_are_of_one_plan_and_one_data_set(planned: Planned) -> None:
    shards, plan = planned
    rates = adq.ClassRates(plan)
    with pytest.raises(
        adq.AdqError, match=r"no data set has these rates yet: ShardDataset\(\.\.\., keep=rates\)"
    ):
        rates.update(UP)
    dataset = stream(planned, rates)
    with pytest.raises(ValueError, match="keep= has the ClassRates of another data set"):
        stream(planned, rates)
    with pytest.raises(ValueError, match="keep= has the ClassRates of another plan"):
        adq.ShardDataset(shards, plan=adq.Plan.from_keys(shards, None), fresh=True, keep=adq.ClassRates(plan))
    with pytest.raises(ValueError, match="keep= changes what fresh draws take: give fresh=True"):
        stream(planned, adq.ClassRates(plan), fresh=False)
    with pytest.raises(ValueError, match="as_map: with fresh=True"):
        dataset.as_map()
    copy = pickle.loads(pickle.dumps(dataset))  # noqa: S301 - our own bytes
    assert ids(copy) == ids(dataset)


def test_plans_without_classes_to_shift_between_are_refused(planned: Planned, tmp_path: Path) -> None:
    folder = planned[1].path
    assert folder is not None
    one = adq.build_plan(folder.parent / "features", bins=2, keep=0.3, classes=[1])
    with pytest.raises(ValueError, match="the plan draws from fewer than two classes, so no seat can move"):
        adq.ClassRates(one)
    golden = Path(__file__).parents[1] / "golden" / "v1" / "plan.parquet"
    with pytest.raises(adq.PlanError, match="version 1 has its quotas only"):
        adq.ClassRates(adq.load_plan(golden))


def test_more_updates_than_there_is_room_for_are_refused(
    planned: Planned, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rate_history, "_MOST", 3)
    rates, clock = alone(planned[1])
    for epoch in range(1, 4):
        clock.epoch = epoch
        rates.update(UP)
    clock.epoch = 4
    before = rates.rates
    text = "room for 3 updates, and all are made: the rates stay as they are; stop updating"
    with pytest.raises(adq.AdqError, match=text):
        rates.update(losses_after(1))
    assert rates.rates == before
