"""How well do the encoders that need no download tell images apart, and at what cost?

CIFAR-10 train and test are embedded as every job embeds them (JPEG shards in, unit rows as float16 out); a test image
takes the label of most of its 20 nearest training images by cosine, or of the nearest one. Side by side in one run:
`builtin` (trained with the labels of this very training set), `builtin-free` (same images, no labels), the same network
with random weights, and `thumbnail`. Time is of the encoder alone, in one thread, on decoded images.

    python -m benchmarks.builtin --data DATA --out benchmarks/results/builtin.json

Two cores of an AMD EPYC, torch 2.15: by the 20 nearest (by the nearest) `builtin` is right for 86.8 % (85.0 %) of the
test images, `builtin-free` for 66.7 % (61.8 %), random weights for 39.0 % (34.0 %), `thumbnail` for 40.9 % (40.1 %).
The network takes 0.30 ms an image, 44 times as long as `thumbnail`. `builtin-free` is a short training of 19 epochs
whose loss was still falling: better than colours, far from what longer training without labels reaches.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray

import adq_wds as adq
from adq_wds.models import BUILTIN_NAMES
from adq_wds.models.builtin import SmallNet, builtin_encoder, weights_path
from adq_wds.models.checkpoints import load_weights
from adq_wds.models.network_encoder import NetworkEncoder
from adq_wds.models.thumbnail import Thumbnail
from adq_wds.protocols import Encoder
from benchmarks.common import data_folder, parser, report, seconds, spread

K = 20
BATCH = 64
N_TIMED = 1024


def random_weights(seed: int = 0) -> NetworkEncoder:
    """The built-in network before any training: He's first weights, no biases."""
    torch.manual_seed(seed)
    network = SmallNet()
    for parameter in network.parameters():
        torch.nn.init.zeros_(parameter) if parameter.ndim == 1 else torch.nn.init.kaiming_normal_(parameter)
    made = builtin_encoder("builtin-free")
    made.options.freeze(network, made.device)
    return replace(made, name="random weights", revision=f"seed={seed}", model=network, trained_on="nothing")


def embedded(shards: list[Path], encoder: Encoder) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Unit rows (N, D) and labels (N,) of some shards."""
    with tempfile.TemporaryDirectory() as out:
        features = adq.embed_shards(shards, encoder, out, progress=False)
        rows = np.concatenate([file.embedding() for file in features]).astype(np.float32)
        return rows, np.concatenate([file.read_columns(["label"])["label"].to_numpy() for file in features])


def nearest_accuracy(
    known: tuple[NDArray[np.float32], NDArray[np.int32]],
    asked: tuple[NDArray[np.float32], NDArray[np.int32]],
    k: int,
) -> float:
    """How often most of the k nearest have the label; the lowest label wins a tie."""
    n_right = 0
    for start in range(0, len(asked[0]), 1000):
        similarity = asked[0][start : start + 1000] @ known[0].T
        nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
        votes = (known[1][nearest][:, :, None] == np.arange(known[1].max() + 1)).sum(axis=1)  # (1000, C)
        n_right += int((votes.argmax(axis=1) == asked[1][start : start + 1000]).sum())
    return n_right / len(asked[0])


def microseconds(encoder: Encoder, runs: int) -> dict[str, float]:
    """An image's time in one thread."""
    pixels = np.random.default_rng(0).integers(0, 256, (N_TIMED, 32, 32, 3), dtype=np.uint8)
    images = [PIL.Image.fromarray(p) for p in pixels]
    batches = [images[i : i + BATCH] for i in range(0, N_TIMED, BATCH)]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    encoder(batches[0])  # warm up
    taken = seconds(lambda: [encoder(batch) for batch in batches], runs)
    torch.set_num_threads(before)
    return spread([t / N_TIMED * 1e6 for t in taken])


def measured(encoder: Encoder, train: list[Path], test: list[Path], runs: int) -> dict[str, Any]:
    """One encoder's row."""
    known, asked = embedded(train, encoder), embedded(test, encoder)
    return {
        "width": known[0].shape[1],
        f"nearest_{K}": round(nearest_accuracy(known, asked, K), 4),
        "nearest_1": round(nearest_accuracy(known, asked, 1), 4),
        "us_an_image": microseconds(encoder, runs),
    }


def main() -> None:
    """Measure all four."""
    arguments = parser(__doc__)
    arguments.add_argument("--data", default=os.environ.get("ADQ_DATA"))
    a = arguments.parse_args()
    folder = data_folder("cifar10", a.data)
    train, test = (sorted(folder.glob(f"*{part}*.tar")) for part in ("train", "test"))
    encoders: list[Encoder] = [
        *(builtin_encoder(name) for name in BUILTIN_NAMES),
        random_weights(),
        Thumbnail(),
    ]
    rows = {encoder.name: measured(encoder, train, test, a.runs) for encoder in encoders}
    headers = {name: load_weights(weights_path(name)).header for name in BUILTIN_NAMES}
    report({"encoders": rows, "headers": headers}, a.out)


if __name__ == "__main__":
    main()
