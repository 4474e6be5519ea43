"""Builds the networks that data-free distillation is measured with, and trains teachers and students.

All take (B, 3, S, S) images in [0, 1], their normalisation inside, and keep BatchNorm statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from adq_wds.models.builtin import MEAN, STD
from adq_wds.registry import look_up
from benchmarks.nets import Residual, resnet
from benchmarks.training import augment

TEMPERATURE = 20.0
_BATCH = 500  # of an evaluation


class Scale(nn.Module):
    """(B, 3, S, S) in [0, 1] to mean 0 and deviation 1 over CIFAR-10 train."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        for name, values in (("mean", MEAN), ("std", STD)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Scale each channel."""
        return (images - self.mean) / self.std


def wide_resnet(depth: int, width: int, n_classes: int) -> nn.Module:
    """A wide residual network of 6 n + 4 layers with activations before convolutions.

    Source: Zagoruyko and Komodakis 2016 (arXiv 1605.07146).
    """
    n_blocks, rest = divmod(depth - 4, 6)
    if rest or n_blocks < 1:
        raise ValueError(f"depth must be 6 n + 4, such as 16 or 40, got {depth}")
    layers, n_in = [_conv(3, 16)], 16
    for n_out, stride in ((16 * width, 1), (32 * width, 2), (64 * width, 2)):
        for i in range(n_blocks):
            step = stride if i == 0 else 1
            body = [_conv(n_in, n_out, stride=step), *_activated(n_out), _conv(n_out, n_out)]
            if n_in == n_out and step == 1:
                layers.append(Residual(nn.Sequential(*_activated(n_in), *body)))
            else:  # the shortcut sees the activation too
                shortcut = nn.Conv2d(n_in, n_out, 1, step, bias=False)
                layers += [*_activated(n_in), Residual(nn.Sequential(*body), shortcut)]
            n_in = n_out
    return nn.Sequential(*layers, *_activated(n_in), *_head(n_in, n_classes))


def vgg11(n_classes: int) -> nn.Module:
    """VGG-11 with BatchNorm and one linear layer; images of at least 32 × 32.

    Source: Simonyan and Zisserman 2015 (arXiv 1409.1556), with the head that is usual on CIFAR.
    """
    layers, n_in = [], 3
    for n_out, pool in ((64, 1), (128, 1), (256, 0), (256, 1), (512, 0), (512, 1), (512, 0), (512, 1)):
        layers += [_conv(n_in, n_out), *_activated(n_out), *[nn.MaxPool2d(2)] * pool]
        n_in = n_out
    return nn.Sequential(*layers, *_head(n_in, n_classes))


def _conv(n_in: int, n_out: int, *, stride: int = 1) -> nn.Module:
    return nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=False)


def _activated(n: int) -> list[nn.Module]:
    return [nn.BatchNorm2d(n), nn.ReLU()]


def _head(n_in: int, n_classes: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n_in, n_classes)]


NETS: dict[str, Callable[[int], nn.Module]] = {
    "wrn10-1": lambda n: wide_resnet(10, 1, n),
    "wrn16-1": lambda n: wide_resnet(16, 1, n),
    "wrn16-2": lambda n: wide_resnet(16, 2, n),
    "wrn40-1": lambda n: wide_resnet(40, 1, n),
    "wrn40-2": lambda n: wide_resnet(40, 2, n),
    "resnet18": lambda n: resnet((2, 2, 2, 2), n),
    "resnet34": lambda n: resnet((3, 4, 6, 3), n),
    "vgg11": vgg11,
}


def build(name: str, n_classes: int, seed: int) -> nn.Module:
    """A network by its name in `NETS`, its first weights decided by `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return nn.Sequential(Scale(), look_up("network", name, NETS)(n_classes))


class Trainer:
    """SGD with momentum whose rate falls as a cosine, over random batches of crops and mirrorings.

    Args:
        net: trained in place.
        loss: of the network, (B, 3, S, S) images in [0, 1] and their (B,) labels.
        rate, weight_decay, n_steps, batch: as of the optimizer; `n_steps` is when the rate reaches 0.
        seed: of batches, crops and mirrorings.
    """

    def __init__(
        self,
        net: nn.Module,
        loss: Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor],
        *,
        rate: float,
        weight_decay: float,
        n_steps: int,
        batch: int,
        seed: int,
    ) -> None:
        self.net, self.loss, self.batch, self.seed = net, loss, batch, seed
        self.sgd = torch.optim.SGD(net.parameters(), rate, 0.9, weight_decay=weight_decay, nesterov=True)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.sgd, n_steps)

    def train(self, pixels: torch.Tensor, labels: torch.Tensor, n_steps: int) -> None:
        """Take steps on (N, 3, S, S) uint8 images; which they draw depends on the seed and the steps taken before."""
        device = pixels.device
        draws = torch.Generator(device).manual_seed(self.seed * 1_000_003 + self.schedule.last_epoch)
        self.net.train()
        for _ in range(n_steps):
            rows = torch.randint(len(pixels), (self.batch,), generator=draws, device=device)
            loss = self.loss(self.net, augment(pixels[rows], draws) / 255, labels[rows])
            self.sgd.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.sgd.step()
            self.schedule.step()
        self.net.eval()

    def state(self) -> dict[str, object]:
        """What a later trainer goes on from."""
        parts: dict[str, Any] = {"net": self.net, "sgd": self.sgd, "schedule": self.schedule}
        return {name: part.state_dict() for name, part in parts.items()}

    def load(self, state: dict[str, dict[str, object]]) -> None:
        """Go on from a state."""
        self.net.load_state_dict(state["net"])
        self.sgd.load_state_dict(state["sgd"])
        self.schedule.load_state_dict(state["schedule"])


def label_loss(net: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy with the labels."""
    return F.cross_entropy(net(images), labels)


def distillation_loss(
    teacher: nn.Module, temperature: float = TEMPERATURE
) -> Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]:
    """KL(teacher‖student) at a temperature T, times T²; labels are not looked at.

    Source: Hinton et al. 2015 (arXiv 1503.02531).
    """

    def loss(student: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            target = (teacher(images) / temperature).log_softmax(1)
        answer = (student(images) / temperature).log_softmax(1)
        return F.kl_div(answer, target, reduction="batchmean", log_target=True) * temperature**2

    return loss


def accuracy(net: nn.Module, pixels: torch.Tensor, labels: torch.Tensor) -> float:
    """The share of (N, 3, S, S) uint8 images that a network in evaluation mode gets right, in percent."""
    with torch.inference_mode():
        parts = [
            net(pixels[i : i + _BATCH] / 255).argmax(1) == labels[i : i + _BATCH]
            for i in range(0, len(labels), _BATCH)
        ]
    return 100 * float(torch.cat(parts).double().mean())
