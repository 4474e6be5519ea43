"""Trains the demo's small classifier in parallel, and reuses stored accuracies."""

from __future__ import annotations

import hashlib
import logging
import platform
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from adq_wds.engines.threads import cores, pool_of_threads
from adq_wds.files import canonical_json

DEFINITION = 1  # of network and recipe; rises when equal images and seeds would give another accuracy
RATE, MOMENTUM, DECAY, BATCH = 0.05, 0.9, 5e-4, 32
MAX_THREADS = 4  # small networks spend much of their time holding the interpreter
logger = logging.getLogger("adq_wds")


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

    def id(self, test: Images) -> str:
        """SHA-256 over everything that determines the accuracy on `test`: equal ids, equal accuracy."""
        settings = [DEFINITION, torch.__version__, platform.machine(), self.seed, *map(len, self.epochs)]
        digest = hashlib.sha256(canonical_json(settings).encode())
        for images in (self.images, test):
            digest.update(images.pixels.tobytes() + images.labels.tobytes())
        digest.update(np.concatenate(self.epochs).astype("<i8").tobytes())
        return digest.hexdigest()


def accuracy_of(training: Training, test: Images, stop: threading.Event) -> float:
    """Train from scratch, an epoch on each array of rows; give the share of `test` that is classified rightly.

    Equal arguments give an equal answer on one machine: first weights and order come from a generator of its own, so
    trainings may run side by side in threads. SGD with momentum, its rate falling to zero in a straight line.
    """
    order = torch.Generator().manual_seed(training.seed)
    (pixels, labels), (test_pixels, test_labels) = training.images.tensors(), test.tensors()
    net = _net(order)
    optimizer = torch.optim.SGD(
        net.parameters(), lr=RATE, momentum=MOMENTUM, weight_decay=DECAY, nesterov=True
    )
    for epoch, rows in enumerate(training.epochs):
        if stop.is_set():
            break  # nobody waits for the answer
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


def train_all(
    trainings: list[Training],
    test: Images,
    known: dict[str, float],
    save: Callable[[], None],
    quiet: bool | None,
) -> list[float]:
    """The accuracy of each training on `test`, in [0, 1].

    Those in `known`, by `Training.id`, are reused. New ones are added to it, and `save` is called after each,
    so that an interrupted run loses only unfinished trainings.
    """
    ids = [training.id(test) for training in trainings]
    if n_known := sum(name in known for name in ids):
        logger.info("    %d of them are known from an earlier run", n_known)
    todo = {name: training for name, training in zip(ids, trainings, strict=True) if name not in known}
    stop = threading.Event()
    with (
        pool_of_threads(min(MAX_THREADS, cores()), "train") as pool,
        tqdm(total=len(todo), desc="train", disable=quiet) as bar,
    ):
        futures = {pool.submit(accuracy_of, training, test, stop): name for name, training in todo.items()}
        try:
            for future in as_completed(futures):
                known[futures[future]] = future.result()
                save()
                bar.update()
        finally:
            stop.set()
    return [known[name] for name in ids]
