"""How does one batch become embeddings? Read, decoded, embedded and measured, each bad sample named."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from adq_wds.core.texture import SHORT_SIDE, texture
from adq_wds.errors import AdqError, SampleError, located
from adq_wds.jobs.embed_shard import Batch, EmbedSettings, ShardJob, unlike
from adq_wds.models.stored import StoredEmbeddings
from adq_wds.sample import Encoder, Label, place_error, read_image, read_label
from adq_wds.tar import Span, read_sample


def embed_batch(
    job: ShardJob, rows: range, settings: EmbedSettings, source: Encoder | StoredEmbeddings
) -> Batch:
    """Embed some samples of a shard; runs in a thread of its own."""
    good: list[int] = []
    labels: list[Label] = []
    images: list[Image.Image] = []
    bad: dict[int, AdqError] = {}
    for i in rows:
        try:
            sample = _read(job, job.spans[i])
            label = read_label(sample, settings.label)
            image = read_image(sample, settings.image)
        except SampleError as error:
            bad[i] = error
            continue
        good.append(i)
        labels.append(label)
        images.append(image)
    h, failed = _embed_images(job, good, images, source)
    bad |= failed
    for row in np.flatnonzero(~np.isfinite(h).all(axis=1)):
        bad.setdefault(good[row], _bad_sample(job, good[row], "its embedding holds NaN or infinity"))
    keep = [k for k, i in enumerate(good) if i not in bad]
    levels = texture_of([images[k] for k in keep])
    return Batch([good[k] for k in keep], [labels[k] for k in keep], h[keep], levels, bad)


def _bad_sample(job: ShardJob, i: int, text: str) -> SampleError:
    return located(SampleError(text), shard=job.name, key=job.spans[i].key)


def _read(job: ShardJob, span: Span) -> dict[str, Any]:
    try:
        return read_sample(job.buffer, span, url=job.path)
    except SampleError as error:
        raise place_error(error, {"__url__": job.path, "__key__": span.key}) from None


def _embed_images(
    job: ShardJob, good: list[int], images: list[Image.Image], source: Encoder | StoredEmbeddings
) -> tuple[NDArray[np.float32], dict[int, AdqError]]:
    """(B, D) float32, and an error for each image that the encoder fails on (its row is NaN)."""
    if not images:
        return np.zeros((0, 0), np.float32), {}
    if isinstance(source, StoredEmbeddings):
        rows = [source.rows(job.name, [job.spans[i].key], job.first + i) for i in good]
        return np.concatenate(rows), {}
    try:
        return _checked(source(images), len(images)), {}
    except Exception as error:
        if isinstance(error, AdqError) and not isinstance(error, SampleError):
            raise
        return _one_by_one(job, good, images, source, error)


def _one_by_one(
    job: ShardJob, good: list[int], images: list[Image.Image], source: Encoder, first_error: Exception
) -> tuple[NDArray[np.float32], dict[int, AdqError]]:
    """Embed image by image, to name those that an encoder fails on."""
    rows: dict[int, NDArray[np.float32]] = {}
    bad: dict[int, AdqError] = {}
    for i, image in zip(good, images, strict=True):
        try:
            rows[i] = _checked(source([image]), 1)
        except Exception as error:
            bad[i] = _bad_sample(
                job, i, f"encoder {source.name!r} fails on it: {type(error).__name__}: {error}"
            )
            bad[i].__cause__ = error
    widths = sorted({row.shape[1] for row in rows.values()})
    if len(widths) > 1:
        raise unlike(job, widths[0], widths[1])
    if not bad:
        raise AdqError(
            f"encoder {source.name!r} fails on {len(images)} images at once, and on none of them alone "
            f"({type(first_error).__name__}: {first_error}); a smaller batch_size may help"
        ) from first_error
    nowhere = np.full((1, widths[0] if widths else 0), np.nan, dtype=np.float32)
    return np.concatenate([rows.get(i, nowhere) for i in good]), bad


def _checked(answer: Any, n: int) -> NDArray[np.float32]:
    """The embeddings in an encoder's answer."""
    if not isinstance(answer, tuple) or len(answer) != 2:
        raise ValueError(f"gave a {type(answer).__name__}, expected (embeddings, logits or None)")
    with np.errstate(over="ignore"):  # beyond float32 becomes infinity, which is refused by name
        rows = np.asarray(answer[0], dtype=np.float32)
    if rows.ndim != 2 or len(rows) != n or rows.shape[1] == 0:
        raise ValueError(f"gave embeddings of shape {rows.shape} for {n} images, expected ({n}, D)")
    return rows


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
