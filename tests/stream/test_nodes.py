"""Does a node give what its source and pipes would, and go on exactly where it stood?"""

import json
import pickle
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torchdata.nodes as tn
import webdataset as wds

import adq_wds as adq
from tests.stream.conftest import (
    BOOM,
    OnlyEven,
    TarSet,
    Trips,
    as_worker,
    boom,
    change_a_byte,
    ids,
    noisy,
    number,
    write_set,
)
from tests.stream.conftest import made as made_in_batches

Make = Callable[[], Any]


def made(tar_set: TarSet, **options: Any) -> adq.ShardDataset:
    return made_in_batches(tar_set, **{"batch_size": None, **options})


@dataclass(frozen=True, eq=False)
class Wide(adq.Pipe):
    """A pipe that works in chunks of its own size."""

    chunk: ClassVar[int] = 7
    one_to_one: ClassVar[bool] = True

    def apply(self, samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
        assert len(samples) <= 16
        return [dict(s) for s in samples]


def untouched(sample: dict[str, Any]) -> dict[str, Any]:
    return sample


PIPES: dict[str, list[adq.Pipe]] = {
    "none": [],
    "map": [adq.Map(number), adq.Map(noisy, seed=1)],
    "chunks": [Wide()],
    "dropping": [OnlyEven(), adq.Map(noisy)],
    "skipping": [Trips(("k00003", "k00024"), on_error="skip"), adq.Map(noisy)],
}


def nodes_of(tar_set: TarSet, pipes: list[adq.Pipe]) -> dict[str, Make]:
    """A node over every kind of source, and under other nodes."""
    samples = [dict(s) for s in made(tar_set)]
    return {
        "data set": lambda: adq.as_node(made(tar_set), *pipes),
        "own pipes": lambda: adq.as_node(made(tar_set, pipes=[Trips(("k00000",), on_error="skip")]), *pipes),
        "node": lambda: adq.as_node(tn.Prefetcher(adq.as_node(made(tar_set)), 3), *pipes),
        "loader": lambda: adq.as_node(adq.Loader(made(tar_set)), *pipes),
        "list": lambda: adq.as_node(samples, *pipes),
        "webdataset": lambda: adq.as_node(
            wds.WebDataset(tar_set.urls, shardshuffle=False, empty_check=False), *pipes
        ),
        "prefetched": lambda: tn.Prefetcher(adq.as_node(made(tar_set), *pipes), 4, snapshot_frequency=3),
        "mapped": lambda: tn.ParallelMapper(
            adq.as_node(made(tar_set), *pipes), untouched, 2, method="thread"
        ),
        "batched": lambda: tn.Unbatcher(tn.Batcher(adq.as_node(made(tar_set), *pipes), 5, drop_last=False)),
    }


def read(node: Any) -> list[dict[str, Any]]:
    node.reset()
    return list(node)


def after(node: Any, n: int) -> Any:
    """Its state, in JSON and back, after n samples."""
    for _ in range(n):
        next(node)
    return json.loads(json.dumps(node.state_dict()))


def check_every_position(make: Make, step: int = 1) -> None:
    """Two epochs; then from every place in the first: the whole rest, and the epoch after it."""
    node = make()
    node.reset()
    states, first = [node.state_dict()], []
    for sample in node:
        first.append(sample)
        states.append(node.state_dict())
    second = read(node)
    assert len(first) > 10, "a law about nothing"
    for given, state in list(enumerate(states))[::step]:
        other = make()
        other.reset(state)
        assert other.state_dict() is not None
        assert list(other) == first[given:], given
        assert read(other) == second, "the next epoch"


@pytest.mark.parametrize("pipes", sorted(PIPES))
@pytest.mark.parametrize("kind", ["data set", "own pipes", "loader", "list", "webdataset"])
def test_a_node_resumes_exactly_at_every_position(tar_set: TarSet, kind: str, pipes: str) -> None:
    check_every_position(nodes_of(tar_set, PIPES[pipes])[kind])


@pytest.mark.parametrize("kind", ["node", "prefetched", "mapped", "batched"])
def test_a_node_resumes_exactly_among_other_nodes(tmp_path: Path, kind: str) -> None:
    tiny = write_set(tmp_path / "tiny", [14, 5, 6], keep=lambda i: i % 7 != 1)
    pipes = [OnlyEven(), Wide()] if kind == "node" else [adq.Map(noisy)]
    check_every_position(nodes_of(tiny, pipes)[kind], 2)


@pytest.mark.parametrize("pipes", sorted(PIPES))
def test_pipes_may_stand_in_the_data_set_or_in_the_node(tar_set: TarSet, pipes: str) -> None:
    inside = made(tar_set, pipes=PIPES[pipes])
    node = adq.as_node(made(tar_set), *PIPES[pipes])
    epochs = [list(inside) for _ in range(3)]
    assert [read(node) for _ in range(3)] == epochs
    assert ids(epochs[0]) != ids(epochs[1])


def test_without_pipes_batches_pass_as_they_are(tar_set: TarSet) -> None:
    options: Any = {"batch_size": 5, "pipes": [adq.Map(number)], "fields": ("key", "label")}
    batches = [batch[0] for batch in adq.as_node(made(tar_set, **options))]
    assert batches == [batch[0] for batch in made(tar_set, **options)]
    assert [len(batch) for batch in batches] == [5, 5, 5, 5, 5, 3]


@pytest.mark.parametrize("method", ["thread", "process"])
def test_torchdatas_loader_goes_on_from_json(tar_set: TarSet, method: str) -> None:
    def make() -> tn.Loader[Any]:
        node = tn.Batcher(adq.as_node(made(tar_set), adq.Map(noisy)), 4, drop_last=False)
        mapped = tn.ParallelMapper(node, list, 2, method=method, multiprocessing_context="fork")
        return tn.Loader(tn.Prefetcher(mapped, 2))

    reference = made(tar_set, pipes=[adq.Map(noisy)], batch_size=4)
    epochs = [list(reference) for _ in range(3)]
    loader, other = make(), make()
    assert list(loader) == epochs[0]
    batches = iter(loader)
    assert [next(batches) for _ in range(3)] == epochs[1][:3]
    other.load_state_dict(json.loads(json.dumps(loader.state_dict())))
    assert [list(other) for _ in range(2)] == [epochs[1][3:], epochs[2]]


def test_a_reset_begins_the_next_epoch_after_a_sample(tar_set: TarSet) -> None:
    """As torchdata's own `SamplerWrapper` does."""
    node = adq.as_node(made(tar_set), Wide())
    epochs = [ids(read(node)) for _ in range(4)]
    dataset = made(tar_set)
    node = adq.as_node(dataset, Wide())
    for epoch, n in ((0, 0), (0, 1), (1, 27), (2, 28)):  # the last has all samples but has not asked for more
        node.reset()
        assert ids([next(node) for _ in range(n)]) == epochs[epoch][:n]
        assert dataset.epoch == epoch + (n > 0)
    state = node.state_dict()
    assert ids(read(node)) == epochs[3]
    assert dataset.epoch == 4
    node.reset(state)
    assert ids(node) == []
    assert dataset.epoch == 3


@pytest.mark.parametrize("pipes", ["none", "map", "chunks"])
def test_one_state_of_all_ranks_fits_any_number_of_them(tar_set: TarSet, pipes: str) -> None:
    def make(rank: int, world: int, **options: Any) -> Any:
        return adq.as_node(made(tar_set, rank=rank, world=world, **options), *PIPES[pipes])

    line = ids(made(tar_set))
    for before, now, step in [(1, 2, 9), (2, 3, 5), (2, 1, 13), (3, 2, 1), (3, 1, 0)]:
        states = [after(make(rank, before), step) for rank in range(before)]
        assert all(state == states[0] for state in states)
        assert len(json.dumps(states[0])) < 450
        rest = Counter[Any]()
        for rank in range(now):
            node = make(rank, now, uneven="ragged")
            node.reset(states[0])
            rest.update(ids(node))
        assert rest == Counter(line[before * step :])


@pytest.mark.parametrize("pipes", ["dropping", "skipping"])
def test_ranks_that_lose_samples_resume_on_their_own_place(tar_set: TarSet, pipes: str) -> None:
    def make(rank: int, world: int = 2) -> Any:
        return adq.as_node(made(tar_set, rank=rank, world=world, uneven="ragged"), *PIPES[pipes])

    node, again = make(1), make(1)
    state = after(node, 1)
    again.reset(state)
    assert (again.state_dict()["source"]["rank"], again.state_dict()["source"]["world"]) == (1, 2)
    assert list(again) == list(node)
    for rank, world in [(0, 2), (0, 1), (1, 3)]:
        with pytest.raises(adq.StateError, match="pipes that drop samples put each rank at a place of its"):
            make(rank, world).reset(state)


def test_a_skip_in_the_data_set_binds_a_state_to_its_rank(tar_set: TarSet) -> None:
    """For the epoch."""
    pipes = [Trips(("k00009",))]
    options: Any = {"shuffle": False, "on_error": "skip", "rank": 0, "world": 2, "uneven": "ragged"}
    node, again = (adq.as_node(made(tar_set, pipes=pipes, **options)) for _ in range(2))
    node.reset()
    states = [node.state_dict()] + [node.state_dict() for _ in node]
    assert [state["source"]["rank"] for state in states] == [None] * 4 + [0] * 10
    again.reset(states[7])
    assert [again.state_dict() for _ in range(6) if next(again)] == states[8:]
    list(again)
    assert again.state_dict()["source"]["rank"] is None, "a new epoch begins in step"


@pytest.mark.parametrize("more", [[], [Wide()], [OnlyEven()]], ids=["alone", "with others", "dropping"])
def test_after_an_error_next_never_ends_quietly(tar_set: TarSet, more: list[adq.Pipe]) -> None:
    """F24: what came before the bad sample comes before its error; a state saved then goes on there."""
    expected = ids(adq.as_node(made(tar_set), *more))
    dataset = made(tar_set)
    node, got = adq.as_node(dataset, adq.Map(boom), *more), []
    with pytest.raises(adq.SampleError, match=f"^{re.escape(BOOM)}$"):
        got.extend(node)
    assert ids(got) == expected[: expected.index(("t-003.tar", "k00024"))]
    for _ in range(3):
        with pytest.raises(adq.LoaderClosed, match=re.escape(f"make it anew: SampleError: {BOOM}")):
            next(node)
    assert dataset.epoch == 1
    state = node.state_dict()
    if OnlyEven not in map(type, more):  # any number of ranks may go on there
        assert (state["source"]["t"], state["n_given"]) == (len(got), 0)
    repaired = adq.as_node(made(tar_set), adq.Map(untouched), *more)
    repaired.reset(state)
    assert ids(repaired) == expected[len(got) :]
    dataset.set_epoch(0)
    node.reset()
    assert ids([next(node)]) == expected[:1], "a reset makes it anew"


def test_an_error_of_the_source_comes_after_what_is_before_it(tmp_path: Path) -> None:
    tar_set = write_set(tmp_path / "set", [9, 9], keep=lambda i: True)
    change_a_byte(tar_set.urls[1])
    node, got = adq.as_node(made(tar_set, shuffle=False), adq.Map(number, on_error="skip")), []
    with pytest.raises(adq.ShardError, match=r"^shard t-001.tar, key 'k00009': bytes differ"):
        got.extend(node)
    assert ids(got) == tar_set.kept[:9]
    assert node.state_dict()["source"]["t"] == 9
    with pytest.raises(adq.LoaderClosed, match=r"make it anew: .*shard t-001.tar, key 'k00009'"):
        next(node)


def test_skipping_is_counted_and_bounded(tar_set: TarSet, caplog: pytest.LogCaptureFixture) -> None:
    some = Trips(("k00003", "k00024"), on_error="skip")
    assert len(read(adq.as_node(made(tar_set), some))) == 26
    assert "Trips: read 28 = kept 26 + dropped 0 + bad 2" in caplog.text
    node = adq.as_node(made(tar_set), Trips(tuple(key for _, key in tar_set.kept[::5]), on_error="skip"))
    with pytest.raises(adq.SampleError, match=r"6 of 28 samples are bad, more than max_bad_fraction=0.1"):
        list(node)
    with pytest.raises(adq.LoaderClosed, match="6 of 28 samples are bad"):
        next(node)


def test_an_interrupt_closes_the_stream_and_loses_nothing(tar_set: TarSet) -> None:
    interrupts = [KeyboardInterrupt()]

    def interrupted(sample: dict[str, Any]) -> dict[str, Any]:
        if sample["__key__"] == "k00024" and interrupts:
            raise interrupts.pop()
        return sample

    expected, got = ids(made(tar_set)), []
    node = adq.as_node(made(tar_set), adq.Map(interrupted))
    with pytest.raises(KeyboardInterrupt):
        got.extend(node)
    with pytest.raises(adq.LoaderClosed, match="KeyboardInterrupt"):
        next(node)
    node.reset(node.state_dict())
    assert ids(got) + ids(node) == expected


class Fickle:
    """Reads in another order each time, or less."""

    def __init__(self, samples: list[dict[str, Any]]) -> None:
        self.orders = [samples, samples[::-1], samples[:3], samples]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.orders.pop(0))


def test_a_source_of_another_order_is_refused(tar_set: TarSet) -> None:
    samples = [dict(s) for s in made(tar_set)]
    node = adq.as_node(Fickle(samples), Wide())
    state = after(node, 9)
    for _ in range(2):
        with pytest.raises(adq.StateError, match="the first 7 samples of a Fickle are not what they were"):
            node.reset(state)
    node.reset(state)
    assert list(node) == samples[9:]
    moved = [{**s, "__url__": "/elsewhere/" + Path(s["__url__"]).name} for s in samples]
    node = adq.as_node(moved, Wide())
    node.reset(state)
    assert list(node) == moved[9:], "moved data is the same data"


def test_a_state_that_leaves_out_more_than_there_is_is_refused(tar_set: TarSet) -> None:
    samples = [dict(s) for s in made(tar_set)]
    node = adq.as_node(samples[:2], Wide())
    node.reset(after(adq.as_node(samples, Wide()), 6))
    with pytest.raises(adq.StateError, match=r"4 samples more had been given out .* than there are now"):
        next(node)


def test_earlier_versions_read_its_state(tar_set: TarSet) -> None:
    state = after(adq.as_node(made(tar_set)), 2)
    assert (state["version"], state["source"]["version"]) == (3, 3)


GOOD = {"version": 1, "source": None, "n_given": 0, "ended": False}


@pytest.mark.parametrize(
    ("state", "text"),
    [
        ({}, "state has version=None, this stream version=4: load it with the adq_wds that saved it"),
        ([1], r"state \[1\] is not one of ours: expected what state_dict\(\) gave"),
        ({**GOOD, "version": 5}, "state has version=5, this stream version=4"),
        ({**GOOD, "version": 2}, "it lacks field 'checksum'"),
        ({**GOOD, "n_given": -1}, "is not a node's"),
        ({**GOOD, "ended": 1}, "is not a node's"),
        ({**GOOD, "source": {"n_read": 3}}, r"'n_read': 3\} is not of a source"),
        ({**GOOD, "source": {"n_read": True, "crc32": 0}}, "is not of a source"),
    ],
)
def test_a_damaged_state_is_refused(state: Any, text: str) -> None:
    node = adq.as_node([{"__key__": "a", "__url__": "a.tar"}])
    with pytest.raises(adq.StateError, match=text):
        node.reset(state)


@pytest.mark.parametrize("kind", ["data set", "node", "samples"])
def test_a_nodes_state_with_any_field_changed_is_refused(tar_set: TarSet, kind: str) -> None:
    """F43, whatever it reads: where a node below has a state of its own, that is covered too."""
    sources: dict[str, Make] = {
        "data set": lambda: made(tar_set),
        "node": lambda: tn.IterableWrapper(list(made(tar_set))),
        "samples": lambda: list(made(tar_set)),
    }
    state = after(adq.as_node(sources[kind](), Wide()), 5)
    other = adq.as_node(sources[kind](), Wide())
    for changed in all_changes(state):
        with pytest.raises(adq.StateError, match=r"load|expected what state_dict\(\) gave"):
            other.reset(changed)
    other.reset(state)
    assert ids(other) == ids(adq.as_node(sources[kind](), Wide()))[5:]


def all_changes(state: Any) -> Iterator[Any]:
    """The same with one number or text in it changed, at any depth."""
    if isinstance(state, dict):
        for name, value in state.items():
            yield from ({**state, name: changed} for changed in all_changes(value))
            yield {other: value for other, value in state.items() if other != name}
    elif isinstance(state, bool):
        yield not state
    elif isinstance(state, int):
        yield from (state + 1, state - 1, state + 10, None, str(state))
    else:
        yield f"{state}0"


def test_after_a_state_of_another_data_set_nothing_comes(tar_set: TarSet) -> None:
    dataset = made(tar_set, seed=5)
    node = adq.as_node(dataset)
    first = next(node)
    with pytest.raises(adq.StateError, match="state has seed=3, this stream seed=5"):
        node.reset(after(adq.as_node(made(tar_set)), 1))
    with pytest.raises(adq.LoaderClosed, match="the node's last reset failed, so it stands nowhere: reset"):
        next(node)
    dataset.set_epoch(0)
    node.reset()
    assert next(node) == first


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("a.tar", "as_node reads a ShardDataset, a node or other samples, got 'a.tar'"),
        ({"__key__": "a"}, "got {'__key__': 'a'}"),
        (3, "got 3"),
        (iter([]), "as_node got a list_iterator, which can be read only once: give what makes it"),
    ],
)
def test_what_cannot_be_read_again_is_refused(source: Any, text: str) -> None:
    with pytest.raises(TypeError, match=text):
        adq.as_node(source)


def test_what_is_no_pipe_or_no_sample_is_refused(tar_set: TarSet) -> None:
    with pytest.raises(ValueError, match=r"as_node: <function number.*is no pipe; wrap .* in adq\.Map"):
        adq.as_node(made(tar_set), number)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Map got a list, expected a sample"):
        next(adq.as_node(made(tar_set, batch_size=4), adq.Map(number)))


def test_a_dataloaders_worker_is_no_place_for_it(tar_set: TarSet) -> None:
    node = pickle.loads(pickle.dumps(adq.as_node(made(tar_set))))  # noqa: S301 - our own bytes
    with as_worker(0, 2), pytest.raises(RuntimeError, match="a ShardDataset's node runs in the main process"):
        next(node)
    for use in (next, tn.BaseNode.state_dict):
        with pytest.raises(adq.LoaderClosed, match="the node's last reset failed"):
            use(node)
    assert len(read(node)) == 28
