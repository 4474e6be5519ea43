"""Re-encodes images smaller: at another size or quality, or without some of their patches."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, ClassVar

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
from adq_wds.writing.tars import member_bytes

SIZE, QUALITY = 224, 90  # defaults for patch-dropped images
MEASURED = 64  # first samples, on which it is seen whether files become smaller at all
_DROPPED = (
    "some of its patches are dropped already, and writing it anew would lose more; take the shards with whole images, or "
    "leave out patch_keep=, size= and quality=: then bytes stay untouched"
)
_PICTURE, _WHOLE, _BEFORE = "__adq_picture__", "__adq_whole__", "__adq_before__"
CELL_FIELD = "__adq_cell__"
"""Set to the bytes that a sample takes in the tar it came from."""

PARTS = ("images", "other fields", "container")
Parts = dict[str, dict[str, int]]

logger = logging.getLogger("adq_wds")


@dataclass(frozen=True, eq=False)
class WriteAnew(Pipe):
    """Replaces an image by a new JPEG, 4:2:0, with optimised tables and without a colour profile, which trainings
    ignore.

    One stage does all steps, so that a bad sample is counted once, wherever it fails.

    Args:
        size: short side to this, then the centre; None for the image's own.
        quality: 1 … 100.
        image: field with the image.
        patch_keep: ratio of patches of 16 that are kept, as ``patches.jpg``; None for whole images, as ``jpg``.
        importance: of patches; selects those kept.
        seed: of a random importance.
        size_asked: the size was named; else images that grow at it are refused.

    Raises (while streaming):
        SampleError: no image, a damaged one, one that lacks patches already; a field where the new one would go.
    """

    one_to_one: ClassVar[bool] = True
    size: int | None
    quality: int
    image: str
    patch_keep: float | None
    importance: Importance | None
    seed: int
    size_asked: bool
    _stages: list[Pipe] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        stages: list[Pipe] = []
        if self.importance is not None:
            options: dict[str, Any] = {"keep": self.patch_keep, "size": self.size, "seed": self.seed}
            drop = DropPatches(self.importance, patch=PATCH, image=_PICTURE, **options)
            stages = [drop, EncodePatches(quality=self.quality)]
        object.__setattr__(self, "_stages", stages)

    @property
    def new_field(self) -> str:
        """The field of the new image."""
        return "jpg" if self.importance is None else JPEG_FIELD

    @property
    def settings(self) -> dict[str, Any]:
        """What the bytes of new images depend on, as JSON has it; an importance by its names."""
        encoder = getattr(self.importance, "encoder", None)
        names = [getattr(self.importance, "__qualname__", type(self.importance).__qualname__)]
        names += [getattr(self.importance, name, None) for name in ("method", "use_labels")]
        names += [getattr(encoder, name, None) for name in ("name", "revision", "preprocessing_hash")]
        numbers = {name: getattr(self, name) for name in ("size", "quality", "image", "patch_keep", "seed")}
        return {**numbers, "importance": names}

    def apply(self, samples: list[Sample]) -> list[Sample]:
        """Each sample with its new image."""
        samples = [self._redrawn(sample) for sample in samples]
        for stage in self._stages:
            samples = stage.apply(samples)
        return samples

    def _redrawn(self, sample: Sample) -> Sample:
        """The sample with its image resized: as a JPEG, or for patches as pixels and the bytes that its JPEG would
        take."""
        sample = clean_fields(sample)
        name, data = image_bytes(sample, self.image)
        if name in STORED_FIELDS:
            raise place_error(SampleError(_DROPPED), sample, name)
        _, image = whole_image(sample, self.image)
        if self.size is not None:
            image = centre_square(image, self.size)
        out = {other: value for other, value in sample.items() if other != name}
        if self.new_field in out:
            text = "is there already, and the new image would take its place"
            raise place_error(SampleError(text), sample, self.new_field)
        whole = encode_whole(np.asarray(image), quality=self.quality)
        out[_BEFORE] = len(data)
        if self.importance is None:
            return {**out, self.new_field: whole}
        return {**out, _PICTURE: image, _WHOLE: len(whole)}


def new_images(
    *,
    patch_keep: float | None,
    importance: str | Importance,
    size: int | None,
    quality: int | None,
    image: str,
    seed: int,
) -> WriteAnew | None:
    """The stage for these arguments of `write_kept`; None where bytes stay untouched.

    Raises:
        ValueError: one is out of range, or has no effect.
    """
    if patch_keep is None and importance != "gradcam++":
        given = repr(importance) if isinstance(importance, str) else f"<{type(importance).__name__}>"
        raise ValueError(
            f"importance={given} decides which patches are kept; give patch_keep too, such as 0.75"
        )
    if patch_keep is None and size is None and quality is None:
        return None
    check_spec(image, "image")
    quality = QUALITY if quality is None else quality
    EncodePatches(quality=quality)  # raises if it is out of range
    size_asked = size is not None
    size = SIZE if size is None and patch_keep is not None else size
    if size is not None:
        positive("size", size)
    chosen = None
    if patch_keep is not None and size is not None:
        _check_patches(patch_keep, size)
        chosen = named_importance(importance, patch=PATCH) if isinstance(importance, str) else importance
        log_classifier(chosen)
    return WriteAnew(size, quality, image, patch_keep, chosen, seed, size_asked)


def _check_patches(patch_keep: float, size: int) -> None:
    """Raise `ValueError` unless images of that size have whole patches, and keep one of them at least."""
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


def check_patch_keep(patch_keep: object) -> None:
    """Raise `ValueError` unless this is a ratio of patches; `name` is the argument's name."""
    try:
        n_kept(1, patch_keep)  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"patch_{error}") from None  # which calls it keep


def log_classifier(importance: Importance) -> None:
    """Log which classifier chooses the patches, where one does."""
    name = getattr(getattr(importance, "encoder", None), "name", None)
    if name is not None:
        small = ", a small classifier of CIFAR-10's classes; for photographs name a better encoder"
        logger.info("patches are kept by what %r looks at%s", name, small if name == "builtin" else "")


@dataclass
class Counted:
    """Bytes of the samples that were written, by part and by stage.

    The container is the headers and padding that tars add to each field, without the blocks at the end of a tar,
    whose number depends on the shards. So every number is a sum over samples.

    Attributes:
        parts: bytes of images, other fields and container: ``before``, in the source; ``whole``, the same images at
            the same size and quality with all their patches; and ``after``, as written, equal to ``whole`` where no
            patches were dropped.
        samples: how many.
    """

    parts: Parts = field(
        default_factory=lambda: {part: dict.fromkeys(("before", "whole", "after"), 0) for part in PARTS}
    )
    samples: int = 0

    def add(self, sample: Sample, new_field: str) -> None:
        """Count a sample that is written, its new image in `new_field`."""
        key, after = sample["__key__"], len(sample[new_field])
        whole = sample.get(_WHOLE, after)
        others = {name: len(data) for name, data in sample.items() if name[:2] != "__" and name != new_field}
        n_others = sum(others.values())
        in_tar = sum(member_bytes(key, name, n) for name, n in others.items())
        for stage, n_image, n_sample in (
            ("before", sample[_BEFORE], sample[CELL_FIELD]),
            ("whole", whole, in_tar + member_bytes(key, "jpg", whole)),
            ("after", after, in_tar + member_bytes(key, new_field, after)),
        ):
            self.parts["images"][stage] += n_image
            self.parts["other fields"][stage] += n_others
            self.parts["container"][stage] += n_sample - n_image - n_others
        self.samples += 1


def totals(parts: Parts) -> dict[str, float]:
    """Sums of `Counted.parts`, and the ratios of ``after`` to the two others: ``of_whole`` and ``of_before``."""
    sums = {stage: sum(part[stage] for part in parts.values()) for stage in ("before", "whole", "after")}
    return {
        **sums,
        "of_whole": sums["after"] / max(1, sums["whole"]),
        "of_before": sums["after"] / max(1, sums["before"]),
    }


def made_anew(samples: Iterable[Sample], new: WriteAnew, counted: Counted, tally: Tally) -> Iterator[Sample]:
    """The samples with new images, counted in `counted`.

    Args:
        samples: with their bytes in the source in `CELL_FIELD`.
        new: how images are stored.
        counted: gets the bytes.
        tally: of bad samples.

    Raises:
        SampleError: a bad image, or too many.
    """
    stream = iter(samples)
    while chunk := list(islice(stream, new.chunk)):
        for sample in new.run(chunk, tally):
            counted.add(sample, new.new_field)
            yield sample
    tally.close()


def written_anew(
    samples: Iterable[Sample], new: WriteAnew, counted: Counted, tally: Tally
) -> Iterator[Sample]:
    """As `made_anew`; the first are made at once, so that growing files are refused before anything is written.

    Raises:
        ValueError: patch-dropped images would take at least the bytes of whole ones, or, at the default size, more
            than in the source; has the numbers.
        SampleError: as `made_anew`.
    """
    made = made_anew(samples, new, counted, tally)
    first = list(islice(made, MEASURED))
    if first:
        _check_bytes(new, counted)
    return chain(first, made)


def _check_bytes(new: WriteAnew, counted: Counted) -> None:
    """Refuse patches that save nothing, in files or in tars, and warn of whole images that grow."""
    n, images, sums = counted.samples, counted.parts["images"], totals(counted.parts)
    saves = images["after"] < images["whole"] and sums["after"] < sums["whole"]
    if new.importance is not None and not saves:
        raise ValueError(
            f"storing patches would not make these images smaller: {images['after'] / n:.0f} bytes an image against "
            f"{images['whole'] / n:.0f} whole, {sums['after'] / n:.0f} against {sums['whole'] / n:.0f} a sample in tars "
            f"(mean of {n}, same quality and subsampling, optimised tables); use larger images, keep fewer patches, or "
            "drop them while training"
        )
    if images["after"] <= images["before"]:
        return
    numbers = f"{images['after'] // n} bytes each against {images['before'] // n} (mean of the first {n})"
    if not new.size_asked and new.importance is not None:
        raise ValueError(
            f"images would become larger than they were: {numbers} at size {new.size}, which is taken where size= says "
            f"nothing, and quality {new.quality}; give a smaller one, or size={new.size} if it is meant"
        )
    size = "their own size" if new.size is None else f"size {new.size}"
    remedy = "a lower quality or a smaller size would help"
    logger.warning(
        "images become larger than they were: %s at %s and quality %d; %s", numbers, size, new.quality, remedy
    )
