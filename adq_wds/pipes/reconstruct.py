"""Rebuilds whole images from kept patches, sample by sample: dropped ones are predicted, kept ones are as stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from adq_wds.core.patches import Grid
from adq_wds.errors import SampleError, shorten
from adq_wds.pipes.accelerator import accelerator_of
from adq_wds.pipes.base import Pipe
from adq_wds.pipes.drop_patches import GRID_FIELD, PATCHES_FIELD, POSITIONS_FIELD
from adq_wds.samples.fields import Sample, check_absent, clean_fields, place_error

if TYPE_CHECKING:
    from adq_wds.mae.network import MaskedAutoencoder

IMAGE_FIELD = "image"


@dataclass(frozen=True, eq=False)
class Reconstruct(Pipe):
    """Put the whole image, (H, W, 3) uint8, into a field ``image``, in place of ``patches``, ``positions`` and ``grid``.

    In a stream this costs a network's pass for every chunk, in the process it runs in; where there is an accelerator,
    `reconstruct_batches` behind the loader is the faster way. The answer does not depend on the cut into batches, but
    for the last bits of a network's sums: pixels may differ by 1.

    Args:
        mae: a `MaskedAutoencoder` for images of that many patches, on any device.

    Raises:
        TypeError: `mae` is none.

    Raises (while streaming):
        SampleError: no patches, or not those of such an image.
        AdqError: the reconstruction is not finite.

    Source: He et al. 2022 (arXiv 2111.06377) for the network; Zhou et al. 2023 (arXiv 2308.10524) for its use.
    """

    chunk: ClassVar[int] = 64
    one_to_one: ClassVar[bool] = True
    mae: MaskedAutoencoder

    def __post_init__(self) -> None:
        super().__post_init__()
        if not hasattr(self.mae, "reconstruct_patches") or isinstance(self.mae, type):
            raise TypeError(
                f"Reconstruct needs a masked autoencoder, got {shorten(self.mae)}; write adq_wds.load_mae(...)"
            )

    def apply(self, samples: list[Sample]) -> list[Sample]:
        """Each sample with ``image`` in place of its patches."""
        import torch

        cleaned = [clean_fields(sample) for sample in samples]
        by_count: dict[int, list[int]] = {}
        for i, sample in enumerate(cleaned):
            _check(sample, self.mae.size.grid)
            by_count.setdefault(len(sample[POSITIONS_FIELD]), []).append(i)
        device = next(iter(self.mae.parameters())).device
        for indices in by_count.values():
            kept = np.stack([cleaned[i][PATCHES_FIELD] for i in indices])
            places = np.stack([cleaned[i][POSITIONS_FIELD] for i in indices])
            with accelerator_of("Reconstruct", "the masked autoencoder"):
                patches, positions = (torch.from_numpy(x).to(device) for x in (kept, places))
                images = self.mae.reconstruct_patches(patches, positions).cpu().numpy()
            for i, image in zip(indices, images, strict=True):
                for name in (PATCHES_FIELD, POSITIONS_FIELD, GRID_FIELD):
                    cleaned[i].pop(name, None)
                cleaned[i][IMAGE_FIELD] = image.copy()  # a view would keep the batch alive
        return cleaned


def _check(sample: Sample, grid: Grid) -> None:
    """Raise `SampleError` where patches are missing or of another image; the network checks their shapes."""
    check_absent(sample, (IMAGE_FIELD,), "Reconstruct")
    for name in (PATCHES_FIELD, POSITIONS_FIELD):
        if not isinstance(sample.get(name), np.ndarray):
            kind = type(sample[name]).__name__ if name in sample else "nothing"
            text = f"{kind} there, expected an array, as DropPatches and Decode give it"
            raise place_error(SampleError(text), sample, name)
    if GRID_FIELD in sample and tuple(np.asarray(sample[GRID_FIELD]).tolist()) != tuple(grid):
        text = f"{shorten(sample[GRID_FIELD])}, but this network's images have {grid[0]} x {grid[1]} patches"
        raise place_error(SampleError(text), sample, GRID_FIELD)
