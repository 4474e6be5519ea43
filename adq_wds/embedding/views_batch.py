"""How does a batch of samples become embeddings of views? Read by offset, cropped twice, embedded; a bad sample named."""

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
from adq_wds.embedding.answers import encoder_answers, one_line
from adq_wds.embedding.batch import PART_PIXELS
from adq_wds.errors import FeaturesError, SampleError, ShardError, located
from adq_wds.protocols import Encoder
from adq_wds.samples.fields import FieldSpec, Sample
from adq_wds.samples.whole_image import whole_image
from adq_wds.shards.names import base_name
from adq_wds.shards.samples_in_tar import Buffer, WrongSample, expected_span, read_sample
from adq_wds.tables.spans import Spans


@dataclass
class ViewJob:
    """A shard whose views are being made: the chosen samples, and what the batches have brought so far."""

    path: str
    name: str
    spans: Spans
    buffer: Buffer
    close: ExitStack
    parts: list[NDArray[np.float16]] = field(default_factory=list)  # (b, 2, D) each


@dataclass(frozen=True)
class ViewWork:
    """What is done to every chosen sample."""

    source: Encoder
    image: FieldSpec
    batch_size: int
    seed: int


def embed_view_batch(job: ViewJob, rows: range, work: ViewWork, width: int) -> NDArray[np.float16]:
    """(b, 2, D) float16 unit rows of some samples of a shard; runs in a thread of its own."""
    done = [np.zeros((0, 2, width), np.float16)]
    for part, images in _viewed(job, rows, work):
        both = [_embed_images(job, part, images[number], number, work.source, width) for number in (0, 1)]
        done.append(np.stack(both, axis=1))
    return np.concatenate(done)


def _viewed(job: ViewJob, rows: range, work: ViewWork) -> Iterator[tuple[list[int], list[list[Image.Image]]]]:
    """The samples of a batch and their first and second views, in parts of at most `PART_PIXELS`, or one sample."""
    part: list[int] = []
    images: list[list[Image.Image]] = [[], []]
    n_pixels = 0
    for i in rows:
        _, whole = whole_image(_read(job, i), work.image)
        size = 2 * min(whole.size) ** 2
        if part and n_pixels + size > PART_PIXELS:
            yield part, images
            part, images, n_pixels = [], [[], []], 0
        part.append(i)
        n_pixels += size
        for number in (0, 1):
            images[number].append(
                make_view(whole, number, seed=work.seed, shard=job.name, key=job.spans.keys[i])
            )
    if part:
        yield part, images


def make_view(image: Image.Image, number: int, *, seed: int, shard: str, key: str) -> Image.Image:
    """A cropped and perhaps mirrored image, resized (bilinear) to a square of the whole image's short side.

    Args:
        image: RGB, of any size.
        number: 0 or 1: the first or the second view.
        seed, shard, key: what its randomness depends on, besides the number; of the shard its base name.

    Source: see `crop_box`; the square of the short side is ours, so that the encoder's own preprocessing follows.
    """
    rng = generator(seed, number, base_name(shard), key, purpose=CROPPING)
    box, flip = crop_box(*image.size, rng)
    side = min(image.size)
    view = image.crop(box).resize((side, side), Image.Resampling.BILINEAR)
    return view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else view


def _read(job: ViewJob, i: int) -> Sample:
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
    job: ViewJob, part: list[int], images: list[Image.Image], number: int, source: Encoder, width: int
) -> NDArray[np.float16]:
    """(b, D) float16 unit rows of one view of some samples."""

    def failed(k: int, error: Exception) -> None:
        text = (
            f"encoder {source.name!r} fails on its view {number}: {type(error).__name__}: {one_line(error)}"
        )
        raise located(SampleError(text), shard=job.name, key=job.spans.keys[part[k]]) from error

    answers = encoder_answers(source, images, failed, shard=job.name)
    h = np.concatenate([rows for rows, _ in answers])
    if h.shape[1] != width:
        raise FeaturesError(
            f"shard {job.name}: encoder {source.name!r} gives {h.shape[1]} numbers for a view, the features have {width}"
        )
    unit, norm = unit_rows(h)
    if not np.isfinite(norm).all():
        i = part[int(np.argmin(np.isfinite(norm)))]
        text = f"the embedding of its view {number} holds NaN or infinity"
        raise located(SampleError(text), shard=job.name, key=job.spans.keys[i])
    return unit.astype(np.float16)
