"""Estimates the samples, bytes, memory and time of a job before it starts."""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Iterable
from typing import Any

from adq_wds.embedding.batch import embed_batch
from adq_wds.embedding.embed_shards import embed_shards
from adq_wds.embedding.settings import Request, check_request
from adq_wds.embedding.shard import open_job, take_batch
from adq_wds.pipes.base import Tally
from adq_wds.protocols import Encoder, Label
from adq_wds.shards.names import is_url
from adq_wds.shards.samples_in_tar import iter_spans
from adq_wds.tables.features_file import DIGEST_BYTES
from adq_wds.tables.spans import no_samples, source_stamp

_TRIED = 64  # samples that are really embedded, to time them


def estimate(
    urls: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    encoder: Encoder,
    *,
    plan: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Walk the headers of all shards and embed a few samples; write nothing. Remote shards are fetched until there are
    enough samples to embed; for the others the number of theirs is an estimate.

    Args:
        urls, encoder, options: as `embed_shards` takes them, but `progress`.
        plan: arguments of `build_plan`.

    Returns:
        shards, samples, bytes of the shards, bytes of the features, seconds for embedding with views (on this machine,
        from at most 64 samples), and with `plan` the samples kept and bytes of memory for binning, for classes of equal size.
    """
    usual = {name: each.default for name, each in inspect.signature(embed_shards).parameters.items()}
    usual = {
        name: usual[name]
        for name in usual.keys() - {"urls", "encoder", "out", "progress", "engine", "address"}
    }
    request = check_request(urls, encoder, **(usual | options))
    settings, trial = request.settings, _Trial(request)
    sizes = [source_stamp(path)["bytes"] for path in request.paths]
    counts: list[int] = []
    n_walked = 0
    for path, name, size in zip(request.paths, request.names, sizes, strict=True):
        if is_url(path) and trial.n == _TRIED:  # not fetched: as many samples for its bytes as so far
            counts.append(round(size * sum(counts) / max(1, n_walked)))
        else:
            counts.append(trial.walk(path, name, sum(counts)))
        n_walked += size
    if not sum(counts):
        raise no_samples(len(request.paths))
    n = min(settings.limit or sum(counts), sum(counts))
    n_views = min(settings.views, n)
    row_bytes = 2 * (trial.width + trial.n_classes) + 64 + DIGEST_BYTES + 4 * len(settings.scores)
    result: dict[str, Any] = {
        "shards": len(request.paths),
        "samples": n,
        "shard_bytes": sum(sizes),
        "features_bytes": n * row_bytes + n_views * (trial.width * 4 + 64),
        "embed_seconds": round((n + 2 * n_views) * trial.seconds / max(1, trial.n) / settings.workers, 1),
    }
    if plan is not None:
        largest = -(-n // max(1, len(trial.labels)))
        matrix = largest * largest * 8
        columns = trial.width + trial.n_classes
        result["kept"] = round(plan["keep"] * n)
        result["plan_memory_bytes"] = largest * columns * 10 + min(matrix, plan["memory_bytes"])
        result["classes_seen"] = len(trial.labels)
    return result


class _Trial:
    """Times the embedding of the first samples of some shards, at most `_TRIED`."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._tally = Tally("embed", request.settings.on_error, 1.0)
        self.n, self.seconds, self.labels = 0, 0.0, set[Label]()
        self.width = self.n_classes = 0  # D; C where logit gradients are requested

    def walk(self, path: str, name: str, first: int) -> int:
        """Count a shard's samples and embed some; `first` is the position of its first one."""
        job = open_job(self._request, path, name, first, _TRIED - self.n)
        n, size = len(job.samples), self._request.settings.batch_size
        with job.close:
            before = time.perf_counter()
            for i in range(0, n, size):
                rows = range(i, min(i + size, n))
                take_batch(job, rows, embed_batch(job, rows), self._tally)
            self.seconds += time.perf_counter() - before
            self.n += n
            self.labels |= set(job.labels.values())
            for columns in job.parts[:1]:
                self.width = columns["embedding"].shape[1]
                self.n_classes = columns["logit_grad"].shape[1] if "logit_grad" in columns else 0
            return n if job.complete else sum(1 for _ in iter_spans(job.buffer, shard=name))
