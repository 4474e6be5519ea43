"""How does one batch become embeddings? Read, decoded, embedded and measured, each bad sample named."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from adq_wds.core.texture import SHORT_SIDE, texture
from adq_wds.errors import AdqError, SampleError, located
from adq_wds.jobs.embed_shard import Batch, EmbedSettings, ShardJob, unlike
from adq_wds.models.stored import StoredEmbeddings
from adq_wds.sample import Encoder, Label, place_error, read_image, read_label
from adq_wds.shards import base_name
from adq_wds.tar import Span, read_sample

PART_PIXELS = 1 << 25  # decoded at once by one thread: 128 MiB, as Pillow takes four bytes a pixel


@dataclass(frozen=True)
class _Part:
    """Decoded samples of a batch: as many as fit into `PART_PIXELS`, or one."""

    rows: list[int]
    labels: list[Label]
    images: list[Image.Image]


def embed_batch(
    job: ShardJob, rows: range, settings: EmbedSettings, source: Encoder | StoredEmbeddings
) -> Batch:
    """Embed some samples of a shard; runs in a thread of its own.

    Large images are embedded a part of the batch at a time; where it is cut depends on their sizes alone.
    """
    bad: dict[int, AdqError] = {}
    done = [_embed_part(job, part, source, bad) for part in _decoded(job, rows, settings, bad)]
    done = [part for part in done if part.good]
    widths = sorted({part.h.shape[1] for part in done})
    if len(widths) > 1:
        raise unlike(job, widths[0], widths[1])
    return Batch(
        [i for part in done for i in part.good],
        [label for part in done for label in part.labels],
        np.concatenate([part.h for part in done]) if done else np.zeros((0, 0), np.float32),
        np.concatenate([part.texture for part in done]) if done else np.zeros(0, np.float32),
        bad,
    )


def _decoded(
    job: ShardJob, rows: range, settings: EmbedSettings, bad: dict[int, AdqError]
) -> Iterator[_Part]:
    """The samples of a batch that can be read, in parts; the others go into `bad`."""
    part = _Part([], [], [])
    n_pixels = 0
    for i in rows:
        try:
            sample = _read(job, job.spans[i])
            label = read_label(sample, settings.label)
            image = read_image(sample, settings.image)
        except SampleError as error:
            bad[i] = _with_whole_name(job, error)
            continue
        size = image.size[0] * image.size[1]
        if part.rows and n_pixels + size > PART_PIXELS:
            yield part
            part, n_pixels = _Part([], [], []), 0
        part.rows.append(i)
        part.labels.append(label)
        part.images.append(image)
        n_pixels += size
    if part.rows:
        yield part


def _embed_part(
    job: ShardJob, part: _Part, source: Encoder | StoredEmbeddings, bad: dict[int, AdqError]
) -> Batch:
    """Embedding and texture of one part; what fails goes into `bad`."""
    h, failed = _embed_images(job, part.rows, part.images, source)
    bad |= failed
    for row in np.flatnonzero(~np.isfinite(h).all(axis=1)):
        i = part.rows[row]
        bad.setdefault(i, _bad_sample(job, i, "its embedding holds NaN or infinity"))
    keep = [k for k, i in enumerate(part.rows) if i not in bad]
    levels = texture_of([part.images[k] for k in keep])
    return Batch([part.rows[k] for k in keep], [part.labels[k] for k in keep], h[keep], levels, {})


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


def _embed_images(
    job: ShardJob, good: list[int], images: list[Image.Image], source: Encoder | StoredEmbeddings
) -> tuple[NDArray[np.float32], dict[int, AdqError]]:
    """(B, D) float32, and an error for each image that the encoder fails on (its row is NaN)."""
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
                job, i, f"encoder {source.name!r} fails on it: {type(error).__name__}: {_one_line(error)}"
            )
            bad[i].__cause__ = error
    widths = sorted({row.shape[1] for row in rows.values()})
    if len(widths) > 1:
        raise unlike(job, widths[0], widths[1])
    if not bad:
        raise AdqError(
            f"encoder {source.name!r} fails on {len(images)} images at once, and on none of them alone "
            f"({type(first_error).__name__}: {_one_line(first_error)}); a smaller batch_size may help"
        ) from first_error
    nowhere = np.full((1, widths[0] if widths else 0), np.nan, dtype=np.float32)
    return np.concatenate([rows.get(i, nowhere) for i in good]), bad


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]


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
