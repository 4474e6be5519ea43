"""Train a small network for an epoch on the kept samples of a plan, in a stock WebDataset pipeline.

    adq run "train-{000000..000009}.tar" --keep 0.2 -o run/
    python examples/webdataset_loop.py "train-{000000..000009}.tar" run/plan.parquet

The one line that `adq_wds` adds is `.compose(adq.Subsample(plan))`, before decoding.
"""

from __future__ import annotations

import argparse

import torch
import webdataset as wds
from torchvision import transforms

import adq_wds as adq


def main() -> None:
    """Read, train, print the loss."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("shards", help="WebDataset pattern")
    arguments.add_argument("plan", help="plan.parquet")
    arguments.add_argument("--classes", type=int, default=10)
    arguments.add_argument("--side", type=int, default=32)
    arguments.add_argument("--epochs", type=int, default=1)
    arguments.add_argument("--workers", type=int, default=2)
    a = arguments.parse_args()

    plan = adq.load_plan(a.plan)
    augment = transforms.Compose(
        [
            transforms.RandomResizedCrop(a.side, scale=(0.5, 1.0)),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
        ]
    )
    dataset = (
        wds.WebDataset(a.shards, shardshuffle=100, empty_check=False)
        .compose(adq.Subsample(plan))  # the one line
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg;png;webp", "cls")
        .map_tuple(augment)
        .batched(64)
    )
    loader = wds.WebLoader(dataset, batch_size=None, num_workers=a.workers)

    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 32, 3, stride=2, padding=1), torch.nn.BatchNorm2d(32), torch.nn.ReLU(),
        torch.nn.Conv2d(32, 64, 3, stride=2, padding=1), torch.nn.BatchNorm2d(64), torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(1024, a.classes),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    print(f"{len(plan):,} of {plan.n_samples:,} samples")
    for epoch in range(a.epochs):
        seen, total = 0, 0.0
        for images, labels in loader:
            loss = torch.nn.functional.cross_entropy(net(images), labels)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
            optimizer.step()
            seen += len(images)
            total += float(loss.detach()) * len(images)
            if seen % 1024 < 64:
                print(f"epoch {epoch}: {seen:,} samples, mean loss {total / seen:.3f}")


if __name__ == "__main__":
    main()
