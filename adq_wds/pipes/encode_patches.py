"""Stores an image's kept patches as one small file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from adq_wds.checks import integer, positive
from adq_wds.errors import SampleError, shorten
from adq_wds.pipes.base import Pipe
from adq_wds.samples.fields import (
    KEPT_FIELDS,
    STORED_FIELDS,
    Sample,
    SpecError,
    check_absent,
    clean_fields,
    place_error,
)
from adq_wds.samples.patch_file import CODING_UNIT, PatchImage, Subsampling, encode_patches

JPEG_FIELD = STORED_FIELDS[0]


@dataclass(frozen=True, eq=False)
class EncodePatches(Pipe):
    """Put what `DropPatches` kept into one file, the new field ``patches.jpg``.

    The fields ``patches``, ``positions`` and ``grid`` go. Every program that opens pictures opens the file, and shows
    the kept patches side by side; `Decode` and `patch_jpeg.decode` also know where they were.

    Args:
        quality: 1 … 100, as libjpeg counts.
        subsampling: "4:2:0" (chroma halved; P a multiple of 16) or "4:4:4" (P a multiple of 8).

    Raises:
        ValueError: an argument is out of range; while streaming, a P that would make files larger, with the numbers
            (never skipped: it is the program's error, not a sample's).

    Raises (while streaming):
        SampleError: no kept patches in the sample, or damaged ones.
    """

    one_to_one: ClassVar[bool] = True
    quality: int = field(default=90, kw_only=True)
    subsampling: Subsampling = field(default="4:2:0", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "quality", integer("quality", self.quality, least=1, most=100))
        if self.subsampling not in CODING_UNIT:
            raise ValueError(
                f"subsampling must be {' or '.join(map(repr, CODING_UNIT))}, got {shorten(self.subsampling)}"
            )

    def apply(self, samples: list[Sample]) -> list[Sample]:
        """Each sample with its kept patches as a file."""
        return [self._encoded(sample) for sample in samples]

    def _encoded(self, sample: Sample) -> Sample:
        out = clean_fields(sample)
        check_absent(out, (JPEG_FIELD,), "EncodePatches")
        image = _kept_patches(out)
        for name in KEPT_FIELDS:
            del out[name]
        try:
            out[JPEG_FIELD] = encode_patches(image, quality=self.quality, subsampling=self.subsampling)
        except ValueError as error:
            if image.patch % CODING_UNIT[self.subsampling]:  # of all samples alike
                raise SpecError(str(error)) from error
            raise place_error(SampleError(str(error)), sample) from error
        return out


def _kept_patches(sample: Sample) -> PatchImage:
    """What `DropPatches` put into a sample.

    Raises:
        SampleError: it is not there, or not as it was.
    """
    missing = [name for name in KEPT_FIELDS if name not in sample]
    if missing:
        text = f"no field {missing[0]!r} with kept patches; put DropPatches before EncodePatches"
        raise place_error(SampleError(text), sample)
    patches, positions, grid = (np.asarray(sample[name]) for name in KEPT_FIELDS)
    try:
        rows, columns = (positive("grid", side) for side in grid.tolist())
        return PatchImage(patches, positions, (rows, columns), patches.shape[1])
    except (ValueError, TypeError, IndexError) as error:
        text = f"these are no kept patches: {shorten(str(error), 200)}"
        raise place_error(SampleError(text), sample) from error
