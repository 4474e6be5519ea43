"""Embeds shards, a task each: one complete file of features per shard, reused by later jobs."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

from adq_wds.checks import Count, Ratio, no_bar
from adq_wds.embedding.settings import Request, check_request
from adq_wds.embedding.source import StoredEmbeddings, gpus_of
from adq_wds.embedding.views import embed_views
from adq_wds.embedding.work import EmbedWork
from adq_wds.engines.choose import EngineName, choose_engine, default_workers
from adq_wds.engines.engine import Engine, Resources, Result, Task, ThisProcess
from adq_wds.engines.shared import lock_for
from adq_wds.errors import FeaturesError, SampleError, shorten
from adq_wds.pipes.base import MAX_BAD_FRACTION, OnError, Tally
from adq_wds.protocols import Encoder
from adq_wds.remote.outputs import make_folder
from adq_wds.samples.fields import IMAGE_FIELDS, FieldSpec
from adq_wds.score import Score
from adq_wds.tables.features import Features
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
    engine: EngineName | Engine = "threads",
    address: str | None = None,
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
        workers: threads; as many as cores by default, one for each process of the engines processes and ray. Each
            decodes and embeds whole batches with one intra-op thread, so that results do not depend on their number.
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
        engine: what does the shards: threads of this process, processes of this machine, ray, or shared, which are equal
            commands with one `out`. The files are the same. Only threads take `limit` and embeddings by position.
        address: of the Ray cluster, ``host:port``; by default the one that Ray finds, or this machine alone.

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
        urls, encoder, out, image=image, label=label, embeddings=embeddings, batch_size=batch_size,
        workers=default_workers(engine, workers), on_error=on_error, max_bad_fraction=max_bad_fraction, limit=limit,
        scores=scores, logit_grad=bool(logit_grad), views=views,
    )  # fmt: skip
    _warn_of_seen_labels(request)
    folder = make_folder(out)
    settings, source = request.settings, request.source
    runner = choose_engine(engine, address=address, folder=folder)
    _refuse_order(request, runner)
    bar = tqdm(
        total=len(request.paths), unit=" shards", unit_scale=True, desc="embed", disable=no_bar(progress)
    )  # fmt: skip
    with lock_for(runner, folder, "embed", _identity(request)), bar:
        judge = _Judge(request, bar)
        tasks = [Task(name, path) for name, path in zip(request.names, request.paths, strict=True)]
        resources = Resources(settings.workers, gpus_of(source))
        for task, result in runner.run(tasks, EmbedWork(request, folder, bar.update), resources):
            judge.take(task.name, result)
        judge.close()
        names = [name for name in request.names if name not in judge.empty]
        if not names:
            raise no_samples(len(request.paths))
        features = Features(folder, shards=names, limit=limit)
        if settings.views and settings.image is not None and not isinstance(source, StoredEmbeddings):
            embed_views(
                features, dict(zip(request.names, request.paths, strict=True)), source, views=settings.views,
                image=settings.image, batch_size=settings.batch_size, workers=settings.workers, progress=progress,
                engine=runner,
            )  # fmt: skip
    return features


def _identity(request: Request) -> dict[str, Any]:
    """What equal commands that share a folder have in common."""
    settings = request.settings
    return {
        **settings.header(request.source, 0),
        "shards": request.names,
        "batch_size": settings.batch_size,
        "views": settings.views,
    }


def _refuse_order(request: Request, engine: Engine) -> None:
    """Raise `ValueError` where a shard's task needs the number of samples before it, and tasks run in any order."""
    if isinstance(engine, ThisProcess):
        return
    if request.settings.limit is not None:
        raise ValueError(
            "limit counts samples from the first shard on: leave it out, or use engine='threads'"
        )
    if isinstance(request.source, StoredEmbeddings) and request.source.by_position:
        raise ValueError(
            f"{request.source.name}: its rows are counted from the first shard on: use engine='threads', or a Parquet file with keys"
        )


def _warn_of_seen_labels(request: Request) -> None:
    """Warn of an encoder that was trained with the labels of these images, since results on them are too good."""
    source: Any = request.source
    if getattr(source, "saw_labels", False) and any("cifar" in name.lower() for name in request.names):
        logger.warning(
            "encoder %s was trained with the labels of %s: for numbers on that set take builtin-free",
            source.name,
            getattr(source, "trained_on", "its set"),
        )


class _Judge:
    """Judges the results of shards together, in the shards' order.

    Attributes:
        empty: names of the shards without samples.
    """

    def __init__(self, request: Request, bar: tqdm[Any]) -> None:
        self._request, self._bar = request, bar
        self._tally = Tally("embed", request.settings.on_error, request.settings.max_bad_fraction)
        self._shard_of_kind: dict[bool, str] = {}  # a shard of each kind of labels, by whether they are words
        self._logged: set[str] = set()
        self._results: dict[str, Result] = {}  # of shards that follow one without a result
        self._n_results = self._n_judged = self._n_read = 0
        self.empty: list[str] = []

    def take(self, shard: str, result: Result) -> None:
        """Judge the results that are there up to the first shard without one."""
        self._n_results += 1
        self._bar.update(max(0, self._n_results - self._bar.n))  # other processes show no shares of shards
        if result.get("earlier"):
            self._bar.unpause()
        self._results[shard] = result
        names = self._request.names
        while self._n_judged < len(names) and names[self._n_judged] in self._results:
            name = names[self._n_judged]
            self._judge(name, self._results.pop(name))
            self._n_judged += 1

    def close(self) -> None:
        """Judge the samples of all shards."""
        source, limit = self._request.source, self._request.settings.limit
        n_rows = (
            source.n_rows if isinstance(source, StoredEmbeddings) and source.by_position else self._n_read
        )
        if limit is None and n_rows != self._n_read:
            raise FeaturesError(
                f"{source.name}: {n_rows:,} rows for {self._n_read:,} samples; one row per sample, in order"
            )
        self._tally.close()

    def _judge(self, shard: str, result: Result) -> None:
        self._n_read += result["read"]
        if result.get("empty"):
            self.empty.append(shard)
        if result.get("gaps"):
            self._log_once(
                logging.WARNING,
                "images are stored without some of their patches, which encoders and scores see as grey",
                shard,
            )
        if result.get("note"):
            self._log_once(logging.INFO, f"{result['note']}, without embedding again", shard)
        first = 0  # of the samples that are not counted yet
        for i, text in result.get("bad", ()):
            self._tally.good(i - first, i - first)
            self._tally.failed(SampleError(text))
            first = i + 1
        self._tally.good(result["read"] - first, result["read"] - first)
        if result.get("usable"):
            self._check_label_kind(shard, result["word"])

    def _check_label_kind(self, shard: str, word: str | None) -> None:
        """Raise `FeaturesError` unless classes are all numbers or all words, over all shards so far."""
        self._shard_of_kind.setdefault(word is not None, shard)
        if len(self._shard_of_kind) == 2:
            here, there = ("words", "numbers") if word is not None else ("numbers", "words")
            example = f", such as {shorten(word)}" if word else ""
            raise FeaturesError(
                f"shard {shard}: its labels are {here}{example}, those of shard {self._shard_of_kind[word is None]} are "
                f"{there}: classes are all numbers or all words; write them alike, or in a program read them by a function of your own"
            )

    def _log_once(self, level: int, text: str, shard: str) -> None:
        if text not in self._logged:
            self._logged.add(text)
            logger.log(level, "shard %s: %s", shard, text)
