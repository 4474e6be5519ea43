"""Whatever engine writes the shards, their bytes are those of one process, also after kills."""

import pickle
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier
from typing import Any

import pyarrow as pa
import pytest

import adq_wds as adq
from adq_wds.cli.main import main
from adq_wds.engines.engine import Resources, Result, Task, Work
from adq_wds.engines.shared import Shared
from adq_wds.files import atomic_path
from adq_wds.tables import parts
from adq_wds.tables.plan import Plan
from adq_wds.writing.unfinished import JOB, Unfinished
from adq_wds.writing.write_shards import write_kept
from tests.conftest import Caplog, MakeShard, MonkeyPatch, jpeg, write_tar
from tests.folders import contents, dates
from tests.programs import Program, soon

ANEW: dict[str, Any] = {"patch_keep": 0.75, "importance": "random", "size": 64, "seed": 3}


class Stopped(Exception):  # noqa: N818 - it says what is
    """The engine was killed."""


class Others:
    """As other processes do tasks: each has a copy of the work, and they end in any order.

    Args:
        seed: of the order.
        stop: tasks that are done before it is killed.
    """

    def __init__(self, seed: int = 0, stop: int | None = None) -> None:
        self.done: list[str] = []
        self._random, self._stop = random.Random(seed), stop

    def run(self, tasks: Sequence[Task], work: Work, resources: Resources) -> Iterator[tuple[Task, Result]]:
        copies: list[Any] = [pickle.loads(pickle.dumps(work)) for _ in range(3)]  # noqa: S301
        for task in self._random.sample(tasks, len(tasks)):
            if self._stop is not None and len(self.done) == self._stop:
                raise Stopped
            (done,) = self._random.choice(copies)(iter([pickle.loads(pickle.dumps(task))]))  # noqa: S301
            self.done.append(task.name)
            yield done


@pytest.fixture
def shards(make_shard: MakeShard) -> list[Path]:
    """Three shards of 30 samples, two of them with the same keys."""
    names = (("b", 0), ("a", 30), ("c", 0))
    return [make_shard(f"in/{name}.tar", 30, first=first, side=80) for name, first in names]


@pytest.fixture
def plan(shards: list[Path], tmp_path: Path) -> Path:
    keys = [
        (f"{name}.tar", f"s{first + i:05d}") for name, first in (("a", 30), ("c", 0)) for i in range(0, 30, 2)
    ]
    Plan.from_keys(list(map(str, shards)), keys).save(tmp_path / "plan.parquet")
    return tmp_path / "plan.parquet"


def shown(folder: Path) -> dict[str, bytes]:
    """The files of a set; what only engines leave there, and killed ones their heartbeats, is left out."""
    return {name: data for name, data in contents(folder).items() if name != JOB and ".leases/" not in name}


BAD = [("k1.jpg", b"no"), ("k2.txt", b"x")]
CASES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "by samples": lambda plan: {"plan": plan, "max_samples": 7},
    "by bytes": lambda plan: {"plan": plan, "max_bytes": 10_000},
    "all": lambda plan: {"plan": None, "max_samples": 50, "split": "val"},
    "new images": lambda plan: {"plan": plan, **ANEW, "max_bytes": 20_000},
    "new quality": lambda plan: {"plan": None, "quality": 50, "max_samples": 25},
}


@pytest.mark.parametrize("case", CASES)
def test_every_engine_writes_the_bytes_of_one_process(
    shards: list[Path], plan: Path, tmp_path: Path, case: str
) -> None:
    options = CASES[case](plan)
    chosen = options.pop("plan")
    expected = write_kept(shards, chosen, tmp_path / "one" / "%04d.tar", **options)
    out = tmp_path / "other"
    report = write_kept(shards, chosen, out / "%04d.tar", **options, engine=Others())
    assert shown(out) == shown(tmp_path / "one")
    assert report == expected
    assert [path.name for path in (out / JOB).parent.iterdir()] == ["job.json"]


@pytest.mark.parametrize("case", ["by samples", "new images", "new quality"])
def test_plans_in_parts_are_written_alike(
    shards: list[Path], plan: Path, tmp_path: Path, monkeypatch: MonkeyPatch, case: str
) -> None:
    options = CASES[case](plan)
    chosen = options.pop("plan")
    write_kept(shards, chosen, tmp_path / "one" / "%04d.tar", **options)
    monkeypatch.setattr(parts, "ONE_FILE", 1)
    monkeypatch.setattr(parts, "PART_SHARDS", 2)
    if chosen is not None:
        adq.load_plan(chosen).save(tmp_path / "parts.parquet")
        chosen = tmp_path / "parts.parquet"
    out = tmp_path / "other"
    write_kept(shards, chosen, out / "%04d.tar", **options, engine=Others())
    assert {name.name: name.read_bytes() for name in out.glob("*.tar")} == {
        name.name: name.read_bytes() for name in (tmp_path / "one").glob("*.tar")
    }
    assert [path.name for path in (out / JOB).parent.iterdir()] == ["job.json"]
    with pytest.raises(Stopped):
        write_kept(shards, chosen, out / "%04d.tar", **options, overwrite=True, engine=Others(stop=1))
    write_kept(shards[:1], None, out / "%04d.tar", overwrite=True)
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == [".adq.write"]


def with_members(shards: list[Path], texts: Callable[[list[str]], list[str] | None]) -> Plan:
    """A plan of all samples, with another column `members`."""
    plan, rows = Plan.from_keys(list(map(str, shards)), None), []
    for shard in plan:
        assert shard.spans.members is not None
        given = texts(shard.spans.members.to_pylist())
        members = None if given is None else pa.array(given)
        rows.append(replace(shard, spans=replace(shard.spans, members=members)))
    return Plan.from_shards(
        rows, {name: plan.header[name] for name in ("settings", "classes", "cells", "bins")}
    )


def test_a_plan_that_knows_no_sizes_is_cut_alike(shards: list[Path], tmp_path: Path) -> None:
    plan = with_members(shards, lambda texts: None)
    write_kept(shards, plan, tmp_path / "one" / "%d.tar", max_bytes=20_000)
    write_kept(shards, plan, tmp_path / "other" / "%d.tar", max_bytes=20_000, engine=Others())
    assert shown(tmp_path / "other") == shown(tmp_path / "one")


def test_sizes_that_the_plan_has_wrong_are_named(shards: list[Path], tmp_path: Path) -> None:
    plan = with_members(shards, lambda texts: [text.replace("jpg/cls/", "jpg/cls/1") for text in texts])
    text = r"shard \d.tar: [\d,]+ bytes of payload, and by the plan's column members [\d,]+: plan again"
    with pytest.raises(adq.PlanError, match=text):
        write_kept(shards, plan, tmp_path / "out" / "%d.tar", engine=Others())


def test_a_plan_that_keeps_nothing_makes_an_empty_set(shards: list[Path], tmp_path: Path) -> None:
    nothing = Plan.from_keys(list(map(str, shards)), [])
    for name, options in (("same", {}), ("new", ANEW)):
        write_kept(shards, nothing, tmp_path / "one" / "%d.tar", overwrite=True, **options)
        write_kept(shards, nothing, tmp_path / name / "%d.tar", engine=Others(), **options)
        assert shown(tmp_path / name) == shown(tmp_path / "one")


# ---- Bad samples


def test_bad_samples_shift_the_cut_alike(shards: list[Path], tmp_path: Path, caplog: Caplog) -> None:
    fine = [(f"n{i:02d}.jpg", jpeg(i, 80)) for i in range(20)]
    more = [write_tar(tmp_path / "in" / "d.tar", [*fine[:3], *BAD, *fine[3:]]), *shards]
    more.append(write_tar(tmp_path / "in" / "e.tar", BAD[:1]))
    options: Any = {**ANEW, "on_error": "skip", "max_samples": 9}
    expected = write_kept(more, None, tmp_path / "one" / "%d.tar", **options)
    lines = [record.getMessage() for record in caplog.records]
    caplog.clear()
    report = write_kept(more, None, tmp_path / "other" / "%d.tar", **options, engine=Others())
    assert report == expected
    assert report.bad == 3
    assert [record.getMessage() for record in caplog.records] == lines
    assert shown(tmp_path / "other") == shown(tmp_path / "one")


@pytest.mark.parametrize("on_error", ["raise", "skip", lambda error: "k62'" not in str(error)])
def test_too_many_bad_samples_are_the_same_error(tmp_path: Path, on_error: Any) -> None:
    """By all samples, not by those of one source shard: half of the second are bad."""
    images = [(f"k{i}.jpg", jpeg(i, 32) if i % 2 or i < 60 else b"no") for i in range(120)]
    in_two = [write_tar(tmp_path / f"{j}.tar", images[60 * j : 60 * j + 60]) for j in range(2)]
    errors = []
    for name, engine in (("one", "threads"), ("other", Others())):
        with pytest.raises(adq.SampleError) as caught:
            write_kept(in_two, None, tmp_path / name / "%d.tar", quality=50, on_error=on_error, engine=engine)  # type: ignore[arg-type]
        errors.append(str(caught.value))
    assert errors[0] == errors[1]
    options: Any = {"quality": 50, "on_error": "skip", "max_bad_fraction": 0.3}
    for name, engine in (("one", "threads"), ("other", Others())):
        write_kept(in_two, None, tmp_path / name / "%d.tar", **options, overwrite=True, engine=engine)
    assert shown(tmp_path / "other") == shown(tmp_path / "one")


def test_files_that_would_grow_are_refused_before_anything_is_made(
    shards: list[Path], tmp_path: Path
) -> None:
    options: Any = {"patch_keep": 0.95, "importance": "random", "quality": 95}
    errors = []
    for engine in ("threads", Others()):
        with pytest.raises(ValueError, match="images would become larger") as caught:
            write_kept(shards, None, tmp_path / "out" / "%d.tar", **options, engine=engine)  # type: ignore[arg-type]
        errors.append(str(caught.value))
    assert errors[0] == errors[1]
    assert not (tmp_path / "out").exists()


# ---- Killed, and started again


@pytest.mark.parametrize("options", [{"max_samples": 7}, {**ANEW, "max_samples": 7}], ids=["same", "new"])
def test_a_killed_job_goes_on_and_does_nothing_twice(
    shards: list[Path], plan: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    expected = write_kept(shards, plan, tmp_path / "one" / "%d.tar", **options)
    out, started, made = tmp_path / "out", 0, {}
    while True:
        engine = Others(started, stop=started + 1)
        try:
            report = write_kept(shards, plan, out / "%d.tar", **options, engine=engine)
            break
        except Stopped:
            assert not (out / "_info.json").exists()
        for path, date in dates(out).items():
            assert made.setdefault(path, date) == date, f"{path} was written twice"
        started += 1
    assert started > 3
    assert report == expected
    assert shown(out) == shown(tmp_path / "one")
    before = dates(out)
    engine = Others()
    assert write_kept(shards, plan, out / "%d.tar", **options, engine=engine) == expected
    assert engine.done == []
    assert dates(out) == before


def test_a_shard_without_its_index_is_written_again(shards: list[Path], plan: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(Stopped):
        write_kept(shards, plan, out / "%d.tar", max_samples=7, engine=Others(stop=2))
    (index, *_) = (out / JOB).parent.glob("*.tar.parquet")
    index.unlink()
    (out / index.name.removesuffix(".parquet")).write_bytes(b"of another")
    write_kept(shards, plan, out / "%d.tar", max_samples=7, engine=Others())
    write_kept(shards, plan, tmp_path / "one" / "%d.tar", max_samples=7)
    assert shown(out) == shown(tmp_path / "one")


def test_a_finished_set_that_was_removed_is_written_again(
    shards: list[Path], plan: Path, tmp_path: Path
) -> None:
    """All of it or a shard; ``rm out/*`` leaves the hidden folder."""
    out = tmp_path / "out"
    write_kept(shards, plan, out / "%d.tar", max_samples=7, engine=Others())
    expected = shown(out)
    for gone in ("*.*", "1.tar"):
        for path in out.glob(gone):
            if path.is_file():
                path.unlink()
        write_kept(shards, plan, out / "%d.tar", max_samples=7, engine=Others())
        assert shown(out) == expected


def test_what_a_kill_at_the_end_left_is_removed(shards: list[Path], plan: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    expected = write_kept(shards, plan, out / "%d.tar", engine=Others())
    left = (out / JOB).with_name("images-000000000.tar")
    left.touch()
    assert write_kept(shards, plan, out / "%d.tar", engine=Others()) == expected
    assert not left.exists()


def test_other_arguments_do_not_go_on(shards: list[Path], plan: Path, tmp_path: Path) -> None:
    """Nor do threads, which keep no account of what they did."""
    out = tmp_path / "out"
    options: list[Any] = [{"max_samples": 8}, {"max_samples": 7, "split": "val"}, {"max_samples": 7, **ANEW}]
    with pytest.raises(Stopped):
        write_kept(shards, plan, out / "%d.tar", max_samples=7, engine=Others(stop=0))
    for engine in (Others(), "threads"):
        for other in options:
            with pytest.raises(adq.AdqError, match=r"out' holds .adq.write/job.json of an earlier run; give"):
                write_kept(shards, plan, out / "%d.tar", **other, engine=engine)  # type: ignore[arg-type]
    with pytest.raises(Stopped):
        write_kept(shards, plan, out / "%d.tar", max_samples=7, engine=Others(stop=2))
    with pytest.raises(adq.AdqError, match=r"out' holds \d.tar of an earlier run; give another folder"):
        write_kept(shards, None, out / "%d.tar", max_samples=7, engine=Others())


def test_overwriting_begins_anew(shards: list[Path], plan: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "%d.tar"
    write_kept(shards, None, out, max_samples=5, engine=Others())
    write_kept(shards, plan, out, max_samples=7, overwrite=True, engine=Others())
    write_kept(shards, plan, tmp_path / "one" / "%d.tar", max_samples=7)
    assert shown(out.parent) == shown(tmp_path / "one")
    before = dates(out.parent)
    write_kept(shards, plan, out, max_samples=7, overwrite=True, engine=Others())
    assert shown(out.parent) == shown(tmp_path / "one")
    assert not set(before.values()) & set(dates(out.parent).values())
    write_kept(shards, plan, out, max_samples=7, overwrite=True)
    assert contents(out.parent) == contents(tmp_path / "one")


# ---- Real processes

PARTICIPANT = """
import sys
from adq_wds.engines.shared import Shared
from adq_wds.writing.write_shards import write_kept
out, *shards = sys.argv[1:]
options = {"quality": 50, "on_error": "skip"} if "new" in out else {}
print(write_kept(shards, None, f"{out}/%d.tar", max_samples=4, engine=Shared(out, beat=0.1), **options))
"""


@pytest.mark.parametrize("n_kills", [2, pytest.param(40, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["same", "new"])
def test_processes_that_share_a_folder_survive_kills(
    shards: list[Path], tmp_path: Path, name: str, n_kills: int
) -> None:
    options: dict[str, Any] = {"quality": 50} if name == "new" else {}
    expected = write_kept(shards, None, tmp_path / "one" / "%d.tar", max_samples=4, **options)
    out, rng = tmp_path / name, random.Random(n_kills)
    out.mkdir()
    living = [Program(PARTICIPANT, str(out), *map(str, shards)) for _ in range(3)]
    for _ in range(n_kills):
        n_before = len(list(out.rglob("*.tar")))
        assert soon(lambda: len(list(out.rglob("*.tar"))) > n_before or (out / "_info.json").exists())  # noqa: B023
        living.pop(rng.randrange(3)).kill()
        living.append(Program(PARTICIPANT, str(out), *map(str, shards)))
    for process in living:
        printed, errors = process.communicate()
        assert printed == f"{expected}\n", errors
    assert shown(out) == shown(tmp_path / "one")


def test_processes_of_this_machine_write_the_same(shards: list[Path], plan: Path, tmp_path: Path) -> None:
    write_kept(shards, plan, tmp_path / "one" / "%d.tar", max_samples=15)
    command = ["write", *map(str, shards), "--plan", str(plan), "-o", str(tmp_path / "two" / "%d.tar"), "-q"]
    assert main([*command, "--max-samples", "15", "--engine", "processes"]) == 0
    assert shown(tmp_path / "two") == shown(tmp_path / "one")


@pytest.mark.slow
def test_a_job_of_several_processes_survives_kills(shards: list[Path], tmp_path: Path) -> None:
    expected = write_kept(shards, None, tmp_path / "one" / "%d.tar", max_samples=4, quality=50)
    out, source = tmp_path / "new", PARTICIPANT.replace("Shared(out, beat=0.1)", "'processes'")
    for _ in range(10):
        job, n_before = Program(source, str(out), *map(str, shards)), len(list(out.rglob("*.tar")))
        assert soon(lambda: len(list(out.rglob("*.tar"))) > n_before or (out / "_info.json").exists())  # noqa: B023
        job.kill()
    assert Program(source, str(out), *map(str, shards)).communicate()[0] == f"{expected}\n"
    assert shown(out) == shown(tmp_path / "one")


def test_shards_are_never_removed_by_one_of_several_processes(shards: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"overwrite=True with engine='shared': .* remove old ones first"):
        write_kept(shards, None, tmp_path / "out" / "%d.tar", overwrite=True, engine="shared")


def test_of_commands_that_start_at_once_one_begins(
    shards: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from adq_wds.writing import write_shards

    begun, both, out = list[int](), Barrier(2, timeout=60), tmp_path / "out"
    clear = write_shards._clear
    monkeypatch.setattr(write_shards, "_clear", lambda *a, **k: (begun.append(1), clear(*a, **k))[1])

    def write() -> str:
        both.wait()
        return str(write_kept(shards, None, out / "%d.tar", max_samples=4, engine=Shared(out, beat=1)))

    out.mkdir()
    with ThreadPoolExecutor(2) as pool:
        first, second = [each.result() for each in [pool.submit(write) for _ in range(2)]]
    assert first == second
    assert begun == [1]
    write_kept(shards, None, tmp_path / "one" / "%d.tar", max_samples=4)
    assert shown(out) == shown(tmp_path / "one")


def test_the_end_of_one_command_leaves_what_another_writes_just_now(tmp_path: Path) -> None:
    unfinished = Unfinished(tmp_path, {})
    unfinished.begin(again=False)
    with atomic_path(tmp_path / JOB) as partial:
        partial.write_text("{}")
        unfinished.finish({"n": 1})
        assert unfinished.report == {"n": 1}
    assert (tmp_path / JOB).read_text() == "{}"
    dead = tmp_path / JOB
    dead.with_name(".x.0-0.partial").touch()
    unfinished.finish({})
    assert list(dead.parent.iterdir()) == [dead]
