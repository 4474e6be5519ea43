"""Do the programs that people train with read our streams as they should, resume included? The examples for each, run."""

import contextlib
import importlib.util
import io
import os
import re
import runpy
import socket
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import adq_wds as adq
from tests.conftest import MakeShard
from tests.programs import FILE, Program

EXAMPLES = Path(__file__).parent.parent / "examples"
Batches = list[list[str]]


@pytest.fixture
def shards(make_shard: MakeShard, tmp_path: Path) -> str:
    """60 samples in 3 shards; beside them a plan that keeps 30."""
    paths = [str(make_shard(f"t-{i}.tar", 20, first=20 * i)) for i in range(3)]
    adq.Plan.from_keys(paths, [f"s{i:05d}" for i in range(60) if i % 4 < 2]).save(tmp_path / "plan.parquet")
    return f"{tmp_path}/t-*.tar"


@pytest.fixture
def plan(shards: str, tmp_path: Path) -> str:
    return str(tmp_path / "plan.parquet")


def needs(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install adq-wds[hosts]")


def run(example: str, *arguments: object) -> str:
    """What an example prints; here, as the libraries are loaded already."""
    before, sys.argv = sys.argv, [example, *map(str, arguments)]
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            runpy.run_path(str(EXAMPLES / example), run_name="__main__")
    finally:
        sys.argv = before
    return out.getvalue()


def epochs(shards: str, plan: str, n: int, batch_size: int) -> list[Batches]:
    """The keys of the first epochs' batches, as one process reads them."""
    dataset = adq.ShardDataset(shards, plan=plan, shuffle=True, batch_size=batch_size)
    return [[[sample["__key__"] for sample in batch] for batch in dataset] for _ in range(n)]


def test_three_loaders_read_one_order_and_two_go_on_in_it(shards: str, plan: str) -> None:
    out = run("torch_loaders.py", shards, plan, "--batch-size", 4, "--workers", 1).splitlines()
    assert "8 batches an epoch, broken off after 4 of the second" in out[0]
    assert out[1] == "DataLoader: no state; on 1 workers it reads 30 samples, from epoch 0"
    assert re.fullmatch(r"StatefulDataLoader: a state of \d+ bytes; on 1 workers it goes on exactly", out[2])
    size = re.fullmatch(r"adq.Loader: a state of (\d+) bytes; on 2 workers it goes on exactly", out[3])
    assert size is not None
    assert int(size[1]) < 400


def test_a_webdataset_pipeline_trains_in_a_webloader(shards: str, plan: str, tmp_path: Path) -> None:
    pattern = f"{tmp_path}/t-{{0..2}}.tar"
    out = run("webdataset_loop.py", pattern, plan, "--side", 16, "--workers", 0, "--epochs", 2)
    assert "30 of 60 samples" in out
    assert re.search(r"epoch 1: 30 samples, mean loss \d\.\d+", out)


def test_torchdata_nodes_go_on_where_they_were_stopped(shards: str, plan: str, tmp_path: Path) -> None:
    arguments = (shards, plan, "--batch-size", 4, "--checkpoint", tmp_path / "nodes.json")
    stopped = run("torchdata_nodes.py", *arguments, "--max-steps", 11)
    expected = epochs(shards, plan, 2, 4)
    assert read_epochs(stopped) == {0: expected[0], 1: expected[1][:3]}
    assert read_epochs(run("torchdata_nodes.py", *arguments)) == {1: expected[1][3:]}
    assert read_epochs(run("torchdata_nodes.py", *arguments)) == {}, "all done"


def read_epochs(out: str) -> dict[int, Batches]:
    """The keys of the batches that an example printed, by epoch."""
    batches: dict[int, Batches] = {}
    for epoch, keys in re.findall(r"epoch (\d+), (?:batch \d+|process \d+): ((?:s\d{5} ?)+)", out):
        batches.setdefault(int(epoch), []).append(keys.split())
    return batches


@pytest.mark.filterwarnings("ignore")
def test_lightning_goes_on_where_it_was_stopped(shards: str, plan: str, tmp_path: Path) -> None:
    needs("lightning")
    arguments = (shards, plan, "--batch-size", 4, "--workers", 0, "--checkpoints", tmp_path / "ck")
    expected = epochs(shards, plan, 2, 4)
    assert read_epochs(run("lightning_fit.py", *arguments, "--max-steps", 5)) == {0: expected[0][:5]}
    assert read_epochs(run("lightning_fit.py", *arguments)) == {0: expected[0][5:], 1: expected[1]}


@pytest.mark.filterwarnings("ignore")
def test_lightning_resumes_from_a_checkpoint_of_any_step(shards: str, plan: str, tmp_path: Path) -> None:
    """At an epoch's end too: Lightning counts batches and never asks for the one after the last."""
    needs("lightning")
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint

    class Net(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Linear(1, 1)
            self.seen: Batches = []

        def training_step(self, batch: Any, i: int) -> torch.Tensor:
            self.seen.append([sample["__key__"] for sample in batch])
            return self.net(torch.ones(1)).sum()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def fit(**options: Any) -> Batches:
        net = Net()
        dataset = adq.ShardDataset(shards, plan=plan, shuffle=True, batch_size=6)
        save = ModelCheckpoint(tmp_path / "ck", filename="{step}", every_n_train_steps=1, save_top_k=-1)
        trainer = lightning.Trainer(
            max_epochs=3, accelerator="cpu", logger=False, callbacks=[save], enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(net, adq.Loader(dataset), **options)
        return net.seen

    expected = [batch for epoch in epochs(shards, plan, 3, 6) for batch in epoch]
    assert fit() == expected
    for step in (1, 4, 5, 6, 10, 14):
        assert fit(ckpt_path=tmp_path / "ck" / f"step={step}.ckpt") == expected[step:], step


@pytest.mark.filterwarnings("ignore")
def test_lightning_reads_epochs_of_other_lengths(shards: str, tmp_path: Path) -> None:
    """Where it asks for the length of each."""
    needs("lightning")
    import lightning

    class Net(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.n_samples = [0, 0, 0]

        def training_step(self, batch: Any, i: int) -> torch.Tensor:
            self.n_samples[self.current_epoch] += len(batch)
            return torch.zeros(1, requires_grad=True).sum()

        def configure_optimizers(self) -> None:
            return None

    plan = adq.build_plan(adq.embed_shards(shards, "thumbnail", tmp_path / "features"), bins=2, keep=0.2)
    dataset = adq.ShardDataset(
        shards, plan=plan, fresh=True, keep=lambda e: (0.1, 0.5, 0.3)[e % 3], batch_size=4
    )
    net = Net()
    lightning.Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, reload_dataloaders_every_n_epochs=1,
    ).fit(net, adq.Loader(dataset))  # fmt: skip
    assert net.n_samples == [6, 30, 18]


def launched(n: int, *command: str) -> str:
    """What n processes print, started as torchrun starts them; anew where another program took the port meanwhile."""
    for left in (2, 1, 0):
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(n)}
        shared |= {**os.environ, **shared, "ACCELERATE_USE_CPU": "true"}
        environments = [{**shared, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(n)]
        running = [Program(FILE, *command, env=environment) for environment in environments]
        out, errors = zip(*(process.communicate() for process in running), strict=True)
        if not left or not re.search("EADDRINUSE|address already in use", "".join(errors), re.IGNORECASE):
            break
    assert [process.returncode for process in running] == [0] * n, errors
    return "".join(out)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_accelerate_reads_each_kept_sample_once(shards: str, plan: str, tmp_path: Path) -> None:
    """Two processes, stopped after 6 steps; their last checkpoint, of step 5, is gone on from by one."""
    needs("accelerate")
    command = [str(EXAMPLES / "accelerate_loop.py"), shards, plan, "--side", "16", "--batch-size", "2"]
    command += ["--workers", "0", "--checkpoint", str(tmp_path / "ck")]

    def keys(n: int, *more: str) -> list[str]:
        (batches,) = read_epochs(launched(n, *command, *more)).values()
        return [key for batch in batches for key in batch]

    line = [key for batch in epochs(shards, plan, 1, 1)[0] for key in batch]
    assert Counter(keys(2, "--max-steps", "6")) == Counter(line[:24])
    assert keys(1) == line[20:]


def test_timm_reads_what_we_write_by_its_info_file(shards: str, plan: str, tmp_path: Path) -> None:
    samples = adq.ShardDataset(shards, plan=plan)
    adq.write_shards(samples, f"{tmp_path}/small/%06d.tar", plan=plan, max_samples=8)
    out = run("timm_loader.py", tmp_path / "small", "--side", 16, "--batch-size", 4, "--workers", 1)
    assert "training: 32 samples in 8 batches" in out, "whole batches, as timm trains"
    assert "validation: 30 samples in 8 batches, by label {0: 15, 1: 15}" in out
