"""Do real processes that train together, are killed in mid-epoch and resume as others see each kept sample once?"""

import json
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.programs import FILE, Program, soon
from tests.stream.conftest import TarSet, write_set

TRAIN = """
import json, os, sys, time
from pathlib import Path

import torch
import torch.distributed as dist

import adq_wds as adq

N_EPOCHS, EVERY = 3, 4


def numbered(sample):
    return {**sample, "x": torch.tensor([float(sample["cls"])])}


def main():
    rank, world, folder, workers, start, slow_from, plan, *urls = sys.argv[1:]
    rank, world, folder, slow_from = int(rank), int(world), Path(folder), tuple(json.loads(slow_from))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store-{world}", rank=rank, world_size=world)
    dataset = adq.ShardDataset(
        urls, plan=plan, shuffle=True, seed=5, batch_size=4, pipes=[adq.Map(numbered)], fields=("__key__", "x")
    )
    how = {"num_workers": int(workers), "multiprocessing_context": start} if int(workers) else {}
    loader = adq.Loader(dataset, **how)
    net = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(1, 1))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.001)
    step, checkpoint = 0, folder / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        net.load_state_dict(saved["net"])
        loader.load_state_dict(saved["loader"])
        step = saved["step"]
    log = open(folder / f"log-{world}-{rank}.jsonl", "a", buffering=1)
    while dataset.epoch < N_EPOCHS:
        epoch = dataset.epoch
        for keys, x in loader:
            loss = net(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            print(json.dumps({"epoch": epoch, "step": step, "keys": keys}), file=log)
            if step % EVERY == 0:
                states = [None] * world
                dist.all_gather_object(states, loader.state_dict())
                assert all(state == states[0] for state in states), "one state for all ranks"
                if rank == 0:
                    whole = {"net": net.state_dict(), "loader": states[0], "step": step}
                    torch.save(whole, folder / "new.pt")
                    os.replace(folder / "new.pt", checkpoint)
            if (epoch, step) >= slow_from:
                time.sleep(600)  # time to be killed in
    weights = [torch.empty(1, 1) for _ in range(world)]
    dist.all_gather(weights, net.module.weight.data)
    assert all(torch.equal(weight, weights[0]) for weight in weights)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
"""
NEVER = (99, 0)


def start(tar_set: TarSet, folder: Path, world: int, workers: int, how: str, slow_from: Any) -> list[Any]:
    """The processes of a run, each the leader of a group with its workers."""
    script = folder / "train.py"
    script.write_text(TRAIN)
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    same = [str(world), str(folder), str(workers), how, json.dumps(slow_from), tar_set.plan, *tar_set.urls]
    return [
        Program(f"import os; os.setsid(); {FILE}", str(script), str(rank), *same, env=environment)
        for rank in range(world)
    ]


def kill(running: list[Any]) -> None:
    """SIGKILL to all, workers too: they get no chance to say anything."""
    for process in running:
        os.killpg(process.pid, signal.SIGKILL)
    for process in running:
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it had ended before"


def rows(folder: Path, world: int) -> list[dict[str, Any]]:
    """All steps that the ranks of a run have logged whole."""
    found = []
    for path in folder.glob(f"log-{world}-*.jsonl"):
        lines = path.read_text().split("\n")
        found += [json.loads(line) for line in lines[:-1]]
    return found


def wait_for(folder: Path, running: list[Any], place: tuple[int, int]) -> None:
    """Until every rank has logged the step `place`, of (epoch, step)."""
    world = len(running)

    def all_there() -> bool:
        assert all(process.poll() is None for process in running), "a rank has ended early"
        return sum((row["epoch"], row["step"]) == place for row in rows(folder, world)) == world

    assert soon(all_there), "no rank came so far"


def check_killed_and_resumed(
    tar_set: TarSet, folder: Path, *, workers: int, how: str = "fork", worlds: list[int], at: list[Any]
) -> None:
    """Runs of these sizes, each but the last killed after a place of (epoch, step) and gone on from by the next."""
    seen: dict[int, Counter[str]] = {epoch: Counter() for epoch in range(3)}
    n_before = 0
    for world, place in zip(worlds, [*at, None], strict=True):
        running = start(tar_set, folder, world, workers, how, place or NEVER)
        if place is None:
            errors = [process.communicate()[1] for process in running]
            assert [process.returncode for process in running] == [0] * world, errors
            n_counted = 10**9
        else:
            try:
                wait_for(folder, running, place)
            finally:
                kill(running)
            state = torch.load(folder / "checkpoint.pt", weights_only=True)
            n_counted = state["step"]
            assert n_before < n_counted <= place[1]
            assert state["loader"]["epoch"] == place[0]
            assert 0 < state["loader"]["t"] < len(tar_set.kept), "killed in mid-epoch"
        counted = [row for row in rows(folder, world) if n_before < row["step"] <= n_counted]
        assert len({(row["epoch"], row["step"]) for row in counted}) * world == len(counted), "in step"
        for row in counted:
            seen[row["epoch"]] += Counter(row["keys"])
        n_before = n_counted
    kept = Counter(key for _, key in tar_set.kept)
    for epoch, counts in seen.items():
        assert kept - counts == Counter(), f"epoch {epoch}: some were never seen"
        assert (counts - kept).total() < max(worlds), f"epoch {epoch}: more repeats than pad's"


@pytest.fixture
def many(tmp_path: Path) -> TarSet:
    """181 samples in 5 shards, 121 of them kept: 16 steps of 4 on 2 ranks, 11 on 3, neither number divides."""
    made = write_set(tmp_path / "many", [50, 3, 60, 41, 27])
    assert len(made.kept) == 121
    return made


def test_two_processes_killed_in_mid_epoch_resume_as_three(many: TarSet, tmp_path: Path) -> None:
    """Three epochs; killed in the second, after step 22, and gone on from step 20."""
    check_killed_and_resumed(many, tmp_path, workers=1, worlds=[2, 3], at=[(1, 22)])


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "how"), [(0, "fork"), (2, "fork"), (2, "spawn"), (2, "forkserver")])
def test_processes_killed_again_and_again_see_each_sample_once(
    many: TarSet, tmp_path: Path, workers: int, how: str
) -> None:
    worlds, at = [2, 3, 1, 4], [(0, 6), (1, 18), (2, 60)]
    check_killed_and_resumed(many, tmp_path, workers=workers, how=how, worlds=worlds, at=at)
