"""A stream with a ratio for every epoch resumes anywhere, on any layout, and only with the schedule it was saved with."""

import json
import math
from collections import Counter
from typing import Any

import pytest
from torch.utils.data import DataLoader

import adq_wds as adq
from adq_wds.reading.schedule import Schedule
from tests.stream.conftest import Names, ids, played

Counts = Counter[tuple[str, str]]


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], adq.Plan]:
    """Three shards of 30 samples of two classes, and a plan of 27 of them."""
    from tests.embedded import shard_of

    folder = tmp_path_factory.mktemp("set")
    shards = [str(shard_of(folder / f"f-{i}.tar", range(30 * i, 30 * i + 30))) for i in range(3)]
    features = adq.embed_shards(shards, "thumbnail", folder / "features")
    return shards, adq.build_plan(features, bins=3, keep=0.3, out=folder / "plan.parquet")


def rising(epoch: int) -> float:
    return (0.1, 0.35, 0.2, 1.0, 0.15)[epoch % 5]


def other_later(epoch: int) -> float:
    return rising(epoch) if epoch < 3 else 0.5


def other(epoch: int) -> float:
    return rising(epoch) if epoch != 1 else 0.5


def stream(planned: Any, keep: Any = rising, **options: Any) -> adq.ShardDataset:
    shards, plan = planned
    defaults = {"plan": plan, "fresh": True, "keep": keep, "shuffle": True, "batch_size": 4, "seed": 3}
    return adq.ShardDataset(shards, **{**defaults, **options})


def expected(planned: Any, epoch: int, keep: Any = rising) -> Counts:
    _, plan = planned
    draws = Schedule(plan, keep)
    return Counter(
        (name, key)
        for name in plan.shards
        for key, kept in zip(plan.shard(name).spans.keys, plan.kept_in(name, epoch, draws), strict=True)
        if kept
    )


def test_each_epoch_has_the_samples_and_the_length_of_its_ratio(planned: Any) -> None:
    for loader in (stream(planned), adq.Loader(stream(planned)), adq.Loader(stream(planned), num_workers=2)):
        for epoch in range(6):
            n = round(90 * rising(epoch))
            assert len(loader) == math.ceil(n / 4)
            drawn = ids(loader)
            assert Counter(drawn) == expected(planned, epoch)
            assert len(drawn) == n


def test_a_constant_schedule_of_the_plans_ratio_is_its_draws(planned: Any) -> None:
    for keep in (0.3, lambda epoch: 0.3):
        with_keep, without = stream(planned, keep), stream(planned, None)
        for _ in range(4):
            assert ids(with_keep) == ids(without)


@pytest.mark.parametrize("world", [1, 3])
def test_killed_and_resumed_on_other_ranks_epochs_are_whole(planned: Any, world: int) -> None:
    """Read by `world` ranks up to each step of an epoch, then by two with workers."""
    for epoch in (0, 2, 3):
        n_steps = math.ceil(round(90 * rising(epoch)) / (8 * world))
        for step in range(n_steps + 1):
            read: Names = []
            for rank in range(world):
                dataset = stream(planned, batch_size=8, rank=rank, world=world, uneven="ragged")
                loader = adq.Loader(dataset)
                dataset.set_epoch(epoch)
                batches = iter(loader)
                for _ in range(step):
                    read += ids([next(batches, [])])
            state = json.loads(json.dumps(loader.state_dict()))
            assert len(json.dumps(state)) < 400
            rest: Names = []
            for rank in range(2):
                resumed = stream(planned, batch_size=8, rank=rank, world=2, uneven="ragged")
                resumed.start_from(state)
                if resumed.epoch == epoch:
                    rest += ids(played(resumed, 2))
            assert Counter(read + rest) == expected(planned, epoch), (epoch, step)


def test_a_state_needs_a_schedule_of_an_equal_past(planned: Any) -> None:
    loader = adq.Loader(stream(planned))
    for _ in range(2):
        list(loader)
    batches = iter(loader)
    next(batches)
    state = loader.state_dict()
    stream(planned, other_later).start_from(state)
    text = "state is of another schedule: keep= does not give the ratios that epochs up to 2 were read with"
    with pytest.raises(adq.StateError, match=text):
        stream(planned, other).start_from(state)
    with pytest.raises(adq.StateError, match=r"state has keep='\w{16}', this stream keep=None"):
        stream(planned, None).start_from(state)
    plain = adq.Loader(stream(planned, None)).state_dict()
    with pytest.raises(adq.StateError, match=r"state has keep=None, this stream keep='\w{16}'"):
        stream(planned).start_from(plain)


def test_a_schedule_may_end(planned: Any) -> None:
    """After its last epoch there is a state, which is read; an epoch more is an error."""
    ratios = [0.1, 0.5]
    loader = adq.Loader(stream(planned, ratios.__getitem__))
    assert [len(ids(loader)) for _ in range(2)] == [9, 45]
    state = loader.state_dict()
    assert (state["epoch"], state["t"]) == (2, 0)
    again = adq.Loader(stream(planned, ratios.__getitem__))
    again.load_state_dict(state)
    assert again.state_dict() == state
    assert repr(again.dataset) == "<ShardDataset an unknown number of samples in 3 shards, epoch 2>"
    shorter = adq.Loader(stream(planned, ratios[:1].__getitem__))
    text = "state is of epoch 2, to which this schedule does not reach: keep: epoch 1: IndexError"
    with pytest.raises(adq.StateError, match=text):
        shorter.load_state_dict(state)
    with pytest.raises(ValueError, match="keep: epoch 2: IndexError"):
        next(iter(again))


@pytest.mark.parametrize("kind", ["torch", "node"])
def test_other_hosts_read_schedules_too(planned: Any, kind: str) -> None:
    dataset = stream(planned, batch_size=None if kind == "node" else 4)
    node = adq.as_node(dataset)
    loader: Any = DataLoader(dataset, batch_size=None, num_workers=2, persistent_workers=True)
    for epoch in range(4):
        if kind == "node":
            node.reset()
        assert Counter(ids(node if kind == "node" else loader)) == expected(planned, epoch)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"fresh": False}, r"keep= changes what fresh draws take: give fresh=True"),
        ({"plan": None}, "fresh=True draws anew from a plan's bins, and there is no plan: give plan="),
        ({"keep": 1.5}, r"keep: epoch 0 has 1\.5, expected a number in \(0, 1\]"),
        ({"keep": lambda epoch: math.nan}, "keep: epoch 0 has nan"),
        ({"keep": "half"}, "keep: epoch 0 has 'half'"),
    ],
)
def test_wrong_arguments_are_refused(planned: Any, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        stream(planned, **options)


def test_a_wrong_ratio_of_a_later_epoch_is_its_error(planned: Any) -> None:
    for n_workers in (0, 2):
        loader = adq.Loader(stream(planned, lambda epoch: 0.2 if epoch < 1 else 0), num_workers=n_workers)
        list(loader)
        with pytest.raises(ValueError, match=r"keep: epoch 1 has 0, expected a number in \(0, 1\]"):
            list(loader)
        with pytest.raises(ValueError, match="keep: epoch 1 has 0"):
            len(loader)


def test_numbers_of_samples_are_refused_with_fresh_draws(planned: Any) -> None:
    with pytest.raises(ValueError, match="as_map: with fresh=True a number would mean another sample"):
        stream(planned).as_map()
