"""How are images written anew, smaller: at another size or quality, or without some of their patches?"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import ClassVar

import numpy as np

from adq_wds.checks import positive
from adq_wds.core.patches import PATCH, n_kept
from adq_wds.errors import SampleError
from adq_wds.pipes.base import Pipe, Tally
from adq_wds.pipes.drop_patches import DropPatches
from adq_wds.pipes.encode_patches import JPEG_FIELD, EncodePatches
from adq_wds.pipes.resize import centre_square
from adq_wds.protocols import Importance
from adq_wds.registry import importance as named_importance
from adq_wds.samples.fields import STORED_FIELDS, Sample, check_spec, clean_fields, image_bytes, place_error
from adq_wds.samples.patch_file import encode_whole
from adq_wds.samples.whole_image import whole_image
from adq_wds.writing.patch_bytes import StoredBytes
from adq_wds.writing.tars import member_bytes

SIZE, QUALITY = 224, 90  # of patch-dropped images, unless said
MEASURED = 64  # first samples, on which it is seen whether files become smaller at all
_DROPPED = (
    "some of its patches are dropped already, and writing it anew would lose more; take the shards with whole images, or "
    "leave out patch_keep=, size= and quality=: then bytes stay untouched"
)
_PICTURE, _WHOLE, _BEFORE = "__adq_picture__", "__adq_whole__", "__adq_before__"
CELL_FIELD = "__adq_cell__"
"""Set to the bytes that a sample takes in the tar it came from."""

Parts = dict[str, dict[str, int]]

logger = logging.getLogger("adq_wds")


@dataclass(frozen=True)
class NewImages:
    """How every image is stored: JPEG, 4:2:0, optimised tables. A colour profile is left out, as trainings do.

    Attributes:
        size: short side to this, then the centre; None for the image's own.
        quality: 1 … 100.
        image: field with the image.
        patch_keep: ratio of patches of 16 that are kept, as ``patches.jpg``; None for whole images, as ``jpg``.
        importance: what says which.
        seed: of a random importance.
        size_asked: the size was named; else images that grow at it are refused.
    """

    size: int | None
    quality: int
    image: str
    patch_keep: float | None
    importance: Importance | None
    seed: int
    size_asked: bool = True

    @property
    def field(self) -> str:
        """Where the new image is."""
        return "jpg" if self.importance is None else JPEG_FIELD


def new_images(
    *,
    patch_keep: float | None,
    importance: str | Importance,
    size: int | None,
    quality: int | None,
    image: str,
    seed: int,
) -> NewImages | None:
    """What the arguments of `write_kept` ask for; None for nothing: bytes stay untouched.

    Raises:
        ValueError: one is out of range, or has no effect.
    """
    if patch_keep is None and importance != "gradcam++":
        said = repr(importance) if isinstance(importance, str) else f"<{type(importance).__name__}>"
        raise ValueError(
            f"importance={said} decides which patches are kept; give patch_keep too, such as 0.75"
        )
    if patch_keep is None and size is None and quality is None:
        return None
    check_spec(image, "image")
    EncodePatches(quality=QUALITY if quality is None else quality)  # speaks now if it is out of range
    size_asked = size is not None
    if size is None and patch_keep is not None:
        size = SIZE
    if size is not None:
        positive("size", size)
    asked = None
    if patch_keep is not None and size is not None:
        check_patch_keep(patch_keep)
        if size % PATCH:
            raise ValueError(
                f"size={size} does not fall into patches of {PATCH} pixels; give a multiple of {PATCH}"
            )
        n_patches = (size // PATCH) ** 2
        if n_kept(n_patches, patch_keep) == 0:
            raise ValueError(
                f"patch_keep={patch_keep} keeps none of the {n_patches} patches of {PATCH} x {PATCH} pixels at size "
                f"{size}; give at least {1 / n_patches:.3g}"
            )
        asked = named_importance(importance, patch=PATCH) if isinstance(importance, str) else importance
        say_whose_eyes(asked)
    new = NewImages(size, QUALITY if quality is None else quality, image, patch_keep, asked, seed, size_asked)
    WriteAnew(new)  # speaks now of what does not fit together
    return new


def check_patch_keep(patch_keep: object) -> None:
    """Raise `ValueError` unless this is a ratio of patches, by the name that it has where it is given."""
    try:
        n_kept(1, patch_keep)  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"patch_{error}") from None  # which calls it keep


def say_whose_eyes(importance: Importance) -> None:
    """Say which classifier chooses the patches, where one does."""
    name = getattr(getattr(importance, "encoder", None), "name", None)
    if name is not None:
        small = ", a small classifier of CIFAR-10's classes; for photographs name a better encoder"
        logger.info("patches are kept by what %r looks at%s", name, small if name == "builtin" else "")


@dataclass(frozen=True, eq=False)
class WriteAnew(Pipe):
    """All that happens to an image, as one stage: a bad sample is counted once, wherever it fails.

    Args:
        new: how images are stored.

    Raises (while streaming):
        SampleError: no image, a damaged one, one that lacks patches already; a field where the new one would go.
    """

    one_to_one: ClassVar[bool] = True
    new: NewImages

    def __post_init__(self) -> None:
        super().__post_init__()
        stages: list[Pipe] = []
        if self.new.importance is not None:
            drop = DropPatches(
                self.new.importance,
                keep=self.new.patch_keep,
                patch=PATCH,
                size=self.new.size,
                image=_PICTURE,
                seed=self.new.seed,
            )
            stages = [drop, EncodePatches(quality=self.new.quality)]
        object.__setattr__(self, "_stages", stages)

    def apply(self, samples: list[Sample]) -> list[Sample]:
        """Each sample with its new image."""
        samples = [self._redrawn(sample) for sample in samples]
        for stage in self._stages:  # type: ignore[attr-defined]
            samples = stage.apply(samples)
        return samples

    def _redrawn(self, sample: Sample) -> Sample:
        """With the image at its new size: as a JPEG, or, for its patches, as pixels and as what its JPEG would take."""
        sample = clean_fields(sample)
        name, data = image_bytes(sample, self.new.image)
        if name in STORED_FIELDS:
            raise place_error(SampleError(_DROPPED), sample, name)
        _, image = whole_image(sample, self.new.image)
        if self.new.size is not None:
            image = centre_square(image, self.new.size)
        out = {field: value for field, value in sample.items() if field != name}
        if self.new.field in out:
            raise place_error(
                SampleError("is there already, and the new image would take its place"),
                sample,
                self.new.field,
            )
        whole = encode_whole(np.asarray(image), quality=self.new.quality)
        out[_BEFORE] = len(data)
        if self.new.importance is None:
            return {**out, self.new.field: whole}
        return {**out, _PICTURE: image, _WHOLE: len(whole)}


@dataclass
class Counted:
    """Bytes of samples that were written, before and after, by parts; cells are headers, content and padding in a tar.

    Attributes:
        before, whole, after: of the images; see `parts`.
        others: of all other fields.
        before_cells: of the samples in their source.
        whole_cells, after_cells: of the images.
        other_cells: of all other fields.
        samples: how many.
    """

    before: int = 0
    whole: int = 0
    after: int = 0
    others: int = 0
    before_cells: int = 0
    whole_cells: int = 0
    after_cells: int = 0
    other_cells: int = 0
    samples: int = 0

    def add(self, sample: Sample, field: str) -> None:
        """Count a sample that is written, its new image in `field`."""
        key, after = sample["__key__"], len(sample[field])
        whole = sample.get(_WHOLE, after)
        others = {name: len(data) for name, data in sample.items() if name[:2] != "__" and name != field}
        self.before += sample[_BEFORE]
        self.whole += whole
        self.after += after
        self.others += sum(others.values())
        self.before_cells += sample[CELL_FIELD]
        self.whole_cells += member_bytes(key, "jpg", whole)
        self.after_cells += member_bytes(key, field, after)
        self.other_cells += sum(member_bytes(key, name, n) for name, n in others.items())
        self.samples += 1

    def parts(self) -> Parts:
        """What images, other fields and the container of the written samples took before and take now, in bytes.

        The container is what tars add to each field: headers, and padding to whole blocks; without the blocks that end
        a tar, of which there are as many as there are shards. So every number is a sum over samples.

        Returns:
            for each part ``before``, in the source; ``whole``, what the same images take at the same size and quality
            with all their patches; and ``after``, as they were written: ``whole`` where no patches were dropped.
        """
        return {
            "images": {"before": self.before, "whole": self.whole, "after": self.after},
            "other fields": {"before": self.others, "whole": self.others, "after": self.others},
            "container": {
                "before": self.before_cells - self.before - self.others,
                "whole": self.whole_cells + self.other_cells - self.whole - self.others,
                "after": self.after_cells + self.other_cells - self.after - self.others,
            },
        }


def written_anew(
    samples: Iterable[Sample], new: NewImages, counted: Counted, tally: Tally
) -> Iterator[Sample]:
    """The samples with their images as `new` says, counted as they pass.

    The first are made at once, so that what would become larger is refused before anything is written.

    Args:
        samples: with what they take in their source in `CELL_FIELD`.
        new: how images are stored.
        counted: gets the bytes.
        tally: of bad samples.

    Raises:
        ValueError: without their patches the images would take as many bytes as whole or more, or, at a size that was
            not asked for, more than they took; has the numbers.
        SampleError: a bad image, or too many.
    """
    made = _made(samples, new, counted, tally)
    first = list(islice(made, MEASURED))
    if first:
        _check_bytes(new, counted)
    return chain(first, made)


def _made(samples: Iterable[Sample], new: NewImages, counted: Counted, tally: Tally) -> Iterator[Sample]:
    anew, stream = WriteAnew(new), iter(samples)
    while chunk := list(islice(stream, anew.chunk)):
        for sample in anew.run(chunk, tally):
            counted.add(sample, new.field)
            yield sample
    tally.close()


def _check_bytes(new: NewImages, counted: Counted) -> None:
    """Refuse patches that save nothing, and warn of whole images that grow."""
    n = counted.samples
    if new.importance is not None:
        StoredBytes(n, counted.whole, counted.after, counted.whole_cells, counted.after_cells).check_smaller()
    if counted.after <= counted.before:
        return
    grown = (
        f"images would become larger than they were: {counted.after // n} bytes each against {counted.before // n} "
        f"(mean of the first {n})"
    )
    if not new.size_asked and new.importance is not None:
        raise ValueError(
            f"{grown} at size {new.size}, which is taken where size= says nothing, and quality {new.quality}; give a smaller one, "
            f"or size={new.size} if it is meant"
        )
    at = "their own size" if new.size is None else f"size {new.size}"
    logger.warning(
        "%s at %s and quality %d; a lower quality or a smaller size would help",
        grown.replace("would become", "become"),
        at,
        new.quality,
    )


def totals(parts: Parts) -> dict[str, float]:
    """Sums of `Counted.parts`, and what ``after`` is of the two others: ``of_whole`` and ``of_before``."""
    sums = {name: sum(part[name] for part in parts.values()) for name in ("before", "whole", "after")}
    return {
        **sums,
        "of_whole": sums["after"] / max(1, sums["whole"]),
        "of_before": sums["after"] / max(1, sums["before"]),
    }
