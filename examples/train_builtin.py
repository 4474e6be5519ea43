"""Train the small network that comes with the package, with labels or without, on any shards of small images.

    python examples/train_builtin.py builtin "cifar10-train-{000000..000009}.tar" "cifar10-test-{000000..000001}.tar" \\
        --scratch /tmp/builtin --epochs 20 --warmup 4 --decay 16 --rate 0.2
    python examples/train_builtin.py builtin-free "cifar10-train-{000000..000009}.tar" "cifar10-test-{000000..000001}.tar" \\
        --scratch /tmp/builtin --epochs 19 --warmup 1 --decay 6 --rate 0.12

These two made the weights in the package. `builtin` learns the labels (cross-entropy with label smoothing).
`builtin-free` never sees one: two random views of an image are to be found among those of all others (contrastive).
Stopped at any time, the same command goes on after the last whole epoch; an epoch takes about a minute on one core.
The scratch folder gets the decoded images, a checkpoint an epoch, `NAME.safetensors` (float16, normalisation folded
in) and `NAME.json` (settings, history, accuracies).

Source: SimCLR (Chen et al. 2020, arXiv 2002.05709) with the decoupled loss (Yeh et al. 2022, arXiv 2110.06848).
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from adq_wds.files import atomic_path, sha256_text, write_text
from adq_wds.models import BUILTIN_NAMES
from adq_wds.models.builtin import MEAN, SIDE, STD, WIDTH, SmallNet, normalised, resized
from adq_wds.remote.open_shard import open_shard
from adq_wds.samples.label import read_label
from adq_wds.samples.whole_image import whole_image
from adq_wds.shards.names import expand_urls
from adq_wds.shards.samples_in_tar import iter_spans, read_sample

Images = NDArray[np.uint8]  # (N, 32, 32, 3)
Labels = NDArray[np.int64]  # (N,)


# Data


def read_shards(pattern: str, scratch: Path) -> tuple[Images, Labels]:
    """All images of the shards at 32×32, and their integer labels; decoded once and kept in `scratch`."""
    cache = scratch / f"decoded-{sha256_text(pattern)[:16]}.npz"
    if not cache.exists():
        images, labels = [], []
        for shard in expand_urls(pattern):
            with open_shard(shard) as buffer:
                for span in iter_spans(buffer, shard=shard):
                    sample = read_sample(buffer, span, url=shard)
                    images.append(resized([whole_image(sample)[1]])[0].permute(1, 2, 0).numpy())
                    labels.append(read_label(sample, "cls"))
        with atomic_path(cache) as partial, partial.open("wb") as handle:
            np.savez(handle, images=np.stack(images), labels=np.array(labels, dtype=np.int64))
    with np.load(cache, allow_pickle=False) as file:
        return file["images"], file["labels"]


# Augmentation: a whole batch at once, each image with its own draws


def flip_and_shift(x: torch.Tensor, generator: torch.Generator, *, pad: int = 4) -> torch.Tensor:
    """Mirror half of the images; shift each by up to `pad` pixels, edges mirrored."""
    B = len(x)
    mirrored = torch.rand(B, 1, 1, 1, generator=generator) < 0.5
    x = F.pad(torch.where(mirrored, x.flip(3), x), (pad, pad, pad, pad), mode="reflect")
    top, left = torch.randint(0, 2 * pad + 1, (2, B, 1), generator=generator)
    rows, columns = top + torch.arange(SIDE), left + torch.arange(SIDE)  # (B, 32)
    return x.permute(0, 2, 3, 1)[
        torch.arange(B)[:, None, None], rows[:, :, None], columns[:, None, :]
    ].permute(0, 3, 1, 2)


def crop_and_colour(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A view: a random part (20 to 100 % of the area) at full size, mirrored or not, colours changed or taken away.

    Args:
        x: (B, 3, 32, 32) in [0, 1].
    """
    B = len(x)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.empty(B, *shape).uniform_(low, high, generator=generator)

    area, shape = uniform(0.2, 1.0), torch.exp(uniform(math.log(3 / 4), math.log(4 / 3)))
    height, width = (area / shape).sqrt().clamp(max=1), (area * shape).sqrt().clamp(max=1)
    sign = uniform(-1, 1).sign()
    zero = torch.zeros(B)
    across = torch.stack([width * sign, zero, (1 - width) * uniform(-1, 1)], dim=1)
    down = torch.stack([zero, height, (1 - height) * uniform(-1, 1)], dim=1)
    grid = F.affine_grid(torch.stack([across, down], dim=1), list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)

    grey_weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    changed = (uniform(0, 1, 1, 1, 1) < 0.8).float()
    x = (x * (1 + changed * uniform(-0.4, 0.4, 1, 1, 1))).clamp_(0, 1)
    mean = (x * grey_weights).sum(1, keepdim=True).mean((2, 3), keepdim=True)
    x = (mean + (x - mean) * (1 + changed * uniform(-0.4, 0.4, 1, 1, 1))).clamp_(0, 1)
    grey = (x * grey_weights).sum(1, keepdim=True)
    colour = _turned(x - grey, changed.view(B) * uniform(-0.1, 0.1) * 2 * math.pi)
    strength = (1 + changed * uniform(-0.4, 0.4, 1, 1, 1)) * (uniform(0, 1, 1, 1, 1) >= 0.2)
    return (grey + colour * strength).clamp_(0, 1)


def _turned(colour: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """Hues turned by an angle around the grey axis: (B, 3, H, W), (B,) in radians."""
    cos, sin = angle.cos().view(-1, 1, 1), angle.sin().view(-1, 1, 1)
    third = torch.full((3, 3), 1 / 3)
    across = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    turn = cos * torch.eye(3) + (1 - cos) * third + sin * across  # (B, 3, 3), Rodrigues' formula
    return (turn @ colour.flatten(2)).view_as(colour)


# The two tasks: a network with what it needs for training, and a loss of a batch


class Supervised(nn.Module):
    """Cross-entropy with smoothed labels."""

    def __init__(self, n_classes: int) -> None:
        super().__init__()
        self.net = SmallNet(n_classes, norm=True)

    def forward(self, images: Images, labels: Labels, generator: torch.Generator) -> torch.Tensor:
        x = flip_and_shift(normalised(torch.from_numpy(images).permute(0, 3, 1, 2)), generator)
        _, logits = self.net(x.contiguous(memory_format=torch.channels_last))
        return F.cross_entropy(logits.float(), torch.as_tensor(labels), label_smoothing=0.1)


class Contrastive(nn.Module):
    """Two views of an image found among all others of the batch; the projection is thrown away after training."""

    def __init__(self, *, temperature: float) -> None:
        super().__init__()
        self.net = SmallNet(None, norm=True)
        self.projection = nn.Sequential(
            nn.Linear(WIDTH, WIDTH, bias=False), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Linear(WIDTH, 128)
        )
        self.temperature = temperature

    def forward(self, images: Images, labels: Labels, generator: torch.Generator) -> torch.Tensor:
        raw = torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(255)
        views = crop_and_colour(torch.cat([raw, raw]), generator)
        x = (views - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
        h, _ = self.net(x.contiguous(memory_format=torch.channels_last))
        z = F.normalize(self.projection(h).float(), dim=1)
        similarity = z @ z.T / self.temperature  # (2B, 2B)
        B = len(images)
        partner = torch.arange(2 * B).roll(B)
        positive = similarity[torch.arange(2 * B), partner]
        others = similarity.clone()
        others.fill_diagonal_(-math.inf)
        others[torch.arange(2 * B), partner] = -math.inf  # decoupled: the partner is no rival of itself
        return (others.logsumexp(1) - positive).mean()


# Training


def rate_at(epoch: float, *, epochs: int, warmup: float, decay: float) -> float:
    """The learning rate's factor: up in a line, flat, down in a line to zero.

    >>> [rate_at(e, epochs=10, warmup=2, decay=5) for e in (0, 1, 4, 7.5, 10)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    return max(0.0, min(1.0, epoch / warmup if warmup else 1.0, (epochs - epoch) / decay if decay else 1.0))


def train(task: nn.Module, images: Images, labels: Labels, a: argparse.Namespace) -> tuple[Any, list[Any]]:
    """Train, from the last checkpoint if there is one; gives the averaged network and the history."""
    task.to(memory_format=torch.channels_last)
    average = copy.deepcopy(task).requires_grad_(False)
    decayed = [p for p in task.parameters() if p.ndim > 1]
    rest = [p for p in task.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": a.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9, nesterov=True)
    checkpoint = a.scratch / f"{a.name}-checkpoint.pt"
    history: list[dict[str, float]] = []
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        task.load_state_dict(state["task"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        history = state["history"]
    for epoch in range(len(history), a.epochs):
        history.append(one_epoch(epoch, task, average, optimizer, images, labels, a))
        print(json.dumps(history[-1]), flush=True)
        state = {"task": task.state_dict(), "average": average.state_dict()}
        state |= {"optimizer": optimizer.state_dict(), "history": history}
        with atomic_path(checkpoint) as partial:
            torch.save(state, partial)
    return average, history


def one_epoch(
    epoch: int,
    task: nn.Module,
    average: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Images,
    labels: Labels,
    a: argparse.Namespace,
) -> dict[str, float]:
    """One pass over the images in an order and with draws that depend on seed and epoch alone."""
    generator = torch.Generator().manual_seed(a.seed * 100_003 + epoch)
    task.train()
    start, total = time.perf_counter(), 0.0
    order = torch.randperm(len(images), generator=generator).numpy()
    batches = list(_batches(order, a.batch))[: a.max_steps]
    for step, at in enumerate(batches):
        now = epoch + step / len(batches)
        for group in optimizer.param_groups:
            group["lr"] = a.rate * rate_at(now, epochs=a.epochs, warmup=a.warmup, decay=a.decay)
        with torch.autocast("cpu", torch.bfloat16, enabled=a.bfloat16):
            loss = task(images[at], labels[at], generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += float(loss.detach())
        _move(average, task, weight=max(1 - a.average, 1 / (epoch * len(batches) + step + 1)))
    taken = time.perf_counter() - start
    return {"epoch": epoch + 1, "loss": round(total / len(batches), 4), "seconds": round(taken, 1)}


def _batches(order: NDArray[np.int64], size: int) -> Iterator[NDArray[np.int64]]:
    """Whole batches only: a short one would upset the batch statistics."""
    size = min(size, len(order))
    for start in range(0, len(order) - size + 1, size):
        yield order[start : start + size]


@torch.no_grad()
def _move(average: nn.Module, task: nn.Module, *, weight: float) -> None:
    """Pull the averaged network towards the trained one, batch statistics too."""
    for kept, new in zip(average.state_dict().values(), task.state_dict().values(), strict=True):
        if kept.dtype.is_floating_point:
            kept.lerp_(new, weight)
        else:
            kept.copy_(new)


# What it reached


@torch.inference_mode()
def embed(net: SmallNet, images: Images) -> tuple[torch.Tensor, torch.Tensor | None]:
    """h and logits of all images."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    parts = [net(normalised(part)) for part in torch.split(pixels, 500)]
    h = torch.cat([part[0] for part in parts])
    return h, None if net.head is None else torch.cat([part[1] for part in parts])


def neighbour_accuracy(
    known: torch.Tensor, known_labels: Labels, asked: torch.Tensor, asked_labels: Labels, *, k: int
) -> float:
    """How often most of the k nearest by cosine have the label."""
    known, asked = F.normalize(known, dim=1), F.normalize(asked, dim=1)
    labels = torch.as_tensor(known_labels)
    n_right = 0
    for i in range(0, len(asked), 1000):
        nearest = (asked[i : i + 1000] @ known.T).topk(min(k, len(known)), dim=1).indices
        votes = F.one_hot(labels[nearest], int(labels.max()) + 1).sum(1)  # (1000, C)
        n_right += int((votes.argmax(1) == torch.as_tensor(asked_labels)[i : i + 1000]).sum())
    return n_right / len(asked)


def accuracies(
    net: SmallNet, train_set: tuple[Images, Labels], test_set: tuple[Images, Labels]
) -> dict[str, float]:
    """Of the test set: by the 20 nearest and by the nearest training image, and by the head."""
    known, _ = embed(net, train_set[0])
    asked, logits = embed(net, test_set[0])
    found = {
        f"nearest_{k}": neighbour_accuracy(known, train_set[1], asked, test_set[1], k=k) for k in (20, 1)
    }
    if logits is not None:
        found["head"] = float((logits.argmax(1).numpy() == test_set[1]).mean())
    return {name: round(value, 4) for name, value in found.items()}


@torch.no_grad()
def folded(net: SmallNet) -> SmallNet:
    """The same function in evaluation with each normalisation put into its convolution, as it is stored."""
    state = net.state_dict()
    plain: dict[str, torch.Tensor] = {name: state[name] for name in state if name.startswith("head.")}
    for name in (name for name in state if name.endswith(".0.weight")):
        block = name.removesuffix(".0.weight")
        gamma, beta, mean, var = (
            state[f"{block}.1.{part}"] for part in ("weight", "bias", "running_mean", "running_var")
        )
        scale = gamma / (var + 1e-5).sqrt()
        plain[name] = state[name] * scale.view(-1, 1, 1, 1)
        plain[f"{block}.0.bias"] = beta - mean * scale
    made = SmallNet(None if net.head is None else net.head.out_features)
    made.load_state_dict(plain)
    return made.eval()


def save(net: SmallNet, header: dict[str, str], path: Path) -> SmallNet:
    """Write the folded network as float16, and give it as it will be loaded."""
    stored = folded(net)
    state = {name: value.half().contiguous() for name, value in stored.state_dict().items()}
    with atomic_path(path) as partial:
        safetensors.torch.save_file(state, partial, metadata=header)
    stored.load_state_dict(state)
    return stored


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("name", choices=BUILTIN_NAMES, help="builtin learns the labels, builtin-free does not")
    made.add_argument("train", help="shards to train on, images and cls")
    made.add_argument("test", help="shards to measure on")
    made.add_argument(
        "--trained-on", default="CIFAR-10 train", help="what the weights' header calls the data"
    )
    made.add_argument("--scratch", type=Path, required=True, help="folder for all that is written")
    made.add_argument("--epochs", type=int, default=20)
    made.add_argument("--warmup", type=float, default=4, help="epochs in which the rate rises")
    made.add_argument("--decay", type=float, default=16, help="epochs at the end in which the rate falls")
    made.add_argument("--rate", type=float, default=0.2, help="the highest learning rate")
    made.add_argument("--weight-decay", type=float, default=5e-4)
    made.add_argument("--batch", type=int, default=256)
    made.add_argument(
        "--average", type=float, default=0.995, help="decay of the moving average of the weights"
    )
    made.add_argument("--temperature", type=float, default=0.2, help="builtin-free: of the contrast")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--threads", type=int, default=2)
    made.add_argument(
        "--max-steps", type=int, help="stop each epoch after so many batches, to try things out"
    )
    made.add_argument("--bfloat16", action=argparse.BooleanOptionalAction, default=True)
    return made


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Read, train, measure, save; gives what `NAME.json` holds."""
    a = arguments().parse_args(argv)
    torch.set_num_threads(a.threads)
    torch.manual_seed(a.seed)
    a.scratch.mkdir(parents=True, exist_ok=True)
    train_set, test_set = read_shards(a.train, a.scratch), read_shards(a.test, a.scratch)
    n_classes = int(train_set[1].max()) + 1
    make: dict[str, Callable[[], nn.Module]] = {
        "builtin": lambda: Supervised(n_classes),
        "builtin-free": lambda: Contrastive(temperature=a.temperature),
    }
    average, history = train(make[a.name](), *train_set, a)
    settings = {k: v for k, v in vars(a).items() if k not in ("train", "test", "scratch", "threads")}
    header = {
        "script": "examples/train_builtin.py",
        "trained_on": a.trained_on,
        "settings": json.dumps(settings),
    }
    path = a.scratch / f"{a.name}.safetensors"
    reached = accuracies(save(average.net, header, path), train_set, test_set)
    save(average.net, {**header, "accuracy": json.dumps(reached)}, path)
    result = {**header, "settings": settings, "accuracy": reached, "history": history}
    write_text(a.scratch / f"{a.name}.json", json.dumps(result, indent=1) + "\n")
    print(json.dumps(reached))
    return result


if __name__ == "__main__":
    main()
