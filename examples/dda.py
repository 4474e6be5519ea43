"""How do I train a student when the data are gone? From a teacher alone: synthesize, vary by diffusion, distil.

    pip install "adq-wds[dda,demo]"
    python examples/dda.py

Digits of 8 x 8 pixels, on a CPU. The teacher is trained on real digits. From then on only its weights are used: images
are made from them, a small diffusion network learns these and varies them, each variant is scored against its parent,
and a student learns the teacher's answers on all of it. The real digits return for the last column alone.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from train_unet import train_unet

import adq_wds as adq
from adq_wds.demo.digits import write_digits
from adq_wds.jobs.vary import vary_shards
from adq_wds.models.diffusion import load_sdedit
from adq_wds.models.inversion import Recipe

TEMPERATURE, RECIPE = 4.0, Recipe(steps=100, rate=0.05, shift=1)
Loss = Callable[["Net", torch.Tensor, torch.Tensor], torch.Tensor]  # of a network, images and their rows


class Net(nn.Module):
    """Three convolutions with BatchNorm over the grey image, and a linear layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after, stride in ((1, width, 1), (width, 2 * width, 2), (2 * width, 2 * width, 1)):
            layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.head = nn.Linear(8 * width, 10)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 3, 8, 8) in [0, 1] to (B, 8 * width)."""
        return self.body((x.mean(1, keepdim=True) - 0.3) * 3)  # type: ignore[no-any-return]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 3, 8, 8) in [0, 1] to logits (B, 10)."""
        return self.head(self.features(x))  # type: ignore[no-any-return]


class Encode:
    """The teacher as an encoder: its penultimate features and logits."""

    def __init__(self, teacher: Net) -> None:
        self.teacher = teacher

    def __call__(self, images: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255
        return self.teacher.features(pixels), self.teacher(pixels)


def load(shards: Any, plan: adq.Plan | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, 3, 8, 8) images in [0, 1] and (N,) labels."""
    ds = adq.ShardDataset(shards, plan=plan, pipes=[adq.Decode(to="torch")], fields=("image", "label"))
    images, labels = zip(*ds, strict=True)
    return torch.stack(images) / 255, torch.tensor(labels)


def fit(width: int, images: torch.Tensor, steps: int, seed: int, loss_of: Loss) -> Net:
    """Train a new network by SGD over images shifted by up to one pixel, each by a draw of its own."""
    torch.manual_seed(seed)
    net, draws = Net(width), torch.Generator().manual_seed(seed)
    sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, steps)
    padded = F.pad(images, (1, 1, 1, 1))
    shifted = torch.stack([padded[:, :, y : y + 8, x : x + 8] for y in range(3) for x in range(3)])
    net.train()
    for _ in range(steps):
        rows = torch.randint(len(images), (64,), generator=draws)
        loss = loss_of(net, shifted[torch.randint(9, (64,), generator=draws), rows], rows)
        sgd.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        sgd.step()
        schedule.step()
    return net.eval().requires_grad_(False)


def label_loss(labels: torch.Tensor) -> Loss:
    """Cross-entropy with the labels."""
    return lambda net, x, rows: F.cross_entropy(net(x), labels[rows])


def agreement_loss(teacher: Net) -> Loss:
    """KL(teacher‖student) of the answers at a temperature."""

    def loss(student: Net, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        target = (teacher(x) / TEMPERATURE).log_softmax(1)
        answer = (student(x) / TEMPERATURE).log_softmax(1)
        return F.kl_div(answer, target, reduction="batchmean", log_target=True) * TEMPERATURE**2

    return loss


def main() -> None:
    """Teacher, bank, variants, students, table; the seed decides on the split and all that follows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-o", "--out", default="dda/", help="folder for bank, UNet and variants")
    parser.add_argument("--rounds", type=int, default=10, help="of 200 images each")
    parser.add_argument("--steps", type=int, default=1500, help="of every student")
    parser.add_argument("--teacher-steps", type=int, default=1500)
    parser.add_argument("--unet-steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    out, start = Path(a.out), time.monotonic()
    digits = write_digits(out / "digits")
    every, classes = load([*digits["train"], *digits["test"]])
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(a.seed))
    (test, images), (truth, labels) = ((x[order[:539]], x[order[539:]]) for x in (every, classes))
    teacher = fit(16, images, a.teacher_steps, a.seed, label_loss(labels))
    bank = adq.synthesize(teacher, out / "bank", side=8, rounds=a.rounds, recipe=RECIPE, seed=a.seed)
    unet = out / f"unet-{a.rounds}"  # a bank that grew is another set
    train_unet(bank, unet, side=8, classes=10, steps=a.unet_steps, seed=a.seed)
    engine = load_sdedit(unet, strength=0.5, steps=20)
    encoder = adq.encoder(Encode(teacher), name="teacher", revision=f"seed {a.seed}")
    vary_shards(bank, engine, encoder, out / "variants", overwrite=True, seed=a.seed, batch_size=200)
    variants = str(out / "variants" / "variant-0" / "*.tar")
    half = adq.select_samples(variants, by="json:cos", keep=0.5)

    parents, varied = load(bank)[0], load(variants)[0]
    some = torch.randperm(len(varied), generator=torch.Generator().manual_seed(a.seed))[: len(varied) // 2]
    more = {"variants": varied, "top half by cosine": load(variants, half)[0], "random half": varied[some]}
    arms = {"bank": parents} | {f"bank + {name}": torch.cat([parents, x]) for name, x in more.items()}
    arms["real digits"] = images
    answers = teacher(every).argmax(1)
    print(f"{'student on':28} {'images':>7} {'accuracy %':>11} {'agreement with teacher %':>25}")
    students = {arm: fit(8, x, a.steps, a.seed, agreement_loss(teacher)) for arm, x in arms.items()}
    nets = {"teacher": teacher} | students
    accuracy = {arm: 100 * float((net(test).argmax(1) == truth).float().mean()) for arm, net in nets.items()}
    for arm, net in nets.items():
        agree = 100 * float((net(every).argmax(1) == answers).float().mean())
        print(f"{arm:28} {len(arms.get(arm, images)):7} {accuracy[arm]:11.1f} {agree:25.1f}")
    print(f"{time.monotonic() - start:.0f} seconds\ndata-free student: {accuracy['bank + variants']:.1f}")


if __name__ == "__main__":
    main()
