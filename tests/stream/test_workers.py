"""Do real workers, started any way and killed at any time, give the stream that none would?"""

import json
import os
import re
import signal
import time
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

import adq_wds as adq
from adq_wds.stream.clock import Start
from tests.programs import FILE, Program
from tests.stream.conftest import TarSet, as_worker, ids, write_set

Names = list[tuple[str, str]]


def made(tar_set: TarSet, **options: Any) -> adq.ShardDataset:
    return adq.ShardDataset(
        tar_set.urls, **{"plan": tar_set.plan, "shuffle": True, "seed": 3, "batch_size": 4, **options}
    )


LOADERS = {
    "torch": lambda dataset, **o: DataLoader(dataset, batch_size=None, **o),
    "torchdata": lambda dataset, **o: StatefulDataLoader(dataset, batch_size=None, **o),
    "adq": lambda dataset, **o: adq.Loader(dataset, **o),
}


@pytest.mark.parametrize("kind", sorted(LOADERS))
@pytest.mark.parametrize("persistent", [True, False])
def test_epochs_follow_each_other_in_any_loader(tar_set: TarSet, kind: str, persistent: bool) -> None:
    """F17: forked workers, kept or made anew, read the epochs that no worker would."""
    reference = made(tar_set)
    expected = [ids(reference) for _ in range(4)]
    loader = LOADERS[kind](made(tar_set), num_workers=2, persistent_workers=persistent)
    assert len(loader) == 7
    assert [ids(loader) for _ in range(3)] == expected[:3]
    loader.dataset.set_epoch(1)
    assert ids(loader) == expected[1]
    assert ids(loader) == expected[2]
    assert loader.dataset.epoch == 3


@pytest.mark.parametrize(("n_workers", "persistent"), [(0, False), (2, True), (2, False)])
def test_the_next_iteration_reads_the_next_epoch_wherever_one_was_left(
    tar_set: TarSet, n_workers: int, persistent: bool
) -> None:
    """Left before the first batch, none was begun; left anywhere after it, or read to its end, one was."""
    reference = made(tar_set)
    expected = [ids(reference) for _ in range(8)]
    loader = adq.Loader(made(tar_set), num_workers=n_workers, persistent_workers=persistent)
    epoch = 0
    for n in (1, 0, 6, 7, 0, 2, 1):
        batches = iter(loader)
        state = loader.state_dict()
        assert (state["epoch"], state["t"]) == (epoch, 0)
        assert ids([next(batches) for _ in range(n)]) == expected[epoch][: 4 * n]
        state = loader.state_dict()
        assert (state["epoch"], state["t"]) == ((epoch, 4 * n) if n < 7 else (epoch + 1, 0))
        epoch += n > 0
        assert loader.dataset.epoch == epoch
    assert ids(loader) == expected[epoch]


@pytest.mark.parametrize("n_workers", [0, 2])
def test_a_loaded_state_goes_on_with_its_own_epoch(tar_set: TarSet, n_workers: int) -> None:
    reference = made(tar_set)
    expected = [ids(reference) for _ in range(3)]
    loader = adq.Loader(made(tar_set), num_workers=n_workers)
    for n in (3, 2):
        batches = iter(loader)
        for _ in range(n):
            next(batches)
    state = loader.state_dict()
    assert (state["epoch"], state["t"]) == (1, 8)
    other = adq.Loader(made(tar_set), num_workers=n_workers)
    for _ in range(2):
        other.load_state_dict(state)
        assert other.state_dict() == state
        assert ids([next(iter(other))]) == expected[1][8:12]
        assert ids(other) == expected[2], "from its beginning"


@pytest.mark.parametrize("n_workers", [0, 2])
def test_an_epoch_that_was_set_is_the_next_whenever_it_was_set(tar_set: TarSet, n_workers: int) -> None:
    reference = made(tar_set)
    expected = [ids(reference) for _ in range(6)]
    loader = adq.Loader(made(tar_set), num_workers=n_workers)
    batches = iter(loader)
    loader.dataset.set_epoch(3)  # before the first batch: what was begun to be read stays
    assert ids([next(batches)]) == expected[0][:4]
    assert ids(loader) == expected[3]
    batches = iter(loader)
    next(batches)
    loader.dataset.set_epoch(4)  # the same again
    assert ids(batches) == expected[4][4:]
    assert ids(loader) == expected[4]
    assert ids(loader) == expected[5]


@pytest.mark.parametrize("batch_size", [None, 4])
def test_the_data_set_itself_goes_on_to_the_next_epoch_too(tar_set: TarSet, batch_size: int | None) -> None:
    reference = made(tar_set, batch_size=batch_size)
    expected = [ids(reference) for _ in range(5)]
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
def test_torchs_loaders_go_on_to_the_next_epoch_and_their_workers_agree_on_it(
    tar_set: TarSet, kind: str, persistent: bool, seeded: bool
) -> None:
    """Also where a program seeds torch alike in every epoch, so that all iterations have one seed."""
    reference = made(tar_set)
    expected = [ids(reference) for _ in range(6)]
    loader = LOADERS[kind](made(tar_set), num_workers=2, persistent_workers=persistent)
    for epoch in range(6):
        if seeded:
            torch.manual_seed(0)
        batches = iter(loader)
        assert ids([next(batches) for _ in range(3)]) == expected[epoch][:12]


@pytest.mark.parametrize("n_workers", [0, 2])
@pytest.mark.parametrize("start", [0, 8])
def test_an_epoch_is_over_with_its_last_batch_though_nobody_asks_for_more(
    tar_set: TarSet, n_workers: int, start: int
) -> None:
    """As programs do that count batches: Lightning, ``zip(range(n), loader)``."""
    reference = made(tar_set)
    expected = [ids(reference) for _ in range(3)]
    loader = adq.Loader(made(tar_set), num_workers=n_workers)
    loader.load_state_dict(loader.dataset.state_at(Start(0), start // 4))
    first = iter(loader)
    assert ids([next(first) for _ in range(7 - start // 4)]) == expected[0][start:]
    state = loader.state_dict()
    assert (state["epoch"], state["t"], loader.dataset.epoch) == (1, 0, 1)
    batches = iter(loader)
    assert ids([next(batches) for _ in range(7)]) == expected[1]
    assert next(first, None) is None
    assert loader.dataset.epoch == 2, "an old iteration's end changes nothing"
    loader.dataset.set_epoch(0)
    assert next(batches, None) is None
    assert loader.dataset.epoch == 0, "nor does an end that was known"
    other = adq.Loader(made(tar_set), num_workers=n_workers)
    other.load_state_dict(state)
    assert ids(other) == expected[1]


def test_ragged_ranks_are_over_together(tar_set: TarSet) -> None:
    """Of 28 samples rank 0 of 3 has one more than the others: while it lacks that one, all stand in one place."""
    loaders = [adq.Loader(made(tar_set, batch_size=3, rank=r, world=3, uneven="ragged")) for r in range(3)]
    streams = [iter(loader) for loader in loaders]
    for t in (9, 18, 27):
        for stream in streams:
            next(stream)
        assert [(s["epoch"], s["t"]) for s in map(adq.Loader.state_dict, loaders)] == [(0, t)] * 3
    assert [next(stream, None) is None for stream in streams] == [False, True, True]
    assert [(s["epoch"], s["t"]) for s in map(adq.Loader.state_dict, loaders)] == [(1, 0)] * 3


def test_workers_of_one_iteration_agree_on_its_epoch_after_one_was_broken_off(tar_set: TarSet) -> None:
    """Torch's own loader: what workers had read ahead may or may not end the epoch, but for all of them alike."""
    loader = DataLoader(made(tar_set), batch_size=None, num_workers=2, persistent_workers=True)
    for _ in range(6):
        batches = iter(loader)
        for _ in range(5):
            next(batches)
        assert Counter(ids(loader)) == Counter(tar_set.kept)


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(LOADERS))
@pytest.mark.parametrize("start", ["spawn", "forkserver"])
def test_spawned_workers_read_the_same_epochs(tar_set: TarSet, kind: str, start: str) -> None:
    reference = made(tar_set)
    expected = [ids(reference) for _ in range(3)]
    for persistent in (True, False):
        loader = LOADERS[kind](
            made(tar_set), num_workers=2, persistent_workers=persistent, multiprocessing_context=start
        )
        assert [ids(loader) for _ in range(2)] == expected[:2]
        loader.dataset.set_epoch(2)
        assert ids(loader) == expected[2]


def test_fewer_batches_than_workers_is_no_hang(tmp_path: Path) -> None:
    """F15."""
    tiny = write_set(tmp_path / "tiny", [3], keep=lambda i: True)
    for kind in LOADERS:
        loader = LOADERS[kind](made(tiny, batch_size=2), num_workers=4)
        assert Counter(ids(loader)) == Counter(tiny.kept)
        assert len(ids(loader)) == 3
        nothing = LOADERS[kind](made(tiny, rank=3, world=4, uneven="ragged"), num_workers=2)
        assert list(nothing) == []


def boom(sample: dict[str, Any]) -> dict[str, Any]:
    if sample["__key__"] == "k00024":
        raise KeyError("boom")
    return sample


@pytest.mark.parametrize("n_workers", [0, 1, 2])
@pytest.mark.parametrize("batch_size", [None, 4])
def test_after_an_error_next_never_ends_quietly(tar_set: TarSet, n_workers: int, batch_size: Any) -> None:
    """F24."""
    text = "shard t-003.tar, key 'k00024': Map: KeyError: \"'boom'\""
    loader = adq.Loader(made(tar_set, pipes=[adq.Map(boom)], batch_size=batch_size), num_workers=n_workers)
    batches = iter(loader)
    got = []
    with pytest.raises(adq.SampleError) as caught:
        got.extend(batches)
    assert str(caught.value) == text
    clean = made(tar_set)
    before = ids(clean)
    assert ids(got) == before[: len(ids(got))], "what came before the error came in order"
    for _ in range(3):
        with pytest.raises(adq.LoaderClosed, match=re.escape(f"make it anew: SampleError: {text}")):
            next(batches)
    state = loader.state_dict()
    assert state["epoch"] == 0
    assert state["t"] == len(ids(got))
    repaired = adq.Loader(made(tar_set, batch_size=batch_size), num_workers=n_workers)
    repaired.load_state_dict(state)
    assert ids(repaired) == before[len(ids(got)) :]


def test_torchs_own_loader_never_ends_quietly_either(tar_set: TarSet) -> None:
    """F24: other workers' batches still come, but the failed one's place never does."""
    for n_workers in (0, 2):
        loader = DataLoader(made(tar_set, pipes=[adq.Map(boom)]), batch_size=None, num_workers=n_workers)
        batches, errors = iter(loader), []
        for _ in range(20):
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
    data = bytearray(Path(tar_set.urls[1]).read_bytes())
    data[512] ^= 1
    Path(tar_set.urls[1]).write_bytes(data)
    with pytest.raises(adq.ShardError) as caught:
        list(adq.Loader(made(tar_set), num_workers=n_workers))
    assert re.fullmatch(r"shard t-001.tar, key 'k00009': bytes differ: .* do that again", str(caught.value))
    if n_workers:
        assert "local.py" in "".join(caught.value.__notes__), "where it came from is still to be seen"


def worker_pids(loader: Any) -> list[int]:
    return [worker.pid for worker in loader._iterator._workers]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def exit_at_once(sample: dict[str, Any]) -> dict[str, Any]:
    if torch.utils.data.get_worker_info() is not None and Path(os.environ["ADQ_TEST_EXIT"]).exists():
        os._exit(0)
    return sample


def check_death(tar_set: TarSet, way: str, turn: int, exit_file: Path) -> None:
    """A worker dies somewhere in the epoch; a Loader made anew goes on exactly there."""
    exit_file.unlink(missing_ok=True)
    expected = ids(made(tar_set, batch_size=2))
    loader = adq.Loader(
        made(tar_set, batch_size=2, pipes=[adq.Map(exit_at_once)]), num_workers=2, prefetch_factor=2
    )
    batches = iter(loader)
    got = [next(batches) for _ in range(turn % 9)]
    pids = worker_pids(loader)
    if way == "exit":
        exit_file.touch()
    else:
        os.kill(pids[turn % 2], getattr(signal, way))
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        got.extend(batches)
    assert time.monotonic() - start < 6 + 6 * (
        way == "exit"
    )  # the 5 s after which torch looks for a quiet death
    with pytest.raises(adq.LoaderClosed, match="RuntimeError: DataLoader worker"):
        next(batches)
    assert ids(got) == expected[: len(ids(got))]
    exit_file.unlink(missing_ok=True)
    state = json.loads(json.dumps(loader.state_dict()))
    other = adq.Loader(made(tar_set, batch_size=2), num_workers=1)
    other.load_state_dict(state)
    assert ids(other) == expected[len(ids(got)) :]
    deadline = time.monotonic() + 5
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, pids)), "an orphan"


@pytest.fixture
def exit_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ADQ_TEST_EXIT", str(tmp_path / "exit"))
    return tmp_path / "exit"


def test_a_killed_worker_is_an_error_and_the_stream_resumes(tar_set: TarSet, exit_file: Path) -> None:
    check_death(tar_set, "SIGKILL", 3, exit_file)


@pytest.mark.slow
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


def check_ranks(tar_set: TarSet, tmp_path: Path, start: str, how: str) -> None:
    """Two processes, each with two workers: no sample twice, none left out."""
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    running = []
    for rank in range(2):
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
        if how == "set":
            environment |= {"RANK": str(rank), "WORLD_SIZE": "2"}
        command = [str(script), str(rank), start, how, str(tmp_path / f"store-{start}"), tar_set.plan]
        running.append(Program(FILE, *command, *tar_set.urls, env=environment))
    outputs = [json.loads(process.communicate(timeout=300)[0]) for process in running]
    assert [process.returncode for process in running] == [0, 0]
    for which in range(2):  # made before and after the process group
        seen = Counter(tuple(name) for output in outputs for name in output[which])
        assert seen == Counter(tar_set.kept)


def test_two_ranks_with_forked_workers_share_out_without_rank_in_the_environment(
    tar_set: TarSet, tmp_path: Path
) -> None:
    """F14."""
    check_ranks(tar_set, tmp_path, "fork", "unset")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["set", "unset"])
@pytest.mark.parametrize("start", ["fork", "spawn", "forkserver"])
def test_two_ranks_share_out_however_workers_start(
    tar_set: TarSet, tmp_path: Path, start: str, how: str
) -> None:
    """F14."""
    check_ranks(tar_set, tmp_path, start, how)


def test_a_rank_that_changes_is_an_error(tar_set: TarSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    early = made(tar_set)
    assert len(early) == 7
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert len(early) == 4, "learnt when it was first known"
    monkeypatch.setenv("RANK", "0")
    for use in (list, len):
        with pytest.raises(
            adq.StateError, match=r"this was rank 1 of 2 and is now rank 0 of 2: make the data set after"
        ):
            use(early)
    assert len(made(tar_set, rank=1, world=2)) == 4, "what the program says is not asked again"
    monkeypatch.delenv("RANK")
    with pytest.raises(
        ValueError, match=r"RANK=None and WORLD_SIZE='2' in the environment: expected two numbers"
    ):
        made(tar_set)
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(ValueError, match="rank=2 of world=2"):
        made(tar_set)


@pytest.mark.slow
def test_a_hundred_epochs_with_workers_take_no_more_memory_or_files(tar_set: TarSet) -> None:
    """F37."""
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


def read_as_worker(dataset: Any, worker: int, wait_for: Any, done: Any, out: Any) -> None:
    wait_for.wait()
    with as_worker(worker, 2):
        out.put(ids(dataset))
    done.set()


def check_late(tar_set: TarSet, start: str) -> None:
    """Both workers are started; one has read its whole share before the other begins."""
    context = torch.multiprocessing.get_context(start)
    dataset = made(tar_set)
    for epoch in range(2):
        first, second, third = context.Event(), context.Event(), context.Event()
        out = context.Queue()
        processes = [
            context.Process(target=read_as_worker, args=(dataset, 0, first, second, out)),
            context.Process(target=read_as_worker, args=(dataset, 1, second, third, out)),
        ]
        for process in processes:
            process.start()
        first.set()
        seen = [out.get(timeout=120) for _ in processes]
        for process in processes:
            process.join()
        assert Counter(seen[0] + seen[1]) == Counter(tar_set.kept)
        assert dataset.epoch == epoch + 1


def test_a_worker_that_begins_after_another_has_ended_reads_the_same_epoch(tar_set: TarSet) -> None:
    check_late(tar_set, "fork")


@pytest.mark.slow
@pytest.mark.parametrize("start", ["spawn", "forkserver"])
def test_a_spawned_worker_that_begins_late_reads_the_same_epoch(tar_set: TarSet, start: str) -> None:
    check_late(tar_set, start)


def test_running_workers_read_the_epoch_that_the_first_of_them_began(tar_set: TarSet) -> None:
    """One of two running workers, ahead after a broken-off epoch, ends what it had begun before the other begins."""
    dataset = made(tar_set)
    context = torch.multiprocessing.get_context("fork")
    out = context.Queue()

    def run(worker: int, go: Any, went: Any) -> None:
        with as_worker(worker, 2):
            old = iter(dataset)
            both_began.wait()
            go.wait()
            if worker == 0:
                new = iter(dataset)
                went.set()
            else:
                list(old)  # makes epoch 1 the current one
                new = iter(dataset)
                went.set()
            out.put(ids(new))

    events = [context.Event() for _ in range(3)]
    both_began = context.Barrier(2)
    processes = [
        context.Process(target=run, args=(0, events[0], events[1])),
        context.Process(target=run, args=(1, events[1], events[2])),
    ]
    for process in processes:
        process.start()
    events[0].set()
    seen = [out.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert Counter(seen[0] + seen[1]) == Counter(tar_set.kept)


def test_a_forked_process_that_is_no_worker_counts_its_own_epochs(tar_set: TarSet) -> None:
    """Two ranks forked from one process: what one reads moves nothing for the other."""
    dataset = made(tar_set, rank=0, world=1)
    context = torch.multiprocessing.get_context("fork")
    out = context.Queue()
    process = context.Process(target=lambda: out.put((ids(dataset), dataset.epoch)))
    process.start()
    there = out.get(timeout=60)
    process.join()
    assert dataset.epoch == 0
    assert there == (ids(dataset), 1)
