"""How do bytes become an image and a label? Only the fields named, with our own decoder."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from adq_wds.image import MAX_PIXELS
from adq_wds.pipe import Pipe
from adq_wds.sample import IMAGE_FIELDS, FieldSpec, Sample, image_bytes, read_image, read_label

FORMS = ("pil", "numpy", "torch")


@dataclass(frozen=True, eq=False)
class Decode(Pipe):
    """Decode a sample's image, upright and RGB, and read its label; other fields pass as bytes.

    The fields ``image`` and ``label`` are new; the bytes they came from are dropped. Unlike
    ``WebDataset.decode()``, nothing else is ever decoded, so nothing in a shard can run code. To be put before
    `.decode()`, or in its place.

    Args:
        image: field with the image, alternatives separated by ``;``, or a function giving its bytes.
        label: field with the label (``cls``, ``txt``, ``json:label``), a function, or None for no label.
        to: "pil" (RGB image), "numpy" ((H, W, 3) uint8) or "torch" ((3, H, W) uint8 tensor).
        max_pixels: a larger image is an error before a pixel is decoded.
        background: what transparency is laid on, RGB.

    Raises (while streaming):
        SampleError: no such field, several of them, damaged, too large, no label. Names shard, key and field.
    """

    image: FieldSpec = IMAGE_FIELDS
    label: FieldSpec | None = "cls"
    to: str = "pil"
    max_pixels: int = field(default=MAX_PIXELS, kw_only=True)
    background: tuple[int, int, int] = field(default=(255, 255, 255), kw_only=True)

    def __post_init__(self) -> None:
        if self.to not in FORMS:
            raise ValueError(f"to must be one of {FORMS}, got {self.to!r}")

    def apply(self, samples: list[Sample]) -> list[Sample]:
        """Each sample with `image`, and `label` unless unlabelled."""
        return [self._decoded(sample) for sample in samples]

    def _decoded(self, sample: Sample) -> Sample:
        label = read_label(sample, self.label)
        picture = read_image(sample, self.image, max_pixels=self.max_pixels, background=self.background)
        used = {image_bytes(sample, self.image)[0]}
        if isinstance(self.label, str):
            used.update(part for part in self.label.split(";"))
        out = {name: value for name, value in sample.items() if name not in used}
        out["image"] = _as(picture, self.to)
        if label is not None:
            out["label"] = label
        return out


def _as(picture: Image.Image, form: str) -> Any:
    if form == "pil":
        return picture
    pixels = np.array(picture)  # a copy: torch wants to own what it may write to
    if form == "numpy":
        return pixels
    import torch

    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
