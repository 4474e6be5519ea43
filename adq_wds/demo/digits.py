"""Writes the demo's images, scikit-learn's digits, to tar shards."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from adq_wds.core.rng import draws
from adq_wds.errors import AdqError
from adq_wds.writing.tars import ShardPattern
from adq_wds.writing.write_shards import write_shards

TEST_SHARE, PER_SHARD = 0.3, 320


def load_digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """1,797 grey images (N, 8, 8) uint8 and their digits (N,) int64, from the files of scikit-learn.

    Raises:
        AdqError: scikit-learn is missing or cannot be imported.
    """
    try:
        from sklearn.datasets import load_digits as bundled
    except ImportError as error:
        text = f'the demo\'s images come with scikit-learn ({error}): pip install "adq-wds[demo]"'
        raise AdqError(text) from error
    images, labels = bundled().images, bundled().target  # 0 … 16 ink levels
    return np.minimum(images * 16, 255).astype(np.uint8), labels.astype(np.int64)


def write_digits(folder: Path) -> dict[str, list[str]]:
    """Write ``train/train-%06d.tar`` and ``test/test-%06d.tar`` unless they are there; give each split's paths.

    The split is keyed and keeps the classes' proportions, so it is the same on any machine.
    """
    pixels, labels = load_digits()
    keys = [f"digit-{i:04d}" for i in range(len(labels))]
    draw = draws(0, 0, "digits", keys, purpose="split")
    in_test = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        in_test[rows[np.argsort(draw[rows])][: round(TEST_SHARE * len(rows))]] = True
    shards = {}
    for split, chosen in (("train", ~in_test), ("test", in_test)):
        rows, target = np.flatnonzero(chosen), folder / split / f"{split}-%06d.tar"
        paths = [ShardPattern(str(target)).path(i) for i in range(-(-len(rows) // PER_SHARD))]
        if not all(path.is_file() for path in [*paths, target.parent / "_info.json"]):
            samples = ({"__key__": keys[i], "png": _png(pixels[i]), "cls": b"%d" % labels[i]} for i in rows)
            write_shards(samples, target, max_samples=PER_SHARD, split=split, overwrite=True, progress=False)
        shards[split] = list(map(str, paths))
    return shards


def _png(pixels: NDArray[np.uint8]) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()
