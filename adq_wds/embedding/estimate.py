"""What will a run take? Samples, bytes, memory and time, told before it starts."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from adq_wds.checks import positive
from adq_wds.embedding.batch import texture_of
from adq_wds.embedding.embed_shards import (
    names_of_features,
    refuse_no_image,
    refuse_views,
    without_images,
)
from adq_wds.embedding.logit_grad import no_logits
from adq_wds.embedding.shard import EmbedSettings
from adq_wds.embedding.stored import StoredEmbeddings, open_embeddings
from adq_wds.embedding.stored_field import FieldEmbeddings
from adq_wds.engines.threads import cores
from adq_wds.errors import AdqError, SampleError
from adq_wds.pipes.base import OnError
from adq_wds.protocols import Encoder
from adq_wds.registry import score as named_score
from adq_wds.remote.open_shard import open_shard
from adq_wds.samples.fields import IMAGE_FIELDS, FieldSpec, content_digest
from adq_wds.samples.label import read_label
from adq_wds.samples.whole_image import whole_image
from adq_wds.shards.names import base_name, expand_urls, is_url
from adq_wds.shards.samples_in_tar import iter_spans, read_sample
from adq_wds.tables.features_file import DIGEST_BYTES
from adq_wds.tables.spans import no_samples, source_stamp, warn_empty

_TRIED = 64  # samples that are really embedded, to time them


def estimate(
    urls: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    encoder: Encoder,
    *,
    image: FieldSpec | None = IMAGE_FIELDS,
    label: FieldSpec | None = "cls",
    embeddings: str | os.PathLike[str] | None = None,
    batch_size: int = 64,
    workers: int | None = None,
    on_error: OnError = "raise",
    limit: int | None = None,
    scores: Sequence[str] = (),
    logit_grad: bool = False,
    views: int = 0,
    plan: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Walk the headers of all shards and embed a few samples; write nothing. Remote shards are fetched until there are
    enough samples to embed; for the others the number of theirs is an estimate.

    Returns:
        shards, samples, bytes of the shards, bytes of the features, seconds for embedding with views (on this machine,
        from at most 64 samples), and with `plan` the samples kept and bytes of memory for binning, for classes of equal size.
    """
    if embeddings is None:
        refuse_no_image(image)
    settings = EmbedSettings(
        None if image == "none" else image, label, positive("batch_size", batch_size), on_error, 0.0,
        logit_grad, tuple(map(named_score, scores)),
    )  # fmt: skip
    if embeddings is not None:
        refuse_views(views)
    paths = expand_urls(urls)
    names = names_of_features(paths)  # speaks now of names that cannot be
    if embeddings is not None:
        settings = without_images(settings, paths, names)
    n_workers = positive("workers", cores() if workers is None else workers)
    n_wanted = None if limit is None else positive("limit", limit)
    counts: list[int] = []
    tried, labels = 0, set()
    spent = 0.0
    n_classes = 0
    stored = None if embeddings is None else open_embeddings(embeddings)
    width = stored.width if isinstance(stored, StoredEmbeddings) else 0
    sizes = [source_stamp(path)["bytes"] for path in paths]
    n_walked = 0
    for path, size in zip(paths, sizes, strict=True):
        if (
            is_url(path) and tried == _TRIED
        ):  # not fetched for an estimate: as many samples for its bytes as so far
            counts.append(round(size * sum(counts) / max(1, n_walked)))
            n_walked += size
            continue
        n_walked += size
        with open_shard(path) as buffer:
            spans = list(iter_spans(buffer, shard=base_name(path)))
            samples = [read_sample(buffer, span, url=path) for span in spans[: _TRIED - tried]]
        before = time.perf_counter()
        if samples:
            images = []
            for sample in samples:
                try:
                    labels.add(read_label(sample, label))
                    if isinstance(stored, FieldEmbeddings):
                        width = len(stored.row(sample))
                    content_digest(sample, settings.image)
                    if settings.image is not None:
                        images.append(whole_image(sample, settings.image)[1])
                except SampleError:
                    if on_error == "raise":
                        raise
            texture_of(images)
            if embeddings is None:
                width, n_classes = _embed(encoder, images, batch_size)
        tried += len(samples)
        spent += time.perf_counter() - before
        if not spans:
            warn_empty(base_name(path))
        counts.append(len(spans))
    if not sum(counts):
        raise no_samples(len(paths))
    if logit_grad and tried and not n_classes:
        raise AdqError(no_logits(encoder.name if embeddings is None else str(embeddings)))
    n = sum(counts) if n_wanted is None else min(n_wanted, sum(counts))
    n_views = min(positive("views", views), n) if views else 0
    row_bytes = width * 2 + 64 + DIGEST_BYTES + 4 * len(scores) + (2 * n_classes if logit_grad else 0)
    said: dict[str, Any] = {
        "shards": len(paths),
        "samples": n,
        "shard_bytes": sum(sizes),
        "features_bytes": n * row_bytes + n_views * (width * 4 + 64),
        "embed_seconds": round((n + 2 * n_views) * spent / max(1, tried) / n_workers, 1),
    }
    if plan is not None:
        largest = -(-n // max(1, len(labels)))
        matrix = largest * largest * 8
        said["kept"] = round(plan["keep"] * n)
        columns = width + (n_classes if plan.get("kernel") == "gradient" else 0)
        said["plan_memory_bytes"] = largest * columns * 10 + min(matrix, plan["memory_bytes"])
        said["classes_seen"] = len(labels)
    return said


def _embed(encoder: Encoder, images: list[Image.Image], batch_size: int) -> tuple[int, int]:
    """Embed images for the time it takes; gives D, and C (0 without a head)."""
    width = n_classes = 0
    try:
        for start in range(0, len(images), batch_size):
            h, logits = encoder(images[start : start + batch_size])
            width = int(np.asarray(h).shape[1])
            n_classes = 0 if logits is None else int(np.asarray(logits).shape[1])
    except Exception as error:
        raise AdqError(f"encoder {encoder.name!r} fails: {type(error).__name__}: {error}") from error
    return width, n_classes
