"""Train in torchdata.nodes, decoding in threads, saving where it stands; run again, it goes on there.

    adq run "train-{000000..000009}.tar" --keep 0.2 -o run/
    python examples/torchdata_nodes.py "train-{000000..000009}.tar" run/plan.parquet --checkpoint nodes.json

`adq.as_node(dataset, *pipes)` is a node like any other. What draws anew in each epoch stands right on the data set, here
or in its `pipes=`; other work may go to a `ParallelMapper`, as a pipe's `apply` takes a list of samples.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchdata.nodes as tn

import adq_wds as adq

DECODE = adq.Decode(to="torch")


def draw_flip(sample: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """A generator of the sample's own: the same draw whoever makes it, another one in every epoch."""
    return {**sample, "flip": bool(rng.random() < 0.5)}


def to_batch(samples: list[dict[str, Any]]) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """Runs in the mapper's threads: decode, flip, stack."""
    decoded = DECODE.apply(samples)
    images = [s["image"].flip(-1) if s["flip"] else s["image"] for s in decoded]
    labels = torch.tensor([s["label"] for s in decoded])
    return [s["__key__"] for s in decoded], torch.stack(images).float() / 255, labels


def main() -> None:
    """Read, train, save, print what was read."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("shards", help="tar files: a pattern in quotes, or a folder")
    arguments.add_argument("plan", help="plan.parquet")
    arguments.add_argument("--classes", type=int, default=10)
    arguments.add_argument("--epochs", type=int, default=2)
    arguments.add_argument("--max-steps", type=int, default=2**62, help="stop early, as if interrupted")
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--batch-size", type=int, default=64)
    arguments.add_argument("--checkpoint", type=Path, default=Path("nodes.json"))
    a = arguments.parse_args()

    dataset = adq.ShardDataset(a.shards, plan=a.plan, shuffle=True)
    samples = tn.Batcher(adq.as_node(dataset, adq.Map(draw_flip)), a.batch_size, drop_last=False)
    batches = tn.ParallelMapper(samples, to_batch, a.threads, method="thread")
    loader = tn.Loader(tn.Prefetcher(batches, 4), restart_on_stop_iteration=False)

    saved = {"epoch": 0, "step": 0}
    if a.checkpoint.exists():
        saved = json.loads(a.checkpoint.read_text())
        loader.load_state_dict(saved["loader"])
    step = saved["step"]
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(a.classes))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    for epoch in range(saved["epoch"], a.epochs):
        for keys, images, labels in loader:
            loss = torch.nn.functional.cross_entropy(net(images), labels)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
            optimizer.step()
            print(f"epoch {epoch}, batch {step}: {' '.join(keys)}")
            step += 1
            state = {"epoch": epoch, "step": step, "loader": loader.state_dict()}
            a.checkpoint.write_text(json.dumps(state))
            if step >= a.max_steps:
                return


if __name__ == "__main__":
    main()
