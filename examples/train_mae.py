"""Train a small masked autoencoder on any shards of images, to rebuild images from their kept patches.

    python examples/train_mae.py "cifar10-train-{000000..000009}.tar" --test "cifar10-test-{000000..000001}.tar" \\
        --scratch /tmp/mae

This made `builtin-mae` in the package. Each step drops patches of every image, a quarter as a rule, and the network is
to predict their pixels (squared error on dropped patches only), or with `--fill` what a mean of nearby pixels leaves of
them. In some of the images each patch is dropped by its own draw; in the others dropped patches lie together, as where
an importance chooses them. First weights let each head look at one neighbour (`--look-around`).
Stopped at any time, the same command goes on after the last checkpoint, with the batch and the draws that would have
come. The scratch folder gets the checkpoint, and with it `mae.safetensors` (moving average of the weights, float16,
ready for `load_mae`; settings, loss and PSNR so far in its header).

Source: He et al. 2022 (arXiv 2111.06377); small drop ratios, clumped draws, fill and average are ours.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

import adq_wds as adq
from adq_wds.files import atomic_path
from adq_wds.mae.checkpoints import save_mae
from adq_wds.mae.network import MaeSize, MaskedAutoencoder
from adq_wds.mae.patches import cut

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


# Data


def view(sample: dict[str, Any], rng: np.random.Generator, *, side: int) -> dict[str, Any]:
    """A random square of the whole short side, mirrored or not; runs in workers, so it has a name they can import."""
    image = sample["image"]
    width, height = image.size
    square = min(width, height)
    left, top = rng.integers(width - square + 1), rng.integers(height - square + 1)
    if image.size != (side, side):
        image = image.resize((side, side), box=(left, top, left + square, top + square), reducing_gap=3.0)
    pixels = np.asarray(image)
    return {"image": (pixels[:, ::-1] if rng.random() < 0.5 else pixels).copy()}


def images_of(pattern: str, a: argparse.Namespace, *, shuffle: bool) -> adq.ShardDataset:
    """Batches (B, side, side, 3) uint8 of all images of the shards; labels are not looked at."""
    return adq.ShardDataset(
        pattern,
        shuffle=shuffle,
        seed=a.seed,
        batch_size=a.batch,
        pipes=[adq.Decode(label=None), adq.Map(functools.partial(view, side=a.side), seed=a.seed)],
        fields=("image",),
    )


def draw_positions(
    n_images: int, grid: tuple[int, int], n_kept: int, clumped: float, generator: torch.Generator
) -> torch.Tensor:
    """Which places are kept: (B, K) int64. The first `clumped` share of the images drops patches that lie together."""
    rows, columns = grid
    scores = torch.rand(n_images, 1, rows, columns, generator=generator)
    n_clumped = round(clumped * n_images)
    if n_clumped:
        coarse = torch.randn(n_clumped, 1, 4, 4, generator=generator)
        scores[:n_clumped] += 2 * F.interpolate(coarse, size=grid, mode="bilinear", align_corners=True)
    return scores.flatten(1).topk(n_kept, dim=1).indices


def draw_n_kept(n_patches: int, a: argparse.Namespace, generator: torch.Generator) -> int:
    """How many patches a step keeps: `--drop` as a rule, else anything in `--drop-range`."""
    low, high = a.drop_range
    usual, ratio = torch.rand(2, generator=generator).tolist()
    dropped = a.drop if usual < a.usual else low + (high - low) * ratio
    return max(1, min(n_patches - 1, n_patches - round(float(dropped) * n_patches)))


# Training


def squared_error(network: MaskedAutoencoder, patches: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Mean squared error of the dropped patches, in the units the decoder predicts."""
    at = positions[:, :, None, None, None].expand(-1, -1, *patches.shape[2:])
    predicted = network(network.normalised(patches.gather(1, at)), positions).float()
    dropped = torch.ones(patches.shape[:2], device=patches.device).scatter_(1, positions, 0.0)
    each = (predicted - network.targets(patches, positions)).square().mean((2, 3, 4))  # (B, L)
    loss: torch.Tensor = (each * dropped).sum() / dropped.sum()
    return loss


AXIAL, DIAGONAL = ((0, 1), (0, -1), (1, 0), (-1, 0)), ((1, 1), (-1, -1), (1, -1), (-1, 1))


@torch.no_grad()
def look_around(network: MaskedAutoencoder, sharpness: float = 2.0) -> None:
    """First weights with which each head attends to one neighbour: right, left, below, above; diagonally in each second block.

    Sine positions make a step a rotation, so queries are rotated keys; over the frequencies that a head has room for,
    the logit is fitted to fall by sharpness · (columns² + rows²) around its neighbour. Nothing else is written where
    these frequencies stand, so that positions can be read in every block.

    Source: d'Ascoli et al. 2021 (arXiv 2103.10697), convolutional initialisation; for sine positions ours.
    """
    for blocks, enter in (
        (network.blocks, network.patch_embed.proj),
        (network.decoder_blocks, network.decoder_embed),
    ):
        for i, block in enumerate(blocks):
            attention: Any = block.attn
            D, n_heads = attention.qkv.in_features, attention.num_heads
            rank = D // n_heads
            for head in range(n_heads):
                step = (DIAGONAL if i % 2 else AXIAL)[head % 4]
                query, key = _step_weights(D, rank, step, max(network.size.grid), sharpness)
                rows = slice(head * rank, (head + 1) * rank)
                attention.qkv.weight[:D][rows] = query
                attention.qkv.weight[D : 2 * D][rows] = key
            mlp: Any = block.mlp
            for layer in (enter, attention.proj, mlp.fc2):
                layer.weight.unflatten(0, (4, D // 4))[:, : rank // 4] = 0
    if network.size.fill:
        torch.nn.init.zeros_(network.decoder_pred.weight)  # the fill alone is the first guess


def _step_weights(
    width: int, rank: int, step: tuple[int, int], side: int, sharpness: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Query and key weights (rank, D) of a head that looks `step` (rows, columns) away."""
    n, quarter = rank // 4, width // 4
    omega = 10_000 ** (-torch.arange(n) / quarter)  # the highest frequencies of `sine_positions`
    away = torch.arange(-side + 1.0, side)
    waves = torch.cat([torch.cos(away[:, None] * omega), torch.ones(len(away), 1)], dim=1)
    wanted = -sharpness * away.square().clamp(max=4)
    amount = torch.linalg.lstsq(
        torch.cat([waves, 0.2 * torch.eye(n + 1)]), torch.cat([wanted, torch.zeros(n + 1)])[:, None]
    ).solution[:n, 0]
    query, key = torch.zeros(2, rank, width)
    for axis, by in enumerate((step[1], step[0])):  # columns come first in the embedding
        for f in range(n):
            sin, cos = 2 * axis * quarter + f, (2 * axis + 1) * quarter + f
            row, turn = (2 * axis) * n + f, float(omega[f]) * by
            key[row, sin] = key[row + n, cos] = 1
            query[row, sin] = query[row + n, cos] = math.cos(turn)
            query[row, cos], query[row + n, sin] = math.sin(turn), -math.sin(turn)
            for r in (row, row + n):
                query[r] *= amount[f].sign() * amount[f].abs().sqrt() * rank**0.25
                key[r] *= amount[f].abs().sqrt() * rank**0.25
    return query, key


def rate_at(step: int, n_steps: int, warmup: int) -> float:
    """The learning rate's factor: up in a line, then half a cosine down to zero.

    >>> [round(rate_at(s, 10, 2), 2) for s in (0, 1, 2, 6, 10)]
    [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, n_steps - warmup)))


class Training:
    """Network, moving average, optimiser and place in the stream: all that a checkpoint holds."""

    def __init__(self, a: argparse.Namespace) -> None:
        torch.manual_seed(a.seed)
        self.a = a
        size = MaeSize(
            (a.side, a.side), a.patch,
            a.width, a.depth, a.heads, a.decoder_width, a.decoder_depth, a.decoder_heads,
            mean=MEAN, std=STD, norm_pix=a.norm_pix, fill=a.fill,
        )  # fmt: skip
        self.network = MaskedAutoencoder(size).to(a.device)
        if a.look_around:
            look_around(self.network)
        if a.device == "cpu":  # fused attention is slow for so few patches, backwards several times as slow
            for block in [*self.network.blocks, *self.network.decoder_blocks]:
                block.attn.fused_attn = False
        self.average = copy.deepcopy(self.network).requires_grad_(False).eval()
        matrices = [p for p in self.network.parameters() if p.requires_grad and p.ndim > 1]
        rest = [p for p in self.network.parameters() if p.requires_grad and p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": a.weight_decay}, {"params": rest, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95))
        self.dataset = images_of(a.train, a, shuffle=True)
        self.loader = adq.Loader(
            self.dataset, num_workers=a.workers, persistent_workers=a.workers > 0, generator=torch.Generator()
        )
        self.n_steps = a.epochs * len(self.loader)
        self.step = 0
        self.loss_sum, self.loss_steps, self.seconds = 0.0, 0, 0.0  # of the epoch so far
        self.history: list[dict[str, float]] = []

    def one_step(self, images: torch.Tensor) -> None:
        """Draw, predict, learn; what is drawn depends on seed and step alone."""
        start = time.perf_counter()
        a, grid = self.a, self.network.size.grid
        generator = torch.Generator().manual_seed(a.seed * 1_000_003 + self.step)
        n_kept = draw_n_kept(grid[0] * grid[1], a, generator)
        positions = draw_positions(len(images), grid, n_kept, a.clumped, generator).to(a.device)
        for group in self.optimizer.param_groups:
            group["lr"] = a.rate * rate_at(self.step, self.n_steps, a.warmup)
        patches = cut(images.to(a.device), a.patch)
        with torch.autocast(torch.device(a.device).type, torch.bfloat16, enabled=a.bfloat16):
            loss = squared_error(self.network, patches, positions)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        with torch.no_grad():
            weight = max(1 - a.average, 1 / self.step)
            for kept, new in zip(self.average.parameters(), self.network.parameters(), strict=True):
                kept.lerp_(new, weight)
        self.loss_sum, self.loss_steps = self.loss_sum + float(loss.detach()), self.loss_steps + 1
        self.seconds += time.perf_counter() - start

    def end_epoch(self) -> None:
        """Write down the epoch's mean loss, and PSNR where there are test shards."""
        entry = {"epoch": len(self.history) + 1, "loss": round(self.loss_sum / max(1, self.loss_steps), 5)}
        if self.a.test:
            entry["psnr_db"] = round(psnr(self.average, self.a), 3)
        self.history.append({**entry, "seconds": round(self.seconds)})
        self.loss_sum, self.loss_steps, self.seconds = 0.0, 0, 0.0
        print(json.dumps(self.history[-1]), flush=True)

    def save(self) -> None:
        """The checkpoint, and the averaged weights as they would ship."""
        state = {name: getattr(self, name).state_dict() for name in ("network", "average", "optimizer")}
        state |= {name: getattr(self, name) for name in _COUNTS} | {"stream": self.loader.state_dict()}
        with atomic_path(self.a.scratch / "checkpoint.pt") as partial:
            torch.save(state, partial)
        settings = {k: v for k, v in vars(self.a).items() if k not in _PLACES}
        reached = {"step": self.step, "of_steps": self.n_steps, **(self.history[-1] if self.history else {})}
        header = {"script": "examples/train_mae.py", "trained_on": self.a.trained_on}
        header |= {"settings": json.dumps(settings), "reached": json.dumps(reached)}
        save_mae(self.average, self.a.scratch / "mae.safetensors", header)

    def load(self) -> None:
        """Go on from the checkpoint, where there is one."""
        path = self.a.scratch / "checkpoint.pt"
        if not path.exists():
            return
        state = torch.load(path, weights_only=True)
        for name in ("network", "average", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        self.loader.load_state_dict(state["stream"])
        for name in _COUNTS:
            setattr(self, name, state[name])


def psnr(network: MaskedAutoencoder, a: argparse.Namespace) -> float:
    """PSNR in dB over all dropped pixels of the first test images, `--drop` of the patches dropped at random."""
    generator, L = torch.Generator().manual_seed(0), network.size.n_patches
    squares = n = 0.0
    dataset = images_of(a.test, a, shuffle=False)
    dataset.set_epoch(0)
    for i, (images,) in enumerate(dataset):
        if i * a.batch >= a.n_test:
            break
        positions = draw_positions(len(images), network.size.grid, L - round(a.drop * L), 0.0, generator)
        keep = torch.zeros(len(images), L, dtype=torch.bool).scatter_(1, positions, True)
        rebuilt = network.reconstruct(images.to(a.device), keep.to(a.device)).cpu()
        squares += float((rebuilt.double() - images.double()).square().sum())  # kept pixels add 0
        n += float((~keep).sum()) * a.patch**2 * 3
    return 10 * math.log10(255**2 * n / max(squares, 1e-9))


_COUNTS = ("step", "history", "loss_sum", "loss_steps", "seconds")
_PLACES = (
    "train",
    "test",
    "scratch",
    "trained_on",
    "threads",
    "workers",
    "device",
    "stop_after",
    "save_every",
)


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("train", help="shards to train on: a pattern in quotes, or a folder")
    made.add_argument("--test", help="shards to measure on")
    made.add_argument("--n-test", type=int, default=1000, help="test images to measure on")
    made.add_argument("--trained-on", default="CIFAR-10 train", help="what the header calls the data")
    made.add_argument("--scratch", type=Path, required=True, help="folder for all that is written")
    made.add_argument("--side", type=int, default=32, help="of the images, in pixels")
    made.add_argument("--patch", type=int, default=4, help="side of a patch")
    made.add_argument("--width", type=int, default=128)
    made.add_argument("--depth", type=int, default=6)
    made.add_argument("--heads", type=int, default=4)
    made.add_argument("--decoder-width", type=int, default=96)
    made.add_argument("--decoder-depth", type=int, default=3)
    made.add_argument("--decoder-heads", type=int, default=4)
    yes_or_no: Any = {"action": argparse.BooleanOptionalAction, "default": True}
    made.add_argument("--fill", **yes_or_no, help="predict what the mean of nearby pixels leaves")
    made.add_argument("--look-around", **yes_or_no, help="first weights that attend to neighbours")
    made.add_argument("--norm-pix", action="store_true", help="predict patches without their mean, scaled")
    made.add_argument("--drop", type=float, default=0.25, help="the usual share of patches dropped")
    made.add_argument(
        "--usual", type=float, default=0.75, help="share of the steps that drop the usual share"
    )
    made.add_argument("--drop-range", type=float, nargs=2, default=(0.15, 0.6), help="in the other steps")
    made.add_argument("--clumped", type=float, default=0.4, help="share of images whose drops lie together")
    made.add_argument("--epochs", type=int, default=24)
    made.add_argument("--batch", type=int, default=64)
    made.add_argument("--rate", type=float, default=4e-3, help="the highest learning rate")
    made.add_argument("--warmup", type=int, default=300, help="steps in which the rate rises")
    made.add_argument("--weight-decay", type=float, default=0.02)
    made.add_argument(
        "--average", type=float, default=0.998, help="decay of the moving average of the weights"
    )
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--device", default="cpu")
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--workers", type=int, default=0)
    made.add_argument("--save-every", type=int, default=200, help="steps between checkpoints")
    made.add_argument("--stop-after", type=int, help="stop after so many steps in all, to try things out")
    made.add_argument("--bfloat16", **yes_or_no, help="products in bfloat16")
    return made


def main(argv: list[str] | None = None) -> None:
    """Train from the last checkpoint to the end."""
    a = arguments().parse_args(argv)
    torch.set_num_threads(a.threads)
    a.scratch.mkdir(parents=True, exist_ok=True)
    training = Training(a)
    training.load()
    while training.step < training.n_steps:
        done = training.step % len(training.loader)
        bar = tqdm(training.loader, total=len(training.loader), initial=done, disable=None, leave=False)
        for (images,) in bar:
            training.one_step(images)
            ended = training.step % len(training.loader) == 0
            if ended:
                training.end_epoch()
            if ended or training.step % a.save_every == 0 or training.step == a.stop_after:
                training.save()
            if training.step == a.stop_after:
                return


if __name__ == "__main__":
    main()
