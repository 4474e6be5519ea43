"""How do bytes become an image and a label? Only the fields named, with our own decoder."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from adq_wds.errors import shorten
from adq_wds.image import MAX_PIXELS
from adq_wds.pipe import Pipe
from adq_wds.sample import (
    IMAGE_FIELDS,
    FieldSpec,
    Sample,
    check_spec,
    clean_fields,
    find_image,
    find_label,
)

FORMS = ("pil", "numpy", "torch")


@dataclass(frozen=True, eq=False)
class Decode(Pipe):
    """Decode a sample's image, upright and RGB, and read its label; other fields pass as bytes.

    The fields ``image`` and ``label`` are new; the fields they came from are dropped, and so are `__adq_*` fields
    that a tar brought. Unlike ``WebDataset.decode()``, nothing else is ever decoded, so nothing in a shard can run
    code. To be put before `.decode()`, or in its place.

    Args:
        image: field with the image, alternatives separated by ``;``, or a function giving its bytes.
        label: field with the label (``cls``, ``txt``, ``json:label``), a function, or None for no label.
        to: "pil" (RGB image), "numpy" ((H, W, 3) uint8) or "torch" ((3, H, W) uint8 tensor).
        max_pixels: a larger image is an error before a pixel is decoded.
        background: what transparency is laid on, RGB, each 0 ... 255.

    Raises:
        ValueError: a field spec is malformed or names a pickle, or another argument is out of range.

    Raises (while streaming):
        SampleError: no such field, several of them, damaged, too large, no label. Names shard, key and field.

    >>> sample = {"__key__": "a", "__url__": "a.tar", "ppm": b"P6 1 1 255 abc", "json": b'{"label": 7}'}
    >>> next(Decode(label="json:label", to="numpy")([sample]))
    {'__key__': 'a', '__url__': 'a.tar', 'image': array([[[97, 98, 99]]], dtype=uint8), 'label': 7}
    """

    one_to_one: ClassVar[bool] = True
    image: FieldSpec = IMAGE_FIELDS
    label: FieldSpec | None = "cls"
    to: str = "pil"
    max_pixels: int = field(default=MAX_PIXELS, kw_only=True)
    background: tuple[int, int, int] = field(default=(255, 255, 255), kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_spec(self.image, "image")
        check_spec(self.label, "label")
        if self.to not in FORMS:
            raise ValueError(f"to must be one of {FORMS}, got {shorten(self.to)}")
        if not _is_integer(self.max_pixels) or self.max_pixels < 1:
            raise ValueError(f"max_pixels must be an integer >= 1, got {shorten(self.max_pixels)}")
        colour = self.background
        if not isinstance(colour, tuple) or len(colour) != 3 or not all(map(_is_level, colour)):
            raise ValueError(f"background must be a tuple of three integers 0 to 255, got {shorten(colour)}")

    def apply(self, samples: list[Sample]) -> list[Sample]:
        """Each sample with `image`, and `label` unless unlabelled."""
        return [self._decoded(sample) for sample in samples]

    def _decoded(self, sample: Sample) -> Sample:
        out = clean_fields(sample)  # a copy, which a user's function may change
        labelled_by, label = find_label(out, self.label)
        pictured_by, picture = find_image(
            out, self.image, max_pixels=self.max_pixels, background=self.background
        )
        for name in (labelled_by, pictured_by):
            if name is not None:
                out.pop(name, None)
        out["image"] = _as(picture, self.to)
        if label is not None:
            out["label"] = label
        return out


def _is_integer(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _is_level(value: Any) -> bool:
    return _is_integer(value) and 0 <= value <= 255


def _as(picture: Image.Image, form: str) -> Any:
    if form == "pil":
        return picture
    pixels = np.array(picture)  # a copy: torch wants to own what it may write to
    if form == "numpy":
        return pixels
    import torch

    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
