"""Further losses of inversion: adversaries, which look for images where a student fails, and a contrastive term."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

WIDTH = 256  # of the contrastive head


@dataclass(frozen=True)
class Seen:
    """What a loss sees at a step: images as the teacher saw them, classes, and its logits and penultimate features."""

    images: torch.Tensor  # (B, 3, S, S) in [0, 1]
    labels: torch.Tensor  # (B,)
    logits: torch.Tensor  # (B, C)
    features: torch.Tensor  # (B, D)


Term = Callable[[Seen], torch.Tensor]
"""A further loss, its weight included."""


def kl_adversary(student: nn.Module, *, weight: float = 1.33, masked: bool = True) -> Term:
    """−weight · KL(teacher‖student): images on which they differ; `masked`, only where both predict one class.

    Source: Tran et al. 2024 (NAYER, arXiv 2310.00258).
    """

    def loss(seen: Seen) -> torch.Tensor:
        answer = student(seen.images)
        target = seen.logits.log_softmax(1)
        each = F.kl_div(answer.log_softmax(1), target, reduction="none", log_target=True).sum(1)
        if masked:
            each = each * (answer.argmax(1) == seen.logits.argmax(1))
        return -weight * each.mean()

    return loss


def rotation_adversary(
    features: Callable[[torch.Tensor], torch.Tensor],
    head: nn.Module,
    *,
    weight: float = 10.0,
    bounded: bool = False,
) -> Term:
    """−weight · `rotation_loss`: images whose class and turn the student's features do not tell.

    Args:
        features, head, bounded: as of `rotation_loss`.
        weight: of the loss.

    Source: CSD (arXiv 2307.04542).
    """

    def loss(seen: Seen) -> torch.Tensor:
        return -weight * rotation_loss(features, head, seen.images, seen.labels, bounded=bounded)

    return loss


def rotation_loss(
    features: Callable[[torch.Tensor], torch.Tensor],
    head: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    bounded: bool = False,
) -> torch.Tensor:
    """The cross-entropy of a joint class × rotation head; descend on it to train the head beside the student.

    Args:
        features: (B, 3, S, S) images to the student's (B, D) penultimate features.
        head: features to (B, 4 C) logits, class by class its four rotations.
        images: (B, 3, S, S) in [0, 1].
        labels: (B,) int64.
        bounded: scale the logits to length 1, as CSD's code does, which bounds the loss.
    """
    turned, targets = rotated(images, labels)
    logits = head(features(turned))
    return F.cross_entropy(F.normalize(logits) if bounded else logits, targets)


def rotated(images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(4 B, 3, S, S) images turned by 0, 90, 180 and 270 degrees, and their joint classes, 4 · label + turns."""
    turned = torch.cat([torch.rot90(images, k, (2, 3)) for k in range(4)])
    return turned, torch.cat([4 * labels + k for k in range(4)])


class Contrast:
    """A contrastive term: an image is near its mirror image, and far from those of the others of its round.

    Args:
        features: (B, 3, S, S) images to the teacher's (B, D) features.
        width: D.
        weight, temperature: of the loss.
        seed: of the head, a random projection to 256.

    Source: Fang et al. 2021 (CMI, arXiv 2105.08584); there the head is trained, pairs are two crops,
        and a memory bank holds images of earlier rounds.
    """

    def __init__(
        self,
        features: Callable[[torch.Tensor], torch.Tensor],
        width: int,
        *,
        weight: float = 0.8,
        temperature: float = 0.2,
        seed: int = 0,
    ) -> None:
        self.features, self.weight, self.temperature = features, weight, temperature
        head = torch.randn(width, WIDTH, generator=torch.Generator().manual_seed(seed))
        self.head = head / math.sqrt(width)

    def _projected(self, images: torch.Tensor) -> torch.Tensor:
        features = self.features(images)
        return F.normalize(features @ self.head.to(features), dim=1)

    def __call__(self, seen: Seen) -> torch.Tensor:
        """The loss; see `Term`."""
        z, mirrored = self._projected(seen.images), self._projected(seen.images.flip(3))
        likeness = z @ mirrored.T / self.temperature
        return self.weight * F.cross_entropy(likeness, torch.arange(len(z), device=z.device))
