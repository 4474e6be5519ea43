"""Plans and codebooks do not depend on who does their classes, on kills, or on the memory that there is."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adq_wds as adq
from adq_wds.core.kernel import unit_rows
from adq_wds.core.near_copies import near_copies
from adq_wds.engines.engine import Resources, Result, Task, ThisProcess, Work
from adq_wds.engines.shared import Shared
from adq_wds.planning import bins as bins_module
from adq_wds.planning import class_tasks, leave_out
from adq_wds.planning.buckets import DiskRows
from adq_wds.planning.build_plan import find_bins
from adq_wds.planning.class_rows import mapped_unit_rows
from adq_wds.tables.features import Features
from adq_wds.tables.features_file import ShardFeatures
from tests.conftest import MonkeyPatch

MakeFeatures = Callable[..., ShardFeatures]


@pytest.fixture
def folder(make_features: MakeFeatures, tmp_path: Path, monkeypatch: MonkeyPatch) -> Path:
    """Five classes in three shards, a task each."""
    monkeypatch.setattr(class_tasks, "_TASK_ROWS", 40)
    for i in range(3):
        label = np.random.default_rng(i).integers(0, 5, 90).tolist()
        make_features(f"s{i}.tar", label, width=8, signed=True, first=1000 * i)
    return tmp_path / "features"


class Backwards:
    """An engine that does the last task first, each in a copy of the work."""

    def run(self, tasks: Sequence[Task], work: Work, resources: Resources) -> Iterator[tuple[Task, Result]]:
        import pickle

        for task in reversed(tasks):
            yield from pickle.loads(pickle.dumps(work))(iter([task]))  # noqa: S301


class Killed:
    """An engine that ends after some tasks, as if the process were killed."""

    def __init__(self, n: int) -> None:
        self.n = n

    def run(self, tasks: Sequence[Task], work: Work, resources: Resources) -> Iterator[tuple[Task, Result]]:
        yield from ThisProcess().run(tasks[: self.n], work, resources)
        raise KeyboardInterrupt


def test_processes_and_any_order_of_tasks_give_equal_bytes(folder: Path, tmp_path: Path) -> None:
    plans, codebooks = [], []
    for name, engine in (
        ("threads", "threads"), ("back", Backwards()), ("shared", "shared"), ("processes", "processes"),
    ):  # fmt: skip
        out = tmp_path / name
        adq.build_plan(folder, bins=4, dedup=0.9, out=out / "plan.parquet", engine=engine)
        plans.append((out / "plan.parquet").read_bytes())
        if name != "processes":
            adq.fit_codebook(folder, bins=4, min_pilot=5, out=out / "c.safetensors", engine=engine)
            codebooks.append((out / "c.safetensors").read_bytes())
        assert not [file for file in os.listdir(out) if file.startswith(".adq-scratch-")]
    assert len(set(plans)) == len(set(codebooks)) == 1


def test_a_killed_plan_goes_on_with_the_classes_that_are_left(
    folder: Path, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    expected = adq.build_plan(folder, bins=4).hash
    out = tmp_path / "out" / "plan.parquet"
    with pytest.raises(KeyboardInterrupt):
        adq.build_plan(folder, bins=4, out=out, engine=Killed(3))
    with pytest.raises(KeyboardInterrupt):  # of other bins: what is left of the first is removed
        adq.build_plan(folder, bins=5, out=out, engine=Killed(1))
    with pytest.raises(KeyboardInterrupt):
        adq.build_plan(folder, bins=4, out=out, engine=Killed(3))
    assert len([name for name in os.listdir(out.parent) if name.startswith(".adq-scratch-")]) == 1
    real, done = bins_module.BinClass.of_class, list[int]()
    monkeypatch.setattr(
        bins_module.BinClass, "of_class", lambda self, rows, p: (done.append(1), real(self, rows, p))[1]
    )
    assert adq.build_plan(folder, bins=4, out=out).hash == expected
    assert len(done) == 2
    assert os.listdir(out.parent) == ["plan.parquet"]


def test_scratch_files_of_a_killed_plan_go_with_the_next_that_needs_none_of_them(
    folder: Path, tmp_path: Path
) -> None:
    earlier = find_bins(Features(folder), bins=3)
    for killed, options in (({"dedup": 0.9}, {"bins": 4}), ({}, {"bins": earlier})):
        with pytest.raises(KeyboardInterrupt):
            adq.build_plan(folder, bins=4, out=tmp_path / "out" / "p.parquet", engine=Killed(1), **killed)
        adq.build_plan(folder, out=tmp_path / "out" / "p.parquet", **options)
        assert os.listdir(tmp_path / "out") == ["p.parquet"]


def test_a_command_that_lags_behind_leaves_no_scratch_files(
    folder: Path, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    """Another ends the job while this one is between copies and bins."""
    options: dict[str, Any] = {"bins": 4, "dedup": 0.9, "out": tmp_path / "out" / "plan.parquet"}
    real = leave_out.who_stays

    def meanwhile(*a: Any) -> Any:
        monkeypatch.setattr(leave_out, "who_stays", real)
        adq.build_plan(folder, engine="shared", **options)
        return real(*a)

    monkeypatch.setattr(leave_out, "who_stays", meanwhile)
    adq.build_plan(folder, engine="shared", **options)
    assert not [name for name in os.listdir(tmp_path / "out") if name.startswith(".adq-scratch-")]


def test_a_class_that_fails_is_named(folder: Path, monkeypatch: MonkeyPatch) -> None:
    def fail(*a: Any, **k: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(bins_module, "graphcut_bins", fail)
    with pytest.raises(adq.FeaturesError, match=r"class '0' of \d+ samples: not enough memory"):
        adq.build_plan(folder, bins=4)


def test_commands_that_share_need_a_folder(folder: Path) -> None:
    with pytest.raises(ValueError, match="engine='shared' needs out="):
        adq.build_plan(folder, engine="shared")


def test_one_that_is_late_takes_the_plan_while_the_first_still_removes_scratch_files(
    folder: Path, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    out, load, begun = tmp_path / "out" / "plan.parquet", class_tasks.load_file, list[Path]()

    def plan() -> str:
        return adq.build_plan(folder, bins=4, out=out, engine=Shared(out.parent, beat=0.1)).hash

    def remove(path: Path, **options: Any) -> None:
        begun.append(path)
        for file in path.iterdir():
            file.unlink()

    def late(path: Path) -> Any:
        monkeypatch.setattr(class_tasks, "load_file", load)
        expected.append(plan())
        return load(path)

    expected = list[str]()
    monkeypatch.setattr(class_tasks.shutil, "rmtree", remove)
    monkeypatch.setattr(class_tasks, "load_file", late)
    assert plan() == expected[0]
    assert begun


@pytest.mark.parametrize("memory_bytes", [0, 60_000])
def test_rows_in_a_file_give_the_bins_of_rows_in_memory(folder: Path, memory_bytes: int) -> None:
    """With 60,000 bytes there is a pool of some rows, with none rows come on demand."""
    features = Features(folder)
    whole, mapped = find_bins(features, bins=4), find_bins(features, bins=4, memory_bytes=memory_bytes)
    assert (whole.bin == mapped.bin).all()
    assert (whole.pick == mapped.pick).all()
    assert whole.header == mapped.header
    of_all = find_bins(features, bins=4, dedup=0.9)
    assert find_bins(features, bins=4, dedup=0.9, memory_bytes=0).header == of_all.header


def test_mapped_rows_are_the_unit_rows(tmp_path: Path) -> None:
    embedding = np.random.default_rng(0).standard_normal((9000, 5)).astype(np.float16)
    embedding.tofile(tmp_path / "rows")
    rows = DiskRows(tmp_path / "rows", 10 * 50, 8950, 5, np.dtype(np.float16))
    mapped = mapped_unit_rows(rows)
    assert (mapped == unit_rows(embedding[50:])).all()
    assert (near_copies(mapped[:3000], 0.99) == near_copies(unit_rows(embedding[50:3050]), 0.99)).all()
    assert os.listdir(tmp_path) == ["rows"]
    with pytest.raises(adq.FeaturesError, match="cut short"):
        DiskRows(tmp_path / "rows", 0, 9001, 5, np.dtype(np.float16))[:]


@pytest.mark.slow
def test_commands_that_share_a_folder_make_one_plan_also_when_one_is_killed(
    folder: Path, tmp_path: Path
) -> None:
    expected = adq.build_plan(folder, bins=4, dedup=0.999, out=tmp_path / "alone" / "plan.parquet")
    out = tmp_path / "shared" / "plan.parquet"
    command = [sys.executable, "-m", "tests.planning.by_shared", str(folder), str(out), "0.2"]
    commands = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    deadline = time.monotonic() + 120
    while not out.parent.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    commands[0].send_signal(signal.SIGKILL)
    said = [process.communicate(timeout=120)[0] for process in commands]
    assert said[1:] == [expected.hash] * 2
    assert out.read_bytes() == (tmp_path / "alone" / "plan.parquet").read_bytes()
    assert not [name for name in os.listdir(out.parent) if name.startswith(".adq-scratch-")]
