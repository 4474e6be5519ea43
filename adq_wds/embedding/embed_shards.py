"""Embeds shards in threads: one complete file of features per shard, reused by later jobs."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import closing
from typing import Any

from tqdm import tqdm

from adq_wds.checks import Count, Ratio, no_bar
from adq_wds.embedding import reuse
from adq_wds.embedding.batch import embed_batch
from adq_wds.embedding.settings import Request, check_request
from adq_wds.embedding.shard import ShardJob, finished, open_job, skipped_before, take_batch
from adq_wds.embedding.source import StoredEmbeddings
from adq_wds.embedding.views import embed_views
from adq_wds.engines.threads import in_order
from adq_wds.errors import FeaturesError, shorten
from adq_wds.pipes.base import MAX_BAD_FRACTION, OnError, Tally
from adq_wds.protocols import Encoder
from adq_wds.remote.outputs import lock, make_folder
from adq_wds.remote.url_path import AnyPath
from adq_wds.samples.fields import IMAGE_FIELDS, FieldSpec
from adq_wds.score import Score
from adq_wds.tables.features import Features, file_name
from adq_wds.tables.features_file import FeaturesFile, ShardFeatures
from adq_wds.tables.spans import no_samples

logger = logging.getLogger("adq_wds")


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
    """Embed every sample of some shards: one Parquet file per shard, with labels, texture and the samples' offsets.

    A shard with a complete file of the same settings is not embedded again, so a killed job resumes, and loses at
    most the shards in progress (one per worker). Where only `label` differs, labels are read again from the shards'
    bytes. Then only samples that were bad before are embedded, or all with `logit_grad`, since logit gradients depend
    on the labels.

    Args:
        urls: tar shards, local ones or URLs (these are fetched whole): a pattern (braces, ``::``, stars), a folder, or several of them.
        encoder: a name (``builtin``, ``thumbnail``, any timm name) or an `Encoder`; see `encoder`.
        out: folder for the features, or its URL (``s3://bucket/run/features``); made if missing.
        image: field with the image, alternatives separated by ``;``. Or a function of the sample, identified by its
            name only: when it changes, give it another name, or another `out`. An image that was stored without some
            of its patches is grey there, which is logged once. None or "none" beside `embeddings` for samples without
            images, such as text, which then have no texture; the default where the first shard has no image field and
            no score needs one.
        label: field with the label (``cls``, ``txt``, ``json:label``); "none" for unlabelled data. Or a function, or
            None. Classes are all numbers or all words: the first label of a shard decides, and a sample of the other
            kind is a bad one; two shards of two kinds are an error.
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
        logit_grad: also store the direction of the loss's gradient by the logits, for ``kernel="gradient"`` of a plan:
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
    request = check_request(
        urls, encoder, out, image=image, label=label, embeddings=embeddings, batch_size=batch_size, workers=workers,
        on_error=on_error, max_bad_fraction=max_bad_fraction, limit=limit, scores=scores, logit_grad=bool(logit_grad),
        views=views,
    )  # fmt: skip
    _warn_of_seen_labels(request)
    folder = make_folder(out)
    bar = tqdm(
        total=len(request.paths), unit=" shards", unit_scale=True, desc="embed", disable=no_bar(progress)
    )  # fmt: skip
    with lock(folder), bar:
        run = _Run(request, folder, bar)
        for made in run.features():
            made.save(folder / file_name(made.shard))
        names = [name for name in request.names if name not in run.empty]
        if not names:
            raise no_samples(len(request.paths))
        features = Features(folder, shards=names, limit=limit)
        settings = request.settings
        if settings.views and settings.image is not None and not isinstance(request.source, StoredEmbeddings):
            embed_views(
                features, dict(zip(request.names, request.paths, strict=True)), request.source, views=settings.views,
                image=settings.image, batch_size=settings.batch_size, workers=settings.workers, progress=progress,
            )  # fmt: skip
    return features


def _warn_of_seen_labels(request: Request) -> None:
    """Warn of an encoder that was trained with the labels of these images, since results on them are too good."""
    source: Any = request.source
    if getattr(source, "saw_labels", False) and any("cifar" in name.lower() for name in request.names):
        logger.warning(
            "encoder %s was trained with the labels of %s: for numbers on that set take builtin-free",
            source.name,
            getattr(source, "trained_on", "its set"),
        )


class _Run:
    """One call of `embed_shards` in its folder.

    Attributes:
        empty: names of the shards without samples.
    """

    def __init__(self, request: Request, folder: AnyPath, bar: tqdm[Any]) -> None:
        self._request, self._folder, self._bar = request, folder, bar
        self._tally = Tally("embed", request.settings.on_error, request.settings.max_bad_fraction)
        self._shard_of_kind: dict[bool, str] = {}  # a shard of each kind of labels, by whether they are words
        self._logged: set[str] = set()
        self.empty: list[str] = []

    def features(self) -> Iterator[ShardFeatures]:
        """Embed in threads, and yield each shard's features after its last batch; check the bad samples at the end."""
        settings = self._request.settings
        batches = in_order(
            self._jobs(), lambda job: len(job.samples), embed_batch,
            batch_size=settings.batch_size, workers=settings.workers, name="adq-embed",
        )  # fmt: skip
        with closing(batches):
            for job, rows, batch, is_last in batches:
                take_batch(job, rows, batch, self._tally)
                if batch.has_gaps:
                    self._log_once(
                        logging.WARNING,
                        "images are stored without some of their patches, which encoders and scores see as grey",
                        job.name,
                    )
                self._bar.update(len(rows) / len(job.samples))
                if is_last:
                    made = finished(job)
                    self._check_label_kind(made.shard, made.names, len(made.spans))
                    yield made  # the caller saves it before it asks for the next
                    job.close.close()
        self._tally.close()

    def _jobs(self) -> Iterator[ShardJob]:
        """The shards without a usable file, each opened and scanned in turn."""
        settings, source = self._request.settings, self._request.source
        first, left = 0, settings.limit
        for path, name in zip(self._request.paths, self._request.names, strict=True):
            if left is not None and left <= 0:
                return
            header, file = settings.header(source, first), self._folder / file_name(name)
            old = reuse.earlier_features(path, file, header, left)
            lacks = old is not None and reuse.lacking(old, header)
            if old is not None and not lacks and not reuse.is_stale(old, header):
                n_read = self._pass_over(FeaturesFile(file, limit=left))
            else:
                job = open_job(
                    self._request, path, name, first, left if old is None else reuse.n_wanted(old, left)
                )
                job.old = old
                if old is not None and not lacks and (what := reuse.take_known(job, old, header)):
                    self._log_once(logging.INFO, f"{what}, without embedding again", name)
                n_read = len(job.samples)
                if n_read:
                    yield job
                else:
                    job.close.close()
                    file.unlink(missing_ok=True)  # of when it had some
                    self.empty.append(name)
            first += n_read
            left = None if left is None else left - n_read
        n_rows = source.n_rows if isinstance(source, StoredEmbeddings) and source.by_position else first
        if left is None and n_rows != first:
            raise FeaturesError(
                f"{source.name}: {n_rows:,} rows for {first:,} samples; one row per sample, in order"
            )

    def _pass_over(self, old: FeaturesFile) -> int:
        """Count the samples of reused features, so that a strict job refuses samples that an earlier one skipped."""
        self._check_label_kind(old.shard, old.names, old.n)
        self._tally.good(old.n, old.n)
        for row in old.bad:
            self._tally.failed(skipped_before(row[5], old))
        self._bar.update(1)
        self._bar.unpause()
        return old.n_read

    def _check_label_kind(self, shard: str, names: list[str] | None, n: int) -> None:
        """Raise `FeaturesError` unless classes are all numbers or all words, over all shards so far."""
        if not n:
            return
        self._shard_of_kind.setdefault(names is not None, shard)
        if len(self._shard_of_kind) == 2:
            here, there = ("words", "numbers") if names is not None else ("numbers", "words")
            example = f", such as {shorten(names[0])}" if names else ""
            raise FeaturesError(
                f"shard {shard}: its labels are {here}{example}, those of shard {self._shard_of_kind[names is None]} are "
                f"{there}: classes are all numbers or all words; write them alike, or in a program read them by a function of your own"
            )

    def _log_once(self, level: int, text: str, shard: str) -> None:
        if text not in self._logged:
            self._logged.add(text)
            logger.log(level, "shard %s: %s", shard, text)
