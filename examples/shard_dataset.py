"""Train a small network on the kept samples of a plan, saving where it stands; run again, it goes on there.

    adq run "train-{000000..000009}.tar" --keep 0.2 -o run/
    python examples/shard_dataset.py "train-{000000..000009}.tar" run/plan.parquet --checkpoint state.json

Only kept bytes are read. Killed in mid-epoch, it resumes at the next batch, with any number of workers. (A real program
saves its network beside the state.)
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torchvision import transforms

import adq_wds as adq

AUGMENT = transforms.Compose(
    [
        transforms.RandomResizedCrop(32, scale=(0.5, 1.0)),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
    ]
)


def augment(sample: dict[str, Any]) -> dict[str, Any]:
    """Runs in the workers, so it has a name that they can import."""
    return {**sample, "image": AUGMENT(sample["image"])}


def main() -> None:
    """Read, train, save, print the loss."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("shards", help="tar files: a pattern in quotes, or a folder")
    arguments.add_argument("plan", help="plan.parquet")
    arguments.add_argument("--classes", type=int, default=10)
    arguments.add_argument("--epochs", type=int, default=2)
    arguments.add_argument("--workers", type=int, default=2)
    arguments.add_argument("--batch-size", type=int, default=64)
    arguments.add_argument("--checkpoint", type=Path, default=Path("state.json"))
    a = arguments.parse_args()

    dataset = adq.ShardDataset(
        a.shards,
        plan=a.plan,
        shuffle=True,
        batch_size=a.batch_size,
        pipes=[adq.Decode(), adq.Map(augment)],
        fields=("image", "label"),
    )
    loader = adq.Loader(dataset, num_workers=a.workers, persistent_workers=a.workers > 0)
    if a.checkpoint.exists():
        loader.load_state_dict(json.loads(a.checkpoint.read_text()))
    print(f"{dataset}, {len(loader)} batches an epoch")

    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(a.classes))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    while dataset.epoch < a.epochs:
        epoch, losses = dataset.epoch, []
        for step, (images, labels) in enumerate(loader):
            loss = torch.nn.functional.cross_entropy(net(images), labels)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
            optimizer.step()
            losses.append(float(loss.detach()))
            if step % 10 == 0:
                a.checkpoint.write_text(json.dumps(loader.state_dict()))
        a.checkpoint.write_text(json.dumps(loader.state_dict()))
        print(f"epoch {epoch}: {len(losses)} batches, mean loss {sum(losses) / max(1, len(losses)):.3f}")


if __name__ == "__main__":
    main()
