"""What do bfloat16, order in memory and torch.compile bring an encoder, and how far do they move its features?

timm's resnet18 at 224 (random weights: they do not change the time) and `builtin` at 32, on pictures drawn from noise at
several scales. Each way of running embeds the same batches in one thread on one core; rounds alternate between the
ways, so noise falls on all. Images a second, the ratio to the default in the same round, seconds until a compiled
network answers for the first time, and the largest cosine distance of an image's features from the default's.

    OMP_NUM_THREADS=1 python -m benchmarks.encoder_options --out benchmarks/results/encoder_options.json

Last measured (one of two cores of an AMD EPYC with bfloat16 instructions, busy with other work; Python 3.11, torch 2.15;
medians of three rounds, spread in the results): resnet18, times the default's speed: amp 1.9 (1.7 to 1.9),
channels_last off 0.73 (0.64 to 1.05), compile 1.4 (0.9 to 1.8), amp and compile 2.6 (1.7 to 4.6); the first compiled
answer took 100 and 72 s. `builtin`: amp 1.7, channels_last off 0.88, compile 0.74, so slower, amp and compile 1.35;
first answer 13 and 17 s. Largest cosine distance: 5e-6 and 2e-5 with amp, below 1e-13 with the others.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray

from adq_wds.models.builtin import builtin_encoder
from adq_wds.models.network_encoder import NetworkEncoder
from adq_wds.models.timm_encoder import timm_encoder
from benchmarks.common import parser, report, spread

BATCH = 64
WAYS: dict[str, dict[str, bool]] = {
    "default": {},
    "amp": {"amp": True},
    "channels_last_off": {"channels_last": False},
    "compile": {"compile": True},
    "amp_and_compile": {"amp": True, "compile": True},
}
NETWORKS: dict[str, tuple[Callable[..., NetworkEncoder], int, int]] = {
    "resnet18_at_224": (lambda **options: timm_encoder("resnet18", pretrained=False, **options), 256, 64),
    "builtin_at_32": (builtin_encoder, 32, 1024),
}  # and side and number of the pictures


def pictures(n: int, side: int) -> list[PIL.Image.Image]:
    """Images with structure from coarse to fine."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(n):
        image = PIL.Image.new("RGB", (side, side), (128, 128, 128))
        for cells in (3, 8, side):
            noise = PIL.Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
            image = PIL.Image.blend(image, noise.resize((side, side), PIL.Image.Resampling.BICUBIC), 0.5)
        made.append(image)
    return made


def embedded(encoder: NetworkEncoder, images: list[PIL.Image.Image]) -> tuple[float, NDArray[np.float64]]:
    """Seconds, and unit rows."""
    start = time.perf_counter()
    h = np.concatenate([encoder(images[i : i + BATCH])[0] for i in range(0, len(images), BATCH)])
    seconds = time.perf_counter() - start
    wide = h.astype(np.float64)
    return seconds, wide / np.linalg.norm(wide, axis=1, keepdims=True)


def measured(name: str, runs: int) -> dict[str, Any]:
    """Speed and distance of every way of running one network."""
    make, side, n = NETWORKS[name]
    images = pictures(n, side)
    encoders = {way: make(**options) for way, options in WAYS.items()}
    first = {way: embedded(encoder, images[:1])[0] for way, encoder in encoders.items()}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    rows: dict[str, NDArray[np.float64]] = {}
    for _ in range(runs):
        for way, encoder in encoders.items():
            taken, rows[way] = embedded(encoder, images)
            seconds[way].append(taken)
    return {
        way: {
            "images_per_s": spread([n / s for s in seconds[way]]),
            "speed_over_default": spread(
                [usual / s for usual, s in zip(seconds["default"], seconds[way], strict=True)]
            ),
            "first_answer_s": float(f"{first[way]:.3g}"),
            "largest_cosine_distance": float(
                f"{max(0.0, 1 - (rows[way] * rows['default']).sum(axis=1).min()):.2g}"
            ),
            "revision_ends_in": encoders[way].revision.partition(";dtype=")[2],
        }
        for way in WAYS
    }


def main() -> None:
    """Measure both networks."""
    a = parser(__doc__).parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as cache:
        # programs kept by an earlier run would make the first answer quick
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        result = {name: measured(name, a.runs) for name in NETWORKS}
    report(result, a.out)


if __name__ == "__main__":
    main()
