"""What is known of a shard while it is embedded? Its samples, what the batches bring, and the features at the end."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adq_wds.embedding.logit_grad import gradients_of_shard
from adq_wds.embedding.stored import StoredEmbeddings
from adq_wds.embedding.stored_field import FieldEmbeddings
from adq_wds.errors import AdqError, FeaturesError, SampleError, ShardError
from adq_wds.pipes.base import OnError, Tally, check_on_error
from adq_wds.protocols import Encoder, Label
from adq_wds.remote.open_shard import open_shard
from adq_wds.samples.fields import IMAGE_FIELDS, WHOLE_FIELDS, FieldSpec, check_spec
from adq_wds.score import Score
from adq_wds.shards.samples_in_tar import Buffer, Span, payload_crc32
from adq_wds.tables.features_file import (
    DIGEST_BYTES,
    LOGIT_GRAD,
    FeaturesFile,
    ShardFeatures,
    numbered,
    unit_and_norm,
)
from adq_wds.tables.spans import Spans, source_stamp, walk_shard

Source = Encoder | StoredEmbeddings | FieldEmbeddings
"""Where embeddings come from: a network, a file, or the samples themselves."""


@dataclass(frozen=True)
class EmbedSettings:
    """How samples are read and what happens to bad ones; see `embed_shards`."""

    image: FieldSpec | None  # None where no image is looked at
    label: FieldSpec | None
    batch_size: int
    on_error: OnError
    max_bad_fraction: float
    logit_grad: bool = False
    scores: tuple[Score, ...] = ()

    def __post_init__(self) -> None:
        check_on_error(self.on_error, self.max_bad_fraction)
        if self.image is not None:
            check_spec(self.image, "image")
        check_spec(self.label, "label")
        names = [score.name for score in self.scores]
        if len(set(names)) != len(names):
            raise ValueError(f"scores must each be named once, got {names}")
        if self.logit_grad and (self.label is None or self.label == "none"):
            raise ValueError("logit gradients need labels: logit_grad=True and label=None exclude each other")
        for score in self.scores:
            if self.image is None and score.needs_image:
                raise ValueError(f"score {score.name!r} looks at images, and image=None leaves them out")

    def header(self, source: Source, first: int) -> dict[str, Any]:
        """What a file must agree in to be used again; `first` is its first sample's position in the set."""
        by_position = isinstance(source, StoredEmbeddings) and source.by_position
        return {
            **({"first_row": first} if by_position else {}),
            "encoder": source.name,
            "revision": source.revision,
            "preprocessing_hash": getattr(source, "preprocessing_hash", ""),
            "image": _spec_name(self.image),
            "label": _spec_name(self.label),
            **({"logit_grad": LOGIT_GRAD} if self.logit_grad else {}),
            **({"scores": {score.name: score.revision for score in self.scores}} if self.scores else {}),
        }


def _spec_name(spec: FieldSpec | None) -> str:
    if callable(spec):
        return f"function:{spec.__module__}.{getattr(spec, '__qualname__', type(spec).__qualname__)}"
    if spec == IMAGE_FIELDS:  # under its first name: features from before it had stored patches too stay good
        return WHOLE_FIELDS
    return "none" if spec is None else spec


@dataclass
class ShardJob:
    """A shard being embedded: its spans, and what the batches have brought so far."""

    path: str
    name: str
    buffer: Buffer
    close: ExitStack
    spans: list[Span]
    crc32: list[int]
    first: int  # position of its first sample in the whole set
    complete: bool
    stamp: dict[str, int]
    old: FeaturesFile | None = None  # features of the same samples, whose further columns are kept
    known: frozenset[int] = (
        frozenset()
    )  # positions whose embeddings are taken from `old`: these are read alone
    settled: dict[int, str] = field(
        default_factory=dict
    )  # bad samples of `old` that are not tried again, and why
    good: list[int] = field(default_factory=list)  # those that were embedded
    labels: dict[int, Label] = field(default_factory=dict)  # of all usable samples, by position
    digests: dict[int, bytes] = field(default_factory=dict)
    parts: list[dict[str, NDArray[np.float32]]] = field(default_factory=list)
    bad: list[tuple[int, str]] = field(default_factory=list)
    first_label: tuple[Label] | None = None  # once the first that can be read is known
    stored_width: int | None = None  # of the embeddings in its samples, once the first is known

    def rows(self) -> list[tuple[int, str, int, int, int]]:
        """(index, key, byte_offset, n_bytes, crc32) of each sample, as `Spans.rows` gives them."""
        pairs = zip(self.spans, self.crc32, strict=True)
        return [(i, s.key, s.byte_offset, s.n_bytes, crc) for i, (s, crc) in enumerate(pairs)]


def open_job(path: str, name: str, first: int, left: int | None) -> ShardJob:
    """Open a shard and scan it, or its first `left` samples."""
    close = ExitStack()
    stamp = source_stamp(path)  # before it is read: a shard replaced meanwhile is seen to differ
    buffer = close.enter_context(open_shard(path))
    spans: list[Span] = []
    crc32: list[int] = []
    complete = True
    limit = None if left is None else left + 1  # one more says whether that is all
    for span in walk_shard(buffer, shard=name, limit=limit, level=logging.WARNING):
        complete = len(spans) != left
        if complete:
            spans.append(span)
            crc32.append(payload_crc32(buffer, span))
    return ShardJob(path, name, buffer, close, spans, crc32, first, complete, stamp)


@dataclass(frozen=True)
class Batch:
    """What one batch brought: rows for the good samples, an error for each bad one.

    Attributes:
        good: positions in the shard of the samples that were embedded.
        labels: of these and of those whose embedding is known, by position.
        digests: likewise.
        columns: a row of each of `good`: "embedding" (n, D), "texture" (n,) of images, "logit_grad" (n, C), and scores (n,) by name.
        bad: an error for each other position, save those that were bad before and are not tried again.
        filled: some of the images were stored without some of their patches, and seen grey there.
    """

    good: list[int]
    labels: dict[int, Label]
    digests: dict[int, bytes]
    columns: dict[str, NDArray[np.float32]]
    bad: dict[int, AdqError]
    filled: bool = False

    @property
    def width(self) -> int:
        """D."""
        return int(self.columns["embedding"].shape[1])


def unlike(shard: str, a: int, b: int) -> FeaturesError:
    """Embeddings of two widths."""
    return FeaturesError(f"shard {shard}: embeddings of {a} and of {b} numbers; they must be alike")


def take_batch(job: ShardJob, rows: range, batch: Batch, tally: Tally) -> None:
    """Add a batch to its shard; bad samples are counted, or raised, in the shard's order."""
    for i in rows:
        if i in batch.labels:
            tally.good(1, 1)
            continue
        error = batch.bad[i] if i in batch.bad else _settled_error(job, i)
        tally.failed(error)
        job.bad.append((i, job.settled.get(i, str(error))))
    if job.parts and batch.good and batch.width != job.parts[0]["embedding"].shape[1]:
        raise unlike(job.name, job.parts[0]["embedding"].shape[1], batch.width)
    job.good += batch.good
    job.labels |= batch.labels
    job.digests |= batch.digests
    if batch.good:
        job.parts.append(batch.columns)


def _settled_error(job: ShardJob, i: int) -> SampleError:
    assert job.old is not None
    return skipped_before(job.settled[i], job.old)


def skipped_before(why: str, old: FeaturesFile) -> SampleError:
    """A sample that was bad when features were made, and is not tried again."""
    return SampleError(f"{why} (skipped when {old.path} was made)")


def finished(job: ShardJob, settings: EmbedSettings, source: Source) -> ShardFeatures:
    """The shard's features, from all its batches and, where their embeddings are known, from the old ones."""
    if not job.labels:
        raise ShardError(
            f"shard {job.name}: none of its {len(job.spans)} samples can be used; the first: {job.bad[0][1]}"
        )
    good = sorted(job.labels)
    columns = _columns(job, settings, good)
    label, names = numbered([job.labels[i] for i in good])
    header = {
        **settings.header(source, job.first),
        "complete": job.complete,
        "source": job.stamp,
    }
    scores = {score.name: columns[score.name] for score in settings.scores}
    same = None  # earlier features of just these samples and labels
    if job.old is not None and set(good) <= set(job.old.spans().index.tolist()):
        rows = np.searchsorted(job.old.spans().index, good)
        kept = {name: job.old.score(name)[rows] for name in job.old.scores if name not in scores}
        if kept:
            header["scores"] = {**header.get("scores", {}), **{name: job.old.scores[name] for name in kept}}
            scores |= kept
        if len(good) == job.old.n and job.old.header["label"] == header["label"]:
            same = job.old
    logit_grad, said = gradients_of_shard(columns, same)
    header |= said
    return ShardFeatures(
        shard=job.name,
        spans=_spans(job, good),
        label=label,
        embedding=columns["embedding"],
        norm=columns["norm"],
        texture=columns.get("texture"),
        header=header,
        names=names,
        bad=_spans(job, [i for i, _ in job.bad]),
        bad_reasons=[why for _, why in job.bad],
        logit_grad=logit_grad,
        scores=scores,
        digest=np.frombuffer(b"".join(job.digests[i] for i in good), np.uint8).reshape(-1, DIGEST_BYTES),
    )


def _columns(job: ShardJob, settings: EmbedSettings, good: list[int]) -> dict[str, NDArray[Any]]:
    """A row of each usable sample: those that were embedded, and those of the old features."""
    made: dict[str, NDArray[Any]] = {}
    if job.parts:
        made = {name: np.concatenate([part[name] for part in job.parts]) for name in job.parts[0]}
        made["embedding"], made["norm"] = unit_and_norm(made["embedding"])
    if job.old is None or not job.known:
        return made
    known = [i for i in good if i in job.known]
    rows = np.searchsorted(job.old.spans().index, known)
    old: dict[str, NDArray[Any]] = {"embedding": job.old.embedding(), "norm": job.old.norm()}
    old |= {"texture": job.old.texture()} if job.old.has_texture else {}
    old |= {score.name: job.old.score(score.name) for score in settings.scores}
    old = {name: column[rows] for name, column in old.items()}
    if not job.good:
        return old
    if made["embedding"].shape[1] != job.old.width:
        raise unlike(job.name, job.old.width, made["embedding"].shape[1])
    order = np.argsort([*job.good, *known], kind="stable")
    return {name: np.concatenate([made[name], column])[order] for name, column in old.items()}


def _spans(job: ShardJob, rows: list[int]) -> Spans:
    every = Spans.from_walk(zip(job.spans, job.crc32, strict=True))
    return every.take(np.array(rows, dtype=np.int64))
