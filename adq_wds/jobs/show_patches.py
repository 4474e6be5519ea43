"""Draws what dropping patches does to a few images: the picture of `adq patches`."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from adq_wds.checks import Count, Ratio, positive
from adq_wds.core.patches import KEEP, PATCH, tile, tile_columns
from adq_wds.errors import AdqError, shorten
from adq_wds.files import atomic_path
from adq_wds.pipes.drop_patches import DropPatches
from adq_wds.pipes.feature_shift import Look
from adq_wds.protocols import Importance
from adq_wds.report.patch_sheet import Panel, Pixels, draw_sheet, heat, holes, psnr
from adq_wds.samples.fields import IMAGE_FIELDS, FieldSpec
from adq_wds.samples.patch_file import (
    CODING_UNIT,
    MAX_JPEG_SIDE,
    decode,
    encode_patches,
    encode_whole,
    keep_patches,
)
from adq_wds.stream.dataset import ShardDataset
from adq_wds.writing.smaller import check_patch_keep, log_classifier

if TYPE_CHECKING:
    from adq_wds.mae.network import MaskedAutoencoder  # which imports timm: seconds

SAMPLES = 4
TITLES = ("original", "importance", "kept", "stored")


@dataclass(frozen=True)
class Shown:
    """Numbers of one image in the picture.

    Attributes:
        key: the sample's.
        whole_bytes: of the whole image as a JPEG of that quality.
        stored_bytes: of the kept patches as one; None where patches are too small for it.
        psnr: in dB, of the rebuilt image's dropped pixels; None without a network, or when nothing was dropped.
    """

    key: str
    whole_bytes: int
    stored_bytes: int | None
    psnr: float | None

    @property
    def ratio(self) -> float | None:
        """Stored bytes by whole ones."""
        return None if self.stored_bytes is None else self.stored_bytes / self.whole_bytes

    def __str__(self) -> str:
        stored = "" if self.ratio is None else f", patches {self.stored_bytes:,} B ({self.ratio:.2f})"
        rebuilt = "" if self.psnr is None else f", rebuilt {self.psnr:.1f} dB on dropped pixels"
        return f"{shorten(self.key)}: {self.whole_bytes:,} B{stored}{rebuilt}"


def show_patches(
    urls: Any,
    importance: Importance,
    out: str | os.PathLike[str],
    *,
    mae: MaskedAutoencoder | None = None,
    patch_keep: Ratio = KEEP,
    patch: int = PATCH,
    size: int | None = 224,
    quality: int = 90,
    image: FieldSpec = IMAGE_FIELDS,
    samples: Count = SAMPLES,
) -> list[Shown]:
    """Draw a few images, where they matter, what is kept, how it is stored, and what a network makes of it.

    Args:
        urls: shards, as `expand_urls` reads them; images from all over them are shown, the same every time.
        importance: see `DropPatches`.
        out: the picture's file, a PNG: ``.png``.
        mae: rebuilds the images, if it is for patches and images of that size.
        patch_keep: ratio of each image's patches kept.
        patch: side of a patch in pixels.
        size: side to which images are drawn first; None takes them as they are.
        quality: quality of the JPEGs, 1 to 100.
        image: field with the image.
        samples: images shown.

    Raises:
        ValueError: an argument is out of range, or the network is for other images.
        SampleError: an image is damaged.
        AdqError: there are no samples, or the picture cannot be written.
    """
    samples = positive("samples", samples)
    if Path(out).suffix.lower() != ".png":
        raise ValueError(f"{shorten(os.fspath(out))} will hold a PNG; give it a name that ends in .png")
    check_patch_keep(patch_keep)
    drop = DropPatches(importance, keep=patch_keep, patch=patch, size=size, image=image)
    if mae is not None and mae.size.patch != patch:
        raise ValueError(
            f"the network rebuilds patches of {mae.size.patch} pixels, not {patch}; give that patch"
        )
    log_classifier(importance)
    # from all over the shards, the same every time
    stream = ShardDataset(urls, shuffle=True, rank=0, world=1)
    rows, shown = [], []
    for sample in islice(stream, samples):
        panels, numbers = _panels(sample["__key__"], drop.look([sample])[0], drop, mae, patch, quality)
        rows.append(panels)
        shown.append(numbers)
    if not rows:
        raise AdqError("no samples to show")
    sheet = draw_sheet(rows, [*TITLES, "rebuilt"][: len(rows[0])])
    with atomic_path(out) as partial:
        sheet.save(partial, format="PNG")
    return shown


def _panels(
    key: str, look: Look, drop: DropPatches, mae: MaskedAutoencoder | None, patch: int, quality: int
) -> tuple[list[Panel], Shown]:
    """The panels of one image, a column each, and its numbers."""
    pixels: Pixels = look.pixels[0]
    n_patches = look.scores.shape[1]
    (kept,) = drop.choose(look)
    if not len(kept):
        least = f"give at least {1 / n_patches:.3g}"
        raise ValueError(f"patch_keep={drop.keep} keeps none of {n_patches} patches; {least}")
    image = keep_patches(pixels, kept, patch)
    whole = len(encode_whole(pixels, quality=quality))
    stored = encode_patches(image, quality=quality) if patch % CODING_UNIT["4:2:0"] == 0 else None
    n_stored = None if stored is None else len(stored)
    beneath = f"patches of {patch}: no JPEG"
    if n_stored is not None:
        beneath = f"{n_stored:,} B, {n_stored / whole:.2f} of the whole"
    columns = tile_columns(len(kept), patch, max_side=_squarish(len(kept), patch))
    panels = [
        Panel(pixels, (key[-34:], f"{whole:,} B as JPEG {quality}")),
        Panel(heat(look.scores[0], look.grid, patch, pixels), (f"{n_patches} patches of {patch}",)),
        Panel(holes(pixels, kept, look.grid, patch), (f"{len(kept)} of {n_patches}",)),
        Panel(tile(image.patches, columns), (beneath,)),
    ]
    if mae is None:
        return panels, Shown(key, whole, n_stored, None)
    if tuple(mae.size.grid) != tuple(look.grid):
        raise ValueError(
            f"the network's images have {mae.size.grid} patches, these {look.grid}; give another size"
        )
    source, device = decode(stored) if stored else image, next(iter(mae.parameters())).device
    arrays = (torch.from_numpy(np.array(x))[None].to(device) for x in (source.patches, source.kept))
    rebuilt = mae.reconstruct_patches(*arrays)[0].cpu().numpy()
    dropped = np.kron(~image.mask.reshape(look.grid), np.ones((patch, patch))).astype(bool)
    of_dropped = psnr(pixels, rebuilt, dropped) if dropped.any() else None
    line = "nothing dropped" if of_dropped is None else f"{of_dropped:.1f} dB on dropped pixels"
    panels.append(Panel(rebuilt, (line, f"{psnr(pixels, rebuilt):.1f} dB on all")))
    return panels, Shown(key, whole, n_stored, of_dropped)


def _squarish(n: int, patch: int) -> int:
    """A side for showing n tiles about as wide as high; files hold them in one row."""
    side = math.isqrt(n - 1) + 1
    return min(MAX_JPEG_SIDE, side * patch)
