"""How do batches of kept patches become normalised images on the device that trains? Rebuilt there, a batch ahead."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from adq_wds.errors import shorten
from adq_wds.models.encoders import pick_device
from adq_wds.models.forward import check_bfloat16
from adq_wds.models.mae import IMAGENET_MEAN, IMAGENET_STD, MaskedAutoencoder

FIELDS = "patches", "positions"


def reconstruct_batches(
    loader: Iterable[Any],
    mae: MaskedAutoencoder,
    *,
    device: str | torch.device | None = None,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    amp: bool = True,
    compile: bool | str = False,  # noqa: A002 - torch's own word
) -> Iterator[Any]:
    """Batches with whole, normalised images in place of kept patches: kept pixels as stored, dropped ones predicted.

    Patches travel to the device as uint8. On CUDA the next batch is copied while this one is computed, from pinned
    memory.

    Args:
        loader: gives batches: dicts, or tuples that begin with patches and positions
            (``fields=("patches", "positions", "label")``), of patches (B, K, P, P, 3) uint8 and positions (B, K) int64,
            as tensors or arrays; or, where images keep different numbers of patches, lists of such samples.
        mae: for images of that many patches; moved to `device`.
        device: where images are rebuilt; by default where `mae` is.
        mean, std: of the colours in [0, 1], which the trained network expects: (x - mean) / std.
        amp: on CUDA, in bfloat16. On the CPU in float32, whatever this says.
        compile: let torch compile the network, in place; pays when batches have one size. A mode of `torch.compile`
            may be named: "reduce-overhead" replays CUDA graphs, which pays for small batches.

    Yields:
        what the loader gave, with images (B, 3, H, W) float32 on the device in place of patches and positions: under
        ``image`` in a dict (``grid`` goes too), first in a tuple. Other tensors go to the device; the samples of a list
        become a batch.

    Raises:
        TypeError: `mae` is no masked autoencoder.
        ValueError: no such device, or one without bfloat16; `mean` or `std` are not three numbers that can be used.

    Raises (while streaming):
        ValueError: a batch is none of these, holds images already, or its patches are not those of such an image.
        AdqError: a reconstruction is not finite.

    Source: He et al. 2022 (arXiv 2111.06377); rebuilding where the accelerator is: ours.
    """
    if not isinstance(mae, MaskedAutoencoder):
        raise TypeError(
            f"reconstruct_batches needs a masked autoencoder, got {shorten(mae)}; write adq_wds.load_mae(...)"
        )
    for name, values in (("mean", mean), ("std", std)):
        numbers = [float(x) for x in values]
        if len(numbers) != 3 or not all(map(math.isfinite, numbers)) or (name == "std" and min(numbers) <= 0):
            raise ValueError(
                f"{name}={shorten(values)}: expected three numbers{', each above 0' if name == 'std' else ''}"
            )
    place = pick_device(str(device)) if device is not None else next(mae.parameters()).device
    amp = amp and place.type == "cuda"
    if amp:
        check_bfloat16(place)
    mae = mae.to(place).eval()
    if compile:
        mae.compile(mode=compile if isinstance(compile, str) else None)
    levels = torch.tensor([[float(x) for x in values] for values in (mean, std)], dtype=torch.float32)
    return _rebuilt(loader, mae, place, amp, *(255 * levels.to(place)[:, :, None, None]).unbind())


def _rebuilt(
    loader: Iterable[Any],
    mae: MaskedAutoencoder,
    place: torch.device,
    amp: bool,
    shift: torch.Tensor,
    scale: torch.Tensor,
) -> Iterator[Any]:
    def checked(batch: Any) -> Split:
        split = _split(batch)
        for patches, positions, _ in split[0]:
            mae.check_kept(patches, positions)  # before they are copied: there it would wait for the device
        return split

    for parts, rest, form in _ahead(map(checked, loader), place):
        with torch.autocast("cuda", torch.bfloat16) if amp else nullcontext():
            images = torch.cat([mae.rebuilt(patches, at) for patches, at, _ in parts])
        if len(parts) > 1:  # back into the order of the samples
            order = torch.cat([rows for _, _, rows in parts])
            images = images[torch.argsort(order).to(place)]
        whole = (images.permute(0, 3, 1, 2).float() - shift) / scale  # (B, 3, H, W)
        yield {"image": whole, **rest} if form is dict else (whole, *rest)


Part = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Patches (b, K, P, P, 3), positions (b, K), and which rows of the batch they are (b,)."""

Split = tuple[list[Part], Any, type]
"""Those of a batch that keep equally many patches, together; its other fields; dict or tuple."""


def _split(batch: Any) -> Split:
    if isinstance(batch, list) and batch and isinstance(batch[0], dict | tuple):
        return _split_samples(batch)
    if isinstance(batch, dict) and set(FIELDS) <= set(batch):
        _refuse_image(batch)
        rest: Any = {name: value for name, value in batch.items() if name not in (*FIELDS, "grid")}
        return [_part(batch["patches"], batch["positions"])], rest, dict
    if isinstance(batch, tuple | list) and len(batch) >= 2:
        return [_part(batch[0], batch[1])], tuple(batch[2:]), tuple
    kind = sorted(batch) if isinstance(batch, dict) else type(batch).__name__
    raise ValueError(
        f"batch of {shorten(kind)}: expected patches and positions, by name or first; fields=('patches', 'positions', ...)"
    )


def _split_samples(samples: list[Any]) -> Split:
    """Samples that keep different numbers of patches: those with equally many together."""
    form = dict if isinstance(samples[0], dict) else tuple
    if form is dict:
        _refuse_image(samples[0])
    keys = FIELDS if form is dict else (0, 1)
    counts: dict[int, list[int]] = {}
    for i, sample in enumerate(samples):
        counts.setdefault(len(sample[keys[1]]), []).append(i)
    parts = []
    for rows in counts.values():
        patches, positions, _ = _part(
            *(np.stack([np.asarray(samples[i][key]) for i in rows]) for key in keys)
        )
        parts.append((patches, positions, torch.tensor(rows)))
    if form is tuple:
        return parts, tuple(_stacked([s[i] for s in samples]) for i in range(2, len(samples[0]))), tuple
    names = [name for name in samples[0] if name not in (*FIELDS, "grid")]
    return parts, {name: _stacked([sample[name] for sample in samples]) for name in names}, dict


def _refuse_image(fields: dict[str, Any]) -> None:
    if "image" in fields:
        raise ValueError(
            "the batch has a field 'image' already, where the rebuilt images would go; rename or drop it"
        )


def _part(patches: Any, positions: Any) -> Part:
    patches, positions = (
        x if isinstance(x, torch.Tensor) else torch.from_numpy(np.array(x)) for x in (patches, positions)
    )
    return patches, positions, torch.arange(len(patches))


def _stacked(values: list[Any]) -> Any:
    """A tensor of numbers or arrays of one shape; else the list itself."""
    try:
        return torch.as_tensor(np.stack([np.asarray(value) for value in values]))
    except (TypeError, ValueError):
        return values


def _ahead(batches: Iterator[Split], place: torch.device) -> Iterator[Split]:
    """Batches on the device; on CUDA the next one is on its way while this one is used."""
    if place.type != "cuda":
        for parts, rest, form in batches:
            yield [(p.to(place), at.to(place), rows) for p, at, rows in parts], _moved(rest, place), form
        return
    copies: Any = torch.cuda.Stream(place)  # type: ignore[no-untyped-call,unused-ignore]
    waiting: Split | None = None
    for parts, rest, form in batches:
        with torch.cuda.stream(copies):
            sent = [(_sent(p, place), _sent(at, place), rows) for p, at, rows in parts]
            rest = _moved(rest, place)
        if waiting is not None:
            yield waiting
        torch.cuda.current_stream(place).wait_stream(copies)
        for tensor in (*(x for part in sent for x in part[:2]), *_tensors(rest)):
            tensor.record_stream(torch.cuda.current_stream(place))  # not given away while it is used
        waiting = (sent, rest, form)
    if waiting is not None:
        yield waiting


def _sent(tensor: torch.Tensor, place: torch.device) -> torch.Tensor:
    if place.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(place)
    return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(place, non_blocking=True)


def _moved(rest: Any, place: torch.device) -> Any:
    """The tensors among a batch's other fields on the device; all else as it is."""
    if isinstance(rest, dict):
        return {name: _sent(x, place) if isinstance(x, torch.Tensor) else x for name, x in rest.items()}
    return tuple(_sent(x, place) if isinstance(x, torch.Tensor) else x for x in rest)


def _tensors(rest: Any) -> list[torch.Tensor]:
    values = rest.values() if isinstance(rest, dict) else rest
    return [x for x in values if isinstance(x, torch.Tensor)]
