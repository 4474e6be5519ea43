"""Do real workers, started any way and killed at any time, give the stream that none would?"""

import contextlib
import json
import os
import re
import signal
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torchdata.stateful_dataloader.stateful_dataloader

import adq_wds as adq
from adq_wds.stream.clock import Start
from tests.programs import FILE, Program, soon
from tests.stream.conftest import (
    BOOM,
    LOADERS,
    TarSet,
    as_worker,
    boom,
    change_a_byte,
    epochs_of,
    ids,
    made,
    slow,
    write_set,
)

STARTS = ["fork", slow("spawn"), slow("forkserver")]


def stand(loader: adq.Loader) -> tuple[int, int]:
    """The epoch and position of its state."""
    state = loader.state_dict()
    return state["epoch"], state["t"]


def take(batches: Any, n: int) -> list[tuple[str, str]]:
    return ids([next(batches) for _ in range(n)])


@pytest.mark.parametrize("kind", sorted(LOADERS))
@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("start", STARTS)
def test_epochs_follow_in_any_loader(tar_set: TarSet, kind: str, persistent: bool, start: str) -> None:
    """F17: workers, kept or made anew, read the epochs that no worker would."""
    expected = epochs_of(made(tar_set), 3)
    options = {"persistent_workers": persistent, "multiprocessing_context": start}
    loader = LOADERS[kind](made(tar_set), num_workers=2, **options)
    assert len(loader) == 7
    assert epochs_of(loader, 3) == expected
    loader.dataset.set_epoch(1)
    assert epochs_of(loader, 2) == expected[1:]
    assert loader.dataset.epoch == 3


def test_spawned_workers_get_all_they_need(tar_set: TarSet) -> None:
    """The quick one of those: from Python 3.14 on workers are not forked unless one asks for it."""
    loader = adq.Loader(made(tar_set), num_workers=1, multiprocessing_context="spawn")
    assert list(loader) == list(made(tar_set))


@pytest.mark.parametrize(("n_workers", "persistent"), [(0, False), (2, True), (2, False)])
def test_iterating_reads_the_epoch_after_the_left(tar_set: TarSet, n_workers: int, persistent: bool) -> None:
    """Left before the first batch, none was begun; left anywhere after it, or read to its end, one was."""
    expected = epochs_of(made(tar_set), 6)
    loader = adq.Loader(made(tar_set), num_workers=n_workers, persistent_workers=persistent)
    epoch = 0
    for n in (1, 0, 6, 7, 0, 2, 1):
        batches = iter(loader)
        assert stand(loader) == (epoch, 0)
        assert take(batches, n) == expected[epoch][: 4 * n]
        assert stand(loader) == ((epoch, 4 * n) if n < 7 else (epoch + 1, 0))
        epoch += n > 0
        assert loader.dataset.epoch == epoch
    assert ids(loader) == expected[epoch]


@pytest.mark.parametrize("n_workers", [0, 2])
def test_a_loaded_state_goes_on_with_its_own_epoch(tar_set: TarSet, n_workers: int) -> None:
    expected = epochs_of(made(tar_set), 3)
    loader, other = (adq.Loader(made(tar_set), num_workers=n_workers) for _ in range(2))
    for n in (3, 2):
        take(iter(loader), n)
    state = loader.state_dict()
    assert stand(loader) == (1, 8)
    for _ in range(2):
        other.load_state_dict(state)
        assert other.state_dict() == state
        assert take(iter(other), 1) == expected[1][8:12]
        assert ids(other) == expected[2], "from its beginning"


@pytest.mark.parametrize("n_workers", [0, 2])
def test_an_epoch_that_was_set_is_the_next(tar_set: TarSet, n_workers: int) -> None:
    expected = epochs_of(made(tar_set), 6)
    loader = adq.Loader(made(tar_set), num_workers=n_workers)
    batches = iter(loader)
    loader.dataset.set_epoch(3)  # before the first batch: what was begun to be read stays
    assert take(batches, 1) == expected[0][:4]
    assert ids(loader) == expected[3]
    batches = iter(loader)
    next(batches)
    loader.dataset.set_epoch(4)  # the same again
    assert ids(batches) == expected[4][4:]
    assert epochs_of(loader, 2) == expected[4:]


@pytest.mark.parametrize("batch_size", [None, 4])
def test_the_data_set_itself_goes_on_to_the_next_epoch(tar_set: TarSet, batch_size: int | None) -> None:
    expected = epochs_of(made(tar_set, batch_size=batch_size), 5)
    dataset = made(tar_set, batch_size=batch_size)
    for epoch, n in enumerate((1, 7, 3, 2)):
        iter(dataset)
        assert ids(islice(dataset, n)) == expected[epoch][: n * (batch_size or 1)]
        assert dataset.epoch == epoch + 1
    assert ids(dataset) == expected[4]
    empty = adq.ShardDataset(tar_set.urls, plan=adq.Plan.from_keys(tar_set.urls, []))
    assert list(empty) == []
    assert empty.epoch == 1


@pytest.mark.parametrize("kind", ["torch", "torchdata"])
@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("seeded", [True, False])
def test_workers_of_torchs_loaders_agree_on_the_next_epoch(
    tar_set: TarSet, kind: str, persistent: bool, seeded: bool
) -> None:
    """Also where a program seeds torch alike in every epoch, so that all iterations have one seed."""
    expected = epochs_of(made(tar_set), 6)
    loader = LOADERS[kind](made(tar_set), num_workers=2, persistent_workers=persistent)
    for epoch in range(6):
        if seeded:
            torch.manual_seed(0)
        assert take(iter(loader), 3) == expected[epoch][:12]
    assert Counter(ids(loader)) == Counter(tar_set.kept)


@pytest.mark.parametrize("n_workers", [0, 2])
@pytest.mark.parametrize("done", [0, 2])
def test_an_epoch_is_over_with_its_last_batch(tar_set: TarSet, n_workers: int, done: int) -> None:
    """Though nobody asks for more, as programs do that count batches: Lightning, ``zip(range(n), loader)``."""
    expected = epochs_of(made(tar_set), 2)
    loader, other = (adq.Loader(made(tar_set), num_workers=n_workers) for _ in range(2))
    loader.load_state_dict(loader.dataset.state_at(Start(0), done))
    first = iter(loader)
    assert take(first, 7 - done) == expected[0][4 * done :]
    state = loader.state_dict()
    assert (*stand(loader), loader.dataset.epoch) == (1, 0, 1)
    batches = iter(loader)
    assert take(batches, 7) == expected[1]
    assert next(first, None) is None
    assert loader.dataset.epoch == 2, "an old iteration's end changes nothing"
    loader.dataset.set_epoch(0)
    assert next(batches, None) is None
    assert loader.dataset.epoch == 0, "nor does an end that was known"
    other.load_state_dict(state)
    assert ids(other) == expected[1]


def test_ragged_ranks_are_over_together(tar_set: TarSet) -> None:
    """Of 28 samples rank 0 of 3 has one more than the others: while it lacks that one, all stand in one place."""
    loaders = [adq.Loader(made(tar_set, batch_size=3, rank=r, world=3, uneven="ragged")) for r in range(3)]
    streams = [iter(loader) for loader in loaders]
    for t in (9, 18, 27):
        for stream in streams:
            next(stream)
        assert [*map(stand, loaders)] == [(0, t)] * 3
    assert [next(stream, None) is None for stream in streams] == [False, True, True]
    assert [*map(stand, loaders)] == [(1, 0)] * 3


@pytest.mark.parametrize("kind", sorted(LOADERS))
def test_fewer_batches_than_workers_is_no_hang(tmp_path: Path, kind: str) -> None:
    """F15."""
    tiny = write_set(tmp_path / "tiny", [3], keep=lambda i: True)
    loader = LOADERS[kind](made(tiny, batch_size=2), num_workers=4)
    assert [Counter(epoch) for epoch in epochs_of(loader, 2)] == [Counter(tiny.kept)] * 2
    assert list(LOADERS[kind](made(tiny, rank=3, world=4, uneven="ragged"), num_workers=2)) == []


@pytest.mark.parametrize("n_workers", [0, 1, 2])
@pytest.mark.parametrize("batch_size", [None, 4])
def test_after_an_error_next_never_ends_quietly(tar_set: TarSet, n_workers: int, batch_size: Any) -> None:
    """F24: what came before the error came in order, and a state saved then goes on there."""
    loader = adq.Loader(made(tar_set, pipes=[adq.Map(boom)], batch_size=batch_size), num_workers=n_workers)
    batches, got = iter(loader), []
    with pytest.raises(adq.SampleError) as caught:
        got.extend(batches)
    assert str(caught.value) == BOOM
    line = ids(made(tar_set))
    n = len(ids(got))
    assert ids(got) == line[:n]
    for _ in range(3):
        with pytest.raises(adq.LoaderClosed, match=re.escape(f"make it anew: SampleError: {BOOM}")):
            next(batches)
    assert stand(loader) == (0, n)
    repaired = adq.Loader(made(tar_set, batch_size=batch_size), num_workers=n_workers)
    repaired.load_state_dict(loader.state_dict())
    assert ids(repaired) == line[n:]


@pytest.mark.parametrize("n_workers", [0, 2])
def test_torchs_own_loader_never_ends_quietly_either(tar_set: TarSet, n_workers: int) -> None:
    """F24: other workers' batches still come, but the failed one's place never does."""
    dataset = made(tar_set, pipes=[adq.Map(boom)], batch_size=None)
    batches, errors = iter(LOADERS["torch"](dataset, num_workers=n_workers)), []
    for _ in range(40):
        try:
            next(batches)
        except adq.AdqError as error:
            errors.append(type(error).__name__)
    assert errors[0] == "SampleError"
    assert set(errors[1:]) == {"LoaderClosed"}
    assert len(errors) >= 10


@pytest.mark.parametrize("n_workers", [0, 2])
def test_an_errors_text_is_the_same_in_and_out_of_workers(tmp_path: Path, n_workers: int) -> None:
    """F1."""
    tar_set = write_set(tmp_path / "set", [9, 9])
    change_a_byte(tar_set.urls[1])
    with pytest.raises(adq.ShardError, match=r"^shard t-001.tar, key 'k00009': bytes differ: ") as caught:
        list(adq.Loader(made(tar_set), num_workers=n_workers))
    notes = "".join(getattr(caught.value, "__notes__", []))
    assert ("local.py" in notes) == (n_workers > 0), "where it came from is still to be seen"


def worker_pids(loader: Any) -> list[int]:
    return [worker.pid for worker in loader._iterator._workers]


def alive(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def exit_at_once(sample: dict[str, Any]) -> dict[str, Any]:
    if torch.utils.data.get_worker_info() is not None and Path(os.environ["ADQ_TEST_EXIT"]).exists():
        os._exit(0)
    return sample


@pytest.fixture
def deaths_are_seen_in_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch asks for dead workers as it waits for a batch; its signal could raise between any two lines of a test."""
    iteration = torchdata.stateful_dataloader.stateful_dataloader._StatefulMultiProcessingDataLoaderIter
    ask: Any = iteration._try_get_data
    monkeypatch.setattr(iteration, "_try_get_data", lambda self, timeout=0.1: ask(self, timeout))
    monkeypatch.setattr(torch.utils.data._utils.signal_handling, "_error_if_any_worker_fails", lambda: None)


def check_death(tar_set: TarSet, way: str, turn: int, exit_file: Path) -> None:
    """A worker dies somewhere in the epoch; a Loader made anew goes on exactly there."""
    line = ids(made(tar_set, batch_size=2))
    dataset = made(tar_set, batch_size=2, pipes=[adq.Map(exit_at_once)])
    loader = adq.Loader(dataset, num_workers=2, prefetch_factor=2)
    batches = iter(loader)
    got = [next(batches) for _ in range(turn % 9)]
    pids = worker_pids(loader)
    if way == "exit":
        exit_file.touch()
    else:
        os.kill(pids[turn % 2], getattr(signal, way))
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        got.extend(batches)
    with pytest.raises(adq.LoaderClosed, match="RuntimeError: DataLoader worker"):
        next(batches)
    n = len(ids(got))
    assert ids(got) == line[:n]
    exit_file.unlink(missing_ok=True)
    other = adq.Loader(made(tar_set, batch_size=2), num_workers=1)
    other.load_state_dict(json.loads(json.dumps(loader.state_dict())))
    assert ids(other) == line[n:]
    assert soon(lambda: not any(map(alive, pids))), "an orphan"


@pytest.fixture
def exit_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ADQ_TEST_EXIT", str(tmp_path / "exit"))
    return tmp_path / "exit"


@pytest.mark.usefixtures("deaths_are_seen_in_next")
def test_a_killed_worker_is_an_error_and_the_stream_resumes(tar_set: TarSet, exit_file: Path) -> None:
    check_death(tar_set, "SIGKILL", 3, exit_file)


@pytest.mark.parametrize("n_given", [0, 2, 6])
def test_a_batch_that_a_workers_death_kept_back_is_not_counted(
    tar_set: TarSet, monkeypatch: pytest.MonkeyPatch, n_given: int
) -> None:
    """Torch raises in whichever line is running when it hears of it: here after the batch was counted."""
    loader = adq.Loader(made(tar_set))
    batches: Any = iter(loader)
    line = ids([next(batches) for _ in range(n_given)])

    def hears_of_it(self: Any) -> None:
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")

    monkeypatch.setattr(type(batches), "advance", hears_of_it)
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        next(batches)
    monkeypatch.undo()
    other = adq.Loader(made(tar_set))
    other.load_state_dict(loader.state_dict())
    assert line + ids(other) == ids(made(tar_set))


@pytest.mark.slow
@pytest.mark.usefixtures("deaths_are_seen_in_next")
@pytest.mark.parametrize("way", ["SIGKILL", "SIGSEGV", "exit"])
def test_workers_that_die_any_way_at_any_time(tar_set: TarSet, way: str, exit_file: Path) -> None:
    """F23."""
    for turn in range(25):
        check_death(tar_set, way, turn, exit_file)


RANK = """
import json, sys
from pathlib import Path

import torch.distributed as dist

import adq_wds as adq

if __name__ == "__main__":
    rank, start, how, store, plan, *urls = sys.argv[1:]
    early = adq.ShardDataset(urls, plan=plan, shuffle=True, batch_size=4)
    if how == "unset":
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=2)
    late = adq.ShardDataset(urls, plan=plan, shuffle=True, batch_size=4)
    seen = []
    for dataset in (early, late):
        loader = adq.Loader(dataset, num_workers=2, multiprocessing_context=start)
        seen.append([(Path(s["__url__"]).name, s["__key__"]) for batch in loader for s in batch])
    print(json.dumps(seen))
"""


@pytest.mark.parametrize(
    ("start", "how"),
    [
        ("fork", "unset"),
        slow("fork", "set"),
        *(slow(s, h) for s in ("spawn", "forkserver") for h in ("unset", "set")),
    ],
)
def test_two_ranks_share_out(tar_set: TarSet, tmp_path: Path, start: str, how: str) -> None:
    """F14: two processes, each with two workers, with and without their ranks in the environment: no sample twice."""
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    running = []
    for rank in range(2):
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
        if how == "set":
            environment |= {"RANK": str(rank), "WORLD_SIZE": "2"}
        command = [str(script), str(rank), start, how, str(tmp_path / f"store-{start}"), tar_set.plan]
        running.append(Program(FILE, *command, *tar_set.urls, env=environment))
    outputs = [json.loads(process.communicate()[0]) for process in running]
    assert [process.returncode for process in running] == [0, 0]
    for which in range(2):  # made before and after the process group
        seen = Counter(tuple(name) for output in outputs for name in output[which])
        assert seen == Counter(tar_set.kept)


def test_a_rank_that_changes_is_an_error(tar_set: TarSet, monkeypatch: pytest.MonkeyPatch) -> None:
    def become(rank: str | None, world: str | None) -> None:
        for name, value in (("RANK", rank), ("WORLD_SIZE", world)):
            monkeypatch.delenv(name, raising=False)
            if value is not None:
                monkeypatch.setenv(name, value)

    become(None, None)
    early = made(tar_set)
    assert len(early) == 7
    become("1", "2")
    assert len(early) == 4, "learnt when it was first known"
    become("0", "2")
    for use in (list, len):
        with pytest.raises(
            adq.StateError, match=r"rank 1 of 2 and is now rank 0 of 2: make the data set aft"
        ):
            use(early)
    assert len(made(tar_set, rank=1, world=2)) == 4, "what the program says is not asked again"
    for rank, text in ((None, "RANK=None and WORLD_SIZE='2' in the environment"), ("2", "rank=2 of world=2")):
        become(rank, "2")
        with pytest.raises(ValueError, match=text):
            made(tar_set)


@pytest.mark.slow
def test_a_hundred_epochs_take_no_more_memory_or_files(tar_set: TarSet) -> None:
    """F37: with workers."""
    loader = adq.Loader(made(tar_set), num_workers=2, persistent_workers=True)

    def used() -> tuple[int, int]:
        pids = [os.getpid(), *worker_pids(loader)]
        pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
        return pages * 4096, sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in pids)

    sizes = []
    for _ in range(100):
        list(loader)
        sizes.append(used())
    assert sizes[-1][0] - sizes[3][0] < 97 << 20
    assert sizes[-1][1] == sizes[3][1]


def run_two(context: Any, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `work(worker, ready, arguments…)` puts out in two processes; `ready` are three events, the first of them set."""
    out, ready = context.Queue(), [context.Event() for _ in range(3)]
    ready[0].set()
    processes = [context.Process(target=work, args=(i, ready, out, *arguments)) for i in range(2)]
    for process in processes:
        process.start()
    results = [out.get(timeout=300) for _ in processes]
    for process in processes:
        process.join()
    return results


def read_in_turn(worker: int, ready: list[Any], out: Any, dataset: adq.ShardDataset) -> None:
    ready[worker].wait()
    with as_worker(worker, 2):
        out.put(ids(dataset))
    ready[worker + 1].set()


@pytest.mark.parametrize("start", STARTS)
def test_a_worker_that_begins_late_reads_the_same_epoch(tar_set: TarSet, start: str) -> None:
    """Both are started; one has read its whole share before the other begins."""
    dataset = made(tar_set)
    for epoch in range(2):
        first, second = run_two(torch.multiprocessing.get_context(start), read_in_turn, dataset)
        assert Counter(first + second) == Counter(tar_set.kept)
        assert dataset.epoch == epoch + 1


def test_running_workers_read_the_epoch_the_first_of_them_began(tar_set: TarSet) -> None:
    """One of two running workers, ahead after a broken-off epoch, ends what it had begun before the other begins."""
    dataset = made(tar_set)
    context = torch.multiprocessing.get_context("fork")
    both_began = context.Barrier(2)

    def run(worker: int, ready: list[Any], out: Any) -> None:
        with as_worker(worker, 2):
            old = iter(dataset)
            both_began.wait()
            ready[worker].wait()
            if worker == 1:
                list(old)  # makes epoch 1 the current one
            new = iter(dataset)
            ready[worker + 1].set()
            out.put(ids(new))

    first, second = run_two(context, run)
    assert Counter(first + second) == Counter(tar_set.kept)


def test_a_forked_process_that_is_no_worker_counts_its_own(tar_set: TarSet) -> None:
    """Two ranks forked from one process: what one reads moves nothing for the other."""
    dataset = made(tar_set, rank=0, world=1)
    context = torch.multiprocessing.get_context("fork")
    out = context.Queue()
    process = context.Process(target=lambda: out.put((ids(dataset), dataset.epoch)))
    process.start()
    there = out.get(timeout=300)
    process.join()
    assert dataset.epoch == 0
    assert there == (ids(dataset), 1)
