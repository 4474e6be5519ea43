"""Reads one batch of samples by offset, crops each twice and embeds the crops; names a bad sample."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from adq_wds.core.rng import generator
from adq_wds.core.unit_rows import unit_rows
from adq_wds.core.views import CROPPING, crop_box
from adq_wds.embedding.answers import encoder_answer
from adq_wds.embedding.batch import in_parts
from adq_wds.errors import FeaturesError, SampleError, ShardError, located, reason_of
from adq_wds.protocols import Encoder
from adq_wds.samples.fields import FieldSpec, Sample
from adq_wds.samples.whole_image import whole_image
from adq_wds.shards.names import base_name
from adq_wds.shards.samples_in_tar import Buffer, WrongSample, expected_span, read_sample
from adq_wds.tables.spans import Spans


@dataclass
class ViewJob:
    """A shard whose views are being made: the chosen samples, and the results of its batches so far."""

    path: str
    name: str
    spans: Spans
    buffer: Buffer
    close: ExitStack
    parts: list[NDArray[np.float16]] = field(default_factory=list)  # (b, 2, D) each


def embed_view_batch(
    job: ViewJob, rows: range, encoder: Encoder, image: FieldSpec, *, seed: int, width: int
) -> NDArray[np.float16]:
    """(b, 2, D) float16 unit rows of some samples of a shard; runs in a thread of its own."""
    parts = [np.zeros((0, 2, width), np.float16)]
    for part in in_parts(_viewed(job, rows, image, seed)):
        samples = [i for i, _ in part]
        both = [
            _embed_images(job, samples, [views[number] for _, views in part], number, encoder, width)
            for number in (0, 1)
        ]
        parts.append(np.stack(both, axis=1))
    return np.concatenate(parts)


def _viewed(
    job: ViewJob, rows: range, image: FieldSpec, seed: int
) -> Iterator[tuple[int, tuple[int, list[Image.Image]]]]:
    """The pixels of the views of each sample, with the sample and its two views."""
    for i in rows:
        _, whole = whole_image(_read_sample(job, i), image)
        key = job.spans.keys[i]
        views = [make_view(whole, number, seed=seed, shard=job.name, key=key) for number in (0, 1)]
        yield 2 * min(whole.size) ** 2, (i, views)


def make_view(image: Image.Image, number: int, *, seed: int, shard: str, key: str) -> Image.Image:
    """View 0 or 1: an RGB image cropped, perhaps mirrored, and resized (bilinear) to a square of its short side.

    Its randomness depends only on number, seed, the shard's base name and key.

    Source: see `crop_box`; the square of the short side is ours, so that the encoder's own preprocessing follows.
    """
    rng = generator(seed, number, base_name(shard), key, purpose=CROPPING)
    box, flip = crop_box(*image.size, rng)
    side = min(image.size)
    view = image.crop(box).resize((side, side), Image.Resampling.BILINEAR)
    return view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else view


def _read_sample(job: ViewJob, i: int) -> Sample:
    """One sample by its offset, compared with what was embedded."""
    start, key = int(job.spans.byte_offset[i]), job.spans.keys[i]
    data = job.buffer[start : start + int(job.spans.n_bytes[i])]
    try:
        span = expected_span(data, shard=job.name, key=key, crc32=int(job.spans.crc32[i]))
    except WrongSample as error:
        text = f"the shard changed since it was embedded ({error}); embed it again"
        raise located(ShardError(text), shard=job.name, key=key) from None
    return read_sample(data, span, url=job.path)


def _embed_images(
    job: ViewJob, part: list[int], images: list[Image.Image], number: int, encoder: Encoder, width: int
) -> NDArray[np.float16]:
    """(b, D) float16 unit rows of one view of some samples."""

    def failed(k: int, error: Exception) -> None:
        text = f"encoder {encoder.name!r} fails on its view {number}: {reason_of(error)}"
        raise located(SampleError(text), shard=job.name, key=job.spans.keys[part[k]]) from error

    h, _ = encoder_answer(encoder, images, failed, shard=job.name)
    if h.shape[1] != width:
        raise FeaturesError(
            f"shard {job.name}: encoder {encoder.name!r} gives {h.shape[1]} numbers for a view, the features have {width}"
        )
    unit, norm = unit_rows(h)
    if not np.isfinite(norm).all():
        i = part[int(np.argmin(np.isfinite(norm)))]
        text = f"the embedding of its view {number} holds NaN or infinity"
        raise located(SampleError(text), shard=job.name, key=job.spans.keys[i])
    return unit.astype(np.float16)
