"""How is one shard embedded? Cut into batches that run in threads, put together in the shard's order."""

from __future__ import annotations

import logging
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from adq_wds.core.texture import SHORT_SIDE, texture
from adq_wds.errors import AdqError, FeaturesError, SampleError, ShardError, located
from adq_wds.models.stored import StoredEmbeddings
from adq_wds.pipe import OnError, Tally, check_on_error
from adq_wds.sample import Encoder, FieldSpec, Label, place_error, read_image, read_label
from adq_wds.tables.features import NO_LABEL, ShardFeatures
from adq_wds.tables.spans import Spans
from adq_wds.tar import Ignored, Span, iter_spans, open_shard, payload_crc32, read_sample

logger = logging.getLogger("adq_wds")


@dataclass(frozen=True)
class EmbedSettings:
    image: FieldSpec
    label: FieldSpec | None
    batch_size: int
    on_error: OnError
    max_bad_fraction: float

    def __post_init__(self) -> None:
        check_on_error(self.on_error)
        if not 0.0 <= self.max_bad_fraction <= 1.0:
            raise ValueError(f"max_bad_fraction must lie in [0, 1], got {self.max_bad_fraction!r}")

    def header(self, source: Encoder | StoredEmbeddings) -> dict[str, Any]:
        """What a file must agree in to be used again."""
        return {
            "encoder": source.name,
            "revision": source.revision,
            "preprocessing_hash": getattr(source, "preprocessing_hash", ""),
            "image": _spec_name(self.image),
            "label": _spec_name(self.label),
        }


def _spec_name(spec: FieldSpec | None) -> str:
    if callable(spec):
        return f"function:{getattr(spec, '__qualname__', type(spec).__qualname__)}"
    return "none" if spec is None else spec


@dataclass
class ShardJob:
    """A shard being embedded: its spans, and what the batches have brought so far."""

    path: str
    name: str
    buffer: memoryview
    close: ExitStack
    spans: list[Span]
    crc32: list[int]
    first: int  # position of its first sample in the whole set
    complete: bool
    tally: Tally
    waiting: int = 0
    good: list[int] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)
    parts: list[tuple[NDArray[np.float32], NDArray[np.float32]]] = field(default_factory=list)
    bad: list[tuple[int, str]] = field(default_factory=list)


def open_job(path: str, name: str, settings: EmbedSettings, first: int, left: int | None) -> ShardJob:
    close = ExitStack()
    ignored = Ignored()
    buffer = close.enter_context(open_shard(path))
    spans: list[Span] = []
    crc32: list[int] = []
    complete = True
    for span in iter_spans(buffer, shard=name, ignored=ignored):
        if left is not None and len(spans) == left:
            complete = False
            break
        spans.append(span)
        crc32.append(payload_crc32(buffer, span))
    if ignored.n_members:
        logger.warning("shard %s: %s", name, ignored)
    if not spans:
        raise ShardError(f"shard {name}: no samples (no member has a name with an extension)")
    tally = Tally(f"embed {name}", settings.on_error, settings.max_bad_fraction)
    return ShardJob(path, name, buffer, close, spans, crc32, first, complete, tally)


def source_stamp(path: str) -> dict[str, int]:
    status = os.stat(path)
    return {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns}


# ---- Batches


@dataclass(frozen=True)
class _Batch:
    """What one batch brought: rows for the good samples, an error for each bad one."""

    good: list[int]
    labels: list[Label]
    h: NDArray[np.float32]
    texture: NDArray[np.float32]
    bad: dict[int, AdqError]


def embed_all(
    jobs: Iterator[ShardJob],
    settings: EmbedSettings,
    source: Encoder | StoredEmbeddings,
    workers: int,
    done: Callable[[str, int, int], None],
) -> Iterator[ShardFeatures]:
    """Run batches in threads, a few ahead, and give each shard's features when its last batch is in.

    `done` is called with a shard's path, the samples just done, and all its samples.
    """
    flying: deque[tuple[ShardJob, range, Future[_Batch]]] = deque()
    todo = ((job, rows) for job in jobs for rows in _cut(job, settings.batch_size))
    threads_before = _torch_threads()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="adq-embed", initializer=_use_one_thread)
    try:
        while True:
            while len(flying) < workers + 2 and (task := next(todo, None)) is not None:
                job, rows = task
                flying.append((job, rows, pool.submit(_embed_batch, job, rows, settings, source)))
            if not flying:
                return
            job, rows, future = flying.popleft()
            _take(job, rows, future.result())
            done(job.path, len(rows), len(job.spans))
            if job.waiting == 0:
                yield _finished(job, settings, source)
                job.close.close()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        if threads_before is not None:
            _torch_threads(threads_before)


def _cut(job: ShardJob, batch_size: int) -> list[range]:
    cuts = [range(i, min(i + batch_size, len(job.spans))) for i in range(0, len(job.spans), batch_size)]
    job.waiting = len(cuts)
    return cuts


def _torch_threads(n: int | None = None) -> int | None:
    """Torch's intra-op threads, set to `n` when given; None while nobody has imported torch."""
    torch = sys.modules.get("torch")
    if torch is None:
        return None
    if n is not None:
        torch.set_num_threads(n)
    return int(torch.get_num_threads())


def _use_one_thread() -> None:
    _torch_threads(1)


def _embed_batch(
    job: ShardJob, rows: range, settings: EmbedSettings, source: Encoder | StoredEmbeddings
) -> _Batch:
    good: list[int] = []
    labels: list[Label] = []
    images: list[Image.Image] = []
    bad: dict[int, AdqError] = {}
    for i in rows:
        try:
            sample = _read(job, job.spans[i])
            labels.append(read_label(sample, settings.label))
            try:
                images.append(read_image(sample, settings.image))
            except BaseException:
                labels.pop()
                raise
            good.append(i)
        except SampleError as error:
            bad[i] = error
    if not good:
        return _Batch([], [], np.zeros((0, 0), np.float32), np.zeros(0, np.float32), bad)
    h = _embed_images(job, good, images, source)
    finite = np.isfinite(h).all(axis=1)
    for row in np.flatnonzero(~finite):
        bad[good[row]] = located(
            SampleError("its embedding holds NaN or infinity"), shard=job.name, key=job.spans[good[row]].key
        )
    levels = texture_of(images)
    keep = np.flatnonzero(finite)
    return _Batch([good[k] for k in keep], [labels[k] for k in keep], h[keep], levels[keep], bad)


def _read(job: ShardJob, span: Span) -> dict[str, Any]:
    try:
        return read_sample(job.buffer, span, url=job.name)
    except SampleError as error:
        raise place_error(error, {"__url__": job.name, "__key__": span.key}) from None


def _embed_images(
    job: ShardJob, good: list[int], images: list[Image.Image], source: Encoder | StoredEmbeddings
) -> NDArray[np.float32]:
    """(B, D) float32; an encoder that fails is tried again image by image, to name the one it fails on."""
    if isinstance(source, StoredEmbeddings):
        keys = [job.spans[i].key for i in good]
        return np.concatenate(
            [source.rows(job.name, [k], job.first + i) for i, k in zip(good, keys, strict=True)]
        )
    try:
        return _checked(source(images)[0], len(images))
    except AdqError:
        raise
    except Exception as first_error:
        for i, image in zip(good, images, strict=True):
            try:
                _checked(source([image])[0], 1)
            except Exception as error:
                text = f"encoder {source.name!r} fails on it: {type(error).__name__}: {error}"
                raise located(SampleError(text), shard=job.name, key=job.spans[i].key) from error
        raise first_error


def _checked(h: Any, n: int) -> NDArray[np.float32]:
    rows = np.asarray(h, dtype=np.float32)
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


def _take(job: ShardJob, rows: range, batch: _Batch) -> None:
    """Add a batch to its shard; bad samples are counted, or raised, in the shard's order."""
    good = dict(zip(batch.good, batch.labels, strict=True))
    for i in rows:
        if i in good:
            job.tally.good(1, 1)
        else:
            job.tally.failed(batch.bad[i])
            job.bad.append((i, str(batch.bad[i])))
    if job.parts and batch.good and batch.h.shape[1] != job.parts[0][0].shape[1]:
        widths = job.parts[0][0].shape[1], batch.h.shape[1]
        raise FeaturesError(
            f"shard {job.name}: embeddings of {widths[0]} and of {widths[1]} numbers; they must be alike"
        )
    job.good += batch.good
    job.labels += batch.labels
    if batch.good:
        job.parts.append((batch.h, batch.texture))
    job.waiting -= 1


def _finished(job: ShardJob, settings: EmbedSettings, source: Encoder | StoredEmbeddings) -> ShardFeatures:
    job.tally.close()
    if not job.good:
        raise ShardError(
            f"shard {job.name}: none of its {len(job.spans)} samples can be used; the first: {job.bad[0][1]}"
        )
    h = np.concatenate([part[0] for part in job.parts]).astype(np.float64)
    norm = np.sqrt(np.einsum("nd,nd->n", h, h))
    unit = np.divide(h, norm[:, None], out=np.zeros_like(h), where=norm[:, None] > 0)
    label, names = _numbered(job)
    header = {
        **settings.header(source),
        "complete": job.complete,
        "source": source_stamp(job.path),
    }
    return ShardFeatures(
        shard=job.name,
        spans=_spans(job, job.good),
        label=label,
        embedding=unit.astype(np.float16),
        norm=np.minimum(norm, np.finfo(np.float32).max).astype(np.float32),
        texture=np.concatenate([part[1] for part in job.parts]),
        header=header,
        names=names,
        bad=_spans(job, [i for i, _ in job.bad]),
        bad_reasons=[why for _, why in job.bad],
    )


def _spans(job: ShardJob, rows: list[int]) -> Spans:
    chosen = [job.spans[i] for i in rows]
    return Spans.from_rows(
        [(i, s.key, s.byte_offset, s.n_bytes, job.crc32[i]) for i, s in zip(rows, chosen, strict=True)]
    )


def _numbered(job: ShardJob) -> tuple[NDArray[np.int32], list[str] | None]:
    """Labels as int32, and the names they stand for when they are strings."""
    kinds = {type(label) for label in job.labels}
    if len(kinds) > 1:
        i = next(i for i, label in enumerate(job.labels) if type(label) is not type(job.labels[0]))
        error = SampleError(
            f"label {job.labels[i]!r}, but the shard's first is {job.labels[0]!r}: all must be of one kind"
        )
        raise located(error, shard=job.name, key=job.spans[job.good[i]].key)
    if kinds == {str}:
        names = sorted({str(label) for label in job.labels})
        number = {name: i for i, name in enumerate(names)}
        return np.array([number[str(label)] for label in job.labels], dtype=np.int32), names
    return np.array([NO_LABEL if label is None else label for label in job.labels], dtype=np.int32), None
