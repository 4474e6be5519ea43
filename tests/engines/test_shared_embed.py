"""Processes that share a folder embed what one process embeds, byte by byte, though some of them are killed."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

import adq_wds as adq
from adq_wds.engines.shared import Shared, lock_for
from tests.conftest import MakeShard
from tests.engines.kills import disturb, ends_well
from tests.folders import contents

ROOT = Path(__file__).parents[2]


def start(out: Path, shards: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.engines.embed", str(out), *shards]
    return subprocess.Popen(command, cwd=ROOT, text=True, stderr=subprocess.PIPE)


def test_three_processes_and_a_killed_one_embed_as_threads_do(make_shard: MakeShard, tmp_path: Path) -> None:
    shards = [str(make_shard(f"train-{i:06d}.tar", 12, first=12 * i)) for i in range(8)]
    adq.embed_shards(shards, "thumbnail", tmp_path / "threads", progress=False)
    out = tmp_path / "shared"
    out.mkdir()
    killed = start(out, shards)
    while killed.poll() is None and not list(out.glob(".leases/task-*")):
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    for process in [start(out, shards) for _ in range(3)]:
        ends_well(process)
    assert contents(out) == contents(tmp_path / "threads")


@pytest.mark.slow
def test_after_ten_kills_and_stops_the_features_are_the_same(make_shard: MakeShard, tmp_path: Path) -> None:
    shards = [str(make_shard(f"train-{i:06d}.tar", 300, first=300 * i)) for i in range(12)]
    adq.embed_shards(shards, "thumbnail", tmp_path / "threads", progress=False)
    out = tmp_path / "shared"
    disturb(lambda: start(out, shards), 10, seed=0, at_most=3.0)
    assert contents(out) == contents(tmp_path / "threads")


def test_another_encoder_is_refused_while_a_process_shares(make_shard: MakeShard, tmp_path: Path) -> None:
    shard, out = make_shard("a.tar", 4), tmp_path / "out"
    out.mkdir()
    with (
        lock_for(Shared(out, beat=0.05), out, "embed", "another encoder"),
        pytest.raises(
            adq.AdqError, match=r"in use by another job or by other arguments, of pid \d+ on .*choose another"
        ),
    ):
        adq.embed_shards(shard, "thumbnail", out, progress=False, engine=Shared(out, beat=0.05))
    assert list(out.iterdir()) == []
    adq.embed_shards(shard, "thumbnail", out, progress=False, engine="shared")
