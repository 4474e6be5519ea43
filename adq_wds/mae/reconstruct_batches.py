"""How do batches of kept patches become normalised images on the device that trains? Rebuilt there, a batch ahead."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch

from adq_wds.errors import shorten
from adq_wds.mae.kept_batches import KeptBatch, check_grid, read_batch
from adq_wds.mae.network import IMAGENET_MEAN, IMAGENET_STD, MaskedAutoencoder
from adq_wds.models.forward import check_bfloat16
from adq_wds.models.timm_encoder import pick_device

log = logging.getLogger("adq_wds")


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
    place = pick_device(str(device)) if device is not None else next(mae.parameters()).device
    half = _in_bfloat16(amp, place)
    mae = mae.to(place).eval()
    if compile:
        mae.compile(mode=compile if isinstance(compile, str) else None)
    levels = torch.tensor(colours, dtype=torch.float32)
    if fields is None:  # a ShardDataset, or a loader of one, knows
        own = getattr(getattr(loader, "dataset", loader), "fields", None)
        fields = own if isinstance(own, tuple) else None
    batches = (_checked(read_batch(batch, fields), mae) for batch in loader)
    return _rebuilt(batches, mae, place, half, *(255 * levels.to(place)[:, :, None, None]).unbind())


def _in_bfloat16(amp: bool | None, place: torch.device) -> bool:
    if amp is False or place.type != "cuda":
        return False
    try:
        check_bfloat16(place)
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
    place: torch.device,
    amp: bool,
    shift: torch.Tensor,
    scale: torch.Tensor,
) -> Iterator[Any]:
    for batch in _ahead(batches, place):
        with torch.autocast("cuda", torch.bfloat16) if amp else nullcontext():
            images = torch.cat([mae.rebuilt(patches, at) for patches, at, _ in batch.parts])
        if len(batch.parts) > 1:  # back into the order of the samples
            order = torch.cat([rows for _, _, rows in batch.parts])
            images = images[torch.argsort(order).to(place)]
        whole = (images.permute(0, 3, 1, 2).float() - shift) / scale  # (B, 3, H, W)
        yield batch.with_images(whole)


def _ahead(batches: Iterator[KeptBatch], place: torch.device) -> Iterator[KeptBatch]:
    """Batches on the device; on CUDA the next one is on its way while this one is used."""
    if place.type != "cuda":
        for batch in batches:
            yield _moved(batch, place)
        return
    copies: Any = torch.cuda.Stream(place)  # type: ignore[no-untyped-call,unused-ignore]
    waiting: KeptBatch | None = None
    for batch in batches:
        with torch.cuda.stream(copies):
            sent = _moved(batch, place)
        if waiting is not None:
            yield waiting
        torch.cuda.current_stream(place).wait_stream(copies)
        for tensor in (*(x for part in sent.parts for x in part[:2]), *sent.rest.values()):
            if isinstance(tensor, torch.Tensor):  # not given away while it is used
                tensor.record_stream(torch.cuda.current_stream(place))
        waiting = sent
    if waiting is not None:
        yield waiting


def _moved(batch: KeptBatch, place: torch.device) -> KeptBatch:
    """The batch with its tensors on the device."""
    parts = [(_sent(patches, place), _sent(at, place), rows) for patches, at, rows in batch.parts]
    rest = {name: _sent(x, place) if isinstance(x, torch.Tensor) else x for name, x in batch.rest.items()}
    return replace(batch, parts=parts, rest=rest)


def _sent(tensor: torch.Tensor, place: torch.device) -> torch.Tensor:
    if place.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(place)
    return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(place, non_blocking=True)
