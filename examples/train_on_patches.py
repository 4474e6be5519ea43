"""Train on images whose dropped patches are rebuilt on the device that trains, batch by batch.

Shards that hold patches (``adq write SHARDS --patch-keep 0.75 -o "small/%06d.tar"``), with a masked autoencoder for them:

    python examples/train_on_patches.py "small/*.tar" --mae mae_visualize_vit_base.pth --classes 1000 --device cuda

Other shards as they are, patches dropped on the way; the built-in network is for 32 × 32 images, as of CIFAR-10:

    python examples/train_on_patches.py "cifar10-train-*.tar" --mae builtin --drop gradcam++ --keep 0.75
"""

from __future__ import annotations

import argparse
from typing import Any

import timm
import torch
from tqdm import tqdm

import adq_wds as adq


def main() -> None:
    """Read, rebuild, train, print the loss."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("shards", help="tar files: a pattern in quotes, a folder or URLs")
    arguments.add_argument("--mae", default="builtin", help="checkpoint of the masked autoencoder")
    arguments.add_argument("--allow-pickle", action="store_true", help="let it be a .pth file: tensors only")
    arguments.add_argument(
        "--drop", help="importance by which patches are dropped on the way, such as gradcam++"
    )
    arguments.add_argument("--keep", type=float, default=0.75, help="ratio of patches kept, with --drop")
    arguments.add_argument("--model", default="resnet18", help="a classifier of timm")
    arguments.add_argument("--classes", type=int, default=10)
    arguments.add_argument("--epochs", type=int, default=2)
    arguments.add_argument("--batch-size", type=int, default=64)
    arguments.add_argument("--workers", type=int, default=2)
    arguments.add_argument("--device", default="cpu")
    a = arguments.parse_args()

    mae = adq.load_mae(a.mae, device=a.device, allow_pickle=a.allow_pickle)
    pipes: list[adq.Pipe] = [adq.Decode(to="patches")]
    if a.drop:
        importance = adq.importance(a.drop, patch=mae.size.patch)
        pipes = [adq.Decode(), adq.DropPatches(importance, keep=a.keep, size=mae.size.image_size[0])]
    fields = ("patches", "positions", "grid", "label")
    dataset = adq.ShardDataset(a.shards, pipes=pipes, fields=fields, batch_size=a.batch_size, shuffle=True)
    loader = adq.Loader(dataset, num_workers=a.workers)

    torch.manual_seed(0)
    model: Any = timm.create_model(a.model, num_classes=a.classes)  # type: ignore[attr-defined, unused-ignore]
    model = model.to(a.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for epoch in range(a.epochs):
        losses = []
        rebuilt = adq.reconstruct_batches(loader, mae, device=a.device)
        for images, labels in tqdm(rebuilt, total=len(loader), disable=None, leave=False):
            loss = torch.nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
            optimizer.step()
            losses.append(float(loss.detach()))
        size = "x".join(map(str, images.shape[2:]))
        print(f"epoch {epoch}: {len(losses)} batches of {size}, mean loss {sum(losses) / len(losses):.3f}")


if __name__ == "__main__":
    main()
