"""Tabulates how features shift as patches go, and chooses the tolerance that meets a budget of patches or bytes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from adq_wds.checks import positive
from adq_wds.core.patches import top_patches
from adq_wds.pipes.drop_patches import DropPatches
from adq_wds.pipes.encode_patches import EncodePatches
from adq_wds.pipes.feature_shift import Look, kept_counts, shift_table
from adq_wds.protocols import Encoder, Importance
from adq_wds.samples.fields import IMAGE_FIELDS, FieldSpec, Sample
from adq_wds.samples.patch_file import encode as encode_file


@dataclass(frozen=True, eq=False)
class Drops:
    """What images lose when they lose patches.

    Attributes:
        n_kept: (R,) int64, numbers of patches kept, descending from all L.
        shift: (N, R) float32, how far the encoder's feature is from the whole image's: 1 − cos, the first column 0.
        n_bytes: (N, R) int64, bytes of the patches' file; None where they were not measured.
    """

    n_kept: NDArray[np.int64]
    shift: NDArray[np.float32]
    n_bytes: NDArray[np.int64] | None = None

    def kept_at(self, tolerance: float) -> NDArray[np.int64]:
        """(N,) numbers of patches that `DropPatches` keeps of these images with this tolerance."""
        last = (self.so_far() <= tolerance).sum(axis=1) - 1  # column down to which no shift exceeds it
        kept: NDArray[np.int64] = self.n_kept[last]
        return kept

    def so_far(self) -> NDArray[np.float32]:
        """(N, R) the largest shift down to each column: one that comes back by luck is not trusted."""
        largest: NDArray[np.float32] = np.maximum.accumulate(self.shift, axis=1)
        return largest


def measure_drops(
    samples: Iterable[Sample],
    importance: Importance,
    encoder: Encoder,
    *,
    patch: int | None = None,
    size: int | None = None,
    image: FieldSpec = f"{IMAGE_FIELDS};image",
    label: FieldSpec | None = None,
    seed: int = 0,
    limit: int | None = None,
    encode: EncodePatches | None = None,
) -> Drops:
    """Tabulate how an encoder's feature shifts as images lose their least important patches: 0.9, 0.8, … 0.1 kept.

    Args:
        samples: a stream, such as a `ShardDataset` without pipes; a few hundred are enough.
        importance, encoder: as for `DropPatches`.
        patch, size, image, label, seed: as for `DropPatches`.
        limit: only the first samples, this many.
        encode: also measure bytes, as this pipe would store the patches.

    Raises:
        ValueError: no sample, batches of them, images of several sizes (give `size`), or an argument that `DropPatches`
            refuses.
        SampleError: a sample is bad.

    Source: ours.
    """
    limit = None if limit is None else positive("limit", limit)
    pipe = DropPatches(
        importance, tolerance=0, encoder=encoder, patch=patch, size=size, image=image, label=label, seed=seed
    )
    shifts: list[NDArray[np.float32]] = []
    n_bytes: list[NDArray[np.int64]] = []
    grids = set()
    stream = islice(samples, limit)
    while chunk := list(islice(stream, pipe.chunk)):
        if not all(isinstance(sample, dict) for sample in chunk):
            raise ValueError("samples to measure are dicts; give a data set without batch_size and fields")
        for look in pipe.look(chunk):
            grids.add(look.grid)
            shifts.append(shift_table(encoder, look))
            if encode is not None:
                n_bytes.append(_bytes_table(look, encode))
    if len(grids) != 1:
        measured = f"images of {len(grids)} sizes" if grids else "no sample"
        raise ValueError(f"{measured} to measure; expected some of one size: give size= where they differ")
    ((rows, columns),) = grids
    whole = None if encode is None else np.concatenate(n_bytes)
    return Drops(kept_counts(rows * columns), np.concatenate(shifts), whole)


def choose_tolerance(shifts: Drops, budget: float, *, of: Literal["patches", "bytes"] = "patches") -> float:
    """The least tolerance with which `DropPatches` stays within a budget on the images of a table.

    A larger tolerance drops more from each image; one tolerance for all takes most from the images that bear it best.

    Args:
        shifts: from `measure_drops`.
        budget: mean over the images: ratio of patches kept, in (0, 1], or bytes of an image's file.
        of: "patches" or "bytes".

    Returns:
        the tolerance, half-way to where the next patches would go, so that a rounding error changes nothing.

    Raises:
        ValueError: the budget is out of range or cannot be met, or bytes were not measured.

    Source: ours.

    >>> table = Drops(np.array([4, 2, 1]), np.array([[0, 0.1, 0.3], [0, 0.2, 0.8]], np.float32))
    >>> tolerance = choose_tolerance(table, 0.5)  # two of four patches
    >>> round(tolerance, 3), table.kept_at(tolerance).tolist()
    (0.25, [2, 2])
    """
    if of not in ("patches", "bytes"):
        raise ValueError(f"of must be 'patches' or 'bytes', got {of!r}")
    top, what = (
        (1.0, "a ratio of patches in (0, 1]")
        if of == "patches"
        else (float("inf"), "bytes an image, above 0")
    )
    is_number = isinstance(budget, int | float | np.number) and not isinstance(budget, bool)
    if not is_number or not 0 < budget <= top or budget == float("inf"):  # NaN fails too
        raise ValueError(f"budget must be {what}, got {budget!r}")
    if of == "patches":
        unit, cost = int(shifts.n_kept[0]), np.broadcast_to(shifts.n_kept, shifts.shift.shape)
    elif shifts.n_bytes is not None:
        unit, cost = 1, shifts.n_bytes
    else:
        raise ValueError("bytes were not measured; call measure_drops with encode=EncodePatches(...)")
    n_units = len(cost) * unit
    shift = shifts.so_far().astype(np.float64)[:, 1:].ravel()  # where each image goes one column on
    change = np.diff(cost, axis=1).ravel()
    order = np.argsort(shift, kind="stable")
    levels = np.unique(np.append(shift, 0.0))
    # what all images cost together at each level, once everything up to it has gone
    n_gone = np.searchsorted(shift[order], levels, side="right")
    total = cost[:, 0].sum() + np.append(0, np.cumsum(change[order]))[n_gone]
    within = np.flatnonzero(total <= budget * n_units + 1e-6)
    if not len(within):
        raise ValueError(
            f"a budget of {budget} {'of the patches' if of == 'patches' else 'bytes an image'} cannot be met: keeping "
            f"{shifts.n_kept[-1]} of {shifts.n_kept[0]} patches of each image still takes {total.min() / n_units:.4g}"
        )
    first = int(within[0])
    return float(levels[first : first + 2].mean())


def _bytes_table(look: Look, pipe: EncodePatches) -> NDArray[np.int64]:
    """(B, R) bytes of the file at each of `kept_counts`."""
    options: Any = {"quality": pipe.quality, "subsampling": pipe.subsampling}
    table = [
        [
            len(encode_file(pixels, top_patches(row[None], k)[0], look.patch, **options))
            for k in look.kept_counts
        ]
        for pixels, row in zip(look.pixels, look.scores, strict=True)
    ]
    return np.array(table, dtype=np.int64)
