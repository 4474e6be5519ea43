"""Every step by three processes that share a folder makes the bytes of threads, though processes are killed."""

import random
from pathlib import Path

import pytest

from adq_wds.cli.main import main
from adq_wds.writing.unfinished import JOB
from tests.conftest import MakeShard
from tests.engines.jobs import SharedJob
from tests.folders import contents


def steps(shards: list[str], out: Path) -> list[list[str]]:
    """The commands that divide their work, step by step and in one go; a folder holds one job at a time."""
    keep, features = ["--keep", "0.5", "--bins", "3"], str(out / "features")
    return [
        ["embed", *shards, "--encoder", "thumbnail", "-o", features, "--workers", "1"],
        ["plan", features, *keep, "-o", str(out / "plan" / "plan.parquet")],
        ["codebook", features, "--bins", "3", "--min-pilot", "5", "-o", str(out / "codebook" / "codebook.safetensors")],
        ["write", *shards, "--plan", str(out / "plan" / "plan.parquet"), "-o", str(out / "small" / "%06d.tar"), "--max-samples", "6"],
        ["run", *shards, "--encoder", "thumbnail", *keep, "-o", str(out / "run"), "--workers", "1"],
    ]  # fmt: skip


def make_equal(shards: list[str], folder: Path, *, n_kills: int, seed: int) -> None:
    for command in steps(shards, folder / "threads"):
        assert main([*command, "-q"]) == 0
    (folder / "shared").mkdir()
    draw = random.Random(seed)
    job = SharedJob(folder / "marks", steps(shards, folder / "shared"), beat=0.1, seed=seed)
    for _ in range(n_kills):
        job.kill()
        job.let_go(draw.randrange(4))
    job.finish()
    made = {
        name: data
        for name, data in contents(folder / "shared").items()
        if not name.endswith(JOB) and ".leases/" not in name  # heartbeats of killed processes go later
    }
    assert made == contents(folder / "threads")


def test_every_step_makes_the_bytes_of_threads_through_ten_kills(
    make_shard: MakeShard, tmp_path: Path
) -> None:
    shards = [str(make_shard(f"{i}.tar", 12, first=12 * i)) for i in range(6)]
    make_equal(shards, tmp_path, n_kills=10, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
def test_every_step_makes_the_bytes_of_threads_through_a_hundred_kills(
    make_shard: MakeShard, tmp_path: Path, seed: int
) -> None:
    shards = [str(make_shard(f"{i}.tar", 40, first=40 * i)) for i in range(9)]
    make_equal(shards, tmp_path, n_kills=10, seed=seed)
