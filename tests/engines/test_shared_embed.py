"""Processes that share a folder embed what one process embeds, byte by byte, though some of them are killed."""

import importlib
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import adq_wds as adq
from adq_wds.engines.shared import Shared, lock_for
from adq_wds.jobs.run import run_job
from tests.conftest import MakeShard, MonkeyPatch
from tests.engines.kills import disturb, ends_well
from tests.folders import contents

ROOT = Path(__file__).parents[2]


def start(out: Path, shards: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.engines.embed", str(out), *shards]
    return subprocess.Popen(command, cwd=ROOT, text=True, stderr=subprocess.PIPE)


@pytest.mark.slow
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


def test_scratch_files_of_a_run_that_was_killed_after_its_bins_go_with_the_next_run(
    make_shard: MakeShard, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    shards = [str(make_shard(f"{i}.tar", 12, first=12 * i)) for i in range(2)]
    same: dict[str, Any] = {"encoder": {"spec": "thumbnail"}, "embed": {}, "plan": {"bins": 3, "keep": 0.5}}
    run_job(shards, tmp_path / "threads", **same)

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "shared"
    with monkeypatch.context() as patch:
        patch.setattr(importlib.import_module("adq_wds.planning.build_plan"), "score_bins", killed)
        with pytest.raises(KeyboardInterrupt):
            run_job(shards, out, engine="shared", **same)
    assert (out / "bins.parquet").exists()
    assert list(out.glob(".adq-scratch-*"))
    run_job(shards, out, engine="shared", **same)
    assert not list(out.glob(".adq-scratch-*"))
    for name in ("bins.parquet", "plan.parquet"):
        assert (out / name).read_bytes() == (tmp_path / "threads" / name).read_bytes()
