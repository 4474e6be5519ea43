"""How does one batch become embeddings? Read, decoded, embedded and measured, each bad sample named."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from adq_wds.core.texture import SHORT_SIDE, texture
from adq_wds.embedding.answers import encoder_answers, one_line
from adq_wds.embedding.logit_grad import gradient_columns, no_logits
from adq_wds.embedding.shard import Batch, EmbedSettings, ShardJob, Source, unlike
from adq_wds.embedding.stored import StoredEmbeddings
from adq_wds.embedding.stored_field import FieldEmbeddings
from adq_wds.errors import AdqError, SampleError, located, shorten
from adq_wds.protocols import Label
from adq_wds.samples.fields import STORED_FIELDS, Sample, content_digest, place_error
from adq_wds.samples.label import read_label
from adq_wds.samples.whole_image import whole_image
from adq_wds.score import sample_value
from adq_wds.shards.names import base_name
from adq_wds.shards.samples_in_tar import Span, read_sample

PART_PIXELS = 1 << 25  # decoded at once by one thread: 128 MiB, as Pillow takes four bytes a pixel


@dataclass(frozen=True)
class _Part:
    """Decoded samples of a batch: as many as fit into `PART_PIXELS`, or one."""

    rows: list[int]
    images: list[Image.Image]  # of each; none where no image is looked at
    stored: list[NDArray[np.float32]] = field(default_factory=list)  # embeddings, where the samples hold them
    filled: list[bool] = field(default_factory=list)  # those that were stored without some of their patches


@dataclass(frozen=True)
class _Read:
    """What the bytes of a batch's samples say without an encoder, by position."""

    labels: dict[int, Label] = field(default_factory=dict)
    digests: dict[int, bytes] = field(default_factory=dict)
    bad: dict[int, AdqError] = field(default_factory=dict)


def embed_batch(job: ShardJob, rows: range, settings: EmbedSettings, source: Source) -> Batch:
    """Embed some samples of a shard; runs in a thread of its own.

    Large images are embedded a part of the batch at a time; where it is cut depends on their sizes alone.
    Of samples whose embedding is known, labels and digests are read and nothing is decoded.
    """
    read = _Read()
    parts = [
        (part, _embed_part(job, part, settings, source, read))
        for part in _decoded(job, rows, settings, source, read)
    ]
    done = [columns for _, columns in parts if len(columns["embedding"])]
    widths = sorted({columns["embedding"].shape[1] for columns in done})
    if len(widths) > 1:
        raise unlike(job.name, widths[0], widths[1])
    return Batch(
        [i for part, _ in parts for i in part.rows if i not in read.bad],
        {i: label for i, label in read.labels.items() if i not in read.bad},
        {i: digest for i, digest in read.digests.items() if i not in read.bad},
        {name: np.concatenate([columns[name] for columns in done]) for name in done[0]} if done else {},
        read.bad,
        any(any(part.filled) for part, columns in parts if len(columns["embedding"])),
    )


def _decoded(
    job: ShardJob, rows: range, settings: EmbedSettings, source: Source, read: _Read
) -> Iterator[_Part]:
    """The samples of a batch that are to be embedded and can be, in parts; what is wrong with others goes to `read`."""
    part = _Part([], [])
    n_pixels = 0
    for i in rows:
        if i in job.settled:
            continue
        try:
            sample = _read(job, job.spans[i])
            label = _label(job, sample, settings)
            digest = content_digest(sample, settings.image)
            if i in job.known:
                read.labels[i], read.digests[i] = label, digest
                continue
            stored = [_stored(job, sample, source)] if isinstance(source, FieldEmbeddings) else []
            name, image = _image(sample, settings, source)
        except SampleError as error:
            read.bad[i] = _with_whole_name(job, error)
            continue
        read.labels[i], read.digests[i] = label, digest
        size = 0 if image is None else image.size[0] * image.size[1]
        if part.rows and n_pixels + size > PART_PIXELS:
            yield part
            part, n_pixels = _Part([], []), 0
        part.rows.append(i)
        if image is not None:
            part.images.append(image)
        part.stored.extend(stored)
        part.filled.append(name in STORED_FIELDS)
        n_pixels += size
    if part.rows:
        yield part


def _image(sample: Sample, settings: EmbedSettings, source: Source) -> tuple[str | None, Image.Image | None]:
    """As `whole_image`; nothing where no image is looked at."""
    if settings.image is None:
        return None, None
    try:
        return whole_image(sample, settings.image)
    except SampleError as error:
        if not isinstance(source, StoredEmbeddings | FieldEmbeddings):
            raise
        trouble = f"{error}; embeddings are given, so image=None (--image none) looks at no image"
        raise SampleError(trouble) from error


def _label(job: ShardJob, sample: Sample, settings: EmbedSettings) -> Label:
    """The label of a sample, of the kind (number, word, none) that the first readable one of its shard has."""
    label = read_label(sample, settings.label)
    if job.first_label is None:
        job.first_label = (_first_label(job, settings),)  # whichever thread finds it first finds the same
    (first,) = job.first_label
    if type(label) is not type(first):
        trouble = (
            f"label {shorten(label)}, but the shard's first is {shorten(first)}: classes are all numbers or all "
            "words; write them alike, or in a program read them by a function of your own"
        )
        raise place_error(SampleError(trouble), sample)
    return label


def _first_label(job: ShardJob, settings: EmbedSettings) -> Label:
    for span in job.spans:
        try:
            return read_label(_read(job, span), settings.label)
        except SampleError:
            continue  # reported where its own batch reads it
    raise AssertionError("called only where a label of the shard has been read")


def _embed_part(
    job: ShardJob, part: _Part, settings: EmbedSettings, source: Source, read: _Read
) -> dict[str, NDArray[np.float32]]:
    """A row of each column for each sample of a part that can be used; what is wrong with others goes to `read`."""
    h, logits, failed = _embed_images(job, part, source)
    bad = read.bad
    bad |= failed
    _refuse_not_finite(job, part, "embedding holds", h, bad)
    if settings.logit_grad:
        if logits is None and not bad.keys() >= set(part.rows):
            raise AdqError(no_logits(source.name))
        if logits is not None:
            _refuse_not_finite(job, part, "logits hold", logits, bad)
    keep = [k for k, i in enumerate(part.rows) if i not in bad]
    pictured = keep if settings.image is not None else []
    levels = dict(zip(pictured, texture_of([part.images[k] for k in pictured]), strict=True))
    values = {k: _score(job, part, k, h[k], settings, bad) for k in keep} if settings.scores else {}
    keep = [k for k in keep if part.rows[k] not in bad]
    columns = {"embedding": h[keep]}
    if settings.image is not None:
        columns["texture"] = np.array([levels[k] for k in keep], dtype=np.float32)
    if settings.logit_grad and logits is not None:
        labels = [read.labels[part.rows[k]] for k in keep]
        columns |= gradient_columns(job.name, source.name, logits[keep], labels)
    for j, score in enumerate(settings.scores):
        columns[score.name] = np.array([values[k][j] for k in keep], dtype=np.float32)
    return columns


def _refuse_not_finite(
    job: ShardJob, part: _Part, what: str, rows: NDArray[np.float32], bad: dict[int, AdqError]
) -> None:
    for row in np.flatnonzero(~np.isfinite(rows).all(axis=1)):
        i = part.rows[row]
        bad.setdefault(i, _bad_sample(job, i, f"its {what} NaN or infinity"))


def _score(
    job: ShardJob,
    part: _Part,
    k: int,
    h: NDArray[np.float32],
    settings: EmbedSettings,
    bad: dict[int, AdqError],
) -> list[float]:
    """The numbers of the scores of users for one sample of a part; none where one fails."""
    try:
        # copies, so that a score that works in place changes nothing for the others
        return [
            sample_value(score, part.images[k].copy() if score.needs_image else None, h.copy())
            for score in settings.scores
        ]
    except SampleError as error:
        bad[part.rows[k]] = _bad_sample(job, part.rows[k], str(error))
        return []


def _with_whole_name(job: ShardJob, error: SampleError) -> SampleError:
    """The error with the shard's name as the plan has it: its folder too, where base names are alike."""
    text = str(error).replace(f"shard {base_name(job.path)}", f"shard {job.name}", 1)
    renamed = SampleError(text)
    renamed.__cause__ = error.__cause__
    return renamed


def _bad_sample(job: ShardJob, i: int, text: str) -> SampleError:
    return located(SampleError(text), shard=job.name, key=job.spans[i].key)


def _read(job: ShardJob, span: Span) -> dict[str, Any]:
    try:
        return read_sample(job.buffer, span, url=job.path)
    except SampleError as error:
        raise place_error(error, {"__url__": job.path, "__key__": span.key}) from None


def _stored(job: ShardJob, sample: dict[str, Any], source: FieldEmbeddings) -> NDArray[np.float32]:
    """(D,) float32, the embedding in a sample, as wide as the first that can be read of its shard."""
    row = source.row(sample)
    if job.stored_width is None:
        job.stored_width = _first_width(job, source)  # whichever thread finds it first finds the same
    if len(row) != job.stored_width:
        trouble = f"{len(row)} numbers, and the shard's first embedding has {job.stored_width}"
        raise place_error(SampleError(trouble), sample, source.field)
    return row


def _first_width(job: ShardJob, source: FieldEmbeddings) -> int:
    for span in job.spans:
        try:
            return len(source.row(_read(job, span)))
        except SampleError:
            continue  # reported where its own batch reads it
    raise AssertionError("called only where a sample of the shard has been read")


def _embed_images(
    job: ShardJob, part: _Part, source: Source
) -> tuple[NDArray[np.float32], NDArray[np.float32] | None, dict[int, AdqError]]:
    """(B, D) and (B, C) or None float32, and an error for each image that the encoder fails on (its rows are NaN)."""
    if isinstance(source, FieldEmbeddings):
        return np.stack(part.stored), None, {}
    if isinstance(source, StoredEmbeddings):
        rows = [source.rows(job.name, [job.spans[i].key], job.first + i) for i in part.rows]
        return np.concatenate(rows), None, {}
    bad: dict[int, AdqError] = {}

    def failed(k: int, error: Exception) -> None:
        text = f"encoder {source.name!r} fails on it: {type(error).__name__}: {one_line(error)}"
        bad[part.rows[k]] = _bad_sample(job, part.rows[k], text)
        bad[part.rows[k]].__cause__ = error

    answers = encoder_answers(source, part.images, failed, shard=job.name)
    if not bad:
        return *answers[0], {}
    good = [k for k, i in enumerate(part.rows) if i not in bad]
    h = _with_gaps([rows for rows, _ in answers], good, len(part.rows))
    logits = _with_gaps([rows for _, rows in answers], good, len(part.rows))
    return (np.full((len(part.rows), 0), np.nan, np.float32) if h is None else h), logits, bad


def _with_gaps(rows: list[NDArray[np.float32] | None], at: list[int], n: int) -> NDArray[np.float32] | None:
    """(n, D) float32: single rows, each (1, D), at some places, NaN at the others; None when there are none at all."""
    given = {i: row for i, row in zip(at, rows, strict=True) if row is not None}
    if not given:
        return None
    missing = np.full_like(next(iter(given.values())), np.nan)
    return np.concatenate([given.get(i, missing) for i in range(n)])


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
