"""Makes images of given classes from a frozen classifier alone, by gradient descent on its losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from adq_wds.checks import positive
from adq_wds.errors import AdqError
from adq_wds.models.adversaries import Seen, Term

Kind = Literal["pixels", "generator", "noisy"]
LATENT = 256  # width of a generator's input


@dataclass(frozen=True)
class Recipe:
    """How a round descends.

    Attributes:
        steps: of Adam.
        rate: its learning rate.
        betas: its decays.
        oh: weight of the cross-entropy with the wanted classes.
        bn: weight of the distance to the BatchNorm statistics.
        shift: the teacher sees images shifted by up to as many pixels, drawn at each step.
        flip: and half of the time mirrored.
    """

    steps: int
    rate: float
    betas: tuple[float, float] = (0.9, 0.999)
    oh: float = 1.0
    bn: float = 1.0
    shift: int = 0
    flip: bool = False

    def __post_init__(self) -> None:
        positive("steps", self.steps)


RECIPES: dict[Kind, Recipe] = {
    "pixels": Recipe(100, 0.05),
    "generator": Recipe(500, 1e-3, (0.5, 0.999)),
    "noisy": Recipe(40, 4e-3, (0.5, 0.999), oh=0.5, bn=10.0),
}
"""By kind. "pixels": the images themselves (DeepInversion without its image priors). "generator": a new generator and its
inputs each round (CSD). "noisy": one generator behind a new layer each round, which is fed with the class (NAYER)."""


# ---- Losses


@contextmanager
def batchnorm_loss(network: nn.Module) -> Iterator[Callable[[], torch.Tensor]]:
    """A function that gives the BatchNorm loss of the network's last pass; hooks are removed at the end.

    The loss is Σ over layers of ‖σ² − σ²_run‖₂ + ‖μ − μ_run‖₂, of the layer's input, its variance biased.

    Raises:
        ValueError: no layer has running statistics.

    Source: Yin et al. 2020 (arXiv 1912.08795), as CSD's code computes it (not squared).
    """
    statistics: dict[nn.Module, tuple[torch.Tensor, torch.Tensor]] = {
        layer: (layer.running_mean, layer.running_var)
        for layer in network.modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm)
        and layer.running_mean is not None
        and layer.running_var is not None
    }
    if not statistics:
        raise ValueError(
            "no BatchNorm layer with running statistics, as where they were folded into other weights; with bn=0 the "
            "cross-entropy remains (and an adversary, where one is given)"
        )
    terms: dict[nn.Module, torch.Tensor] = {}

    def note(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        (x,) = inputs
        axes = [axis for axis in range(x.ndim) if axis != 1]
        mean, variance = statistics[layer]
        distance = torch.linalg.vector_norm(x.var(axes, correction=0) - variance)
        terms[layer] = distance + torch.linalg.vector_norm(x.mean(axes) - mean)

    hooks = [layer.register_forward_pre_hook(note) for layer in statistics]
    try:
        yield lambda: torch.stack(list(terms.values())).sum()
    finally:
        for hook in hooks:
            hook.remove()


# ---- What is descended on


class Generator(nn.Module):
    """A latent vector to an image: linear, then two blocks of doubled side, sigmoid; weights drawn from N(0, 0.02).

    Args:
        side: of the images, a multiple of 4.
        draws: what weights are drawn from.

    Raises:
        ValueError: another side.

    Source: the generator of CMI and CSD.
    """

    def __init__(self, side: int, draws: torch.Generator) -> None:
        super().__init__()
        if side < 4 or side % 4:
            raise ValueError(
                f"a generator doubles its side twice and makes no images of {side} x {side}; use pixels"
            )
        self._start = side // 4
        self.linear = nn.Linear(LATENT, 128 * self._start**2)
        blocks: list[nn.Module] = [nn.BatchNorm2d(128)]
        for channels in (128, 64):
            blocks += [nn.Upsample(scale_factor=2), nn.Conv2d(128, channels, 3, padding=1)]
            blocks += [nn.BatchNorm2d(channels), nn.LeakyReLU(0.2)]
        self.blocks = nn.Sequential(*blocks, nn.Conv2d(64, 3, 3, padding=1), nn.Sigmoid())
        for layer in self.modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)) and layer.bias is not None:
                nn.init.normal_(layer.weight, 0.0, 0.02, generator=draws)
                nn.init.zeros_(layer.bias)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """(B, 256) to (B, 3, side, side) in [0, 1]."""
        return self.blocks(self.linear(z).view(-1, 128, self._start, self._start))  # type: ignore[no-any-return]


Source = tuple[list[torch.Tensor], Callable[[], torch.Tensor]]
"""Parameters, and a function that gives (B, 3, S, S) images in [0, 1] from them."""


def pixel_source(n: int, side: int, draws: torch.Generator, device: torch.device) -> Source:
    """The kind "pixels": uniform at first, clamped straight-through."""
    x = torch.rand(n, 3, side, side, generator=draws).to(device).requires_grad_()
    return [x], lambda: x + (x.clamp(0, 1) - x).detach()


def latent_source(n: int, side: int, draws: torch.Generator, device: torch.device) -> Source:
    """The kind "generator": a new one, and its inputs."""
    generator = Generator(side, draws).to(device)
    z = torch.randn(n, LATENT, generator=draws).to(device).requires_grad_()
    return [*generator.parameters(), z], lambda: generator(z)


def noisy_source(
    labels: torch.Tensor, n_classes: int, generator: Generator, draws: torch.Generator
) -> Source:
    """The kind "noisy": a kept generator behind a new layer, fed with one-hot classes."""
    linear = nn.Linear(n_classes, LATENT)
    nn.init.normal_(linear.weight, generator=draws)
    nn.init.zeros_(linear.bias)
    layer = nn.Sequential(nn.BatchNorm1d(n_classes), linear).to(labels.device)
    classes = F.one_hot(labels, n_classes).float()
    return [*layer.parameters(), *generator.parameters()], lambda: generator(layer(classes))


# ---- A round


def invert(
    teacher: nn.Module,
    labels: torch.Tensor,
    source: Source,
    recipe: Recipe,
    draws: torch.Generator,
    *,
    terms: Sequence[Term] = (),
) -> torch.Tensor:
    """Descend on the teacher's losses, and give the images of the step with the least loss.

    Args:
        teacher: in evaluation mode; takes (B, 3, S, S) in [0, 1] (its normalisation inside) and gives logits.
        labels: (B,) int64, the wanted classes.
        source: what is descended on.
        recipe: steps and weights.
        draws: what shifts and mirrorings are drawn from.
        terms: further losses: adversaries, a contrastive term.

    Returns:
        (B, 3, S, S) uint8 on the CPU, rounded.

    Raises:
        ValueError: the teacher has no BatchNorm, and `recipe.bn` is not 0.
        AdqError: a loss is NaN or infinite; names the step.
    """
    parameters, make = source
    adam = torch.optim.Adam(parameters, lr=recipe.rate, betas=recipe.betas)
    best, least = torch.empty(0), math.inf
    with _statistics(teacher, recipe) as bn_loss, _penultimate(teacher) as features:
        for step in range(recipe.steps):
            images = make()
            seen_images = augmented(images, recipe, draws)
            logits = teacher(seen_images)
            loss = recipe.oh * F.cross_entropy(logits, labels) + recipe.bn * bn_loss()
            seen = Seen(seen_images, labels, logits, features())
            for term in terms:
                loss = loss + term(seen)
            value = float(loss.detach())
            if not math.isfinite(value):
                raise AdqError(f"step {step}: the loss is {value}; lower the rate ({recipe.rate:g})")
            if value < least:
                best, least = images.detach().clone(), value
            adam.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
            adam.step()
    return (best.clamp(0, 1) * 255).round().to(torch.uint8).cpu()


def augmented(images: torch.Tensor, recipe: Recipe, draws: torch.Generator) -> torch.Tensor:
    """The images, one and all shifted and mirrored as drawn; what a shift uncovers repeats the edge."""
    if recipe.shift:
        s = recipe.shift
        dy, dx = torch.randint(0, 2 * s + 1, (2,), generator=draws).tolist()
        padded = F.pad(images, (s, s, s, s), mode="replicate")
        images = padded[:, :, dy : dy + images.shape[2], dx : dx + images.shape[3]]
    if recipe.flip and bool(torch.rand((), generator=draws) < 0.5):
        images = images.flip(3)
    return images


@contextmanager
def _statistics(teacher: nn.Module, recipe: Recipe) -> Iterator[Callable[[], torch.Tensor]]:
    if recipe.bn == 0:
        yield lambda: torch.zeros(())
    else:
        with batchnorm_loss(teacher) as loss:
            yield loss


@contextmanager
def _penultimate(teacher: nn.Module) -> Iterator[Callable[[], torch.Tensor]]:
    """The input of the teacher's last linear layer in its last pass; (B, 0) where it has none."""
    linear = [layer for layer in teacher.modules() if isinstance(layer, nn.Linear)]
    kept: list[torch.Tensor] = []

    def note(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        kept[:] = [inputs[0].flatten(1)]

    hook = linear[-1].register_forward_pre_hook(note) if linear else None
    try:
        yield lambda: kept[0] if kept else torch.empty(0)
    finally:
        if hook is not None:
            hook.remove()
