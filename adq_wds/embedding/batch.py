"""Reads, decodes, embeds and measures one batch of a shard's samples, and names each bad one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from adq_wds.core.texture import SHORT_SIDE, texture
from adq_wds.embedding.answers import encoder_answer
from adq_wds.embedding.logit_grad import gradient_columns
from adq_wds.embedding.shard import Batch, ShardJob, joined_columns
from adq_wds.embedding.source import StoredEmbeddings
from adq_wds.errors import AdqError, SampleError, reason_of, shorten
from adq_wds.protocols import Answer, Label
from adq_wds.samples.fields import STORED_FIELDS, Sample, content_digest, place_error
from adq_wds.samples.label import read_label
from adq_wds.samples.whole_image import whole_image
from adq_wds.score import sample_value
from adq_wds.shards.names import base_name

PART_PIXELS = 1 << 25  # decoded at once by one thread: 128 MiB, as Pillow takes four bytes a pixel

T = TypeVar("T")


class _Decoded(NamedTuple):
    """A sample to be embedded."""

    i: int  # its position in the shard
    image: Image.Image | None  # None where images are not read
    h: NDArray[np.float32] | None  # its embedding, where that was made elsewhere


def embed_batch(job: ShardJob, rows: range) -> Batch:
    """Embed some samples of a shard; runs in a thread of its own.

    Large images are embedded a part of the batch at a time; where it is cut depends on their sizes alone.
    Of samples whose embedding is known, labels and digests are read and nothing is decoded.
    """
    batch = Batch()
    parts = []
    for part in in_parts(_decoded(job, rows, batch)):
        columns = _embed_part(job, part, batch)
        parts += [columns] if len(columns["embedding"]) else []
    batch.columns = joined_columns(job.name, parts)
    for i in batch.bad:
        batch.labels.pop(i, None)
        batch.digests.pop(i, None)
    return batch


def in_parts(sized: Iterable[tuple[int, T]]) -> Iterator[list[T]]:
    """Cut a stream of (pixels, item) into parts of at most `PART_PIXELS`, or of one item, before more is decoded."""
    part: list[T] = []
    total = 0
    for n_pixels, item in sized:
        if part and total + n_pixels > PART_PIXELS:
            yield part
            part, total = [], 0
        part.append(item)
        total += n_pixels
    if part:
        yield part


def _decoded(job: ShardJob, rows: range, batch: Batch) -> Iterator[tuple[int, _Decoded]]:
    """The samples of a batch to embed, decoded, with their pixels; results of the others go to `batch`."""
    for i in rows:
        if i in job.settled:
            continue
        h = image = None
        try:
            sample = job.sample(i)
            label = _label(job, sample)
            digest = content_digest(sample, job.settings.image)
            if i not in job.known:
                h = _stored(job, sample, job.first + i)
                field, image = _image(job, sample)
                batch.has_gaps |= field in STORED_FIELDS
        except SampleError as error:
            batch.bad[i] = _with_whole_name(job, error)
            continue
        batch.labels[i], batch.digests[i] = label, digest
        if i not in job.known:
            yield 0 if image is None else image.width * image.height, _Decoded(i, image, h)


def _label(job: ShardJob, sample: Sample) -> Label:
    """The label of a sample, checked to be of the kind (number, word, none) of its shard's first readable one."""
    label = read_label(sample, job.settings.label)
    if type(label) is not type(job.first_label):
        text = (
            f"label {shorten(label)}, but the shard's first is {shorten(job.first_label)}: classes are all numbers or all "
            "words; write them alike, or in a program read them by a function of your own"
        )
        raise place_error(SampleError(text), sample)
    return label


def _stored(job: ShardJob, sample: Sample, position: int) -> NDArray[np.float32] | None:
    """(D,) float32, the stored embedding of a sample; None where an encoder makes it."""
    if not isinstance(job.source, StoredEmbeddings):
        return None
    h = job.source.row(sample, shard=job.name, position=position)
    if job.stored_width not in (None, len(h)):
        text = f"{len(h)} numbers, and the shard's first embedding has {job.stored_width}"
        raise place_error(SampleError(text), sample, job.source.name.partition(":")[2])
    return h


def _image(job: ShardJob, sample: Sample) -> tuple[str | None, Image.Image | None]:
    """As `whole_image`; None where images are not read."""
    if job.settings.image is None:
        return None, None
    try:
        return whole_image(sample, job.settings.image)
    except SampleError as error:
        if not isinstance(job.source, StoredEmbeddings):
            raise
        text = f"{error}; embeddings are given, so image=None (--image none) looks at no image"
        raise SampleError(text) from error


def _with_whole_name(job: ShardJob, error: SampleError) -> SampleError:
    """The error with the shard's name as in the plan, with its folder where base names are equal."""
    text = str(error).replace(f"shard {base_name(job.path)}", f"shard {job.name}", 1)
    renamed = SampleError(text)
    renamed.__cause__ = error.__cause__
    return renamed


def _embed_part(job: ShardJob, part: list[_Decoded], batch: Batch) -> dict[str, NDArray[np.float32]]:
    """A row of each column for each usable sample of a part; errors of the others go to `batch`."""
    settings, name, bad = job.settings, job.source.name, batch.bad
    h, logits = _embed_images(job, part, bad)
    part = [sample for sample in part if sample.i not in bad]  # those that have a row
    _refuse_not_finite(job, part, "embedding holds", h, bad)
    if settings.logit_grad and part:
        if logits is None:
            text = "gives no logits, which logit gradients need; take one with a classifier head"
            raise AdqError(f"encoder {name!r} {text}")
        _refuse_not_finite(job, part, "logits hold", logits, bad)
    values = [[] if sample.i in bad else _scores(job, sample, h[k], bad) for k, sample in enumerate(part)]
    keep = [k for k, sample in enumerate(part) if sample.i not in bad]
    part = [part[k] for k in keep]
    batch.good += [sample.i for sample in part]
    columns = {"embedding": h[keep]}
    if settings.image is not None:
        columns["texture"] = texture_of([sample.image for sample in part if sample.image is not None])
    if settings.logit_grad and logits is not None:
        labels = [batch.labels[sample.i] for sample in part]
        columns |= gradient_columns(job.name, name, logits[keep], labels)
    for j, score in enumerate(settings.scores):
        columns[score.name] = np.array([values[k][j] for k in keep], dtype=np.float32)
    return columns


def _embed_images(job: ShardJob, part: list[_Decoded], bad: dict[int, AdqError]) -> Answer:
    """Embeddings and logits of samples; errors of those that the encoder fails on go to `bad`."""
    source = job.source
    if isinstance(source, StoredEmbeddings):
        return np.stack([sample.h for sample in part if sample.h is not None]), None

    def failed(k: int, error: Exception) -> None:
        text = f"encoder {source.name!r} fails on it: {reason_of(error)}"
        bad[part[k].i] = job.bad_sample(part[k].i, text)
        bad[part[k].i].__cause__ = error

    images = [sample.image for sample in part if sample.image is not None]
    return encoder_answer(source, images, failed, shard=job.name)


def _refuse_not_finite(
    job: ShardJob, part: list[_Decoded], what: str, rows: NDArray[np.float32], bad: dict[int, AdqError]
) -> None:
    for row in np.flatnonzero(~np.isfinite(rows).all(axis=1)):
        i = part[row].i
        bad.setdefault(i, job.bad_sample(i, f"its {what} NaN or infinity"))


def _scores(job: ShardJob, sample: _Decoded, h: NDArray[np.float32], bad: dict[int, AdqError]) -> list[float]:
    """The values of users' scores for one sample; None where one fails."""
    image = sample.image
    try:
        # copies, so that a score that works in place changes nothing for the others
        return [
            sample_value(score, image.copy() if score.needs_image and image is not None else None, h.copy())
            for score in job.settings.scores
        ]
    except SampleError as error:
        bad[sample.i] = job.bad_sample(sample.i, str(error))
        return []


def texture_of(images: list[Image.Image]) -> NDArray[np.float32]:
    """(B,) float32 texture of RGB images of any sizes, scaled down to a short side of 256 first."""
    by_size: dict[tuple[int, int], list[int]] = {}
    small = [_scaled_down(image) for image in images]
    for i, image in enumerate(small):
        by_size.setdefault(image.size, []).append(i)
    levels = np.empty(len(images), dtype=np.float32)
    for members in by_size.values():
        levels[members] = texture(np.stack([np.asarray(small[i]) for i in members]))
    return levels


def _scaled_down(image: Image.Image) -> Image.Image:
    scale = SHORT_SIDE / min(image.size)
    if scale >= 1.0:
        return image
    width, height = (max(SHORT_SIDE, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BILINEAR)
