"""How do shards become features? Decoded and embedded in threads, one file per shard, whole or not at all."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from adq_wds.checks import Count, Ratio, listed, positive
from adq_wds.embedding.batch import embed_batch
from adq_wds.embedding.shard import (
    Batch,
    EmbedSettings,
    ShardJob,
    Source,
    finished,
    open_job,
    skipped_before,
    take_batch,
)
from adq_wds.embedding.stored import StoredEmbeddings, open_embeddings
from adq_wds.embedding.stored_field import FieldEmbeddings
from adq_wds.embedding.views import embed_views
from adq_wds.engines.threads import cores, in_order
from adq_wds.errors import FeaturesError, shorten
from adq_wds.files import lock, make_folder
from adq_wds.pipes.base import MAX_BAD_FRACTION, OnError, Tally
from adq_wds.protocols import Encoder
from adq_wds.registry import encoder as named_encoder
from adq_wds.registry import score as named_score
from adq_wds.remote.open_shard import open_shard
from adq_wds.samples.fields import IMAGE_FIELDS, FieldSpec
from adq_wds.score import Score
from adq_wds.shards.names import expand_urls, plain_shard_names
from adq_wds.shards.samples_in_tar import iter_spans
from adq_wds.tables.features import Features, file_name
from adq_wds.tables.features_file import FeaturesFile, ShardFeatures
from adq_wds.tables.spans import Spans, no_samples, scan_spans, source_stamp

logger = logging.getLogger("adq_wds")

_MAX_NAME_BYTES = 255  # of a file, on the usual file systems


def embed_shards(
    urls: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    encoder: str | Encoder = "builtin",
    out: str | os.PathLike[str] = "features",
    *,
    image: FieldSpec | None = IMAGE_FIELDS,
    label: FieldSpec | None = "cls",
    embeddings: str | os.PathLike[str] | None = None,
    batch_size: Count = 64,
    workers: Count | None = None,
    on_error: OnError = "raise",
    max_bad_fraction: Ratio = MAX_BAD_FRACTION,
    limit: Count | None = None,
    scores: Iterable[str | Score] = (),
    logit_grad: bool = False,
    views: int = 0,
    progress: bool | None = None,
) -> Features:
    """Embed every sample of some shards: one Parquet file per shard, with labels, texture and where samples lie.

    Shards whose file is there, complete and made with the same settings are not embedded again, so a job that was
    killed goes on where it was, and loses at most the shards it was working on (one per worker). Where only `label`
    is another one, labels are read again from the shards' bytes and nothing is embedded, save samples that were bad
    before, and all where `logit_grad` is asked for: logit gradients depend on the labels.

    Args:
        urls: tar shards, local ones or URLs (these are fetched whole): a pattern (braces, ``::``, stars), a folder, or several of them.
        encoder: a name (``builtin``, ``thumbnail``, any timm name) or an `Encoder`; see `encoder`.
        out: folder for the features; made if missing.
        image: field with the image, alternatives separated by ``;``. Or a function of the sample, which is
            known by its name only: give it another name, or another `out`, when it changes. An image that was stored
            without some of its patches is seen grey there, which is logged once. None or "none" beside `embeddings`
            for samples without images, such as text, of which there is no texture then; unless said, so it is where
            the first shard has no image field and no score needs one.
        label: field with the label (``cls``, ``txt``, ``json:label``); none for unlabelled data. Or a function, or None.
            Classes are all numbers or all words: the first label of a shard decides, and a sample of the other kind
            is a bad one; two shards of two kinds are an error.
        embeddings: embeddings made elsewhere, instead of an encoder: a Parquet file (columns key, embedding), an
            .npy file or a folder of numbered ones, or ``field:emb.npy`` for a field of the samples themselves.
        batch_size: images per call of the encoder; batches are cut inside a shard.
        workers: threads; as many as cores by default. Each decodes and embeds whole batches with one intra-op
            thread, so that results do not depend on their number.
        on_error: what to do with a bad sample (no image, no label, an encoder that fails on it): "raise" or "skip".
            Or a function of the error. Skipped samples are listed in the file and never kept by a plan.
        max_bad_fraction: share of bad samples, of all, above which skipping is an error too, once 100 were read, and
            at the end; so are 100 bad ones in a row.
        limit: only the first samples, this many, over all shards.
        scores: scores of yours (a `Score`, or the name of an installed one), a column each. Texture is always there.
        logit_grad: also keep the direction of the loss's gradient by the logits, for ``kernel="gradient"`` of a plan:
            the encoder must have a head trained on these labels.
        views: also embed two augmented views of so many images, for `diversity_head` of a plan; the same images
            whatever the shards' order (`adq_wds.embedding.views`).
        progress: show a bar; only on a terminal by default.

    Returns:
        the features of these shards, opened.

    Raises:
        ValueError: an argument is out of range, or nothing matches `urls`.
        ShardError, SampleError: damaged data, with shard and key.
        FeaturesError: the folder holds features of these shards made with other settings, or the embeddings given
            do not fit the samples.
        AdqError: the folder cannot be written, or another job works in it.
    """
    if embeddings is None:
        refuse_no_image(image)
    settings = EmbedSettings(
        None if image == "none" else image, label, positive("batch_size", batch_size), on_error, max_bad_fraction,
        bool(logit_grad), tuple(map(named_score, listed("scores", scores))),
    )  # fmt: skip
    if views:
        positive("views", views)
    n_workers = positive("workers", cores() if workers is None else workers)
    left = None if limit is None else positive("limit", limit)
    paths = expand_urls(urls)
    names = names_of_features(paths)
    if embeddings is not None:
        refuse_views(views)
    source = open_embeddings(embeddings) if embeddings is not None else named_encoder(encoder)
    _say_what_it_saw(source, names)
    if embeddings is not None:
        settings = without_images(settings, paths, names, Path(out) / file_name(names[0]))
    folder = make_folder(out)
    with lock(folder), ExitStack() as stack:
        bar = stack.enter_context(_Bar(paths, limit, progress))
        tally = Tally("embed", settings.on_error, settings.max_bad_fraction)
        reread, kinds = _Reread(), _LabelKinds()
        todo = _shards_to_do(paths, names, folder, settings, source, left, bar, tally, reread, kinds)
        empty: list[str] = []
        for made in _embed_all(
            _with_samples(todo, folder, empty), settings, source, n_workers, bar.update, tally
        ):
            kinds.check(made.shard, made.names, len(made.spans))
            made.save(folder / file_name(made.shard))
        tally.close()
        reread.say(folder)
        names = [name for name in names if name not in empty]
        if not names:
            raise no_samples(len(paths))
        features = Features(folder, shards=names, limit=limit)
        if views and not isinstance(source, StoredEmbeddings | FieldEmbeddings):
            embed_views(
                features, paths, source, views=views, image=settings.image, batch_size=batch_size,
                workers=n_workers, progress=progress,
            )  # fmt: skip
    return features


def _with_samples(jobs: Iterator[ShardJob], folder: Path, empty: list[str]) -> Iterator[ShardJob]:
    """The jobs that have something to do; the others' names go to `empty`, and features that they once had go."""
    for job in jobs:
        if job.spans:
            yield job
            continue
        job.close.close()
        (folder / file_name(job.name)).unlink(missing_ok=True)
        empty.append(job.name)


def refuse_views(views: int) -> None:
    """Views need an encoder."""
    if views:
        raise ValueError(
            "views need an encoder, and embeddings made elsewhere have none: leave one of them out"
        )


def refuse_no_image(image: FieldSpec | None) -> None:
    """An encoder looks at images."""
    if image is None or image == "none":
        raise ValueError(
            "image=None (--image none) needs embeddings made elsewhere, embeddings= (--embeddings): an encoder looks at images"
        )


def without_images(
    settings: EmbedSettings, paths: Sequence[str], shards: Sequence[str], made: Path | None = None
) -> EmbedSettings:
    """The settings of a job with stored embeddings: with no image, where none was named and there is none.

    The first shard that holds samples tells for all.

    Args:
        settings: what was asked for.
        paths, shards: the shards and their names.
        made: where the first one's features are, if there are some: what was done then is done again, and no shard
            opened.
    """
    if settings.image != IMAGE_FIELDS or any(score.needs_image for score in settings.scores):
        return settings
    if made is not None and made.exists():
        with suppress(FeaturesError):
            is_none = FeaturesFile(made).header.get("image") == "none"
            return replace(settings, image=None) if is_none else settings
    fields = set(IMAGE_FIELDS.split(";"))
    for path, shard in zip(paths, shards, strict=True):
        n_samples = 0
        with open_shard(path) as buffer:
            for span in iter_spans(buffer, shard=shard):
                n_samples += 1
                if not fields.isdisjoint(member.field for member in span.members):
                    return settings
        if n_samples:
            logger.info(
                "shard %s has no image field: samples are taken without images, and have no texture", shard
            )
            return replace(settings, image=None)
    return settings


def _say_what_it_saw(source: Source, names: list[str]) -> None:
    """An encoder that has seen the labels of these very images flatters what is measured on them."""
    if getattr(source, "saw_labels", False) and any("cifar" in name.lower() for name in names):
        logger.warning(
            "encoder %s was trained with the labels of %s: for numbers on that set take builtin-free",
            source.name,
            getattr(source, "trained_on", "its set"),
        )


def names_of_features(paths: list[str]) -> list[str]:
    """The shards' names, which their features go by.

    Raises:
        ValueError: two shards would have one file (`a/b.tar` and `a--b.tar`), or a name is too long for one.
        PlanError: a name that no table may hold.
    """
    names = plain_shard_names(paths)
    shard_of: dict[str, str] = {}
    for name in names:
        file = file_name(name)
        other = shard_of.setdefault(file, name)
        if other != name:
            raise ValueError(f"shards {other!r} and {name!r} would both be {file}; rename one")
        if len(os.fsencode(file)) > _MAX_NAME_BYTES:
            raise ValueError(
                f"shard {shorten(name)}: its features would be a file whose name is too long; rename it"
            )
    return names


def _shards_to_do(
    paths: list[str],
    names: list[str],
    folder: Path,
    settings: EmbedSettings,
    source: Source,
    left: int | None,
    bar: _Bar,
    tally: Tally,
    reread: _Reread,
    kinds: _LabelKinds,
) -> Iterator[ShardJob]:
    """The shards that have no usable file yet, each opened and scanned when its turn comes.

    Samples of the others count too, so that a strict job does not take over what an earlier one skipped.
    """
    first = 0
    for path, name in zip(paths, names, strict=True):
        if left is not None and left <= 0:
            return
        header = settings.header(source, first)
        old = _found(path, folder / file_name(name), header, left)
        if old is None or _lacking(old, header) or _stale(old, header):
            job = open_job(path, name, first, left if old is None else _as_many(old, left))
            job.old = old
            if old is not None and not _lacking(old, header):
                reread.begin(job, old, header)
            n_read = len(job.spans)
            yield job
        else:
            n_read = old.n_read
            kinds.check(old.shard, old.names, old.n)
            tally.good(old.n, old.n)
            for row in old.bad:
                tally.failed(skipped_before(row[5], old))
            bar.skip(path, n_read)
        first += n_read
        left = None if left is None else left - n_read
    if not isinstance(source, StoredEmbeddings) or not source.by_position or left is not None:
        return
    if source.n_rows != first:
        raise FeaturesError(
            f"{source.name}: {source.n_rows:,} rows for {first:,} samples; one row per sample, in order"
        )


def _found(path: str, file: Path, header: dict[str, Any], left: int | None) -> FeaturesFile | None:
    """The features of a shard, or of its first `left` samples, made by the same encoder from the same bytes; or None.

    They may lack columns that are asked for now (see `_lacking`), or have labels by another field (`_stale`).
    """
    if not file.exists():
        return None
    try:
        old = FeaturesFile(file)
        old.read(old.header["columns"])  # every column is held against its hash
    except FeaturesError as error:
        logger.warning("%s; embedding the shard again", error)
        return None
    kind = {} if old.n_classes is None else {"logit_grad": header.get("logit_grad", old.header["logit_grad"])}
    not_here = ("scores", "logit_grad", "label")
    wanted = {name: value for name, value in header.items() if name not in not_here} | kind
    differs = [name for name, value in wanted.items() if old.header.get(name) != value]
    if differs:
        raise FeaturesError(
            f"{file} was made with {differs[0]} {old.header.get(differs[0])!r}, now {wanted[differs[0]]!r}: "
            "give another folder, or remove the old features"
        )
    enough = old.header["complete"] or (left is not None and old.n_read >= left)
    stamp = source_stamp(path)
    if not enough or old.header["source"]["bytes"] != stamp["bytes"]:
        return None
    if old.header["source"] != stamp and not _same_samples(path, old):
        return None
    if _lacking(old, header):
        logger.info("%s has no %s; embedding the shard again", file, ", ".join(_lacking(old, header)))
    if _lacking(old, header) or _stale(old, header):
        return old
    return FeaturesFile(file, limit=left)


def _as_many(old: FeaturesFile, left: int | None) -> int | None:
    """How many samples of a shard are embedded again for a further column: all that there were, at least."""
    return None if old.header["complete"] else max(old.n_read, left or 0)


def _lacking(old: FeaturesFile, header: dict[str, Any]) -> list[str]:
    """Columns that are asked for and not there, or there in another revision."""
    scores = header.get("scores", {})
    lacking = [name for name, revision in scores.items() if old.scores.get(name) != revision]
    if "logit_grad" in header:
        if old.n_classes is None:
            lacking.append("logit_grad")
        elif old.header["label"] != header["label"]:
            lacking.append(f"logit_grad by label {header['label']!r}")
    return lacking


def _stale(old: FeaturesFile, header: dict[str, Any]) -> bool:
    """Whether a column has to be read from the samples' bytes, without an encoder: other labels, or no digests yet."""
    return bool(old.header["label"] != header["label"] or not old.has_digest)


@dataclass
class _Reread:
    """The shards whose bytes are read again, not their images: other labels, or digests that older files lack."""

    label: str = ""  # what labels are by now
    n_labels: int = 0
    n_tried: int = 0  # bad samples that are tried again, since their label may have been what was wrong
    n_digests: int = 0

    def begin(self, job: ShardJob, old: FeaturesFile, header: dict[str, Any]) -> None:
        """Take the embeddings of the old features, unless the shard changed; labels and digests are read."""
        if job.rows() != _rows(old):
            logger.warning("shard %s changed since %s was made; embedding it again", job.name, old.path)
            job.old = None
            return
        job.known = frozenset(old.spans().index.tolist())
        if old.header["label"] != header["label"]:
            self.label = header["label"]
            self.n_labels += 1
            self.n_tried += len(old.bad)
        else:
            job.settled = {row[0]: row[5] for row in old.bad}
            self.n_digests += 1

    def say(self, folder: Path) -> None:
        """One line for each kind."""
        if self.n_labels:
            logger.info(
                "%s: the labels of %d shards are now by %r, read without embedding again; %d samples that were bad before "
                "were tried again", folder, self.n_labels, self.label, self.n_tried,
            )  # fmt: skip
        if self.n_digests:
            logger.info(
                "%s: the features of %d shards had no digests, which were added without embedding again",
                folder,
                self.n_digests,
            )


class _LabelKinds:
    """Classes are all numbers or all words, over all shards; said with the first shard that differs."""

    def __init__(self) -> None:
        self._shards: dict[bool, str] = {}  # by whether the labels are words

    def check(self, shard: str, names: list[str] | None, n: int) -> None:
        """Raise `FeaturesError` where an earlier shard had labels of the other kind."""
        if not n:
            return
        self._shards.setdefault(names is not None, shard)
        if len(self._shards) == 2:
            here, there = ("words", "numbers") if names is not None else ("numbers", "words")
            example = f", such as {shorten(names[0])}" if names else ""
            raise FeaturesError(
                f"shard {shard}: its labels are {here}{example}, those of shard {self._shards[names is None]} are "
                f"{there}: classes are all numbers or all words; write them alike, or in a program read them by a function of your own"
            )


def _rows(old: FeaturesFile) -> list[tuple[int, str, int, int, int]]:
    """Where all samples lay, usable or not, and their checksums."""
    spans = Spans.joined([old.spans(), old.bad_spans()])
    return spans.take(np.argsort(spans.index, kind="stable")).rows()


def _same_samples(path: str, old: FeaturesFile) -> bool:
    """Does a shard whose date changed still hold what was embedded? Decided by its checksums."""
    rows = _rows(old)
    now = scan_spans(path, shard=old.shard).rows()
    return (now if old.header["complete"] else now[: len(rows)]) == rows


def _embed_all(
    jobs: Iterator[ShardJob],
    settings: EmbedSettings,
    source: Source,
    workers: int,
    done: Callable[[str, int, int], None],
    tally: Tally,
) -> Iterator[ShardFeatures]:
    """Embed in threads, and give each shard's features when its last batch is in.

    `done` is called with a shard's path, the samples just done, and all its samples.
    """

    def cut(job: ShardJob) -> list[range]:
        n, size = len(job.spans), settings.batch_size
        return [range(i, min(i + size, n)) for i in range(0, n, size)]

    def work(job: ShardJob, rows: range) -> Batch:
        return embed_batch(job, rows, settings, source)

    filled = False
    with closing(in_order(jobs, cut, work, workers=workers, name="adq-embed")) as batches:
        for job, rows, batch, last in batches:
            take_batch(job, rows, batch, tally)
            if batch.filled and not filled:  # said once
                filled = True
                logger.warning(
                    "shard %s: images are stored without some of their patches, which encoders and scores see as grey",
                    job.name,
                )
            done(job.path, len(rows), len(job.spans))
            if last:
                yield finished(job, settings, source)  # the caller saves it before it asks for the next
                job.close.close()


class _Bar:
    """A progress bar over samples; their total is estimated from the bytes of the shards still to come."""

    def __init__(self, paths: list[str], limit: int | None, progress: bool | None) -> None:
        self._limit = limit
        sizes = {path: os.path.getsize(path) if os.path.isfile(path) else 0 for path in paths}
        self._sizes, self._all = sizes, sum(sizes.values())
        self._bytes = 0.0
        self._bar = tqdm(unit=" samples", desc="embed", disable=None if progress is None else not progress)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def update(self, path: str, n: int, of: int) -> None:
        """`n` samples done, of `of` in this shard."""
        self._bytes += self._sizes[path] * n / of
        if self._bytes:
            total = round((self._bar.n + n) * self._all / self._bytes)
            self._bar.total = total if self._limit is None else min(total, self._limit)
        self._bar.update(n)

    def skip(self, path: str, n: int) -> None:
        """A shard that was done before."""
        self.update(path, n, n)
        self._bar.unpause()
