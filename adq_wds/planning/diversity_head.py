"""Trains projection heads that ignore small changes of an image, and scores the diversity of bins in their output."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from adq_wds.core.rng import draw
from adq_wds.core.scores import diversity_of_views

logger = logging.getLogger("adq_wds")

WIDTH = 128  # E, of a projection
TEMPERATURE = 0.07
LEARNING_RATE = 1e-3
BATCH = 512  # images, so 1,024 rows
EPOCHS = 10
N_SEEDS = 3
DEFINITION = f"1: D-D-{WIDTH}, ReLU; NT-Xent {TEMPERATURE}, Adam {LEARNING_RATE}, batch {BATCH}, {EPOCHS} epochs; {N_SEEDS} seeds"  # its number changes when the numbers of a head change for the same settings

Progress = Callable[[int], object]


def new_head(width: int, *, seed: int) -> nn.Sequential:
    """An untrained head D → D → 128 with a ReLU between, float32, drawn from a generator of its own.

    Weights and biases of both layers are uniform in ±1/√D, which is what PyTorch gives a linear layer.

    Args:
        width: D.
        seed: of the draw; the global random state is neither used nor changed.

    >>> [tuple(parameter.shape) for parameter in new_head(64, seed=0).parameters()]
    [(64, 64), (64,), (128, 64), (128,)]
    """
    with torch.device("meta"):  # no first weights: they would draw from the caller's random state
        layers = [nn.Linear(width, n, dtype=torch.float32) for n in (width, WIDTH)]
        head = nn.Sequential(layers[0], nn.ReLU(), layers[1]).requires_grad_(False)
    generator, bound = _generator(seed, "weights"), 1 / math.sqrt(width)
    with _plain_cpu():
        head.to_empty(device="cpu")
        for parameter in head.parameters():
            parameter.uniform_(-bound, bound, generator=generator)
    return head


def contrastive(
    z: NDArray[np.float16], *, seed: int = 0, epochs: int = EPOCHS, progress: Progress | None = None
) -> nn.Sequential:
    """Train one head for the whole set to tell the views of an image from those of others.

    InfoNCE over the 2·B rows of a batch (NT-Xent, τ = 0.07), Adam at 1e-3, batches of 512 images in an order drawn for
    each epoch, float32, on the CPU in one thread, so equal views and an equal seed give an equal head on one
    machine. Fewer than two images leave the head untrained.

    Args:
        z: (M, 2, D) float16, two unit rows (or zero rows) for each of M images.
        seed: of first weights and order; the global random state is neither used nor changed.
        epochs: passes over the images, >= 0.
        progress: called with numbers that add up to `epochs`.

    Source: Li et al. 2024 (arXiv 2412.16895) train a contrastive head; the loss is that of Chen et al. 2020 (SimCLR,
    arXiv 2002.05709); width, rate, batch and epochs are ours.
    """
    head = new_head(z.shape[2], seed=seed)
    if len(z) < 2:
        logger.warning("views of %d images: no two to tell apart, so the head stays untrained", len(z))
        if progress is not None:
            progress(epochs)
        return head
    generator = _generator(seed, "order")
    with _plain_cpu(), torch.enable_grad():
        optimiser = torch.optim.Adam(head.requires_grad_(True).parameters(), lr=LEARNING_RATE)
        views = torch.tensor(z)  # (M, 2, D) float16
        for _ in range(epochs):
            for batch in torch.split(torch.randperm(len(views), generator=generator), BATCH):
                optimiser.zero_grad()
                loss = info_nce(head(views[batch].float()))
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
            if progress is not None:
                progress(1)
    return head.requires_grad_(False)


def info_nce(projected: torch.Tensor) -> torch.Tensor:
    """Mean loss of picking the other view of the same image among all other rows of a batch.

    Args:
        projected: (B, 2, E) float32, two views of B images, of any length.

    Returns:
        scalar: the mean over the 2·B rows of −log softmax of cos/τ at the other view, the row itself left out.

    Source: Chen et al. 2020 (SimCLR, arXiv 2002.05709), NT-Xent.

    >>> round(float(info_nce(torch.ones(2, 2, 3))), 4)  # three others, all alike: log 3
    1.0986
    """
    B = len(projected)
    rows = F.normalize(projected.transpose(0, 1).reshape(2 * B, -1), dim=1)  # first views, then second ones
    logits = rows @ rows.T / TEMPERATURE  # (2B, 2B)
    logits = logits.masked_fill(torch.eye(2 * B, dtype=torch.bool), -torch.inf)
    other = torch.arange(2 * B).roll(B)
    return F.cross_entropy(logits, other)


def project(head: nn.Sequential, z: NDArray[np.float16]) -> NDArray[np.float64]:
    """Views through a head: (M, 2, E) float64 unit rows, zero where the head gives zero; one thread, as `contrastive`."""
    with _plain_cpu(), torch.inference_mode():
        rows = torch.cat([head(part.float()).double() for part in torch.split(torch.tensor(z), BATCH)])
        norm = rows.norm(dim=2, keepdim=True)
        unit: NDArray[np.float64] = (rows / torch.where(norm > 0, norm, 1.0)).numpy()
    return unit


def head_diversity(
    z: NDArray[np.float16],
    bin: NDArray[np.integer],
    n_bins: int,
    *,
    size: NDArray[np.int64] | None = None,
    seed: int = 0,
    epochs: int = EPOCHS,
    progress: Progress | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation (n − 1) of each bin's diversity seen through three heads: (K,) float64, NaN where empty.

    Args:
        z: (M, 2, D) float16, views of M images; all of them train the head, in a bin or not.
        bin: (M,) integer, the bin of each image; -1 for one that is in none.
        n_bins: K.
        size: (K,) int64, all samples in each bin, viewed or not; see `diversity_of_views`.
        seed: of the first head; the others have seed + 1 and seed + 2.
        epochs: of training.
        progress: called with numbers that add up to 3 · epochs.

    Source: the score as `diversity_of_views`; three heads and their spread are ours.
    """
    heads = (contrastive(z, seed=s, epochs=epochs, progress=progress) for s in range(seed, seed + N_SEEDS))
    scores = [diversity_of_views(project(head, z), bin, n_bins, size=size) for head in heads]
    return np.mean(scores, axis=0), np.std(scores, axis=0, ddof=1)


def _generator(seed: int, use: str) -> torch.Generator:
    """A separate generator for each seed and use."""
    return torch.Generator("cpu").manual_seed(draw(seed, 0, "", use, purpose="head"))


@contextmanager
def _plain_cpu() -> Iterator[None]:
    """Compute on the CPU in float32 with one intra-op thread, so that sums have one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.device("cpu"), torch.autocast("cpu", enabled=False), torch.inference_mode(False):
            yield
    finally:
        torch.set_num_threads(before)
