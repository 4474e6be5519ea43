"""Replaces each image of a stream by a variant of itself, such as a diffusion network makes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from adq_wds.checks import integer, positive
from adq_wds.core.rng import check_seed, draw, generator
from adq_wds.errors import SampleError, shorten
from adq_wds.pipes.accelerator import accelerator_of
from adq_wds.pipes.base import Pipe, in_batches
from adq_wds.pipes.embed import as_rgb
from adq_wds.protocols import VariantEngine
from adq_wds.samples.fields import (
    EPOCH_FIELD,
    IMAGE_FIELDS,
    STORED_FIELDS,
    FieldSpec,
    Sample,
    check_spec,
    clean_fields,
    image_value,
    place_error,
)
from adq_wds.samples.image import MAX_PIXELS
from adq_wds.samples.label import find_label
from adq_wds.shards.names import base_name


@dataclass(frozen=True, eq=False)
class Vary(Pipe):
    """Replace every image by one variant of itself.

    In a training stream each epoch has another variant, and a resumed stream goes on with the same ones; with `variant`
    it is the same in every epoch. The noise depends on seed, variant, shard and key alone. Images of one size go
    through the engine together; networks add in another order for another batch, which moves a value by one grey
    level now and then.

    The image keeps its field and form: an RGB PIL image, an (H, W, 3) uint8 array or a (3, H, W) uint8 tensor. The
    bytes of a file become a PIL image.

    Args:
        engine: a `VariantEngine`, such as ``adq_wds.models.SDEdit(unet, scheduler, strength=0.5)``.
        label: field with the class, a number, that the engine is told: "label" after `Decode`, "cls" before it;
            None tells it none.
        seed: of the noise.
        variant: a number >= 0; None takes the epoch.
        batch_size: images per call of the engine, at most.
        image: field with the image.
        max_pixels: a larger image is an error before a pixel is decoded.

    Raises:
        TypeError: `engine` is no engine.
        ValueError: another argument is out of range, or a field spec malformed.

    Raises (while streaming):
        SampleError: no image, a damaged one or one without some of its patches; a side or class that the engine
            does not take; a label that is a word; a variant that holds NaN.
        AdqError: the engine's device cannot be used in this process.

    Source: Li et al. 2024 (arXiv 2410.17606), diffusion augmentation; keyed noise and one variant an epoch are ours.

    >>> sample = {"__key__": "a", "__url__": "a.tar", "image": np.full((1, 1, 3), 60, np.uint8), "label": 2}
    >>> Vary(lambda images, labels, noise: -images).apply([sample])[0]["image"].tolist()
    [[[195, 195, 195]]]
    """

    one_to_one: ClassVar[bool] = True
    engine: VariantEngine
    label: FieldSpec | None = "label"
    seed: int = 0
    variant: int | None = None
    batch_size: int = 64
    image: str = field(default=f"{IMAGE_FIELDS};image", kw_only=True)
    max_pixels: int = field(default=MAX_PIXELS, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.engine, type) or not callable(self.engine):
            raise TypeError(
                f"Vary needs an engine, such as adq_wds.models.SDEdit, got {shorten(self.engine)}"
            )
        check_spec(self.label, "label")
        check_spec(self.image, "image")
        check_seed(self.seed)
        if self.variant is not None:
            integer("variant", self.variant, least=0)
        positive("max_pixels", self.max_pixels)
        object.__setattr__(self, "chunk", positive("batch_size", self.batch_size))

    def apply(self, samples: list[Sample]) -> list[Sample]:
        """Each sample with a variant in its image's place."""
        return in_batches(self._batch, samples, self.batch_size)

    def _batch(self, samples: list[Sample]) -> list[Sample]:
        out = [clean_fields(sample) for sample in samples]
        fields, pixels = zip(*map(self._pixels, out), strict=True)
        labels = [self._class(sample) for sample in out]
        by_size: dict[tuple[int, ...], list[int]] = {}
        for i, image in enumerate(pixels):
            by_size.setdefault(image.shape, []).append(i)
        for rows in by_size.values():
            images = np.stack([pixels[i] for i in rows]).transpose(0, 3, 1, 2)
            varied = self._varied(images, [labels[i] for i in rows], [out[i] for i in rows])
            wrong = ~np.isfinite(varied).all(axis=(1, 2, 3))
            if wrong.any():
                i = rows[int(wrong.argmax())]
                raise place_error(
                    SampleError("the engine's variant holds NaN or infinity"), out[i], fields[i]
                )
            levels = np.rint(np.clip((varied + 1) * 127.5, 0, 255)).astype(np.uint8)
            for i, level in zip(rows, levels.transpose(0, 2, 3, 1), strict=True):
                out[i][fields[i]] = _in_form_of(out[i][fields[i]], np.ascontiguousarray(level))
        return out

    def _pixels(self, sample: Sample) -> tuple[str, NDArray[np.uint8]]:
        """The image's field, and its pixels, (H, W, 3) uint8."""
        name, value = image_value(sample, self.image)
        try:
            if name in STORED_FIELDS:
                raise SampleError("some of its patches are dropped; take the shards with whole images")
            pixels = np.asarray(as_rgb(value, self.max_pixels))
            side = getattr(self.engine, "side", None)
            if side is not None and pixels.shape[:2] != tuple(side):
                sizes = (
                    f"{pixels.shape[0]} x {pixels.shape[1]} pixels, the engine takes {side[0]} x {side[1]}"
                )
                raise SampleError(f"{sizes}; resize it before Vary, or take an engine of that size")
        except SampleError as error:
            raise place_error(error, sample, name) from error.__cause__
        return name, pixels

    def _class(self, sample: Sample) -> int:
        name, label = find_label(sample, self.label)
        n_classes = getattr(self.engine, "n_classes", None)
        text = None
        if isinstance(label, str):
            text = f"label {shorten(label)} is a word, and the engine is told numbers; Decode(classes=) makes them"
        elif label is not None and n_classes is not None and label >= n_classes:
            text = f"label {label}, and the engine knows {n_classes} classes"
        if text is not None:
            raise place_error(SampleError(f"{text}; or tell it none, label=None"), sample, name)
        return -1 if label is None else int(label)

    def _varied(self, images: NDArray[np.uint8], labels: list[int], samples: list[Sample]) -> NDArray[Any]:
        places = [
            (int(sample.get(EPOCH_FIELD, 0)) if self.variant is None else self.variant,
             base_name(sample["__url__"]), sample["__key__"])
            for sample in samples
        ]  # fmt: skip
        if getattr(self.engine, "draws_itself", False):
            noise = np.array([draw(self.seed, *place, purpose="vary") for place in places], dtype=np.uint64)
        else:
            shape = images.shape[1:]
            normal = [
                generator(self.seed, *place, purpose="vary").standard_normal(shape, np.float32)
                for place in places
            ]
            noise = np.stack(normal)
        known = None if -1 in labels else np.array(labels, dtype=np.int64)
        with accelerator_of("Vary", "the engine"):
            varied = np.asarray(self.engine(images.astype(np.float32) / 127.5 - 1, known, noise))
        if varied.shape != images.shape:
            raise ValueError(f"the engine gave {varied.shape} for images of {images.shape}")
        return varied


def _in_form_of(value: Any, pixels: NDArray[np.uint8]) -> Any:
    """(H, W, 3) pixels as an array, a tensor or a PIL image, whichever `value` is; bytes count as the last."""
    if isinstance(value, np.ndarray):
        return pixels
    if isinstance(value, bytes | bytearray | memoryview | Image.Image):
        return Image.fromarray(pixels)
    import torch

    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
