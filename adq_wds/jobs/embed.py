"""How do shards become features? Decoded and embedded in threads, one file per shard, whole or not at all."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from adq_wds.errors import FeaturesError
from adq_wds.files import lock, make_folder
from adq_wds.jobs.embed_shard import EmbedSettings, ShardJob, embed_all, open_job, source_stamp
from adq_wds.models.stored import StoredEmbeddings, open_embeddings
from adq_wds.pipe import MAX_BAD_FRACTION, OnError
from adq_wds.registry import encoder as named_encoder
from adq_wds.sample import IMAGE_FIELDS, Encoder, FieldSpec
from adq_wds.shards import check_shard_name, expand_urls, shard_names
from adq_wds.tables.features import Features, FeaturesFile, file_name
from adq_wds.tables.spans import Spans
from adq_wds.tar import iter_spans, open_shard, payload_crc32

logger = logging.getLogger("adq_wds")


def embed_shards(
    urls: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    encoder: str | Encoder = "thumbnail",
    out: str | os.PathLike[str] = "features",
    *,
    image: FieldSpec = IMAGE_FIELDS,
    label: FieldSpec | None = "cls",
    embeddings: str | os.PathLike[str] | None = None,
    batch_size: int = 64,
    workers: int | None = None,
    on_error: OnError = "raise",
    max_bad_fraction: float = MAX_BAD_FRACTION,
    limit: int | None = None,
    progress: bool | None = None,
) -> Features:
    """Embed every sample of some shards: one Parquet file per shard, with labels, texture and where samples lie.

    Shards whose file is there, complete and made with the same settings are not embedded again, so a job that was
    killed goes on where it was, and loses at most the shards it was working on (one per worker).

    Args:
        urls: local tar shards: a pattern (braces, ``::``, stars), a folder, or several of them.
        encoder: a name (``thumbnail``, any timm name) or an `Encoder`; see `encoder`.
        out: folder for the features; made if missing.
        image: field with the image, alternatives separated by ``;``, or a function of the sample.
        label: field with the label (``cls``, ``txt``, ``json:label``), a function, or None for unlabelled data.
        embeddings: a Parquet file (columns key, embedding) or .npy file with embeddings made elsewhere,
            instead of an encoder.
        batch_size: images per call of the encoder; batches are cut inside a shard.
        workers: threads, each decoding and embedding whole batches with one intra-op thread, so that results
            do not depend on their number. As many as cores by default.
        on_error: what to do with a bad sample: "raise", "skip" or a function. Skipped samples are listed in
            the file and never kept by a plan.
        max_bad_fraction: more than this in a shard is an error even so.
        limit: only the first samples, this many, over all shards.
        progress: show a bar; only on a terminal by default.

    Returns:
        the features of these shards, opened.

    Raises:
        ValueError: an argument is out of range, or nothing matches `urls`.
        ShardError, SampleError: damaged data, with shard and key.
        AdqError: the folder cannot be written, or another job works in it.
    """
    settings = EmbedSettings(image, label, _positive("batch_size", batch_size), on_error, max_bad_fraction)
    n_workers = _positive("workers", cores() if workers is None else workers)
    left = None if limit is None else _positive("limit", limit)
    paths = expand_urls(urls)
    names = [check_shard_name(name) for name in shard_names(paths)]
    source = open_embeddings(embeddings) if embeddings is not None else named_encoder(encoder)
    folder = make_folder(out)
    with lock(folder), ExitStack() as stack:
        bar = stack.enter_context(_Bar(paths, progress))
        todo = _shards_to_do(paths, names, folder, settings, source, left, bar)
        for features in embed_all(todo, settings, source, n_workers, bar.update):
            features.save(folder / file_name(features.shard))
    return Features(folder, shards=names, limit=limit)


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _positive(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
    return int(value)


def _shards_to_do(
    paths: list[str],
    names: list[str],
    folder: Path,
    settings: EmbedSettings,
    source: Encoder | StoredEmbeddings,
    left: int | None,
    bar: _Bar,
) -> Iterator[ShardJob]:
    """The shards that have no usable file yet, each opened and scanned when its turn comes."""
    first = 0
    for path, name in zip(paths, names, strict=True):
        if left is not None and left <= 0:
            return
        n_read = _already_done(path, folder / file_name(name), settings.header(source), left)
        if n_read is None:
            job = open_job(path, name, settings, first, left)
            n_read = len(job.spans)
            yield job
        else:
            bar.skip(path, n_read)
        first += n_read
        left = None if left is None else left - n_read
    if isinstance(source, StoredEmbeddings) and left is None and source.n_rows != first and source.positional:
        raise FeaturesError(
            f"{source.name}: {source.n_rows:,} rows for {first:,} samples; one row per sample, in order"
        )


def _already_done(path: str, file: Path, header: dict[str, Any], left: int | None) -> int | None:
    """Samples in a features file that need not be made again, or None."""
    if not file.exists():
        return None
    try:
        old = FeaturesFile(file)
    except FeaturesError as error:
        logger.warning("%s; embedding the shard again", error)
        return None
    differs = [name for name, value in header.items() if old.header.get(name) != value]
    if differs:
        raise FeaturesError(
            f"{file} was made with {differs[0]} {old.header.get(differs[0])!r}, now {header[differs[0]]!r}: "
            "give another folder, or remove the old features"
        )
    enough = old.header["complete"] or (left is not None and old.n_read >= left)
    stamp = source_stamp(path)
    if not enough or old.header["source"]["bytes"] != stamp["bytes"]:
        return None
    if old.header["source"] != stamp and not _same_samples(path, old):
        return None
    return old.n_read if left is None else min(left, old.n_read)


def _same_samples(path: str, old: FeaturesFile) -> bool:
    """Does a shard whose date changed still hold what was embedded? Decided by its checksums."""
    spans = Spans.joined([old.spans(), old.bad_spans()])
    spans = spans.take(np.argsort(spans.index, kind="stable"))
    with open_shard(path) as buffer:
        found = [
            (span.key, span.byte_offset, span.n_bytes, payload_crc32(buffer, span))
            for span in iter_spans(buffer, shard=old.shard)
        ]
    return found[: len(spans)] == [row[1:] for row in spans.rows()]


class _Bar:
    """A progress bar over samples; their total is estimated from the bytes of the shards still to come."""

    def __init__(self, paths: list[str], progress: bool | None) -> None:
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
            self._bar.total = round((self._bar.n + n) * self._all / self._bytes)
        self._bar.update(n)

    def skip(self, path: str, n: int) -> None:
        """A shard that was done before."""
        self.update(path, n, n)
        self._bar.unpause()
