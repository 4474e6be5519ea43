"""Any number of equal processes share a folder: all tasks are done, and every process has all results."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import adq_wds as adq
from adq_wds.engines.engine import Resources, Result, Task, ThisProcess
from adq_wds.engines.shared import Shared, lock_for
from tests.engines.kills import Start, disturb, ends_well
from tests.engines.stand_in import WriteFiles, tasks_of

ROOT = Path(__file__).parents[2]
N = 40


def start(
    folder: Path, *, n: int = N, beat: float = 0.2, seconds: float = 0.0, settings: str = ""
) -> subprocess.Popen[str]:
    words = [str(folder), str(n), str(beat), str(seconds), settings]
    return subprocess.Popen(
        [sys.executable, "-m", "tests.engines.stand_in", *words],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.out")}


@pytest.fixture(scope="module")
def by_threads(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("threads")
    assert len(list(ThisProcess().run(tasks_of(N), WriteFiles(folder, 0.0, []), Resources()))) == N
    return files(folder)


def test_three_processes_make_what_one_makes(tmp_path: Path, by_threads: dict[str, bytes]) -> None:
    # beats so slow that no process is taken for dead: then each task is done once
    processes = [start(tmp_path, beat=20.0) for _ in range(3)]
    assert sum(int(ends_well(process)) for process in processes) == N
    assert files(tmp_path) == by_threads
    assert sorted(os.listdir(tmp_path)) == sorted(by_threads)


def slowly(folder: Path) -> Start:
    return lambda: start(folder, beat=0.05, seconds=0.15)


def test_after_ten_kills_and_stops_the_files_are_the_same(
    tmp_path: Path, by_threads: dict[str, bytes]
) -> None:
    disturb(slowly(tmp_path), 10, seed=0, at_most=0.5)
    assert files(tmp_path) == by_threads


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
def test_after_a_hundred_kills_and_stops_the_files_are_the_same(
    tmp_path: Path, by_threads: dict[str, bytes], seed: int
) -> None:
    disturb(slowly(tmp_path), 10, seed, at_most=0.5)
    assert files(tmp_path) == by_threads


class Both:
    """Work that holds two tasks before it yields the first, and meets another process in between."""

    def __init__(self, folder: Path, meet: threading.Barrier) -> None:
        self._folder, self._meet, self._first = folder, meet, True

    def __call__(self, tasks: Iterator[Task]) -> Iterator[tuple[Task, Result]]:
        ready = [task for task in (next(tasks, None), next(tasks, None)) if task is not None]
        if self._first:
            self._first = False
            self._meet.wait(60)
        for task in (*ready, *tasks):
            (self._folder / f"{task.what}.out").write_bytes(b"x")
            yield task, {}


def test_who_has_results_ready_never_waits_for_the_other(tmp_path: Path) -> None:
    """Each of two holds what the other still needs: waiting inside the work would last for ever."""
    meet, ends = threading.Barrier(2), []

    def take_part() -> None:
        ends.append(len(list(Shared(tmp_path, beat=5.0).run(tasks_of(4), Both(tmp_path, meet), Resources()))))

    threads = [threading.Thread(target=take_part, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert ends == [4, 4]


def test_a_failing_task_ends_the_job_and_frees_its_leases(tmp_path: Path) -> None:
    def fails(tasks: Iterator[Task]) -> Iterator[tuple[Task, Result]]:
        yield next(tasks), {}
        raise adq.ShardError(f"shard {next(tasks).name}: damaged")

    with pytest.raises(adq.ShardError, match="damaged"):
        list(Shared(tmp_path).run(tasks_of(3), fails, Resources()))
    assert os.listdir(tmp_path) == []


def test_a_run_that_is_left_frees_its_leases(tmp_path: Path) -> None:
    results = Shared(tmp_path).run(tasks_of(9), WriteFiles(tmp_path, 0.0, []), Resources())
    next(results)
    assert (tmp_path / ".leases").exists()
    results.close()  # type: ignore[attr-defined]
    assert not (tmp_path / ".leases").exists()


def test_no_tasks_are_done_at_once(tmp_path: Path) -> None:
    assert list(Shared(tmp_path).run([], WriteFiles(tmp_path, 0.0, []), Resources())) == []
    assert os.listdir(tmp_path) == []


def test_other_settings_and_other_engines_are_refused_while_a_process_shares(tmp_path: Path) -> None:
    engine = Shared(tmp_path, beat=0.05)
    with lock_for(engine, tmp_path, "embed", {"encoder": "a"}):
        other = start(tmp_path, beat=0.05, settings="other")
        _, error = other.communicate(timeout=120)
        assert other.returncode == 1
        assert error.splitlines()[-1].endswith(
            ": wait for it, give the same arguments, or choose another folder"
        )
        with (
            pytest.raises(adq.AdqError, match="in use by pid"),
            lock_for(ThisProcess(), tmp_path, "embed", {"encoder": "a"}),
        ):
            pass
        with lock_for(Shared(tmp_path), tmp_path, "embed", {"encoder": "a"}):
            pass
    assert os.listdir(tmp_path) == []
