"""Train a small vision transformer straight on kept patches and their positions: nothing is rebuilt, less is computed.

    adq write "train-{000000..000009}.tar" --patch-keep 0.75 --importance gradcam++ -o "small/%06d.tar"
    python examples/vit_on_patches.py "small/*.tar" --classes 1000

Other shards are taken as they are, and their patches dropped on the way, for instance of CIFAR-10:

    python examples/vit_on_patches.py "cifar10-train-*.tar" --size 32 --patch 4 --drop random --keep 0.5
"""

from __future__ import annotations

import argparse
from typing import Any

import timm
import torch
from tqdm import tqdm

import adq_wds as adq


def forward(vit: Any, patches: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Logits (B, C) of a timm ViT that sees kept patches (B, K, P, P, 3) uint8 and where they were, (B, K)."""
    x = (patches.flatten(0, 1).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5  # (B·K, 3, P, P)
    x = vit.patch_embed.proj(x).view(*positions.shape, -1)  # each patch is an image of one patch: (B, K, D)
    x = x + vit.pos_embed[0, 1:][positions]
    first = (vit.cls_token + vit.pos_embed[:, :1]).expand(len(x), -1, -1)
    logits: torch.Tensor = vit.forward_head(vit.norm(vit.blocks(vit.norm_pre(torch.cat([first, x], dim=1)))))
    return logits


def main() -> None:
    """Read, train, print the loss."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("shards", help="tar files: a pattern in quotes, or a folder")
    arguments.add_argument("--size", type=int, default=224, help="side of the images")
    arguments.add_argument("--patch", type=int, default=16)
    arguments.add_argument(
        "--drop", help="importance by which patches are dropped on the way, such as random"
    )
    arguments.add_argument("--keep", type=float, default=0.75, help="ratio of patches kept, with --drop")
    arguments.add_argument("--model", default="vit_tiny_patch16_224", help="a ViT of timm, for its blocks")
    arguments.add_argument("--depth", type=int, default=12, help="blocks of it")
    arguments.add_argument("--classes", type=int, default=10)
    arguments.add_argument("--epochs", type=int, default=2)
    arguments.add_argument("--batch-size", type=int, default=64)
    arguments.add_argument("--workers", type=int, default=2)
    a = arguments.parse_args()

    pipes: list[adq.Pipe] = [adq.Decode(to="patches")]
    if a.drop:
        importance = adq.importance(a.drop, patch=a.patch)
        pipes = [adq.Decode(), adq.DropPatches(importance, keep=a.keep, size=a.size)]
    fields = ("patches", "positions", "grid", "label")
    dataset = adq.ShardDataset(a.shards, pipes=pipes, fields=fields, batch_size=a.batch_size, shuffle=True)
    loader = adq.Loader(dataset, num_workers=a.workers)

    torch.manual_seed(0)
    sizes = {"img_size": a.size, "patch_size": a.patch, "depth": a.depth, "num_classes": a.classes}
    vit: Any = timm.create_model(a.model, **sizes)  # type: ignore[attr-defined, unused-ignore]
    optimizer = torch.optim.AdamW(vit.parameters(), lr=5e-4)
    for epoch in range(a.epochs):
        losses = []
        for patches, positions, grid, labels in tqdm(loader, disable=None, leave=False):
            if not (grid == torch.tensor(vit.patch_embed.grid_size)).all():
                raise SystemExit(
                    f"images of {grid[0].tolist()} patches, the ViT's have {vit.patch_embed.grid_size}"
                )
            loss = torch.nn.functional.cross_entropy(forward(vit, patches, positions), labels)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
            optimizer.step()
            losses.append(float(loss.detach()))
        seen = f"{patches.shape[1]} of {vit.patch_embed.num_patches} patches"
        print(f"epoch {epoch}: {len(losses)} batches of {seen}, mean loss {sum(losses) / len(losses):.3f}")


if __name__ == "__main__":
    main()
