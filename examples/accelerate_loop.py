"""Train with Accelerate on any number of processes, each kept sample once an epoch over all; run again, it goes on.

    adq run "train-{000000..000009}.tar" --keep 0.2 -o run/
    accelerate launch examples/accelerate_loop.py "train-{000000..000009}.tar" run/plan.parquet --checkpoint ck/

Model and optimizer go through `accelerator.prepare`; the loader does not. Our data set knows its rank and gives it its
share, in equal numbers. `prepare` would share that share out again: with dispatch_batches=True, its default here, only
process 0 reads, and the other shares are never seen; with dispatch_batches=False it refuses a loader that brings batches.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device

import adq_wds as adq


def scaled(sample: dict[str, Any]) -> dict[str, Any]:
    """Runs in the workers, so it has a name that they can import."""
    return {**sample, "image": sample["image"].float().flatten() / 255}


def main() -> None:
    """Read, train, save, print what was read."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("shards", help="tar files: a pattern in quotes, or a folder")
    arguments.add_argument("plan", help="plan.parquet")
    arguments.add_argument("--side", type=int, default=32)
    arguments.add_argument("--classes", type=int, default=10)
    arguments.add_argument("--epochs", type=int, default=1)
    arguments.add_argument("--workers", type=int, default=2)
    arguments.add_argument("--batch-size", type=int, default=64, help="of each process")
    arguments.add_argument("--max-steps", type=int, default=2**62, help="stop early, as if interrupted")
    arguments.add_argument("--checkpoint", type=Path, default=Path("checkpoint"))
    a = arguments.parse_args()

    accelerator = Accelerator()  # before the data set, which asks it for the rank
    dataset = adq.ShardDataset(
        a.shards,
        plan=a.plan,
        shuffle=True,
        batch_size=a.batch_size,
        pipes=[adq.Decode(to="torch"), adq.Map(scaled)],
        fields=("__key__", "image", "label"),
        rank=accelerator.process_index,
        world=accelerator.num_processes,
    )
    loader = adq.Loader(dataset, num_workers=a.workers)
    net = torch.nn.Linear(3 * a.side * a.side, a.classes)
    net, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.01))
    accelerator.register_for_checkpointing(loader)  # its small state, the same on all processes
    if a.checkpoint.exists():
        accelerator.load_state(a.checkpoint)

    step = 0
    while dataset.epoch < a.epochs and step < a.max_steps:
        epoch = dataset.epoch
        for keys, images, labels in loader:
            images, labels = send_to_device((images, labels), accelerator.device)
            loss = torch.nn.functional.cross_entropy(net(images), labels)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            print(f"epoch {epoch}, process {accelerator.process_index}: {' '.join(keys)}", flush=True)
            step += 1
            if step % 5 == 0:
                accelerator.save_state(a.checkpoint)
            if step >= a.max_steps:
                break
    # a process group that lives on at the end of its process may abort it: nothing refers to it any more, then it goes
    del loader, net, optimizer
    accelerator.free_memory()
    accelerator.end_training()


if __name__ == "__main__":
    main()
