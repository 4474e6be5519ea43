"""The networks that are trained on selections of 32×32 images, each with first weights that a seed decides."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from adq_wds.core.rng import draw
from adq_wds.models.builtin import MEAN, STD
from adq_wds.registry import look_up

_building = threading.Lock()  # networks draw their first weights from torch's global generator


class Normalise(nn.Module):
    """(B, 3, H, W) uint8 to float32 of mean 0 and deviation 1 over CIFAR-10 train, channels last."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        for name, values in (("mean", MEAN), ("std", STD)):
            self.register_buffer(name, 255 * torch.tensor(values).view(1, 3, 1, 1))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Scale each channel."""
        return pixels.to(torch.float32, memory_format=torch.channels_last).sub_(self.mean).div_(self.std)


class Residual(nn.Module):
    """x + body(x), or shortcut(x) + body(x) where the shape changes; then ReLU where asked."""

    def __init__(
        self, body: nn.Module, shortcut: nn.Module | None = None, *, last_relu: bool = False
    ) -> None:
        super().__init__()
        self.body, self.shortcut, self.last_relu = body, shortcut, last_relu

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to (B, C', H', W')."""
        y: torch.Tensor = self.body(x) + (x if self.shortcut is None else self.shortcut(x))
        return F.relu(y, inplace=True) if self.last_relu else y


def _convolution(
    n_in: int, n_out: int, *, kernel: int = 3, stride: int = 1, pool: bool = False, relu: bool = True
) -> nn.Sequential:
    layers = [nn.Conv2d(n_in, n_out, kernel, stride, padding=kernel // 2, bias=False)]
    pooling = [nn.MaxPool2d(2)] if pool else []  # first of all: the rest has a quarter to do then
    rectifier = [nn.ReLU(inplace=True)] if relu else []
    return nn.Sequential(*layers, *pooling, nn.BatchNorm2d(n_out), *rectifier)


def _basic_block(n_in: int, width: int, *, stride: int) -> nn.Module:
    """The two-convolution block of a ResNet; a 1×1 convolution is its shortcut where the shape changes."""
    body = nn.Sequential(_convolution(n_in, width, stride=stride), _convolution(width, width, relu=False))
    same = stride == 1 and n_in == width
    shortcut = None if same else _convolution(n_in, width, kernel=1, stride=stride, relu=False)
    return Residual(body, shortcut, last_relu=True)


def _five_convolutions(width: int, n_classes: int) -> nn.Module:
    """Five convolutions on grids of 32×32, 16×16, 8×8 and 4×4, pooled in between; the first has `width` channels."""
    return nn.Sequential(
        _convolution(3, width, pool=True),
        _convolution(width, 2 * width, pool=True),
        _convolution(2 * width, 4 * width),
        Residual(_convolution(4 * width, 4 * width)),
        nn.MaxPool2d(2),
        _convolution(4 * width, 8 * width),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(8 * width, n_classes),
    )


def small(n_classes: int) -> nn.Module:
    """Five convolutions, 24 channels first. 13.9 M multiply-adds an image."""
    return _five_convolutions(24, n_classes)


def resnet(blocks: Sequence[int], n_classes: int) -> nn.Module:
    """A ResNet for small images, of so many two-convolution blocks on each grid: a 3×3 stem, no max pooling.

    Source: He et al. 2016 (arXiv 1512.03385), with the stem that is usual on CIFAR.
    """
    layers: list[nn.Module] = [_convolution(3, 64)]
    n_in = 64
    for width, stride, n_blocks in zip((64, 128, 256, 512), (1, 2, 2, 2), blocks, strict=True):
        for step in (stride, *[1] * (n_blocks - 1)):
            layers.append(_basic_block(n_in, width, stride=step))
            n_in = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, n_classes))


def resnet18(n_classes: int) -> nn.Module:
    """ResNet-18 for small images. 556 M multiply-adds an image of 32×32."""
    return resnet((2, 2, 2, 2), n_classes)


def tiny(n_classes: int) -> nn.Module:
    """`small` at half the width: 77 k weights, 3.6 M multiply-adds an image."""
    return _five_convolutions(12, n_classes)


def resnet20(n_classes: int) -> nn.Module:
    """ResNet-20 for CIFAR: 0.27 M weights, 41 M multiply-adds an image.

    Source: He et al. 2016 (arXiv 1512.03385), with a 1×1 convolution where the shape changes.
    """
    layers: list[nn.Module] = [_convolution(3, 16)]
    n_in = 16
    for width in (16, 32, 64):
        for i in range(3):
            layers.append(_basic_block(n_in, width, stride=2 if width > n_in and i == 0 else 1))
            n_in = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, n_classes))


class ChannelNorm(nn.LayerNorm):
    """Layer normalisation over the channels of (B, C, H, W)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to the same shape."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def convnext(n_classes: int) -> nn.Module:
    """A ConvNeXt of six blocks on grids of 16×16, 8×8 and 4×4: 0.4 M weights, 14 M multiply-adds an image.

    Source: Liu et al. 2022 (arXiv 2201.03545), without layer scale and stochastic depth.
    """
    layers: list[nn.Module] = [nn.Conv2d(3, 32, 2, 2), ChannelNorm(32)]
    n_in = 32
    for width in (32, 64, 128):
        if width > n_in:
            layers += [ChannelNorm(n_in), nn.Conv2d(n_in, width, 2, 2)]
            n_in = width
        for _ in range(2):
            body = nn.Sequential(
                nn.Conv2d(width, width, 7, padding=3, groups=width),
                ChannelNorm(width),
                nn.Conv2d(width, 4 * width, 1),
                nn.GELU(),
                nn.Conv2d(4 * width, width, 1),
            )
            layers.append(Residual(body))
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(128), nn.Linear(128, n_classes)
    )


NETS: dict[str, Callable[[int], nn.Module]] = {
    "tiny": tiny,
    "small": small,
    "resnet20": resnet20,
    "convnext": convnext,
    "resnet18": resnet18,
}


def build_net(name: str, n_classes: int, seed: int) -> nn.Module:
    """A network that takes uint8 images, its first weights decided by `seed` alone; torch's generator is put back."""
    with _building, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_for(seed, "weights"))
        return nn.Sequential(Normalise(), look_up("network", name, NETS)(n_classes))


def seed_for(seed: int, purpose: str) -> int:
    """The seed of one generator of a training."""
    return draw(seed, 0, "", "", purpose=f"training {purpose}") % 2**63
