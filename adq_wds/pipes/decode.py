"""Decodes the image and reads the label of each sample: only the fields named, with our own decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from adq_wds.checks import positive
from adq_wds.errors import SampleError, shorten
from adq_wds.pipes.base import Pipe
from adq_wds.protocols import Label
from adq_wds.samples.fields import (
    FILLED_FIELD,
    IMAGE_FIELDS,
    KEPT_FIELDS,
    FieldSpec,
    Sample,
    check_spec,
    clean_fields,
    place_error,
)
from adq_wds.samples.image import MAX_PIXELS
from adq_wds.samples.label import find_label
from adq_wds.samples.patch_file import GREY, PatchImage
from adq_wds.samples.whole_image import read_patches, stored_patches, whole_image

FORMS = ("pil", "numpy", "torch", "patches")


@dataclass(frozen=True, eq=False)
class Decode(Pipe):
    """Decode a sample's image, upright and RGB, and read its label; other fields pass as bytes.

    The fields ``image`` and ``label`` are new; the fields they came from are dropped, and so are `__adq_*` fields
    that a tar brought. Unlike ``WebDataset.decode()``, it decodes nothing else, so nothing in a shard can run code.
    Put it before `.decode()`, or in its place.

    An image that was stored without some of its patches (``patches.jpg``, from `EncodePatches`)
    becomes a whole one again, of one colour where patches are missing, and ``__adq_filled__`` is True beside it. With
    ``to="patches"`` it becomes the fields that `DropPatches` makes: ``patches`` (k, P, P, 3) uint8, ``positions``
    (k,) and ``grid`` (2,) int64.

    Args:
        image: field with the image, alternatives separated by ``;``, or a function giving its bytes.
        label: field with the label (``cls``, ``txt``, ``json:label``), a function, or None for no label. A word there
            is a name, unless `classes` gives its number.
        to: "pil" (RGB image), "numpy" ((H, W, 3) uint8), "torch" ((3, H, W) uint8 tensor) or "patches", which takes
            only images stored so.
        max_pixels: a larger image is an error before a pixel is decoded.
        background: colour behind transparency, RGB, each 0 ... 255.
        fill: colour of missing patches, RGB, each 0 ... 255.
        classes: names of the classes: a label that is a word becomes its position among them, as training needs
            it. ``plan.header["names"]`` are those of a plan, so that numbers agree with its classes; None, as there
            for labels that are numbers, leaves labels as they are.

    Raises:
        ValueError: a field spec is malformed or names a pickle, or another argument is out of range.

    Raises (while streaming):
        SampleError: no such field, several of them, damaged, too large, no label. Names shard, key and field.

    >>> sample = {"__key__": "a", "__url__": "a.tar", "ppm": b"P6 1 1 255 abc", "json": b'{"label": 7}'}
    >>> next(Decode(label="json:label", to="numpy")([sample]))
    {'__key__': 'a', '__url__': 'a.tar', 'image': array([[[97, 98, 99]]], dtype=uint8), 'label': 7}
    >>> words = Decode(image="ppm", label=lambda sample: "dog", classes=["cat", "dog"])
    >>> next(words([sample]))["label"]
    1
    """

    one_to_one: ClassVar[bool] = True
    image: FieldSpec = IMAGE_FIELDS
    label: FieldSpec | None = "cls"
    to: str = "pil"
    max_pixels: int = field(default=MAX_PIXELS, kw_only=True)
    background: tuple[int, int, int] = field(default=(255, 255, 255), kw_only=True)
    fill: tuple[int, int, int] = field(default=GREY, kw_only=True)
    classes: Sequence[str] | None = field(default=None, kw_only=True, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_spec(self.image, "image")
        check_spec(self.label, "label")
        if self.to not in FORMS:
            raise ValueError(f"to must be one of {FORMS}, got {shorten(self.to)}")
        positive("max_pixels", self.max_pixels)
        for name in ("background", "fill"):
            colour = getattr(self, name)
            if not isinstance(colour, tuple) or len(colour) != 3 or not all(map(_is_level, colour)):
                raise ValueError(f"{name} must be a tuple of three integers 0 to 255, got {shorten(colour)}")
        if self.classes is not None:
            _check_classes(self.classes)
            numbers = {name: i for i, name in enumerate(self.classes)}
            object.__setattr__(self, "_number_of", numbers)

    def apply(self, samples: list[Sample]) -> list[Sample]:
        """Each sample with `image`, and `label` unless unlabelled."""
        return [self._decoded(sample) for sample in samples]

    def _decoded(self, sample: Sample) -> Sample:
        out = clean_fields(sample)  # a copy, which a user's function may change
        label_field, label = find_label(out, self.label)
        if label is not None and self.classes is not None:
            label = self._number(label, sample, label_field)
        image_field, fields = self._pictured(out)
        for name in (label_field, image_field):
            if name is not None:
                out.pop(name, None)
        out.update(fields)
        if label is not None:
            out["label"] = label
        return out

    def _number(self, label: Label, sample: Sample, field: str | None) -> int:
        """A class's position among `classes`."""
        number: int | None = self.__dict__["_number_of"].get(label)
        if number is None:
            trouble = f"label {shorten(label)} is none of the {len(self.classes or ())} names in classes="
            raise place_error(SampleError(trouble), sample, field)
        return number

    def _pictured(self, sample: Sample) -> tuple[str | None, Sample]:
        """The image's field, None for a function, and the new fields."""
        if self.to == "patches":
            field, kept = read_patches(sample, self.image, self.max_pixels)
            return None if callable(self.image) else field, _kept(kept)
        stored = stored_patches(sample, self.image, max_pixels=self.max_pixels)
        if stored is None:
            options: Any = {"max_pixels": self.max_pixels, "background": self.background}
            name, picture = whole_image(sample, self.image, **options)
            return name, {"image": picture if self.to == "pil" else _formed(np.array(picture), self.to)}
        pixels = stored[1].to_image(self.fill)
        image = Image.fromarray(pixels) if self.to == "pil" else _formed(pixels, self.to)
        return stored[0], {"image": image, FILLED_FIELD: True}


def _check_classes(classes: object) -> None:
    names = None if isinstance(classes, str) or not isinstance(classes, Sequence) else list(classes)
    if names is None or not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
        raise ValueError(f"classes must be a list of different names, got {shorten(classes)}")


def _kept(image: PatchImage) -> Sample:
    patches = image.patches.copy()  # read-only, and scattered over a larger image
    values = (patches, image.kept.astype(np.int64), np.array(image.grid, dtype=np.int64))
    return dict(zip(KEPT_FIELDS, values, strict=True))


def _is_level(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and 0 <= int(value) <= 255


def _formed(pixels: NDArray[np.uint8], form: str) -> Any:
    if form == "numpy":
        return pixels
    import torch

    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
