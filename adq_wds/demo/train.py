"""Trains the demo's small classifier, in parallel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from adq_wds.engines.threads import cores, pool_of_threads

RATE, MOMENTUM, DECAY, BATCH = 0.05, 0.9, 5e-4, 32
MAX_THREADS = 4  # small networks spend much of their time holding the interpreter


@dataclass(frozen=True)
class Images:
    """Grey images in memory: pixels (N, 8, 8) uint8, labels (N,) int64, 0 … 9."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, 1, 8, 8) float32 around zero, and (N,) int64."""
        grey = torch.from_numpy(self.pixels).float().div(255).sub(0.3).mul(3)
        return grey.unsqueeze(1), torch.from_numpy(self.labels)


@dataclass(frozen=True)
class Training:
    """A training to be done."""

    arm: str
    seed: int  # of the plan, of first weights and of order
    images: Images
    epochs: Sequence[NDArray[np.int64]]  # rows (n,) of `images` for each epoch


def accuracy_of(training: Training, test: Images) -> float:
    """Train from scratch, an epoch on each array of rows; give the share of `test` that is classified rightly.

    Equal arguments give an equal answer on one machine: first weights and order come from a generator of its own, so
    trainings may run side by side in threads. SGD with momentum, its rate falling to zero in a straight line.
    """
    order = torch.Generator().manual_seed(training.seed)
    (pixels, labels), (test_pixels, test_labels) = training.images.tensors(), test.tensors()
    net = _net(order)
    optimizer = torch.optim.SGD(net.parameters(), RATE, MOMENTUM, weight_decay=DECAY, nesterov=True)
    for epoch, rows in enumerate(training.epochs):
        shuffled = torch.from_numpy(rows)[torch.randperm(len(rows), generator=order)]
        batches = torch.split(shuffled, BATCH)
        for step, batch in enumerate(batches):
            done = (epoch + step / len(batches)) / len(training.epochs)
            optimizer.param_groups[0]["lr"] = RATE * (1 - done)
            loss = F.cross_entropy(net(pixels[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
            optimizer.step()
    with torch.inference_mode():
        return float((net(test_pixels).argmax(1) == test_labels).double().mean())


def _net(generator: torch.Generator) -> nn.Sequential:
    """Two convolutions and a linear layer, 10,000 weights; drawn from `generator` alone."""
    with torch.device("meta"):  # first weights of torch's own would come from the shared random state
        net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),  # 8×8 -> 4×4
            nn.Flatten(), nn.Linear(32 * 4 * 4, 10),
        )  # fmt: skip
    net.to_empty(device="cpu")
    for name, weights in net.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(weights)
        else:
            nn.init.kaiming_uniform_(weights, nonlinearity="relu", generator=generator)
    return net


def train_all(trainings: list[Training], test: Images, quiet: bool | None) -> list[float]:
    """The accuracy of each training on `test`, in [0, 1], some at a time."""
    with pool_of_threads(min(MAX_THREADS, cores()), "train") as pool:
        accuracies = pool.map(lambda training: accuracy_of(training, test), trainings)
        return list(tqdm(accuracies, total=len(trainings), desc="train", disable=quiet))
