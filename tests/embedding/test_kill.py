"""F25: killed at any moment and started again, a job ends with the bytes of one that was left alone."""

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from adq_wds.cli.main import main
from adq_wds.tables.bins import Bins
from adq_wds.tables.features_file import FeaturesFile
from adq_wds.tables.plan import load_plan
from tests.programs import Program, soon

MakeShard = Callable[..., Path]
N_SHARDS, N_IMAGES = 6, 60
TOTAL = N_SHARDS * N_IMAGES
CHEAP = ["--encoder", "thumbnail"]

# The command as it is, with an encoder that takes 2 ms an image, writes down each one in the file argv[1], and after
# argv[2] of them waits for Ctrl-C.
SLOW_COMMAND = """
import os, signal, sys, threading, time
interrupted = threading.Event()
def interrupt(*arguments):
    interrupted.set()
    signal.default_int_handler(*arguments)
signal.signal(signal.SIGINT, interrupt)
import adq_wds.jobs.run
from adq_wds.cli.main import main
from adq_wds.models.thumbnail import Thumbnail
fast = Thumbnail.__call__
log = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
def slow(self, images):
    for image in images:
        time.sleep(0.002)
        os.write(log, b".")
        if os.fstat(log).st_size == int(sys.argv[2]):
            interrupted.wait()
    return fast(self, images)
Thumbnail.__call__ = slow
print("ready", flush=True)
sys.exit(main(sys.argv[3:]))
"""


@pytest.fixture
def shards(make_shard: MakeShard) -> list[str]:
    return [str(make_shard(f"t-{i}.tar", N_IMAGES, first=i * 1000, classes=3)) for i in range(N_SHARDS)]


def start(log: Path, arguments: list[str], n_images: int = -1) -> Program:
    """The command, at the moment it begins to work."""
    job = Program(SLOW_COMMAND, str(log), str(n_images), *arguments)
    assert job.stdout.readline() == "ready\n"
    return job


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.parquet"))}


def assert_nothing_is_torn(folder: Path) -> None:
    for path in folder.rglob("*.parquet"):
        if path.parent.name == "features":
            file = FeaturesFile(path)
            assert file.n == N_IMAGES
            file.read_columns(file.header["columns"])
        elif path.name == "bins.parquet":
            Bins.load(path)
        else:
            assert sum(len(shard.spans) for shard in load_plan(path)) == TOTAL


def kill_and_resume(command: list[str], folder: Path, out: Path, *, n_kills: int, workers: int) -> None:
    """Kill the command `n_kills` times at random moments, let it end, and look at what it did."""
    rng = np.random.default_rng(n_kills)
    log = folder.with_name("log")
    arguments = [*command, "-o", str(out), "--workers", str(workers), "-q"]
    longest = 0.002 * TOTAL / workers + 0.3  # the encoder's time, and some for all else
    n_landed = 0
    for _ in range(n_kills):
        job = start(log, arguments)
        try:
            job.wait(timeout=rng.uniform(0.0, longest))
        except subprocess.TimeoutExpired:
            job.kill()
            n_landed += 1
        job.communicate()
        assert_nothing_is_torn(folder)
        if n_landed % 5 == 4:  # begin anew now and then, so that every stage is hit
            for path in (*folder.rglob("*.parquet"), *folder.rglob("run.json")):  # a slow kill lets a run end
                path.unlink()
            log.unlink(missing_ok=True)
            n_landed = 0
    job = start(log, arguments)
    assert job.communicate()[1] == ""
    assert job.returncode == 0
    assert_nothing_is_torn(folder)
    assert log.stat().st_size <= TOTAL + n_landed * workers * N_IMAGES


@pytest.mark.parametrize("n_kills", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_embed_survives_kills(shards: list[str], tmp_path: Path, n_kills: int) -> None:
    assert main(["embed", *shards, *CHEAP, "-o", str(tmp_path / "whole" / "features"), "-q"]) == 0
    out = tmp_path / "killed" / "features"
    kill_and_resume(["embed", *shards, *CHEAP], tmp_path / "killed", out, n_kills=n_kills, workers=2)
    assert everything(tmp_path / "killed") == everything(tmp_path / "whole")


@pytest.mark.parametrize("n_kills", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_run_survives_kills(shards: list[str], tmp_path: Path, n_kills: int) -> None:
    command = ["run", *shards, *CHEAP, "--keep", "0.2", "--bins", "4"]
    assert main([*command, "-o", str(tmp_path / "whole"), "-q"]) == 0
    kill_and_resume(command, tmp_path / "killed", tmp_path / "killed", n_kills=n_kills, workers=1)
    assert everything(tmp_path / "killed") == everything(tmp_path / "whole")


def test_ctrl_c_ends_with_130_and_the_next_run_goes_on(shards: list[str], tmp_path: Path) -> None:
    command = ["run", *shards, *CHEAP, "-o", str(tmp_path / "out"), "--workers", "1"]
    log = tmp_path / "log"
    job = start(log, command, n_images=2 * N_IMAGES + 1)
    assert soon((tmp_path / "out" / "features" / "t-1.parquet").exists)
    os.kill(job.pid, signal.SIGINT)
    _, errors = job.communicate()
    assert job.returncode == 130
    assert errors.splitlines()[-1] == "adq: interrupted; run the same command again to go on"
    assert "Traceback" not in errors
    assert_nothing_is_torn(tmp_path / "out")
    job = start(log, command)
    job.communicate()
    assert job.returncode == 0
    assert log.stat().st_size <= TOTAL + N_IMAGES
    assert main(["run", *shards, *CHEAP, "-o", str(tmp_path / "whole"), "-q"]) == 0
    assert everything(tmp_path / "out") == everything(tmp_path / "whole")
