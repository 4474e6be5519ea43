"""The engine `processes`: equal results, the same errors, and nothing left of a process when the job ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import adq_wds as adq
from adq_wds.engines.choose import choose_engine
from adq_wds.engines.engine import Resources, ThisProcess
from adq_wds.errors import AdqError
from tests.conftest import Caplog, MakeShard
from tests.engines.works import PickyError, Write, tasks_of
from tests.folders import contents


def ends(pid: int) -> bool:
    """Whether a process ends within a minute."""
    for _ in range(600):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
            os.kill(pid, 0)
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.1)
    return False


def test_every_task_is_done_once_by_processes_that_keep_their_work(tmp_path: Path, caplog: Caplog) -> None:
    engine = choose_engine("processes", folder=tmp_path)
    tasks = tasks_of(1, 2, "log", 4, 5, 6)
    results = dict(engine.run(tasks, Write(tmp_path), Resources()))
    assert set(results) == set(tasks)
    assert [(tmp_path / task.name).read_text() for task in tasks] == ["1", "2", "log", "4", "5", "6"]
    assert os.getpid() not in {result["pid"] for result in results.values()}
    assert max(result["calls"] for result in results.values()) > 1, "the work of a process is unpickled once"
    assert "a line of t002" in caplog.messages, "what the package logs elsewhere is logged here"


def test_processes_embed_as_threads_do(tmp_path: Path, make_shard: MakeShard) -> None:
    shards = [make_shard(f"{i}.tar", 12, first=12 * i) for i in range(3)]
    for engine in ("threads", "processes"):
        adq.embed_shards(shards, "thumbnail", tmp_path / engine, batch_size=5, engine=engine)  # type: ignore[arg-type]
    assert contents(tmp_path / "processes") == contents(tmp_path / "threads")


def test_errors_are_those_of_this_process_and_one_line_where_they_cannot_travel(tmp_path: Path) -> None:
    for what, kind, text in (
        ("picky", PickyError, "shard a.tar, key 'k': no good"),
        ("value", ValueError, "no such thing"),
        ("strange", AdqError, "StrangeError: one two"),
    ):
        with pytest.raises(kind) as raised:
            list(
                choose_engine("processes", folder=tmp_path).run(tasks_of(what), Write(tmp_path), Resources())
            )
        assert type(raised.value) is kind
        assert str(raised.value) == text


def test_a_process_takes_as_many_threads_for_products_as_it_has_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def threads(workers: int) -> dict[str, object]:
        run = choose_engine("processes", folder=tmp_path).run
        ((_, result),) = run(tasks_of("threads"), Write(tmp_path), Resources(workers))
        return result

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert threads(1) == {"threads": "1"}
    assert "OMP_NUM_THREADS" not in os.environ, "this process' later ones choose for themselves"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads(1)["threads"] == "3", "the user's own number holds"


def test_a_killed_process_ends_the_job_with_one_line_and_what_is_done_stays(tmp_path: Path) -> None:
    with pytest.raises(AdqError, match=r"a process ended while it worked on t001.*run it again") as raised:
        list(
            choose_engine("processes", folder=tmp_path).run(
                tasks_of(1, "kill"), Write(tmp_path), Resources(workers=99)
            )
        )
    assert "\n" not in str(raised.value)
    assert (tmp_path / "t000").read_text() == "1"


def test_the_processes_end_with_the_job_when_it_is_left_or_killed(tmp_path: Path) -> None:
    def pid_of(name: str) -> int:
        for _ in range(600):
            if (tmp_path / name).exists() and (text := (tmp_path / name).read_text()):
                return int(text)
            time.sleep(0.1)
        raise AssertionError(name)

    code = (
        "from pathlib import Path\n"
        "from tests.engines.works import Write, tasks_of\n"
        "from adq_wds.engines.engine import Resources\n"
        "from adq_wds.engines.processes import Processes\n"
        "if __name__ == '__main__':\n"
        f"    list(Processes().run(tasks_of('wait'), Write(Path({str(tmp_path)!r})), Resources()))\n"
    )
    (tmp_path / "job.py").write_text(code)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, tmp_path / "job.py"], env=environment) as job:
        pid = pid_of("t000.pid")
        job.send_signal(signal.SIGKILL)
    assert ends(pid)


def test_work_that_cannot_be_pickled_is_refused_before_any_process_starts(tmp_path: Path) -> None:
    with pytest.raises(AdqError, match=r"cannot be handed to other processes .*threads"):
        list(
            choose_engine("processes", folder=tmp_path).run(tasks_of(1), lambda tasks: iter(()), Resources())
        )


def test_a_job_that_needs_a_gpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no process a GPU of its own"):
        list(choose_engine("processes", folder=tmp_path).run(tasks_of(1), Write(tmp_path), Resources(gpus=1)))


def test_wrong_names_and_addresses_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"threads, processes, ray, shared, got 'dask'"):
        choose_engine("dask", folder=tmp_path)
    with pytest.raises(ValueError, match=r"address='10.0.0.1:6379'.*engine='ray'"):
        choose_engine("threads", address="10.0.0.1:6379", folder=tmp_path)
    engine = ThisProcess()
    assert choose_engine(engine, folder=tmp_path) is engine
