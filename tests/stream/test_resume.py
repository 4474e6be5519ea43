"""Does what follows a state equal what would have followed, at every step and on every layout?"""

from collections import Counter
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import webdataset as wds

import adq_wds as adq
from adq_wds.reading.open_shards import Readers
from adq_wds.reading.places import Place
from adq_wds.stream.clock import Start
from tests.stream.conftest import (
    LOADERS,
    Names,
    OnlyEven,
    Options,
    TarSet,
    Trips,
    as_worker,
    epochs_of,
    ids,
    made,
    noisy,
    number,
    played,
    slow,
    worker_streams,
    write_set,
)


def check_steps(tar_set: TarSet, kind: str, steps: Any, batch_size: Any = 4, **options: Any) -> None:
    """Save after each of `steps` batches of two epochs, load into another loader, and compare the whole rest."""

    def make() -> Any:
        return LOADERS[kind](made(tar_set, pipes=[adq.Map(noisy)], batch_size=batch_size), **options)

    reference = made(tar_set, pipes=[adq.Map(noisy)], batch_size=batch_size)
    expected = [list(reference) for _ in range(3)]
    for step in range(2 * len(expected[0])) if steps == "every" else steps:
        epoch, done = divmod(step, len(expected[0]))
        loader = make()
        for _ in range(epoch):
            list(loader)
        batches = iter(loader)
        assert [next(batches) for _ in range(done)] == expected[epoch][:done]
        state = loader.state_dict()
        del batches, loader
        other = make()
        other.load_state_dict(state)
        assert list(other) == expected[epoch][done:], step
        assert list(other) == expected[epoch + 1], step


@pytest.mark.parametrize("kind", ["adq", "torchdata"])
@pytest.mark.parametrize("batch_size", [None, 5])
def test_a_loader_resumes_at_every_step(tar_set: TarSet, kind: str, batch_size: Any) -> None:
    """F19, without workers, over two epochs."""
    check_steps(tar_set, kind, "every", batch_size)


@pytest.mark.parametrize("kind", ["adq", "torchdata"])
@pytest.mark.parametrize(
    ("n_workers", "persistent", "start", "steps"),
    [
        (2, True, "fork", (0, 3, 10)),
        (3, False, "fork", (0, 3, 10)),
        *(slow(n, kept, "fork", "every") for n in (1, 2, 3) for kept in (True, False)),
        *(slow(2, kept, start, (10,)) for start in ("spawn", "forkserver") for kept in (True, False)),
    ],
)
def test_a_loader_with_workers_resumes(
    tar_set: TarSet, kind: str, n_workers: int, persistent: bool, start: str, steps: Any
) -> None:
    """F19."""
    options = {"persistent_workers": persistent, "multiprocessing_context": start}
    check_steps(tar_set, kind, steps, num_workers=n_workers, **options)


@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("start", ["fork", slow("spawn"), slow("forkserver")])
def test_webdatasets_loader_reads_our_epochs(tar_set: TarSet, start: str, persistent: bool) -> None:
    """With a stage of its own behind it."""
    options = {"persistent_workers": persistent, "multiprocessing_context": start}
    loader = wds.WebLoader(made(tar_set), batch_size=None, num_workers=2, **options).unlisted()
    assert epochs_of(loader, 3) == epochs_of(made(tar_set), 3)


LAYOUTS = [(1, 0), (1, 3), (2, 1), (3, 2), (4, 0), (4, 2)]


def read(dataset: adq.ShardDataset, n_workers: int, n_batches: int | None) -> tuple[list[Any], Options]:
    """Some batches as workers played in this process give them, and the state after these."""
    start, batches = dataset.next_start, played(dataset, n_workers)
    out = list(batches) if n_batches is None else [next(batches) for _ in range(n_batches)]
    return out, dataset.state_at(start, len(out))


@pytest.mark.parametrize(
    ("before", "uneven"), [*product(LAYOUTS, ["ragged"]), *product(LAYOUTS[2:5:2], ["pad"])]
)
def test_a_state_resumes_on_any_other_layout(tar_set: TarSet, before: Any, uneven: str) -> None:
    """F20: 36 pairs of layouts, 5 steps each, in order: what is left is the rest of the line."""
    options: Options = {"uneven": uneven, "batch_size": 2}
    line = ids(made(tar_set))
    kept = Counter(tar_set.kept)
    for step in range(5):
        head: Names = []
        states = []
        for rank in range(before[0]):
            batches, state = read(made(tar_set, rank=rank, world=before[0], **options), before[1], step)
            head += ids(batches)
            states.append(state)
        assert all(state == states[0] for state in states)
        t = states[0]["t"]
        assert t == min(2 * step * before[0], len(line))
        assert Counter(head) == Counter(line[:t])
        for world, n_workers in LAYOUTS:
            seen = Counter(head)
            for rank in range(world):
                dataset = made(tar_set, rank=rank, world=world, **options)
                dataset.start_from(states[0])
                rest = ids(read(dataset, n_workers, None)[0])
                own = line[t + rank :: world]
                assert rest[: len(own)] == own
                seen += Counter(rest)
                assert dataset.epoch == (n_workers == 0)
            assert kept - seen == Counter()
            assert (seen - kept).total() == (-(len(line) - t) % world if uneven == "pad" else 0)


def test_a_start_holds_for_its_epoch_only(tar_set: TarSet) -> None:
    epochs = epochs_of(made(tar_set), 3)
    dataset = made(tar_set)
    state = dataset.state_at(Start(1), 1)
    dataset.start_from(state)
    assert dataset.epoch == 1
    next(iter(dataset))
    assert ids(dataset) == epochs[2]
    dataset.start_from(state)
    assert ids(dataset) == epochs[1][4:]
    assert ids(dataset) == epochs[2]
    dataset.set_epoch(0)
    assert ids(dataset) == epochs[0]
    assert ids(dataset) == epochs[1][4:]


def test_an_iterator_without_workers_fits_any_layout(tar_set: TarSet) -> None:
    line = ids(made(tar_set))
    stream: Any = iter(made(tar_set))
    for _ in range(3):
        next(stream)
    seen: Names = []
    for rank in range(2):
        dataset = made(tar_set, rank=rank, world=2, uneven="ragged")
        dataset.start_from(stream.state_dict())
        seen += ids(dataset)
    assert Counter(seen) == Counter(line[12:])
    list(stream)
    after = made(tar_set)
    after.start_from(stream.state_dict())
    assert after.epoch == 1


def test_an_iterators_state_says_where_its_epoch_began(tar_set: TarSet) -> None:
    line = ids(made(tar_set))
    first, other = made(tar_set), made(tar_set)
    first.start_from(first.state_at(Start(0), 2))
    stream: Any = iter(first)
    next(stream)
    loaded: Any = iter(other)
    loaded.load_state_dict(stream.state_dict())
    assert ids([next(loaded)]) == line[12:16]
    for dataset in (other, first):
        assert dataset.epoch == 1
        dataset.set_epoch(0)
        assert ids(dataset) == line[8:], "begins where both began"


def test_an_iterator_that_goes_back_begins_its_epoch_again(tar_set: TarSet) -> None:
    epochs = epochs_of(made(tar_set), 2)
    dataset = made(tar_set)
    stream: Any = iter(dataset)
    next(stream)
    state = stream.state_dict()
    next(stream)
    stream.load_state_dict(state)
    assert dataset.epoch == 0
    assert ids(stream) == epochs[0][4:]
    assert ids(dataset) == epochs[1]


BAD = ("k00003", "k00024")


@pytest.mark.parametrize(
    "pipes",
    [[adq.Map(number), adq.Map(noisy, seed=1)], [OnlyEven(), adq.Map(noisy)], [Trips(BAD)]],
    ids=["map", "dropping", "skipping"],
)
@pytest.mark.parametrize("batch_size", [None, 1, 4])
@pytest.mark.parametrize("n_workers", [0, 3])
def test_every_kind_of_pipe_resumes_at_every_position(
    tar_set: TarSet, pipes: Any, batch_size: Any, n_workers: int
) -> None:
    def streams() -> list[Any]:
        options: Options = {"batch_size": batch_size, "on_error": "skip", "rank": 0, "world": 1}
        return worker_streams(made(tar_set, pipes=pipes, **options), n_workers)

    for worker, (stream, other) in enumerate(zip(streams(), streams(), strict=True)):
        with as_worker(worker, max(1, n_workers)):
            states, whole = [stream.state_dict()], []
            for sample in stream:
                whole.append(sample)
                states.append(stream.state_dict())
            for step, state in enumerate(states):
                other.load_state_dict(state)
                assert list(other) == whole[step:]


@pytest.mark.parametrize("n_workers", [0, 2])
@pytest.mark.parametrize("pipes", [[OnlyEven()], [Trips(BAD)]], ids=["drop", "skip"])
def test_a_loader_that_loses_samples_resumes_exactly(tar_set: TarSet, pipes: Any, n_workers: int) -> None:
    """Single samples: other numbers of workers give the same order, and resume at each step."""

    def make(workers: int = n_workers) -> adq.Loader:
        return adq.Loader(made(tar_set, pipes=pipes, batch_size=None, on_error="skip"), num_workers=workers)

    whole = ids(make(0))
    assert ids(make(3)) == whole
    for step in (1, 7, len(whole)) if n_workers else range(len(whole) + 1):
        loader = make()
        batches = iter(loader)
        for _ in range(step):
            next(batches)
        other = make(n_workers and 3)
        other.load_state_dict(loader.state_dict())
        assert ids(other) == whole[step:]


def test_resuming_late_reads_the_rest_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """F21: at 90 % of an epoch, at most 15 % of its bytes."""
    tar_set = write_set(tmp_path / "set", [100] * 5)
    n_read = [0]
    original = Readers.read_samples

    def read(self: Readers, places: Sequence[Place]) -> Any:
        n_read[0] += sum(place.n_bytes for place in places)
        return original(self, places)

    monkeypatch.setattr(Readers, "read_samples", read)
    dataset = made(tar_set, batch_size=6)
    list(dataset)
    whole, n_read[0] = n_read[0], 0
    done = round(0.9 * len(dataset))
    dataset.start_from(dataset.state_at(Start(0), done))
    assert len(list(dataset)) == len(dataset) - done
    assert 0.05 * whole < n_read[0] <= 0.15 * whole
