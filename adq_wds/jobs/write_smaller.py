"""How are images written anew, smaller: at another size or quality, or without some of their patches?"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice

import numpy as np

from adq_wds.core.patches import n_kept
from adq_wds.errors import SampleError
from adq_wds.patch_bytes import StoredBytes, cell_bytes
from adq_wds.patch_jpeg import encode_whole
from adq_wds.pipes.encode_patches import JPEG_FIELD, EncodePatches
from adq_wds.pipes.map import Map
from adq_wds.pipes.patches import PATCH, DropPatches
from adq_wds.pipes.resize import centre_square, check_size
from adq_wds.registry import importance as named_importance
from adq_wds.sample import STORED_FIELDS, Importance, Sample, check_spec, find_image, image_bytes, place_error

SIZE, QUALITY = 224, 90  # of patch-dropped images, unless said
MEASURED = 64  # first samples, on which it is seen whether files become smaller at all
_DROPPED = (
    "some of its patches are dropped already, and writing it anew would lose more; take the shards with whole images, or "
    "leave out patch_keep, size and quality: then bytes stay untouched"
)
_PICTURE, _WHOLE = "__adq_picture__", "__adq_whole__"

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
    """

    size: int | None
    quality: int
    image: str
    patch_keep: float | None
    importance: Importance | None
    seed: int

    def pipes(self) -> list[Map | DropPatches | EncodePatches]:
        """The stages."""
        stages: list[Map | DropPatches | EncodePatches] = [Map(_Redraw(self))]
        if self.importance is not None:
            drop = DropPatches(
                self.importance,
                keep=self.patch_keep,
                patch=PATCH,
                size=self.size,
                image=_PICTURE,
                seed=self.seed,
            )
            stages += [drop, EncodePatches(quality=self.quality)]
        return stages

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
        raise ValueError(
            f"importance={importance!r} decides which patches are kept; give patch_keep too, such as 0.75"
        )
    if patch_keep is None and size is None and quality is None:
        return None
    check_spec(image, "image")
    EncodePatches(quality=QUALITY if quality is None else quality)  # speaks now if it is out of range
    if size is None and patch_keep is not None:
        size = SIZE
    if size is not None:
        check_size(size)
    asked = None
    if patch_keep is not None and size is not None:
        n_patches = (size // PATCH) ** 2
        if n_patches and n_kept(n_patches, patch_keep) == 0:  # a size that PATCH does not divide is met below
            raise ValueError(
                f"patch_keep={patch_keep} keeps none of the {n_patches} patches of {PATCH} x {PATCH} pixels at size "
                f"{size}; give at least {1 / n_patches:.3g}"
            )
        asked = named_importance(importance, patch=PATCH) if isinstance(importance, str) else importance
        seen_by = getattr(getattr(asked, "encoder", None), "name", None)
        if seen_by is not None:
            small = ", a small classifier of CIFAR-10's classes; for photographs name a better encoder"
            logger.info(
                "patches are kept by what %r looks at%s", seen_by, small if seen_by == "builtin" else ""
            )
    new = NewImages(size, QUALITY if quality is None else quality, image, patch_keep, asked, seed)
    new.pipes()
    return new


@dataclass
class Counted:
    """Bytes of samples before and after, by parts."""

    before: int = 0
    whole: int = 0
    after: int = 0
    others: int = 0
    whole_padding: int = 0  # headers and padding of images in a tar
    after_padding: int = 0
    samples: int = field(default=0, repr=False)

    def parts(self, *, source_cells: int, new_bytes: int) -> Parts:
        """What images, other fields and the container took before and take now.

        Args:
            source_cells: bytes of the samples' cells in their source tars.
            new_bytes: bytes of the new tars.

        Returns:
            for each part ``before``, ``whole`` and ``after``; ``whole`` is what the same images would take at the same
            size and quality with all their patches, equal to ``after`` where none were dropped.
        """
        container = new_bytes - self.after - self.others
        return {
            "images": {"before": self.before, "whole": self.whole, "after": self.after},
            "other fields": {"before": self.others, "whole": self.others, "after": self.others},
            "container": {
                "before": source_cells - self.before - self.others,
                "whole": container - self.after_padding + self.whole_padding,
                "after": container,
            },
        }


def written_anew(samples: Iterable[Sample], new: NewImages, counted: Counted) -> Iterator[Sample]:
    """The samples with their images as `new` says, counted as they pass.

    The first are made at once, so that what would become larger is refused before anything is written.

    Raises:
        ValueError: without their patches the images would take as many bytes as whole, or more; has the numbers.
        SampleError: a bad image.
    """
    stream: Iterable[Sample] = _counting_before(samples, new, counted)
    for pipe in new.pipes():
        stream = pipe(stream)
    made = _counting_after(stream, new, counted)
    first = list(islice(made, MEASURED))
    if first and new.importance is not None:
        StoredBytes(
            counted.samples,
            counted.whole,
            counted.after,
            counted.whole + counted.whole_padding,
            counted.after + counted.after_padding,
        ).check_smaller()
    if counted.after > counted.before:
        n = counted.samples
        logger.warning(
            "images become larger than they were: %d bytes each against %d (mean of the first %d); a lower quality or "
            "a smaller size would help",
            counted.after // n,
            counted.before // n,
            n,
        )
    return chain(first, made)


def parts_text(parts: Parts) -> str:
    """A table of `Counted.parts`, with sums."""
    columns = ("before", "whole", "after")
    sums = {name: sum(part[name] for part in parts.values()) for name in columns}
    rows = [("bytes", *columns)] + [
        (name, *(f"{part[column]:,}" for column in columns)) for name, part in {**parts, "all": sums}.items()
    ]
    lines = ["  ".join([f"{row[0]:<12}", *(f"{value:>15}" for value in row[1:])]) for row in rows]
    share = sums["after"] / max(1, sums["whole"])
    lines.append(
        f"after: {share:.3f} of whole, which is the same images at the same size and quality with all their patches; "
        f"{sums['after'] / max(1, sums['before']):.3f} of before"
    )
    return "\n".join(lines)


@dataclass(frozen=True)
class _Redraw:
    """An image at its new size: as a JPEG, or, for its patches, as pixels and as what its JPEG would take."""

    new: NewImages

    def __call__(self, sample: Sample) -> Sample:
        name, image = find_image(sample, self.new.image)
        if self.new.size is not None:
            image = centre_square(image, self.new.size)
        out = {field: value for field, value in sample.items() if field != name}
        if self.new.field in out:
            raise place_error(
                SampleError("is there already, and the new image would take its place"),
                sample,
                self.new.field,
            )
        data = encode_whole(np.asarray(image), quality=self.new.quality)
        if self.new.importance is None:
            return {**out, self.new.field: data}
        return {**out, _PICTURE: image, _WHOLE: len(data)}


def _counting_before(samples: Iterable[Sample], new: NewImages, counted: Counted) -> Iterator[Sample]:
    for sample in samples:
        name, data = image_bytes(sample, new.image)
        if name in STORED_FIELDS:
            raise place_error(SampleError(_DROPPED), sample, name)
        n_image = len(data)
        counted.before += n_image
        counted.others += sum(len(data) for name, data in sample.items() if name[:2] != "__") - n_image
        yield sample


def _counting_after(samples: Iterable[Sample], new: NewImages, counted: Counted) -> Iterator[Sample]:
    for sample in samples:
        after = len(sample[new.field])
        whole = sample.get(_WHOLE, after)
        counted.after += after
        counted.whole += whole
        counted.after_padding += cell_bytes(after) - after
        counted.whole_padding += cell_bytes(whole) - whole
        counted.samples += 1
        yield {name: value for name, value in sample.items() if name != _WHOLE}
