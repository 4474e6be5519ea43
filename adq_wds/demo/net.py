"""How well does a small network do after training on these images? The classifier of `adq demo`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

DEFINITION = 1  # of network and recipe; rises when equal images and seeds would give another accuracy
RATE, MOMENTUM, DECAY, BATCH = 0.05, 0.9, 5e-4, 32


@dataclass(frozen=True)
class Images:
    """Labelled grey images, held in memory.

    Attributes:
        pixels: (N, 8, 8) uint8.
        labels: (N,) int64, 0 … C − 1.
    """

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, 1, 8, 8) float32 around zero, and (N,) int64."""
        grey = torch.from_numpy(self.pixels).float().div(255).sub(0.3).mul(3)
        return grey.unsqueeze(1), torch.from_numpy(self.labels)


def accuracy_after(
    train: Images, epochs: Iterable[NDArray[np.int64]], n_epochs: int, test: Images, *, seed: int
) -> float:
    """Train from scratch, an epoch on each array of rows, and count what is right on `test`.

    Equal arguments give an equal answer on one machine: first weights and order come from generators of their own,
    so trainings may run side by side in threads. SGD with momentum, its rate falling to zero in a straight line.

    Args:
        train: the images that rows stand for.
        epochs: the rows (n,) of each epoch, n >= 1.
        n_epochs: how many there are, for the rate.
        test: what is counted on.
        seed: of first weights and order.

    Returns:
        the share of `test` classified rightly, in [0, 1].

    Source: ours.
    """
    order = torch.Generator().manual_seed(seed)
    net = _net(int(max(train.labels.max(), test.labels.max())) + 1, order)
    optimizer = torch.optim.SGD(
        net.parameters(), lr=RATE, momentum=MOMENTUM, weight_decay=DECAY, nesterov=True
    )
    pixels, labels = train.tensors()
    for epoch, rows in enumerate(epochs):
        shuffled = torch.from_numpy(rows)[torch.randperm(len(rows), generator=order)]
        batches = torch.split(shuffled, BATCH)
        for step, batch in enumerate(batches):
            optimizer.param_groups[0]["lr"] = RATE * (1 - (epoch + step / len(batches)) / n_epochs)
            loss = F.cross_entropy(net(pixels[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
            optimizer.step()
    pixels, labels = test.tensors()
    with torch.inference_mode():
        return float((net(pixels).argmax(1) == labels).double().mean())


def _net(n_classes: int, generator: torch.Generator) -> nn.Sequential:
    """Two convolutions and a linear layer, 10,000 weights; drawn from `generator` alone."""
    with torch.device("meta"):  # first weights of torch's own would come from the shared random state
        net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),  # 8×8 -> 4×4
            nn.Flatten(), nn.Linear(32 * 4 * 4, n_classes),
        )  # fmt: skip
    net.to_empty(device="cpu")
    for name, weights in net.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(weights)
        else:
            nn.init.kaiming_uniform_(weights, nonlinearity="relu", generator=generator)
    return net
