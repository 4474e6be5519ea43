"""With a global batch, is a step the same samples for every number of ranks, and a run that changes it the same run?"""

import json
from collections import Counter
from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

import adq_wds as adq
from adq_wds.core.order import Uneven, n_for_rank, n_in_step, rank_positions
from adq_wds.stream.clock import Start
from adq_wds.stream.state import sealed
from tests.stream.conftest import Options, TarSet, epochs_of, ids, made, noisy, played

Step = list[int]
WAYS: tuple[Uneven, ...] = ("pad", "drop", "ragged")


def steps_by_hand(n_total: int, size: int, uneven: str) -> list[Step]:
    """Global steps as one would cut them from the line, without ranks."""
    steps = [list(range(i, min(i + size, n_total))) for i in range(0, n_total, size)]
    if steps and len(steps[-1]) < size:
        if uneven == "drop":
            steps.pop()
        if uneven == "pad":
            steps[-1] += [t % n_total for t in range(n_total, len(steps) * size)]
    return steps


def batches_of(n_total: int, size: int, uneven: Uneven, rank: int, world: int, start: int) -> list[Step]:
    """A rank's batches, by the index functions."""
    place = {"start": start, "rank": rank, "world": world, "step": size}
    n = n_for_rank(n_total, uneven=uneven, **place)
    line = rank_positions(np.arange(n), n_total=n_total, **place).tolist()
    own = n_in_step(size, rank=rank, world=world)
    return [line[i : i + own] for i in range(0, n, own)]


@given(st.integers(0, 200), st.integers(1, 40), st.sampled_from(WAYS), st.data())
def test_steps_are_those_by_hand_whatever_the_ranks(
    n_total: int, size: int, uneven: Uneven, data: st.DataObject
) -> None:
    """A run of one epoch, broken off after random numbers of steps and gone on with by other numbers of ranks."""
    expected = steps_by_hand(n_total, size, uneven)
    done = 0
    while done <= len(expected):
        world = data.draw(st.integers(1, size))
        start = min(done * size, n_total)
        ranks = [batches_of(n_total, size, uneven, rank, world, start) for rank in range(world)]
        n_steps = max(map(len, ranks))
        assert n_steps == len(expected) - done
        assert len({*map(len, ranks)}) == 1 or (uneven == "ragged" and n_total % size < world)
        for s in range(n_steps):
            parts = [rank[s] for rank in ranks if s < len(rank)]
            assert sorted(t for part in parts for t in part) == sorted(expected[done + s])
            assert len(parts) == min(world, len(expected[done + s]))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
        done += 1 + data.draw(st.integers(0, len(expected)))


def read_steps(
    tar_set: TarSet, state: Any, world: int, n_workers: int, n_steps: int | None, **options: Any
) -> tuple[list[Counter[Any]], Any]:
    """The samples of some global steps, all ranks together, and the state after them."""
    steps: list[Counter[Any]] = []
    states = []
    for rank in range(world):
        dataset = made(tar_set, rank=rank, world=world, batch_size=None, **options)
        if state is not None:
            dataset.start_from(state)
        start = dataset.next_start
        batches = list(islice(played(dataset, n_workers), n_steps))
        for s, batch in enumerate(batches):
            if s == len(steps):
                steps.append(Counter())
            steps[s].update(ids(batch))
        done = len(batches) if n_steps is None else n_steps
        states.append(json.loads(json.dumps(dataset.state_at(start, done))))
    assert all(other == states[0] for other in states) or n_steps is None
    return steps, states[0]


LAYOUTS = [(2, 1), (3, 0), (5, 2)]


@pytest.mark.parametrize("uneven", WAYS)
def test_a_run_on_changing_ranks_is_the_unbroken_run(tar_set: TarSet, uneven: str) -> None:
    """28 samples in steps of 9, broken off after each step: the ranks before, and those after, read the same steps."""
    options: Options = {"plan": adq.load_plan(tar_set.plan), "global_batch": 9, "uneven": uneven}
    line = ids(made(tar_set))
    expected = [Counter(line[t] for t in step) for step in steps_by_hand(28, 9, uneven)]
    for step in range(len(expected)):
        before, after = LAYOUTS[step % 3], LAYOUTS[(step + 1) % 3]
        head, state = read_steps(tar_set, None, *before, step, **options)
        assert state["t"] == step * 9
        assert head + read_steps(tar_set, state, *after, None, **options)[0] == expected


def test_ranks_that_divide_it_read_what_batch_size_reads(tar_set: TarSet) -> None:
    for rank in range(3):
        options: Options = {"rank": rank, "world": 3, "uneven": "ragged"}
        by_rank = made(tar_set, batch_size=2, **options)
        together = made(tar_set, batch_size=None, global_batch=6, **options)
        assert [list(by_rank) for _ in range(2)] == [list(together) for _ in range(2)]


@pytest.mark.parametrize("uneven", WAYS)
def test_its_length_is_the_number_of_batches(tar_set: TarSet, uneven: str) -> None:
    lengths = []
    for rank in range(5):
        dataset = made(tar_set, batch_size=None, global_batch=12, uneven=uneven, rank=rank, world=5)
        lengths.append(len(dataset))
        assert len(adq.Loader(dataset)) == len(list(dataset)) == lengths[-1]
    left = 28 % 12
    assert lengths == {"pad": [3] * 5, "drop": [2] * 5, "ragged": [3] * left + [2] * (5 - left)}[uneven]


@pytest.mark.parametrize("n_workers", [0, 2])
def test_its_loader_resumes_on_another_number_of_ranks(tar_set: TarSet, n_workers: int) -> None:
    """In a second epoch, with draws of a pipe; a rank that the last step does not reach ends with the others."""
    options: Options = {"batch_size": None, "global_batch": 9, "uneven": "ragged", "pipes": [adq.Map(noisy)]}
    whole = made(tar_set, **options)
    expected = [list(whole) for _ in range(3)]
    heads: list[list[Any]] = [[] for _ in range(2)]
    states = []
    for rank in range(2):
        loader = adq.Loader(made(tar_set, rank=rank, world=2, **options), num_workers=n_workers)
        list(loader)
        batches = iter(loader)
        heads[rank] = [next(batches) for _ in range(2)]
        states.append(loader.state_dict())
    assert states[0] == states[1]
    assert (states[0]["epoch"], states[0]["t"], states[0]["global_batch"]) == (1, 18, 9)
    assert len(json.dumps(states[0])) < 400
    rest: list[list[Any]] = []
    for rank in range(3):
        other = adq.Loader(made(tar_set, rank=rank, world=3, **options))
        other.load_state_dict(states[0])
        rest.append(list(other))
        assert other.state_dict()["epoch"] == 2
        assert [len(batches) for batches in (rest[-1], list(other))] == [2 - (rank > 0), 4 - (rank > 0)]
    for s, batch in enumerate(expected[1]):
        parts = [head[s] for head in heads] if s < 2 else [own[s - 2] for own in rest if s - 2 < len(own)]
        assert by_key(sample for part in parts for sample in part) == by_key(batch)


def by_key(samples: Any) -> list[Any]:
    return sorted(samples, key=lambda sample: sample["__key__"])  # type: ignore[no-any-return]


def test_other_hosts_take_it(tar_set: TarSet) -> None:
    """Torch's loader and a node give its batches; by number it has no batches; fresh draws are shared out alike."""
    options: Options = {"batch_size": None, "global_batch": 6, "uneven": "ragged"}
    expected = [list(epoch) for epoch in epochs_of(made(tar_set, **options), 2)]
    assert epochs_of(DataLoader(made(tar_set, **options), batch_size=None), 2) == expected
    node = adq.as_node(made(tar_set, **options))
    node.reset()
    head = ids([next(node), next(node)])
    state = node.state_dict()
    node.reset(state)
    assert head + ids(node) == expected[0]
    assert sorted(ids(made(tar_set, **options).as_map())) == sorted(tar_set.kept)
    fresh, _ = read_steps(tar_set, None, 4, 0, None, global_batch=6, uneven="ragged", fresh=True)
    assert [step.total() for step in fresh] == [6, 6, 6, 6, 4]


def test_its_state_is_of_version_4_and_small(tar_set: TarSet) -> None:
    states = [
        made(tar_set, batch_size=None, global_batch=9, rank=r, world=5).state_at(Start(0), 2)
        for r in range(5)
    ]
    assert all(state == states[0] for state in states)
    assert states[0] == {
        "version": 4, "plan": adq.load_plan(tar_set.plan).hash, "seed": 3, "epoch": 0, "shuffle": True,
        "fresh": False, "lanes": 64, "global_batch": 9, "t": 18, "rank": None, "world": None,
        "keep": None, "checksum": states[0]["checksum"],
    }  # fmt: skip
    largest = {**states[0], "seed": -(2**63), "epoch": 2**40, "t": 2**40, "rank": 10_000, "world": 10_000}
    assert len(json.dumps({**largest, "global_batch": 2**20})) <= 400
    assert made(tar_set).state_at(Start(0), 2)["version"] == 3, "older versions read it"


@pytest.mark.parametrize(
    ("saved", "now", "text"),
    [
        ({"batch_size": 4}, {"global_batch": 8}, "state has batch_size=4, this stream global_batch=8: give .* batch_size"),
        ({"global_batch": 8}, {"batch_size": 4}, "state has global_batch=8, this stream batch_size=4: give .* global_batch"),
        ({"global_batch": 8}, {}, "state has global_batch=8, this stream batch_size=None: give .* the global_batch"),
        ({"global_batch": 8}, {"global_batch": 4}, "state has global_batch=8, this stream global_batch=4"),
    ],
)  # fmt: skip
def test_a_state_of_other_batches_is_refused(
    tar_set: TarSet, saved: Options, now: Options, text: str
) -> None:
    first, other = (made(tar_set, **{"batch_size": None, **options}) for options in (saved, now))
    stream: Any = iter(first)
    next(stream)
    for state in (first.state_at(Start(0), 1), stream.state_dict()):
        with pytest.raises(adq.StateError, match=text):
            other.start_from(state)
    first.start_from(stream.state_dict())
    assert first.next_start == Start(0, 4 if "batch_size" in saved else 8, 64)


def test_the_fields_of_a_state_are_those_of_its_version(tar_set: TarSet) -> None:
    state = made(tar_set, batch_size=None, global_batch=9).state_at(Start(0), 1)
    plain = {name: value for name, value in state.items() if name != "checksum"}
    for change in ({"version": 3}, {"batch_size": 4}):
        with pytest.raises(adq.StateError, match=r"damaged state: it (lacks|has an unknown) field"):
            made(tar_set, batch_size=None, global_batch=9).start_from(sealed({**plain, **change}))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"global_batch": 8, "batch_size": 4}, "batch_size is of each rank, global_batch of all .*: give one"),
        ({"global_batch": 0}, "global_batch must be"),
        ({"global_batch": 2.5}, "global_batch must be"),
        ({"global_batch": 4, "rank": 0, "world": 5}, "global_batch=4 leaves some of 5 ranks without a sample"),
        ({"global_batch": 9, "uneven": "error"}, r"28 samples do not divide into global batches of 9 .* 8 of them"),
    ],
)  # fmt: skip
def test_what_cannot_be_shared_out_is_refused(tar_set: TarSet, options: Options, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        made(tar_set, **{"batch_size": None, **options})


def test_more_ranks_than_samples_in_a_step_are_refused_when_they_are_known(
    tar_set: TarSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = made(tar_set, batch_size=None, global_batch=4)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "5")
    for use in (len, list):
        with pytest.raises(ValueError, match="global_batch=4 leaves some of 5 ranks"):
            use(dataset)


def test_a_collate_takes_its_batches(tar_set: TarSet) -> None:
    dataset = made(tar_set, batch_size=None, global_batch=10, collate=len, rank=1, world=3, uneven="ragged")
    assert list(dataset) == [3, 3, 3]
