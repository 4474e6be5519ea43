"""Embeds the images of a stream, a batch at a time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from adq_wds.checks import positive
from adq_wds.core.unit_rows import unit_rows
from adq_wds.errors import SampleError, shorten
from adq_wds.pipes.accelerator import accelerator_of
from adq_wds.pipes.base import Pipe, in_batches
from adq_wds.protocols import Encoder
from adq_wds.samples.fields import (
    IMAGE_FIELDS,
    FieldSpec,
    Sample,
    check_spec,
    clean_fields,
    image_value,
    place_error,
)
from adq_wds.samples.image import MAX_PIXELS, decode_image
from adq_wds.samples.whole_image import stored_patches

EMBEDDING_FIELD = "emb.npy"
ENCODER_FIELD = "__adq_encoder__"  # (name, revision, preprocessing_hash) of what made the embedding


@dataclass(frozen=True, eq=False)
class Embed(Pipe):
    """Embed every image of a stream into a new field, ``emb.npy``: a unit row, as `embed_shards` stores it.

    The image's own field stays as it is, so that what `Subsample` drops later need not be decoded again. A field
    ``emb.npy`` that was there is replaced. A source that owns its pipes gives them batches; elsewhere `batch_size`
    samples go to the encoder at once.

    With `thumbnail` the embedding does not depend on the cut into batches. Networks add in another order for another
    batch: entries differ by 1e-3 at most (a float16 step or two), so a sample that lies on the border of two bins may
    change its bin.

    Where it may run: in the main process on any device; in workers on the CPU, however they are started; in spawned
    workers also on an accelerator, each with a copy of the network there. A forked process cannot use an accelerator
    that its parent set up: that is an error which says so.

    Args:
        encoder: an `Encoder`, such as ``adq_wds.encoder("builtin")`` gives.
        image: field with the image, as bytes or decoded: an RGB PIL image, an (H, W, 3) uint8 array or a (3, H, W)
            uint8 tensor. Or a function giving one of these. An image that was stored without some of its patches (the
            bytes of ``patches.jpg``) is seen grey where they are missing.
        batch_size: images per call of the encoder, at most.
        max_pixels: a larger image is an error before a pixel is decoded.

    Raises:
        TypeError: `encoder` is no encoder.
        ValueError: another argument is out of range, or a field spec malformed.

    Raises (while streaming):
        SampleError: no image, a damaged one, or an embedding that is not finite.
        AdqError: the encoder's device cannot be used in this process.

    >>> from adq_wds.models.thumbnail import Thumbnail
    >>> sample = {"__key__": "a", "__url__": "a.tar", "ppm": b"P6 1 1 255 abc"}
    >>> row = next(Embed(Thumbnail())([sample]))["emb.npy"]
    >>> row.shape, row.dtype, round(float(row @ row), 2)
    ((192,), dtype('float16'), 1.0)
    """

    one_to_one: ClassVar[bool] = True
    encoder: Encoder
    image: FieldSpec = f"{IMAGE_FIELDS};image"
    batch_size: int = field(default=64, kw_only=True)
    max_pixels: int = field(default=MAX_PIXELS, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        source: Any = self.encoder
        if isinstance(source, str | type) or not callable(source) or not hasattr(source, "revision"):
            hint = f"; write adq_wds.encoder({source!r})" if isinstance(source, str) else ""
            raise TypeError(f"{type(self).__name__} needs an encoder, got {shorten(source)}{hint}")
        check_spec(self.image, "image")
        positive("max_pixels", self.max_pixels)
        object.__setattr__(self, "chunk", positive("batch_size", self.batch_size))

    def apply(self, samples: list[Sample]) -> list[Sample]:
        """Each sample with ``emb.npy``, (D,) float16 of length 1, or 0 where the encoder gave zeros."""
        return in_batches(self._batch, samples, self.batch_size)

    def _batch(self, samples: list[Sample]) -> list[Sample]:
        cleaned, rows, _ = self._embedded(samples)
        made_by = self._made_by
        return [  # copies: a view keeps the batch alive
            {**sample, EMBEDDING_FIELD: row.copy(), ENCODER_FIELD: made_by}
            for sample, row in zip(cleaned, rows, strict=True)
        ]

    @property
    def _made_by(self) -> tuple[str, str, str]:
        source = self.encoder
        return source.name, source.revision, getattr(source, "preprocessing_hash", "")

    def _embedded(
        self, samples: list[Sample]
    ) -> tuple[list[Sample], NDArray[np.float16], NDArray[np.float32] | None]:
        """The samples without forged fields, their unit rows (B, D), and the encoder's logits (B, C) or None."""
        cleaned = [clean_fields(sample) for sample in samples]
        h, logits = self._encoded([self._image(sample) for sample in cleaned])
        rows = unit_rows(h)[0].astype(np.float16)
        wrong = ~np.isfinite(rows).all(axis=1)
        if wrong.any():
            bad = samples[int(wrong.argmax())]
            raise place_error(SampleError("its embedding holds NaN or infinity"), bad)
        return cleaned, rows, logits

    def _image(self, sample: Sample) -> Image.Image:
        stored = stored_patches(sample, self.image, max_pixels=self.max_pixels)
        if stored is not None:
            return Image.fromarray(stored[1].to_image())
        name, value = image_value(sample, self.image)
        try:
            return as_rgb(value, self.max_pixels)
        except SampleError as error:
            raise place_error(error, sample, name) from error.__cause__

    def _encoded(self, images: list[Image.Image]) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        with accelerator_of(type(self).__name__, f"the encoder {self.encoder.name!r}"):
            answer: Any = self.encoder(images)
        with np.errstate(over="ignore"):  # as in `embed_shards`: beyond float32 is infinity
            rows = np.asarray(answer[0], dtype=np.float32)
        if rows.ndim != 2 or len(rows) != len(images) or rows.shape[1] == 0:
            raise ValueError(
                f"encoder {self.encoder.name!r} gave embeddings of shape {rows.shape} for {len(images)} images"
            )
        return rows, answer[1]


def as_rgb(value: Any, max_pixels: int) -> Image.Image:
    """The RGB image in a field's value: the bytes of a file, a PIL image, an array or a tensor.

    Raises:
        SampleError: it holds something else, or what it holds cannot be decoded.
    """
    if isinstance(value, bytes | bytearray | memoryview):
        return decode_image(bytes(value), max_pixels=max_pixels)
    if isinstance(value, Image.Image):
        if value.mode != "RGB":
            raise SampleError(
                f"an image of mode {value.mode!r}, expected RGB; decode it to RGB, as Decode does"
            )
        return value
    pixels: NDArray[Any] = np.asarray(value) if hasattr(value, "__array__") else np.empty(0)
    if pixels.ndim == 3 and pixels.shape[0] == 3 and not isinstance(value, np.ndarray):
        pixels = pixels.transpose(1, 2, 0)  # a tensor has its colours first
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
        shape = f" of {pixels.dtype} {pixels.shape}" if hasattr(value, "__array__") else ""
        raise SampleError(
            f"holds {type(value).__name__}{shape}, expected a file's bytes, an RGB PIL image, an (H, W, 3) uint8 array or "
            "a (3, H, W) uint8 tensor"
        )
    return Image.fromarray(np.ascontiguousarray(pixels))
