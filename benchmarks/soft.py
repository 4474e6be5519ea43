"""Makes soft targets for the trainings of `benchmarks.accuracy`, as a user does: by `soften_labels` and `SoftLabels`.

Half of each target is the label, half the probabilities of

- `ridge`: the leave-one-out fit on all samples' embeddings and labels, or
- `proxy`: a `small` network trained on as many other samples, drawn at random; so it has seen none of those that it
  gives targets for. No label of the test set is used.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

import adq_wds as adq
from adq_wds.core.rng import generator
from adq_wds.tables.features import Features
from benchmarks.training import Images, recipe_for, train

SOURCES = ("ridge", "proxy")
_BATCH = 500


def soft_targets(
    source: str,
    features: Features,
    shards: Sequence[Path],
    data: Images,
    rows: NDArray[np.int64],
    *,
    seed: int,
    precision: str,
) -> torch.Tensor:
    """(N, C) float32 targets of all images.

    Args:
        source: one of `SOURCES`.
        features: of the images, for `ridge`.
        shards: that the images were read from.
        data: N images.
        rows: those that will be trained on, which the proxy does not see.
        seed: of the proxy.
        precision: of the proxy's training.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "soft.parquet"
        if source == "ridge":
            report = adq.soften_labels(features, out=file, progress=False)
        else:
            logits = _proxy_logits(data, rows, seed, precision)
            np.save(Path(folder) / "logits.npy", logits)
            proxy = adq.embed_shards(
                shards,
                out=Path(folder) / "logits",
                embeddings=Path(folder) / "logits.npy",
                image=None,
                progress=False,
            )
            report = adq.soften_labels(proxy, source="logits", out=file, progress=False)
        print(report, flush=True)
        names = [(name, key) for name, keys in data.keys.items() for key in keys]
        samples = [
            {"__url__": name, "__key__": key, "label": y}
            for (name, key), y in zip(names, data.label.tolist(), strict=True)
        ]
        soft = np.stack([sample["soft.npy"] for sample in adq.SoftLabels(file).apply(samples)])
    return torch.from_numpy(soft).to(data.pixels.device)


def _proxy_logits(data: Images, rows: NDArray[np.int64], seed: int, precision: str) -> NDArray[np.float32]:
    """(N, C) logits of a network that was trained on none of `rows`."""
    n = len(data.label)
    rest = np.setdiff1d(np.arange(n), rows)
    seen = np.sort(generator(seed, 0, "", "", purpose="proxy").permutation(rest)[: len(rows)])
    recipe = recipe_for("small", len(rows) / n, precision)
    judged = Images(data.pixels[rest[:_BATCH]], data.label[rest[:_BATCH]], {})  # whatever it says is not used
    net = train(recipe, data, judged, lambda epoch: seen, seed=seed).net.eval()
    with torch.inference_mode():
        logits = [net(data.pixels[i : i + _BATCH]).float().cpu() for i in range(0, n, _BATCH)]
    return torch.cat(logits).numpy()
