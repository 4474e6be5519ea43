"""Embeds shards as tasks: what one process does, by threads; its results are judged by the process of the job."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

from adq_wds.embedding import reuse
from adq_wds.embedding.batch import embed_batch
from adq_wds.embedding.settings import Request
from adq_wds.embedding.shard import ShardJob, finished, open_job, skipped_before, take_batch
from adq_wds.engines.engine import Result, Task
from adq_wds.engines.threads import in_order
from adq_wds.errors import AdqError, SampleError
from adq_wds.pipes.base import MAX_BAD_IN_A_ROW
from adq_wds.remote.url_path import AnyPath
from adq_wds.tables.features import file_name
from adq_wds.tables.features_file import FeaturesFile, ShardFeatures

Progress = Callable[[float], object]


def _silent(shards: float) -> None:
    pass


@dataclass
class _Bad:
    """The bad samples of a shard: texts for the job's judgement, or the first as an error where none may be skipped."""

    raises: bool
    texts: list[str] = field(default_factory=list)
    in_a_row: int = 0

    def good(self, n_read: int, n_kept: int) -> None:
        self.in_a_row = 0

    def failed(self, error: AdqError) -> None:
        if self.raises or not isinstance(error, SampleError):
            raise error
        self.texts.append(str(error))
        self.in_a_row += 1
        if self.in_a_row >= MAX_BAD_IN_A_ROW:
            raise SampleError(f"{self.in_a_row} bad samples in a row; the last: {error}") from error


class EmbedWork:
    """Tasks that name a shard's path, to files of features.

    Args:
        request: what is asked; its shards are the tasks'.
        folder: of the features.
        progress: called with shares of shards as they are embedded; other processes' copies call nothing.
    """

    def __init__(self, request: Request, folder: AnyPath, progress: Progress = _silent) -> None:
        self._request = replace(request, paths=[], names=[])
        self._folder, self._progress = folder, progress

    def __getstate__(self) -> dict[str, Any]:
        """For other processes: only the job's own process asks a function `on_error`."""
        settings = self._request.settings
        on_error = "skip" if callable(settings.on_error) else settings.on_error
        request = replace(self._request, settings=replace(settings, on_error=on_error))
        return {"_request": request, "_folder": self._folder, "_progress": _silent}

    def __call__(self, tasks: Iterator[Task]) -> Iterator[tuple[Task, Result]]:
        """Embed in threads; a shard's file is saved after its last batch."""
        settings = self._request.settings
        passed: deque[tuple[Task, Result]] = deque()
        bad: dict[str, _Bad] = {}
        task_of: dict[str, Task] = {}

        def jobs() -> Iterator[ShardJob]:
            first, left = 0, settings.limit
            for task in tasks:
                job, result = self._open(task, first, left)
                if job is None:
                    passed.append((task, result))
                else:
                    bad[job.name], task_of[job.name] = _Bad(settings.on_error == "raise"), task
                    yield job
                n_read = result["read"] if job is None else len(job.samples)
                first += n_read
                left = None if left is None else left - n_read

        batches = in_order(
            jobs(), lambda job: len(job.samples), embed_batch,
            batch_size=settings.batch_size, workers=settings.workers, name="adq-embed",
        )  # fmt: skip
        with closing(batches):
            for job, rows, batch, is_last in batches:
                while passed:
                    yield passed.popleft()
                take_batch(job, rows, batch, bad[job.name])
                self._progress(len(rows) / len(job.samples))
                job.has_gaps |= batch.has_gaps
                if is_last:
                    made = finished(job)
                    made.save(self._folder / file_name(made.shard))
                    job.close.close()
                    yield task_of.pop(job.name), _result_of(job, made, bad.pop(job.name).texts)
        yield from passed

    def _open(self, task: Task, first: int, left: int | None) -> tuple[ShardJob | None, Result]:
        """A shard to be embedded; or no job, and the result of a shard that needs none."""
        if left is not None and left <= 0:
            return None, {"read": 0}
        path, name, source = task.what, task.name, self._request.source
        header, file = self._request.settings.header(source, first), self._folder / file_name(name)
        old = reuse.earlier_features(path, file, header, left)
        lacks = old is not None and reuse.lacking(old, header)
        if old is not None and not lacks and not reuse.is_stale(old, header):
            self._progress(1)
            return None, _result_of_earlier(FeaturesFile(file, limit=left))
        job = open_job(self._request, path, name, first, left if old is None else reuse.n_wanted(old, left))
        job.old = old
        if old is not None and not lacks:
            job.note = reuse.take_known(job, old, header)
        if job.samples:
            return job, {}
        job.close.close()
        file.unlink(missing_ok=True)  # of when it had some
        self._progress(1)
        return None, {"read": 0, "empty": True}


def _result_of(job: ShardJob, made: ShardFeatures, texts: list[str]) -> Result:
    result: Result = {"read": len(job.samples), "usable": len(made.spans)}
    result["bad"] = [[i, text] for (i, _), text in zip(job.bad, texts, strict=True)]
    return result | {"word": _word(made.names), "gaps": job.has_gaps, "note": job.note}


def _result_of_earlier(old: FeaturesFile) -> Result:
    """Its skipped samples are listed too, so that a strict job refuses them."""
    bad = [[row[0], str(skipped_before(row[5], old))] for row in old.bad]
    return {"read": old.n_read, "usable": old.n, "bad": bad, "word": _word(old.names), "earlier": True}


def _word(names: list[str] | None) -> str | None:
    """An example of the labels where they are words."""
    return None if names is None else (names or [""])[0]
