"""Every step on a Ray cluster of two nodes makes the bytes of threads, though workers, actors, nodes and drivers die."""

import random
from pathlib import Path
from typing import Any

import pytest

from adq_wds.cli.main import main
from adq_wds.writing.unfinished import JOB
from tests.conftest import Capsys, MakeShard
from tests.engines.jobs import RayJob
from tests.folders import contents

TEN = ["worker", "actor", "driver", "worker", "node", "worker", "actor", "worker", "actor", "worker"]


def steps(shards: list[str], out: Path, *, min_pilot: int = 5, n_indexed: int = 1) -> list[list[str]]:
    """All commands that divide their work: features, bins, plan and shards; a codebook; an index; comparisons."""
    few = shards[:n_indexed]
    return [
        ["run", *shards, "--encoder", "thumbnail", "--keep", "0.5", "--bins", "3", "--write", "-o", str(out), "--workers", "1"],
        ["codebook", str(out / "features"), "--bins", "3", "--min-pilot", str(min_pilot), "-o", str(out / "codebook.safetensors")],
        ["index", *few, "-o", str(out / "index.parquet")],
        ["verify", str(out / "index.parquet"), *few],
    ]  # fmt: skip


@pytest.fixture
def shards(make_shard: MakeShard) -> list[str]:
    return [str(make_shard(f"{i}.tar", 12, first=12 * i)) for i in range(6)]


def by_threads(commands: list[list[str]]) -> None:
    for command in commands:
        assert main([*command, "-q"]) == 0


def made(out: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(out).items() if not name.endswith(JOB)}


def test_every_step_makes_the_bytes_of_threads_through_ten_kills(
    nodes: Any, shards: list[str], tmp_path: Path, capsys: Capsys
) -> None:
    by_threads(steps(shards, tmp_path / "threads"))
    printed = capsys.readouterr().out
    commands = steps(shards, tmp_path / "ray")
    job = RayJob(nodes, tmp_path / "marks", commands, n_drivers=2, seed=0)
    for kind in TEN:
        job.kill(kind)
        job.let_go(1)
    assert printed.splitlines()[-1] in job.finish().splitlines()
    assert made(tmp_path / "ray") == made(tmp_path / "threads")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
def test_every_step_makes_the_bytes_of_threads_through_a_hundred_kills(
    nodes: Any, shards: list[str], tmp_path: Path, seed: int
) -> None:
    by_threads(steps(shards, tmp_path / "threads", n_indexed=6))
    draw = random.Random(seed)
    commands = steps(shards, tmp_path / "ray", n_indexed=6)
    job = RayJob(nodes, tmp_path / "marks", commands, n_drivers=1, seed=seed)
    for kind in draw.sample(TEN, len(TEN)):
        job.kill(kind)
        job.let_go(draw.randrange(4))
    job.finish()
    assert made(tmp_path / "ray") == made(tmp_path / "threads")
