"""What does a diversity head cost, and what does it see that embeddings alone do not?

CIFAR-10 train is embedded with `builtin-free` (no labels seen) and cut into ten bins; two views of 20,000 keyed images
are embedded. Then the diversity of each bin, with the time beyond the views' embedding, side by side in one run: without
a head (running sums over all embeddings), and behind `contrastive` (three heads, mean and spread) after 1, 3, 10 (what
plans take) and 30 epochs, since what it finds similar depends on how long it is trained. `range` is the largest value over the least: what normalising leaves of it moves the rates.

    python -m benchmarks.heads --data DATA --out benchmarks/results/heads.json

Two cores of an AMD EPYC shared with other jobs (torch 2.15): three contrastive heads take 29 s of one core (53 s by the
clock, at a load of 4); the views' embedding 54 s, beside 78 s for the whole set. Without a head
diversity rises from bin to bin, 1.125 to 1.206. Untrained heads, which the released code has, saw nearly nothing when
they were here (1.028 to 1.039, and a head's draw moved a value by 0.004). Trained ones push all images apart and level the bins: 1.892 in the first, 1.930 in the middle,
1.912 in the last, with a spread over heads of 0.004 to 0.026, as large as most differences between bins. After one epoch
the values still rise from bin to bin (1.832 to 1.909), from three on they fall again in the last: the trained form depends
on how long the head is trained. Beside texture at alpha 0.65 the rates stay within 3 % of each other's mean in all cases.
"""

from __future__ import annotations

import os
import tempfile
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

import adq_wds as adq
from adq_wds.core.allocation import adaptive
from adq_wds.core.scores import importance
from adq_wds.planning.build_plan import find_bins
from adq_wds.planning.diversity_head import EPOCHS, N_SEEDS, head_diversity
from adq_wds.tables.views import Views
from benchmarks.common import data_folder, parser, report, seconds

ENCODER = "builtin-free"
N_BINS = 10
N_IMAGES = 20_000
EPOCHS_SHOWN = (1, 3, EPOCHS, 30)


def row(
    value: NDArray[np.float64], over_heads: NDArray[np.float64] | None, texture: NDArray[np.float64]
) -> dict[str, Any]:
    """Values of the bins, and the rates they lead to beside texture, relative to keep, at alpha 0.65."""
    rates = adaptive(np.ones(N_BINS, np.int64), importance([texture, value]), 0.3)
    return {
        "value": np.round(value, 4).tolist(),
        "spread": None if over_heads is None else np.round(over_heads, 5).tolist(),
        "range": round(float(value.max() / value.min()), 4),
        "rates": np.round(rates / rates.mean(), 4).tolist(),
    }


def main() -> None:
    """Embed, bin, view, score."""
    arguments = parser(__doc__)
    arguments.add_argument("--data", default=os.environ.get("ADQ_DATA"))
    a = arguments.parse_args()
    shards = sorted(str(path) for path in data_folder("cifar10", a.data).glob("cifar10-train-*.tar"))
    with tempfile.TemporaryDirectory() as out:
        embedding_s = seconds(lambda: adq.embed_shards(shards, ENCODER, out, progress=False), 1)[0]
        features = adq.Features(out)
        bins = find_bins(features, bins=N_BINS, progress=False)
        views_s = seconds(lambda: adq.embed_shards(shards, ENCODER, out, views=N_IMAGES, progress=False), 1)[
            0
        ]
        position, z = Views(features).rows()
    bin, size = bins.bin[position], np.bincount(bins.bin, minlength=N_BINS)
    scores = bins.scores()
    rows = {"none": row(scores["diversity"], None, scores["texture"])}
    by_epochs, taken = {}, {}
    for epochs in EPOCHS_SHOWN:
        wall, cpu = time.perf_counter(), time.process_time()
        found = head_diversity(z, bin, N_BINS, size=size, epochs=epochs)
        times = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        made = row(*found, scores["texture"])
        by_epochs[epochs] = made
        if epochs == EPOCHS:
            rows["contrastive"] = made
            taken["contrastive"] = {clock: round(s, 1) for clock, s in times.items()}
    result = {
        "samples": len(features),
        "images_viewed": len(z),
        "width": z.shape[2],
        "encoder": ENCODER,
        "embedding_all_s": round(embedding_s, 1),
        "embedding_views_s": round(views_s, 1),
        f"{N_SEEDS}_heads_s": taken,
        "texture": np.round(scores["texture"], 4).tolist(),
        "heads": rows,
        "contrastive_after_epochs": by_epochs,
        "load_average": round(os.getloadavg()[0], 1),
    }
    report(result, a.out)


if __name__ == "__main__":
    main()
