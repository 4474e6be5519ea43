"""Does what follows a state equal what would have followed, at every step and on every layout?"""

import pickle
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import pytest
from torchdata.stateful_dataloader import StatefulDataLoader

import adq_wds as adq
from adq_wds.reading.open_shards import Readers
from adq_wds.reading.places import Place
from adq_wds.stream.clock import Start
from tests.stream.conftest import OnlyEven, TarSet, Trips, as_worker, ids, noisy, number, played, write_set

Options = dict[str, Any]
Names = list[tuple[str, str]]


def made(tar_set: TarSet, **options: Any) -> adq.ShardDataset:
    return adq.ShardDataset(
        tar_set.urls, **{"plan": tar_set.plan, "shuffle": True, "seed": 2, "batch_size": 5, **options}
    )


def two_epochs(loader: Any) -> list[list[Names]]:
    return [[ids([batch]) for batch in loader] for _ in range(2)]


def check_every_step(make: Any, expected: list[list[Names]], steps: Any) -> None:
    """Save after each of `steps` batches of two epochs, load into another loader, and compare the whole rest."""
    per_epoch = len(expected[0])
    for step in steps:
        epoch, done = divmod(step, per_epoch)
        loader = make()
        for _ in range(epoch):
            list(loader)
        batches = iter(loader)
        head = [ids([next(batches)]) for _ in range(done)]
        assert head == expected[epoch][:done]
        state = loader.state_dict()
        del batches, loader
        other = make()
        other.load_state_dict(state)
        rest = [ids([batch]) for batch in other]
        assert rest == expected[epoch][done:], step
        assert [ids([batch]) for batch in other] == expected_after(expected, epoch), step


def expected_after(expected: list[list[Names]], epoch: int) -> list[Names]:
    return expected[epoch + 1]


@pytest.mark.parametrize("batch_size", [None, 5])
def test_a_loader_resumes_at_every_step_of_two_epochs(tar_set: TarSet, batch_size: Any) -> None:
    """F19, without workers."""
    expected = [*two_epochs(loader := adq.Loader(made(tar_set, batch_size=batch_size))), *two_epochs(loader)]
    assert len({str(epoch) for epoch in expected}) == 4
    check_every_step(
        lambda: adq.Loader(made(tar_set, batch_size=batch_size)), expected, range(2 * len(expected[0]))
    )


def with_workers(tar_set: TarSet, n_workers: int, persistent: bool, steps: Any) -> None:
    expected = [*two_epochs(loader := adq.Loader(made(tar_set))), *two_epochs(loader)]
    check_every_step(
        lambda: adq.Loader(made(tar_set), num_workers=n_workers, persistent_workers=persistent),
        expected,
        steps,
    )


@pytest.mark.parametrize(("n_workers", "persistent"), [(2, True), (3, False)])
def test_a_loader_with_workers_resumes(tar_set: TarSet, n_workers: int, persistent: bool) -> None:
    with_workers(tar_set, n_workers, persistent, (0, 3, 8))


@pytest.mark.slow
@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("n_workers", [1, 2, 3])
def test_a_loader_with_workers_resumes_at_every_step(
    tar_set: TarSet, n_workers: int, persistent: bool
) -> None:
    """F19."""
    with_workers(tar_set, n_workers, persistent, range(12))


def torchdatas(tar_set: TarSet, n_workers: int, persistent: bool, batch_size: Any, steps: Any) -> None:
    def make() -> StatefulDataLoader[Any]:
        return StatefulDataLoader(
            made(tar_set, batch_size=batch_size),
            batch_size=None,
            num_workers=n_workers,
            persistent_workers=persistent,
        )

    expected = [*two_epochs(loader := make()), *two_epochs(loader)]
    assert expected[:2] == two_epochs(adq.Loader(made(tar_set, batch_size=batch_size)))
    check_every_step(make, expected, steps)


@pytest.mark.parametrize("batch_size", [None, 5])
def test_torchdatas_loader_resumes_at_every_step_without_workers(tar_set: TarSet, batch_size: Any) -> None:
    per_epoch = len(made(tar_set, batch_size=batch_size))
    torchdatas(tar_set, 0, False, batch_size, range(2 * per_epoch))


@pytest.mark.parametrize(("n_workers", "persistent"), [(2, True), (3, False)])
def test_torchdatas_loader_resumes_on_as_many_workers(
    tar_set: TarSet, n_workers: int, persistent: bool
) -> None:
    torchdatas(tar_set, n_workers, persistent, 5, (0, 4, 7))


@pytest.mark.slow
@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("n_workers", [1, 2, 3])
def test_torchdatas_loader_resumes_at_every_step(tar_set: TarSet, n_workers: int, persistent: bool) -> None:
    """F19."""
    torchdatas(tar_set, n_workers, persistent, 5, range(12))


def test_torchdatas_loader_goes_on_with_the_next_epoch_after_a_state_of_the_end(tar_set: TarSet) -> None:
    for n_workers in (0, 2):

        def make(n_workers: int = n_workers) -> StatefulDataLoader[Any]:
            return StatefulDataLoader(made(tar_set), batch_size=None, num_workers=n_workers)

        first = make()
        expected = [[ids([b]) for b in first] for _ in range(2)]
        loader = make()
        list(loader)
        state = loader.state_dict()
        other = make()
        other.load_state_dict(state)
        assert [ids([b]) for b in other] == expected[1]


LAYOUTS = [(1, 0), (1, 3), (2, 1), (3, 2), (4, 0), (4, 2)]


class Played:
    """A Loader whose workers are played in this process."""

    def __init__(self, dataset: adq.ShardDataset, n_workers: int) -> None:
        self.dataset, self.n_workers = dataset, n_workers

    def run(self, n_batches: int | None) -> tuple[list[Any], dict[str, Any]]:
        start = self.dataset.next_start
        batches: Iterator[Any] = played(self.dataset, self.n_workers)
        out = list(batches) if n_batches is None else [next(batches) for _ in range(n_batches)]
        return out, self.dataset.state_at(start, len(out))


@pytest.mark.parametrize(
    ("before", "uneven"), [*product(LAYOUTS, ["ragged"]), *product(LAYOUTS[2:5:2], ["pad"])]
)
def test_a_state_resumes_on_any_other_layout(tar_set: TarSet, before: Any, uneven: str) -> None:
    """F20: 36 pairs of layouts, 5 steps each, in order: what is left is the rest of the line."""
    options: Options = {"uneven": uneven, "batch_size": 2}
    line = ids(made(tar_set, batch_size=None))
    kept = Counter(tar_set.kept)
    for (world, n_workers), step in product(LAYOUTS, range(5)):
        head: Names = []
        states = []
        for rank in range(before[0]):
            batches, state = Played(made(tar_set, rank=rank, world=before[0], **options), before[1]).run(step)
            head += ids(batches)
            states.append(state)
        assert all(state == states[0] for state in states)
        t = states[0]["t"]
        assert t == min(2 * step * before[0], len(line))
        assert Counter(head) == Counter(line[:t])
        tail: Counter[tuple[str, str]] = Counter()
        for rank in range(world):
            dataset = made(tar_set, rank=rank, world=world, **options)
            dataset.start_from(states[0])
            rest, _ = Played(dataset, n_workers).run(None)
            own = line[t + rank :: world]
            assert ids(rest)[: len(own)] == own
            tail += Counter(ids(rest))
            assert dataset.epoch == (1 if n_workers == 0 else 0)
        extra = Counter(head) + tail - kept
        assert Counter(head) + tail - extra == kept
        assert extra.total() == (-(len(line) - t) % world if uneven == "pad" else 0)


def test_real_loaders_hand_over_between_layouts(tar_set: TarSet) -> None:
    line = ids(made(tar_set, batch_size=None))
    head = []
    for rank in range(2):
        loader = adq.Loader(made(tar_set, rank=rank, world=2, batch_size=3), num_workers=1)
        batches = iter(loader)
        head += ids([next(batches) for _ in range(2)])
        state = loader.state_dict()
    assert Counter(head) == Counter(line[:12])
    other = adq.Loader(made(tar_set, batch_size=3), num_workers=2)
    other.load_state_dict(state)
    assert ids(other) == line[12:]
    after = other.state_dict()
    assert after == {**state, "epoch": 1, "t": 0, "checksum": after["checksum"]}


def test_the_start_holds_for_its_epoch_only(tar_set: TarSet) -> None:
    reference = made(tar_set)
    epochs = [ids(reference) for _ in range(3)]
    loader = adq.Loader(made(tar_set))
    list(loader)
    batches = iter(loader)
    next(batches)
    state = loader.state_dict()
    dataset = made(tar_set)
    dataset.start_from(state)
    assert dataset.epoch == 1
    stream = iter(dataset)
    next(stream)
    assert ids(dataset) == epochs[2]
    dataset.start_from(state)
    assert ids(dataset) == epochs[1][5:]
    assert ids(dataset) == epochs[2]
    dataset.set_epoch(0)
    assert ids(dataset) == epochs[0]
    dataset.set_epoch(1)
    assert ids(dataset) == epochs[1][5:]


def test_an_iterator_without_workers_hands_over_to_any_layout(tar_set: TarSet) -> None:
    line = ids(made(tar_set, batch_size=None))
    stream = iter(made(tar_set))
    for _ in range(3):
        next(stream)
    seen: Names = []
    for rank in range(2):
        dataset = made(tar_set, rank=rank, world=2, uneven="ragged")
        dataset.start_from(stream.state_dict())  # type: ignore[attr-defined]
        seen += ids(dataset)
    assert Counter(seen) == Counter(line[15:])
    list(stream)
    after = made(tar_set)
    after.start_from(stream.state_dict())  # type: ignore[attr-defined]
    assert after.epoch == 1


def test_an_iterators_state_brings_along_where_its_epoch_began(tar_set: TarSet) -> None:
    first = made(tar_set)
    line = ids(first)
    first.start_from(first.state_at(Start(0), 2))
    stream = iter(first)
    next(stream)
    other = made(tar_set)
    begun = iter(other)
    begun.load_state_dict(stream.state_dict())  # type: ignore[attr-defined]
    assert ids([next(begun)]) == line[15:20]
    for dataset in (other, first):
        assert dataset.epoch == 1
        dataset.set_epoch(0)
        assert ids(dataset) == line[10:], "begins where both began"


def test_an_iterator_that_goes_back_begins_its_epoch_again(tar_set: TarSet) -> None:
    reference = made(tar_set)
    epochs = [ids(reference) for _ in range(2)]
    dataset = made(tar_set)
    stream = iter(dataset)
    next(stream)
    state = stream.state_dict()  # type: ignore[attr-defined]
    next(stream)
    stream.load_state_dict(state)  # type: ignore[attr-defined]
    assert dataset.epoch == 0
    assert ids(stream) == epochs[0][5:]
    assert ids(dataset) == epochs[1]


@pytest.mark.parametrize(
    "pipes",
    [[adq.Map(number), adq.Map(noisy, seed=1)], [OnlyEven(), adq.Map(noisy)], [Trips(("k00003", "k00024"))]],
    ids=["map", "dropping", "skipping"],
)
@pytest.mark.parametrize("batch_size", [None, 1, 4])
@pytest.mark.parametrize("n_workers", [0, 3])
def test_every_kind_of_pipe_resumes_exactly_at_every_position(
    tar_set: TarSet, pipes: Any, batch_size: Any, n_workers: int
) -> None:
    def make() -> adq.ShardDataset:
        return made(tar_set, pipes=pipes, batch_size=batch_size, on_error="skip", rank=0, world=1)

    def places(dataset: adq.ShardDataset) -> list[Any]:
        if n_workers == 0:
            return [iter(dataset)]
        out = []
        for worker in range(n_workers):
            with as_worker(worker, n_workers):
                out.append(iter(pickle.loads(pickle.dumps(dataset))))  # noqa: S301 - our own bytes
        return out

    for place, other in zip(places(make()), places(make()), strict=True):
        whole = list(place)
        for step in range(len(whole) + 1):
            stream = _again(make(), place)
            for _ in range(step):
                next(stream)
            other.load_state_dict(stream.state_dict())
            assert list(other) == whole[step:]


def _again(dataset: adq.ShardDataset, place: Any) -> Any:
    """A new iterator at another's place of the layout."""
    layout = place._share
    with as_worker(layout.worker, layout.n_workers):
        return iter(pickle.loads(pickle.dumps(dataset)))  # noqa: S301 - our own bytes


@pytest.mark.parametrize("n_workers", [0, 2])
@pytest.mark.parametrize("pipes", [[OnlyEven()], [Trips(("k00003", "k00024"))]], ids=["drop", "skip"])
def test_a_loader_whose_batches_shrink_to_nothing_resumes_exactly(
    tar_set: TarSet, pipes: Any, n_workers: int
) -> None:
    """Single samples, some dropped: other numbers of workers give the same order, and resume at each step."""

    def make(workers: int = n_workers) -> adq.Loader:
        return adq.Loader(made(tar_set, pipes=pipes, batch_size=None, on_error="skip"), num_workers=workers)

    whole = ids(make(0))
    assert ids(make(3)) == whole
    for step in (0, 1, 7, len(whole)) if n_workers else range(len(whole) + 1):
        loader = make()
        batches = iter(loader)
        for _ in range(step):
            next(batches)
        other = make(n_workers and 3)
        other.load_state_dict(loader.state_dict())
        assert ids(other) == whole[step:]


def test_resuming_late_reads_the_rest_only(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """F21: at 90 % of an epoch, at most 15 % of its bytes."""
    tar_set = write_set(tmp_path / "set", [100] * 5)
    n_read = [0]
    original = Readers.read

    def read(self: Readers, places: Sequence[Place]) -> Any:
        n_read[0] += sum(place.n_bytes for place in places)
        return original(self, places)

    monkeypatch.setattr(Readers, "read", read)
    loader = adq.Loader(made(tar_set, batch_size=6))
    batches = iter(loader)
    for _ in range(round(0.9 * len(loader))):
        next(batches)
    state = loader.state_dict()
    list(batches)
    whole, n_read[0] = n_read[0], 0
    other = adq.Loader(made(tar_set, batch_size=6))
    other.load_state_dict(state)
    assert len(list(other)) == len(loader) - round(0.9 * len(loader))
    assert 0.05 * whole < n_read[0] <= 0.15 * whole
