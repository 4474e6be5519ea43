"""What does the importance of patches by a class activation map cost beyond the forward pass?

By turns, in one thread: each network embeds a batch of decoded images (resize, forward pass, features and logits
out); and from its last feature maps, as the forward pass has them, comes the Grad-CAM++ importance of the images'
patches for the predicted class. Closed forms where the network allows them, else the head run backwards.

    python -m benchmarks.cam --out benchmarks/results/cam.json

Two cores of an AMD EPYC kept busy by other work, torch 2.15: beyond the forward pass `builtin` at 32×32 takes 1.4 %
of it (at most 4.6 %), ResNet-18 at 224×224 0.2 %, RegNetX-400MF 0.8 %, and ConvNeXt-Atto, by gradient, 1.6 %.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import PIL.Image
import torch

from adq_wds.core.importance import patch_means
from adq_wds.models.builtin import builtin_encoder
from adq_wds.models.network_encoder import NetworkEncoder
from adq_wds.models.timm_encoder import timm_encoder
from adq_wds.saliency.cam import cam_importance
from benchmarks.common import parser, report, spread

# name: side of the images, patch, images in a batch
CASES = {
    "builtin": (32, 4, 256),
    "resnet18": (224, 16, 16),
    "regnetx_004": (224, 16, 16),
    "convnext_atto": (224, 16, 16),
}


def in_turn(
    first: Callable[[], Any], second: Callable[[], Any], runs: int
) -> tuple[list[float], list[float]]:
    """Seconds of each, taken by turns, so that a busy machine slows both."""
    taken: tuple[list[float], list[float]] = ([], [])
    for work in (first, second):
        work()
    for _ in range(runs):
        for work, into in zip((first, second), taken, strict=True):
            start = time.perf_counter()
            work()
            into.append(time.perf_counter() - start)
    return taken


def measured(name: str, runs: int) -> dict[str, Any]:
    """One network's row."""
    side, patch, batch = CASES[name]
    encoder: NetworkEncoder = builtin_encoder() if name == "builtin" else timm_encoder(name, pretrained=False)
    pixels = np.random.default_rng(0).integers(0, 256, (batch, side, side, 3), dtype=np.uint8)
    images = [PIL.Image.fromarray(p) for p in pixels]
    importance = cam_importance(encoder, patch=patch)
    grid = (side // patch, side // patch)
    with torch.no_grad():
        maps = importance._maps(encoder.whole(images))

    def beyond() -> None:
        with torch.no_grad():
            patch_means(importance.of_maps(maps, [None] * batch), grid, patch)

    forward, rest = in_turn(lambda: encoder(images), beyond, runs)
    return {
        "closed": importance.closed,
        "forward_ms_an_image": spread([t / batch * 1e3 for t in forward]),
        "beyond_ms_an_image": spread([t / batch * 1e3 for t in rest]),
        "share_of_the_forward_pass": spread([b / a for a, b in zip(forward, rest, strict=True)]),
    }


def main() -> None:
    """Measure all."""
    a = parser(__doc__).parse_args()
    torch.set_num_threads(1)
    report({"networks": {name: measured(name, a.runs) for name in CASES}}, a.out)


if __name__ == "__main__":
    main()
