"""How well does a network learn from a selection? Recipes, resident data, augmentation, and one training.

A training draws all its randomness from generators of its own, seeded by its seed and a purpose, so its result does
not depend on what else runs in the process. On an accelerator it has a stream of its own; images, order and
augmentation stay there, and only evaluations wait for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from adq_wds.pipes.decode import Decode
from adq_wds.registry import look_up
from adq_wds.remote.open_shard import open_shard
from adq_wds.shards.names import shard_names
from adq_wds.shards.samples_in_tar import iter_spans, read_sample
from benchmarks.nets import NETS, build_net, seed_for

CROP = 4  # pixels that a crop may be off in each direction
EVALUATION_BATCH = 500
EPOCHS = 30  # of the networks whose compute is in proportion to the images kept


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: SGD with momentum 0.9, crops and flips.

    Attributes:
        net: a name in `NETS`.
        epochs: how often the selection is gone through, each time in a new order.
        batch: images a step; an epoch's last ones that fill no batch are left out of it.
        lr: the largest learning rate; from there it falls to 0 by a cosine.
        warmup: share of the steps, in [0, 1), in which it rises to that in a line.
        weight_decay: of all parameters.
        nesterov: Nesterov's momentum.
        label_smoothing: in [0, 1).
        evaluations: how often the test set is looked at, evenly over the epochs, the last one included.
        precision: "bfloat16" (autocast) or "float32".
    """

    net: str
    epochs: int
    batch: int
    lr: float
    warmup: float
    weight_decay: float
    nesterov: bool
    label_smoothing: float
    evaluations: int
    precision: str = "bfloat16"


def recipe_for(net: str, keep: float, precision: str = "bfloat16") -> Recipe:
    """The recipe of a network at a keep ratio.

    `resnet18` as in the dataset quantization papers: 200 epochs, batch 128, 16 below 10 %. The others are short, for
    a CPU; their numbers were chosen on random selections of a seed that is not reported. All but `small` and
    `resnet18` train as many epochs at every ratio, so a tenth of the images is a tenth of the compute.

    Raises:
        ValueError: an unknown network, or `keep` outside (0, 1].

    Source: Zhou et al. 2023 (arXiv 2308.10524) and its released code for `resnet18`; ours for `small`.

    >>> recipe_for("resnet18", 0.05).batch, recipe_for("resnet18", 0.1).batch
    (16, 128)
    """
    look_up("network", net, NETS)
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be in (0, 1], got {keep!r}")
    if net == "resnet18":
        batch = 16 if keep < 0.1 else 128
        return Recipe(
            net,
            200,
            batch,
            0.1,
            0.0,
            5e-4,
            nesterov=False,
            label_smoothing=0.0,
            evaluations=20,
            precision=precision,
        )
    epochs = EPOCHS if net != "small" else 50 if keep <= 0.05 else 34 if keep <= 0.1 else 24
    return Recipe(
        net,
        epochs,
        32,
        0.05,
        0.2,
        1e-3,
        nesterov=True,
        label_smoothing=0.05,
        evaluations=2,
        precision=precision,
    )


def native_precision() -> str:
    """bfloat16 where this processor has instructions for it, else float32: emulation is slower than that.

    A machine without /proc/cpuinfo counts as without.
    """
    path = Path("/proc/cpuinfo")
    known = path.read_text(encoding="utf-8") if path.exists() else ""
    return "bfloat16" if re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", known) else "float32"


@dataclass(frozen=True)
class Images:
    """A set of decoded images, resident on a device.

    Attributes:
        pixels: (N, 3, H, W) uint8.
        label: (N,) int64.
        keys: the samples' keys by shard name; shards ascending, samples in tar order: the order of rows.
    """

    pixels: torch.Tensor
    label: torch.Tensor
    keys: dict[str, list[str]]

    @property
    def n_classes(self) -> int:
        """C, one more than the largest label."""
        return int(self.label.max()) + 1

    def hash(self) -> str:
        """SHA-256 of pixels and labels."""
        whole = hashlib.sha256(self.pixels.cpu().contiguous().numpy().tobytes())
        whole.update(self.label.cpu().numpy().tobytes())
        return whole.hexdigest()


def read_images(shards: Sequence[str | Path], device: torch.device) -> Images:
    """Decode every sample of some shards once; all images must have one size.

    Raises:
        ShardError, SampleError: damaged data, with shard and key.
    """
    decode = Decode(label="cls", to="torch")
    names = shard_names([str(path) for path in shards])
    pixels, labels, keys = [], [], {}
    for name, path in sorted(zip(names, shards, strict=True)):
        with open_shard(path) as buffer:
            spans = list(iter_spans(buffer, shard=name))
            samples = decode.apply([read_sample(buffer, span, url=str(path)) for span in spans])
        pixels += [sample["image"] for sample in samples]
        labels += [sample["label"] for sample in samples]
        keys[name] = [span.key for span in spans]
    return Images(torch.stack(pixels).to(device), torch.tensor(labels).to(device), keys)


def augment(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each image shifted by up to 4 pixels either way (black where nothing was), every second one mirrored.

    Args:
        pixels: (B, 3, H, W) uint8.
        generator: of the same device.

    Returns:
        (B, 3, H, W) uint8.
    """
    n, _, height, width = pixels.shape
    device = pixels.device
    windows = F.pad(pixels, (CROP,) * 4).unfold(2, height, 1).unfold(3, width, 1)  # (B, 3, 9, 9, H, W)
    down, right = torch.randint(2 * CROP + 1, (2, n), generator=generator, device=device)
    cut = windows[torch.arange(n, device=device), :, down, right]  # (B, 3, H, W)
    mirror = torch.rand((n, 1, 1, 1), generator=generator, device=device) < 0.5
    return torch.where(mirror, cut.flip(3), cut)


@dataclass(frozen=True)
class Outcome:
    """What a training reached.

    Attributes:
        curve: (epoch, accuracy on the half of the test set that is reported, on the half that settings are chosen
            on) of every evaluation, epochs from 1; the last entry is the result.
        n_seen: distinct images over all epochs.
        n_steps: steps over all epochs.
        net: the trained network.
    """

    curve: list[tuple[int, float, float]]
    n_seen: int
    n_steps: int
    net: nn.Module


def train(
    recipe: Recipe,
    data: Images,
    test: Images,
    rows: Callable[[int], NDArray[np.int64]],
    *,
    seed: int,
    targets: torch.Tensor | None = None,
    n_rows: Callable[[int], int] | None = None,
    after: Callable[[torch.Tensor, torch.Tensor], None] | None = None,
) -> Outcome:
    """Train from random weights.

    Args:
        recipe: how.
        data: all training images.
        test: judged on; chosen by never.
        rows: epoch (from 0) → rows of `data` to train on; as many in every epoch, or as `n_rows` says.
        seed: of first weights, order and augmentation.
        targets: (N, C) float32 soft labels, in place of the labels of `data`.
        n_rows: epoch → the number of its rows, where epochs differ.
        after: is called after every epoch with the sums of the losses by label, (C,), and (C,) how many they are.

    Raises:
        ValueError: an epoch has no rows, or another number of them than expected.
    """
    sizes = [len(rows(0)) if n_rows is None else n_rows(epoch) for epoch in range(recipe.epochs)]
    with _own_stream(data.pixels.device):
        return _train(
            recipe, data, test, rows, seed, data.label if targets is None else targets, sizes, after
        )


def _train(
    recipe: Recipe,
    data: Images,
    test: Images,
    rows: Callable[[int], NDArray[np.int64]],
    seed: int,
    targets: torch.Tensor,
    sizes: Sequence[int],
    after: Callable[[torch.Tensor, torch.Tensor], None] | None,
) -> Outcome:
    device = data.pixels.device
    net = build_net(recipe.net, data.n_classes, seed).to(device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        net.parameters(), recipe.lr, 0.9, weight_decay=recipe.weight_decay, nesterov=recipe.nesterov
    )
    order = torch.Generator().manual_seed(seed_for(seed, "order"))
    draws = torch.Generator(device).manual_seed(seed_for(seed, "augmentation"))
    batch = max(1, min(recipe.batch, *sizes))
    n_steps = sum(n // batch for n in sizes)
    looks = {math.ceil(recipe.epochs * (i + 1) / recipe.evaluations) for i in range(recipe.evaluations)}
    seen = np.zeros(len(data.label), dtype=bool)
    curve, step = [], 0
    for epoch, n in enumerate(sizes):
        chosen = rows(epoch)
        if not n or len(chosen) != n:
            raise ValueError(f"epoch {epoch} has {len(chosen)} rows, expected {n}, and at least 1")
        seen[chosen] = True
        losses = torch.zeros(2, data.n_classes, device=device)
        shuffled = torch.from_numpy(chosen)[torch.randperm(n, generator=order)]
        if device.type == "cuda":  # one copy an epoch, which no step waits for
            shuffled = shuffled.pin_memory().to(device, non_blocking=True)
        net.train()
        for first in range(0, n - batch + 1, batch):
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * _share_of_lr(step / n_steps, recipe.warmup)
            picked = shuffled[first : first + batch]
            logits = _logits(net, augment(data.pixels[picked], draws), recipe.precision)
            loss = F.cross_entropy(logits, targets[picked], label_smoothing=recipe.label_smoothing)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            step += 1
            if after is not None:
                label = data.label[picked]
                each = F.cross_entropy(logits.detach(), label, reduction="none")
                losses.index_add_(1, label, torch.stack([each, torch.ones_like(each)]))
        if after is not None:
            after(*losses)
        if epoch + 1 in looks:
            curve.append((epoch + 1, *accuracy(net, test, recipe.precision)))
    return Outcome(curve, int(seen.sum()), step, net)


def accuracy(net: nn.Module, test: Images, precision: str = "bfloat16") -> tuple[float, float]:
    """The share of images that a network, put into evaluation mode, gets right: of every second image from the second
    on, which results are reported on, and of the others, which settings are chosen on.
    """
    net.eval()
    with torch.inference_mode():
        right = [
            (
                _logits(net, test.pixels[i : i + EVALUATION_BATCH], precision).argmax(1)
                == test.label[i : i + EVALUATION_BATCH]
            )
            for i in range(0, len(test.label), EVALUATION_BATCH)
        ]
        whole = torch.cat(right).double()
        return float(whole[1::2].mean()), float(whole[::2].mean())


def _logits(net: nn.Module, pixels: torch.Tensor, precision: str) -> torch.Tensor:
    """(B, C) float32 logits of (B, 3, H, W) uint8 images."""
    # without a cache, which all threads would share: a pass reads each weight once
    with torch.autocast(
        pixels.device.type, torch.bfloat16, enabled=precision == "bfloat16", cache_enabled=False
    ):
        logits: torch.Tensor = net(pixels)
    return logits.float()


def _share_of_lr(done: float, warmup: float) -> float:
    """The learning rate as a share of its largest when this share of the steps is done.

    >>> [_share_of_lr(done, 0.2) for done in (0.1, 0.2, 0.6)]
    [0.5, 1.0, 0.5]
    """
    if done < warmup:
        return done / warmup
    return 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))


@contextlib.contextmanager
def _own_stream(device: torch.device) -> Iterator[None]:
    """On CUDA a stream for this thread, so that several trainings overlap; nothing elsewhere."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.default_stream(device))  # the images were put there
    with torch.cuda.device(device), torch.cuda.stream(stream):
        yield
        stream.synchronize()
