"""How do I get a diffusion network for `adq vary`? Train a small UNet over pixels on any shards.

    pip install "adq-wds[dda]"
    python examples/train_unet.py "train-{000000..000009}.tar" -o unet/ --side 32 --classes 10 --steps 20000
    adq vary "train-{000000..000009}.tar" --unet unet/ --strength 0.5 --variants 2 -o variants/

The UNet knows the classes, and one more for "no class", which 15 % of the images are trained with; so one network varies
with labels and without. Killed and started again, it goes on from the last checkpoint, to the same weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel

import adq_wds as adq

NO_CLASS = 0.15  # share of images trained without their class


def train_unet(
    shards: Any,
    out: str | Path,
    *,
    side: int,
    classes: int,
    steps: int,
    channels: tuple[int, ...] = (24, 48),
    batch_size: int = 64,
    rate: float = 2e-3,
    seed: int = 0,
    device: str = "cpu",
    save_every: int = 500,
) -> None:
    """Train, and save a folder that `load_unet` and `load_scheduler` read."""
    torch.manual_seed(seed)
    deep = len(channels) - 1
    unet = UNet2DModel(
        sample_size=side, num_class_embeds=classes + 1, block_out_channels=channels, layers_per_block=1,
        down_block_types=("DownBlock2D",) * deep + ("AttnDownBlock2D",), attention_head_dim=8,
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * deep, norm_num_groups=8,
    ).to(device)  # fmt: skip
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    adam = torch.optim.AdamW(unet.parameters(), lr=rate)
    pipes = [adq.Decode(to="pil"), adq.Map(Square(side))]
    options: dict[str, Any] = {"shuffle": True, "seed": seed, "uneven": "drop", "batch_size": batch_size}
    loader = adq.Loader(adq.ShardDataset(shards, pipes=pipes, fields=("image", "label"), **options))
    state, first = Path(out) / "state.pt", 0
    if state.exists():
        saved = torch.load(state, map_location=device, weights_only=True)
        unet.load_state_dict(saved["unet"])
        adam.load_state_dict(saved["adam"])
        loader.load_state_dict(saved["loader"])
        first = saved["step"]
    stream = endless(loader)
    for step in range(first, steps):
        images, labels = next(stream)
        draws = torch.Generator().manual_seed(seed * 1_000_003 + step)
        noise = torch.randn(images.shape, generator=draws).to(device)
        t = torch.randint(0, 1000, (len(images),), generator=draws).to(device)
        unknown = torch.rand(len(images), generator=draws) < NO_CLASS
        told = torch.where(unknown, classes, labels).to(device)
        noised = scheduler.add_noise(images.to(device), noise, t)
        loss = F.mse_loss(unet(noised, t, class_labels=told).sample, noise)
        adam.param_groups[0]["lr"] = rate * min(1, (step + 1) / 50) * (1 - step / steps)
        adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
        adam.step()
        if (step + 1) % save_every == 0 or step + 1 == steps:
            Path(out).mkdir(parents=True, exist_ok=True)
            saved = {"unet": unet.state_dict(), "adam": adam.state_dict(), "loader": loader.state_dict()}
            torch.save({**saved, "step": step + 1}, state.with_suffix(".new"))
            state.with_suffix(".new").replace(state)
            print(f"step {step + 1} of {steps}: loss {float(loss.detach()):.4f}", flush=True)
    unet.save_pretrained(out)
    scheduler.save_pretrained(out)


class Square:
    """Makes the image a tensor (3, side, side) in [-1, 1]."""

    def __init__(self, side: int) -> None:
        self.side = side

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        pixels = np.asarray(sample["image"].resize((self.side, self.side)), dtype=np.float32)
        return {**sample, "image": torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1).contiguous()}


def endless(loader: adq.Loader) -> Iterator[Any]:
    """One epoch after another."""
    while True:
        yield from loader


def main() -> None:
    """Read the arguments, and train."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("shards", nargs="+", help="tar shards with images and integer labels (cls)")
    parser.add_argument("-o", "--out", required=True, help="folder of the UNet; an earlier training goes on")
    parser.add_argument("--side", type=int, required=True, help="images are drawn to side x side pixels")
    parser.add_argument("--classes", type=int, required=True)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--channels", type=int, nargs="+", default=[64, 128, 128])
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--save-every", type=int, default=500, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    a = vars(parser.parse_args())
    train_unet(a.pop("shards"), a.pop("out"), channels=tuple(a.pop("channels")), **a)


if __name__ == "__main__":
    main()
