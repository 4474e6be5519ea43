"""What did a loader give? Kept patches, their places and other fields, whatever form a batch has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from adq_wds.errors import shorten
from adq_wds.samples.fields import KEPT_FIELDS

PATCHES, POSITIONS, GRID = KEPT_FIELDS
IMAGE = "image"

Part = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Patches (b, K, P, P, 3), positions (b, K), and which rows of the batch they are (b,)."""


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
    found = {tuple(row) for row in torch.as_tensor(grid).reshape(-1, 2).tolist()}
    if found != {tuple(expected)}:
        raise ValueError(
            f"images of {' and '.join(f'{r} x {c}' for r, c in sorted(found))} patches, but this network's have "
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
