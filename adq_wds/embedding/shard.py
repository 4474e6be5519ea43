"""Collects the results of a shard while it is embedded, and makes its features at the end."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from adq_wds.embedding.answers import joined
from adq_wds.embedding.logit_grad import gradients_of_shard
from adq_wds.embedding.settings import EmbedSettings, Request
from adq_wds.embedding.source import Source
from adq_wds.embedding.stored_field import FieldEmbeddings
from adq_wds.errors import AdqError, SampleError, ShardError, located
from adq_wds.protocols import Label
from adq_wds.remote.open_shard import open_shard
from adq_wds.samples.fields import Sample, place_error
from adq_wds.samples.label import read_label
from adq_wds.shards.samples_in_tar import Buffer, Span, read_sample
from adq_wds.tables.arrays import numbered, unit_and_norm
from adq_wds.tables.features_file import DIGEST_BYTES, FeaturesFile, ShardFeatures
from adq_wds.tables.spans import Spans, source_stamp, walk_shard

T = TypeVar("T")


@dataclass
class ShardJob:
    """A shard being embedded: its samples, and the results of its batches so far. Samples are numbered by position."""

    path: str
    name: str
    settings: EmbedSettings
    source: Source
    first: int  # position of its first sample in the whole set
    buffer: Buffer
    close: ExitStack
    samples: list[Span]
    spans: Spans  # the same, with checksums
    complete: bool
    stamp: dict[str, int]
    old: FeaturesFile | None = None  # features of the same samples, whose further columns are kept
    known: frozenset[int] = frozenset()  # samples whose embeddings are taken from `old`: only read
    settled: dict[int, str] = field(default_factory=dict)  # bad ones of `old` that are not retried, and why
    good: list[int] = field(default_factory=list)  # those that were embedded
    labels: dict[int, Label] = field(default_factory=dict)  # of all usable samples
    digests: dict[int, bytes] = field(default_factory=dict)
    parts: list[dict[str, NDArray[np.float32]]] = field(default_factory=list)
    bad: list[tuple[int, str]] = field(default_factory=list)
    first_label: Label = None  # of the first sample whose label can be read
    stored_width: int | None = None  # of the first embedding that its samples hold and that can be read
    has_gaps: bool = False  # some images were stored without some of their patches
    note: str = ""  # what is reused, for the log

    def sample(self, i: int) -> Sample:
        """Read a sample; an unusable one raises `SampleError`."""
        try:
            return read_sample(self.buffer, self.samples[i], url=self.path)
        except SampleError as error:
            raise place_error(error, {"__url__": self.path, "__key__": self.samples[i].key}) from None

    def first_of(self, get: Callable[[Sample], T]) -> T | None:
        """The result of `get` for the first sample that it accepts."""
        for i in range(len(self.samples)):
            try:
                return get(self.sample(i))
            except SampleError:
                continue  # reported where its own batch reads it
        return None

    def bad_sample(self, i: int, text: str) -> SampleError:
        """The error of a sample, with its place."""
        return located(SampleError(text), shard=self.name, key=self.samples[i].key)


def open_job(request: Request, path: str, name: str, first: int, limit: int | None) -> ShardJob:
    """Open a shard and scan it, or its first `limit` samples."""
    close = ExitStack()
    stamp = source_stamp(path)  # before it is read: a shard replaced meanwhile is seen to differ
    buffer = close.enter_context(open_shard(path))
    one_more = None if limit is None else limit + 1  # which says whether that is all
    samples = list(walk_shard(buffer, shard=name, limit=one_more, level=logging.WARNING))
    complete = limit is None or len(samples) <= limit
    samples = samples[:limit]
    spans = Spans.from_walk(buffer, samples)
    settings, source = request.settings, request.source
    job = ShardJob(path, name, settings, source, first, buffer, close, samples, spans, complete, stamp)
    job.first_label = job.first_of(lambda sample: read_label(sample, settings.label))
    if isinstance(source, FieldEmbeddings):
        job.stored_width = job.first_of(lambda sample: len(source.row(sample, shard=name, position=first)))
    return job


@dataclass
class Batch:
    """Results of one batch: rows of the good samples, an error for each bad one. Samples are numbered by position."""

    good: list[int] = field(default_factory=list)  # those that were embedded
    labels: dict[int, Label] = field(default_factory=dict)  # of these and of those whose embedding is known
    digests: dict[int, bytes] = field(default_factory=dict)  # likewise
    # of `good`; embedding (n, D), texture, ...
    columns: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    bad: dict[int, AdqError] = field(default_factory=dict)  # each other one, save those that stay bad
    has_gaps: bool = False  # some images were stored without some of their patches


def joined_columns(shard: str, parts: list[dict[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    """The rows of several parts of a shard; no columns without parts."""
    return {name: joined(shard, [part[name] for part in parts]) for name in (parts[0] if parts else ())}


class Counts(Protocol):
    """Counts samples, as `Tally` does."""

    def good(self, n_read: int, n_kept: int) -> None: ...
    def failed(self, error: AdqError) -> None: ...


def take_batch(job: ShardJob, rows: range, batch: Batch, tally: Counts) -> None:
    """Add a batch to its shard; bad samples are counted, or raised, in the shard's order."""
    for i in rows:
        if i in batch.labels:
            tally.good(1, 1)
            continue
        error = batch.bad[i] if i in batch.bad else skipped_before(job.settled[i], job.old)
        tally.failed(error)
        job.bad.append((i, job.settled.get(i, str(error))))
    job.good += batch.good
    job.labels |= batch.labels
    job.digests |= batch.digests
    if batch.good:
        job.parts.append(batch.columns)


def skipped_before(why: str, old: FeaturesFile | None) -> SampleError:
    """The error of a sample that was bad in earlier features, and is not retried."""
    assert old is not None
    return SampleError(f"{why} (skipped when {old.path} was made)")


def finished(job: ShardJob) -> ShardFeatures:
    """The shard's features, from all its batches and the reused embeddings."""
    if not job.labels:
        raise ShardError(
            f"shard {job.name}: none of its {len(job.samples)} samples can be used; the first: {job.bad[0][1]}"
        )
    good = sorted(job.labels)
    columns = _columns(job, good)
    label, names = numbered([job.labels[i] for i in good])
    header: Any = {
        **job.settings.header(job.source, job.first),
        "complete": job.complete,
        "source": job.stamp,
    }
    scores = {score.name: columns[score.name] for score in job.settings.scores}
    same = None  # earlier features of just these samples and labels
    if job.old is not None and set(good) <= set(job.old.spans().index.tolist()):
        rows = np.searchsorted(job.old.spans().index, good)
        kept = {name: job.old.score(name)[rows] for name in job.old.scores if name not in scores}
        if kept:
            header["scores"] = {**header.get("scores", {}), **{name: job.old.scores[name] for name in kept}}
            scores |= kept
        if len(good) == job.old.n and job.old.header["label"] == header["label"]:
            same = job.old
    logit_grad, of_gradients = gradients_of_shard(columns, same)
    return ShardFeatures(
        shard=job.name,
        spans=job.spans.take(np.array(good, dtype=np.int64)),
        label=label,
        embedding=columns["embedding"],
        norm=columns["norm"],
        texture=columns.get("texture"),
        header=header | of_gradients,
        names=names,
        bad=job.spans.take(np.array([i for i, _ in job.bad], dtype=np.int64)),
        bad_reasons=[why for _, why in job.bad],
        logit_grad=logit_grad,
        scores=scores,
        digest=np.frombuffer(b"".join(job.digests[i] for i in good), np.uint8).reshape(-1, DIGEST_BYTES),
    )


def _columns(job: ShardJob, good: list[int]) -> dict[str, NDArray[Any]]:
    """A row of each usable sample: those embedded now, and those of the old features."""
    made = joined_columns(job.name, job.parts)
    if made:
        made["embedding"], made["norm"] = unit_and_norm(made["embedding"])
    if job.old is None or not job.known:
        return made
    known = [i for i in good if i in job.known]
    rows = np.searchsorted(job.old.spans().index, known)
    old: dict[str, NDArray[Any]] = {"embedding": job.old.embedding(), "norm": job.old.norm()}
    old |= {"texture": job.old.texture()} if job.old.has_texture else {}
    old |= {score.name: job.old.score(score.name) for score in job.settings.scores}
    old = {name: column[rows] for name, column in old.items()}
    if not made:
        return old
    order = np.argsort([*job.good, *known], kind="stable")
    return {name: joined(job.name, [made[name], column])[order] for name, column in old.items()}
