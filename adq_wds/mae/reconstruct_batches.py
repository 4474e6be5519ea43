"""Rebuilds normalised images from batches of kept patches, on the device that trains, one batch ahead."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from adq_wds.errors import shorten
from adq_wds.mae.network import IMAGENET_MEAN, IMAGENET_STD, MaskedAutoencoder
from adq_wds.models.forward import check_bfloat16, pick_device
from adq_wds.samples.fields import KEPT_FIELDS

log = logging.getLogger("adq_wds")

PATCHES, POSITIONS, GRID = KEPT_FIELDS
IMAGE = "image"

Part = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Patches (b, K, P, P, 3), positions (b, K), and which rows of the batch they are (b,)."""


def reconstruct_batches(
    loader: Iterable[Any],
    mae: MaskedAutoencoder,
    *,
    device: str | torch.device | None = None,
    fields: Sequence[str] | None = None,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    amp: bool | None = None,
    compile: bool | str = False,  # noqa: A002 - torch's own word
) -> Iterator[Any]:
    """Batches with whole, normalised images in place of kept patches: kept pixels as stored, dropped ones predicted.

    Patches travel to the device as uint8. On CUDA the next batch is copied while this one is computed, from pinned
    memory.

    Args:
        loader: gives batches: dicts or tuples of patches (B, K, P, P, 3) uint8, positions (B, K) int64, grid (B, 2), which
            may be left out but is then not held against the network's, and other fields, as tensors or arrays; or,
            where images keep different numbers of patches, lists of such samples (``collate=list``).
        mae: for images of that many patches; moved to `device`.
        device: where images are rebuilt; by default where `mae` is.
        fields: names of the items of tuples, such as ``("patches", "positions", "grid", "label")``. The loader's data set
            is asked where nothing is said; if it does not tell, patches and positions are the first two.
        mean, std: of the colours in [0, 1], which the trained network expects: (x - mean) / std.
        amp: in bfloat16, on CUDA; unless said, where the device computes in it. On the CPU in float32, whatever this says.
        compile: let torch compile the network, in place; pays when batches have one size. A mode of `torch.compile`
            may be named: "reduce-overhead" replays CUDA graphs, which pays for small batches.

    Yields:
        what the loader gave, with images (B, 3, H, W) float32 on the device in place of patches, positions and grid:
        under ``image`` in a dict, first in a tuple. Other tensors go to the device; the samples of a list become a batch.

    Raises:
        TypeError: `mae` is no masked autoencoder.
        ValueError: no such device, or with ``amp=True`` one without bfloat16; `mean` or `std` are not three numbers that can be used.

    Raises (while streaming):
        ValueError: a batch is none of these, holds images already, or its patches are not those of such an image.
        AdqError: a reconstruction is not finite.

    Source: He et al. 2022 (arXiv 2111.06377); rebuilding where the accelerator is: ours.
    """
    if not isinstance(mae, MaskedAutoencoder):
        raise TypeError(
            f"reconstruct_batches needs a masked autoencoder, got {shorten(mae)}; write adq_wds.load_mae(...)"
        )
    colours = [[float(x) for x in values] for values in (mean, std)]
    for name, values, numbers in (("mean", mean, colours[0]), ("std", std, colours[1])):
        if len(numbers) != 3 or not all(map(math.isfinite, numbers)) or (name == "std" and min(numbers) <= 0):
            raise ValueError(
                f"{name}={shorten(values)}: expected three numbers{', each above 0' if name == 'std' else ''}"
            )
    target = pick_device(str(device)) if device is not None else next(mae.parameters()).device
    half = _in_bfloat16(amp, target)
    mae = mae.to(target).eval()
    if compile:
        mae.compile(mode=compile if isinstance(compile, str) else None)
    levels = torch.tensor(colours, dtype=torch.float32)
    if fields is None:  # a ShardDataset, or a loader of one, knows
        names = getattr(getattr(loader, "dataset", loader), "fields", None)
        fields = names if isinstance(names, tuple) else None
    batches = (_checked(read_batch(batch, fields), mae) for batch in loader)
    return _rebuilt(batches, mae, target, half, *(255 * levels.to(target)[:, :, None, None]).unbind())


def _in_bfloat16(amp: bool | None, target: torch.device) -> bool:
    if amp is False or target.type != "cuda":
        return False
    try:
        check_bfloat16(target)
    except ValueError as error:
        if amp:
            raise
        log.info("images are rebuilt in float32: %s", error)
        return False
    return True


def _checked(batch: KeptBatch, mae: MaskedAutoencoder) -> KeptBatch:
    """The batch, if it is for this network; before it is copied, since there a check would wait for the device."""
    check_grid(batch.grid, mae.size.grid)
    for patches, positions, _ in batch.parts:
        mae.check_kept(patches, positions)
    return batch


def _rebuilt(
    batches: Iterator[KeptBatch],
    mae: MaskedAutoencoder,
    target: torch.device,
    amp: bool,
    shift: torch.Tensor,
    scale: torch.Tensor,
) -> Iterator[Any]:
    for batch in _ahead(batches, target):
        with torch.autocast("cuda", torch.bfloat16) if amp else nullcontext():
            images = torch.cat([mae.rebuilt(patches, positions) for patches, positions, _ in batch.parts])
        if len(batch.parts) > 1:  # back into the order of the samples
            order = torch.cat([rows for _, _, rows in batch.parts])
            images = images[torch.argsort(order).to(target)]
        whole = (images.permute(0, 3, 1, 2).float() - shift) / scale  # (B, 3, H, W)
        yield batch.with_images(whole)


def _ahead(batches: Iterator[KeptBatch], target: torch.device) -> Iterator[KeptBatch]:
    """Batches on the device; on CUDA the next one is on its way while this one is used."""
    if target.type != "cuda":
        for batch in batches:
            yield _moved(batch, target)
        return
    copies: Any = torch.cuda.Stream(target)  # type: ignore[no-untyped-call,unused-ignore]
    waiting: KeptBatch | None = None
    for batch in batches:
        with torch.cuda.stream(copies):
            sent = _moved(batch, target)
        if waiting is not None:
            yield waiting
        torch.cuda.current_stream(target).wait_stream(copies)
        for tensor in (*(x for part in sent.parts for x in part[:2]), *sent.rest.values()):
            if isinstance(tensor, torch.Tensor):  # not given away while it is used
                tensor.record_stream(torch.cuda.current_stream(target))
        waiting = sent
    if waiting is not None:
        yield waiting


def _moved(batch: KeptBatch, target: torch.device) -> KeptBatch:
    """The batch with its tensors on the device."""
    parts = [
        (_sent(patches, target), _sent(positions, target), rows) for patches, positions, rows in batch.parts
    ]
    rest = {name: _sent(x, target) if isinstance(x, torch.Tensor) else x for name, x in batch.rest.items()}
    return replace(batch, parts=parts, rest=rest)


def _sent(tensor: torch.Tensor, target: torch.device) -> torch.Tensor:
    if target.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(target)
    return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(target, non_blocking=True)


@dataclass(frozen=True)
class KeptBatch:
    """A batch, taken apart.

    Attributes:
        parts: images that keep equally many patches, together.
        grid: (n, 2) rows and columns of patches of whole images; None where the batch does not say.
        rest: the other fields, by name, or in their order where the batch was a tuple; arrays and numbers are tensors.
        form: dict or tuple, what the batch or its samples were.
    """

    parts: list[Part]
    grid: Any
    rest: dict[Any, Any]
    form: type

    def with_images(self, images: torch.Tensor) -> Any:
        """The batch again, with images in place of patches."""
        return {IMAGE: images, **self.rest} if self.form is dict else (images, *self.rest.values())


def read_batch(batch: Any, names: Sequence[str] | None = None) -> KeptBatch:
    """Take a batch apart.

    Args:
        batch: a dict, a tuple, or a list of samples that are one or the other.
        names: of the items of tuples; without them patches and positions come first.

    Raises:
        ValueError: it is none of these, or a dict with a field "image".
    """
    # a collated batch is a list too; its fields of text are tuples, its patches are not
    ragged = isinstance(batch, list) and bool(batch) and all(isinstance(x, dict | tuple) for x in batch)
    one = batch[0] if ragged else batch
    form = dict if isinstance(one, dict) else tuple
    fields = _named(one, names)
    if form is dict and IMAGE in fields:
        raise ValueError(
            "the batch has a field 'image' already, where the rebuilt images would go; rename or drop it"
        )
    others = [name for name in fields if name not in (PATCHES, POSITIONS, GRID)]
    if not ragged:
        patches, positions = _tensor(fields[PATCHES]), _tensor(fields[POSITIONS])
        if patches.ndim == 4:
            raise ValueError(
                f"patches are {tuple(patches.shape)}, those of one image; expected batches (B, K, P, P, 3): give the "
                "data set batch_size="
            )
        rest = {name: _tensor(fields[name]) for name in others}
        return KeptBatch([(patches, positions, torch.arange(len(patches)))], fields.get(GRID), rest, form)
    samples = [_named(sample, names) for sample in batch]
    rest = {name: _stacked([sample[name] for sample in samples]) for name in others}
    grid = np.stack([np.asarray(sample[GRID]) for sample in samples]) if GRID in fields else None
    return KeptBatch(_by_count(samples), grid, rest, form)


def check_grid(grid: Any, expected: tuple[int, int]) -> None:
    """Raise `ValueError` unless all images have as many rows and columns of patches as expected, where that is known."""
    if grid is None:
        return
    grids = {tuple(row) for row in torch.as_tensor(grid).reshape(-1, 2).tolist()}
    if grids != {tuple(expected)}:
        raise ValueError(
            f"images of {' and '.join(f'{r} x {c}' for r, c in sorted(grids))} patches, but this network's have "
            f"{expected[0]} x {expected[1]}: give DropPatches or `adq write` the network's size, or load the network with "
            "image_size="
        )


def _named(item: Any, names: Sequence[str] | None) -> dict[Any, Any]:
    """The fields of a batch or sample by name, those after the first two of a tuple without names by number."""
    if isinstance(item, dict) and {PATCHES, POSITIONS} <= set(item):
        return item
    if isinstance(item, tuple | list) and len(item) >= 2:
        if names is not None and len(names) == len(item) and {PATCHES, POSITIONS} <= set(names):
            return dict(zip(names, item, strict=True))
        return {PATCHES: item[0], POSITIONS: item[1], **dict(enumerate(item[2:]))}
    kind = sorted(item) if isinstance(item, dict) else type(item).__name__
    raise ValueError(
        f"batch of {shorten(kind)}: expected patches and positions, by name or first; fields=('patches', 'positions', ...)"
    )


def _by_count(samples: list[dict[Any, Any]]) -> list[Part]:
    """Samples that keep different numbers of patches: those with equally many together."""
    counts: dict[int, list[int]] = {}
    for i, sample in enumerate(samples):
        counts.setdefault(len(sample[POSITIONS]), []).append(i)
    return [
        (
            _tensor(np.stack([np.asarray(samples[i][PATCHES]) for i in rows])),
            _tensor(np.stack([np.asarray(samples[i][POSITIONS]) for i in rows])),
            torch.tensor(rows),
        )
        for rows in counts.values()
    ]


def _tensor(value: Any) -> Any:
    """A tensor of an array of numbers; everything else as it is."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return torch.from_numpy(np.array(value))  # a copy: the array may be read-only
    return value


def _stacked(values: list[Any]) -> Any:
    """A tensor of numbers or arrays of one shape; else the list itself."""
    try:
        return torch.as_tensor(np.stack([np.asarray(value) for value in values]))
    except (TypeError, ValueError):
        return values
