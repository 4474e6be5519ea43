"""Images at three quarters of their bytes: patches dropped and rebuilt or left grey, or all compressed anew.

The `builtin` masked autoencoder rebuilds, through the package's own pipes; patches are of 4, 48 of 64 kept,
those that Grad-CAM++ of the `builtin` classifier sees most in, or by chance. Both networks have seen
CIFAR-10 train, the classifier its labels too, so what they choose and rebuild brings in more than the images
kept. Dropped images count as their share of patches of the bytes, which flatters them: our files of 32×32
images with patches of 4 would be larger than whole ones (`benchmarks.patch_jpeg`).
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch

import adq_wds as adq
from adq_wds.samples.patch_file import PatchImage
from adq_wds.tables.plan import Plan
from benchmarks.training import Images

PATCH = 4
SHARE = 0.75  # of patches, and of bytes
WAYS: dict[str, tuple[str, bool] | None] = {
    "recompressed": None,
    "gradcam-rebuilt": ("gradcam++", True),
    "gradcam-grey": ("gradcam++", False),
    "chance-rebuilt": ("random", True),
    "chance-grey": ("random", False),
}
"""Name → (importance of patches, whether holes are rebuilt), or None for compressing the whole anew."""


def altered(
    way: str, shards: Sequence[Path], plan: Plan, data: Images, *, seed: int
) -> tuple[Images, dict[str, Any]]:
    """The images that a plan keeps, altered, in the order of `data`; and for the record, bytes an image."""
    kept = adq.ShardDataset(shards, plan=plan, fields=("__key__", "jpg"))
    files: dict[str, bytes] = dict(iter(kept))
    whole = sum(map(len, files.values())) / len(files)
    record: dict[str, Any] = {"bytes_whole": round(whole, 1), "bytes": round(SHARE * whole, 1)}
    if (dropped := WAYS[way]) is None:
        quality, files = recompressed(files, SHARE * whole)
        record |= {"quality": quality, "bytes": round(sum(map(len, files.values())) / len(files), 1)}
        pixels = {key: _pixels(file) for key, file in files.items()}
    else:
        importance, rebuilt = dropped
        pipes: list[adq.Pipe] = [
            adq.Decode(label=None, to="pil"),
            adq.DropPatches(adq.importance(importance, patch=PATCH), keep=SHARE, patch=PATCH, seed=seed),
            adq.Reconstruct(adq.load_mae("builtin")) if rebuilt else adq.Map(with_grey_holes),
        ]
        pixels = dict(iter(adq.ShardDataset(shards, plan=plan, pipes=pipes, fields=("__key__", "image"))))
    keys = [key for name in data.keys for key in data.keys[name]]
    rows = [row for row, key in enumerate(keys) if key in pixels]
    stacked = torch.from_numpy(np.stack([pixels[keys[row]] for row in rows])).permute(0, 3, 1, 2)
    device = data.pixels.device
    return Images(stacked.contiguous().to(device), data.label[rows], {}), record


def recompressed(files: dict[str, bytes], target: float) -> tuple[int, dict[str, bytes]]:
    """The highest JPEG quality at which the files take at most `target` bytes in the mean, and they at it.

    Raises:
        ValueError: not even quality 1 is small enough.
    """
    images = {key: PIL.Image.open(io.BytesIO(file)) for key, file in files.items()}
    quality = highest(
        lambda q: sum(len(_saved(image, q)) for image in images.values()) <= target * len(files)
    )
    return quality, {key: _saved(image, quality) for key, image in images.items()}


def highest(fits: Callable[[int], bool]) -> int:
    """The highest quality, 1 to 100, that fits, by bisection.

    >>> highest(lambda quality: quality <= 37)
    37
    """
    low, high = 0, 100
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    if low == 0:
        raise ValueError("no JPEG quality is small enough")
    return low


def _saved(image: PIL.Image.Image, quality: int) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality, optimize=True)
    return file.getvalue()


def _pixels(file: bytes) -> Any:
    return np.asarray(PIL.Image.open(io.BytesIO(file)).convert("RGB"))


def with_grey_holes(sample: dict[str, Any]) -> dict[str, Any]:
    """The image, grey where patches are missing; for `Map`."""
    rows, columns = sample["grid"].tolist()
    kept = PatchImage(sample["patches"], sample["positions"], (rows, columns), PATCH)
    return {"__key__": sample["__key__"], "image": kept.to_image()}
