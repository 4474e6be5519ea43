"""Writes images anew by the tasks of an engine: those of each source shard to a tar of its own.

How large a new image is shows only when it is made, and bad samples are left out: so where shards are cut is not known
beforehand. The tars are cut as any other samples are, by `write_runs`, and then removed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np

from adq_wds.engines.engine import Engine, Result, Task
from adq_wds.errors import AdqError, SampleError
from adq_wds.files import canonical_json
from adq_wds.pipes.base import Tally
from adq_wds.remote.outputs import write_text
from adq_wds.tables.plan import Plan
from adq_wds.tables.plan_header import header_without_bins
from adq_wds.tables.plan_rows import PlanShard
from adq_wds.writing.by_engine import index_shard, run_tasks, spans_of
from adq_wds.writing.kept import Kept, Run
from adq_wds.writing.smaller import MEASURED, Counted, WriteAnew, made_anew, written_anew
from adq_wds.writing.tars import write_tar
from adq_wds.writing.unfinished import Unfinished


class _BadSamples(Tally):
    """Notes the bad samples of one source shard: whether they are too many shows only when all are counted.

    Attributes:
        each: position and error.
    """

    def __init__(self, *, strict: bool) -> None:
        super().__init__("write", "raise" if strict else "skip")
        self.each: list[tuple[int, str]] = []

    def failed(self, error: AdqError) -> None:
        """Note a bad sample, or raise."""
        if self.on_error == "raise" or not isinstance(error, SampleError):
            raise error
        self.each.append((self.read, str(error)))
        self.read += 1

    def close(self, *, whole: bool = True) -> None:
        """Do nothing."""


@dataclass(frozen=True)
class MakeAnew:
    """Work: writes the new images of a `Run` of kept samples to a tar, its index, and its counts.

    The counts are the result: ``read``, samples; ``bad``, position and error of each bad one; ``samples`` and ``parts``
    as in `Counted`.
    """

    kept: Kept
    new: WriteAnew
    unfinished: Unfinished
    strict: bool

    def __call__(self, tasks: Iterator[Task]) -> Iterator[tuple[Task, Result]]:
        """Do the tasks in their order."""
        for task in tasks:
            counts = self.unfinished.folder / f"{task.name}.json"
            if not counts.exists():
                self.unfinished.check()
                write_text(counts, canonical_json(self._make(task.name, task.what)))
            yield task, json.loads(counts.read_text(encoding="utf-8"))

    def _make(self, name: str, run: Run) -> Result:
        bad, counted, path = _BadSamples(strict=self.strict), Counted(), self.unfinished.folder / name
        samples = self.kept.with_cells(self.kept.samples(run.first, run.stop), run.first, run.stop)
        made = made_anew(samples, self.new, counted, bad)
        if first := list(islice(made, 1)):
            write_tar(path, chain(first, made))
            index_shard(self.unfinished, path)
        return {"read": bad.read, "bad": bad.each, "samples": counted.samples, "parts": counted.parts}


def check_growth(kept: Kept, new: WriteAnew, *, strict: bool) -> None:
    """Refuse files that would grow, by the first samples, before anything is written; raises as `written_anew`."""
    n = min(kept.plan.n_kept, 2 * MEASURED)
    written_anew(kept.with_cells(kept.samples(0, n), 0, n), new, Counted(), _BadSamples(strict=strict))


def make_anew(
    kept: Kept,
    new: WriteAnew,
    unfinished: Unfinished,
    engine: Engine,
    *,
    tally: Tally,
    counted: Counted,
    progress: bool | None,
) -> Kept:
    """The kept samples with new images, out of a tar for each source shard.

    Args:
        kept: the samples, its plan in a file.
        new: how images are stored.
        unfinished: the folder for the tars.
        engine: runs the tasks.
        tally, counted: get what one process would count.
        progress: show a bar.

    Raises:
        SampleError: a bad image, or too many.
    """
    tasks, first = [], 0
    for i, n in enumerate(kept.plan.shard_kept.tolist()):
        stop = first + n
        if stop > first:
            tasks.append(Task(f"images-{i:09d}.tar", Run("", first, stop)))
        first = stop
    results = run_tasks(
        engine, tasks, MakeAnew(kept, new, unfinished, tally.on_error == "raise"), "images", progress
    )
    for task in tasks:
        _count(results[task.name], tally, counted)
    tally.close()
    made = [task.name for task in tasks if results[task.name]["samples"]]
    spans = ((name, spans_of(unfinished, name)) for name in made)
    rows = (PlanShard.chosen(name, each, np.ones(len(each), bool)) for name, each in spans)
    plan = Plan.from_shards(rows, header_without_bins({"source": "keys"}))
    paths = tuple(os.fspath(unfinished.folder / name) for name in made)
    return Kept(paths, plan).on_disk(unfinished.folder / "images.parquet")


def _count(result: Result, tally: Tally, counted: Counted) -> None:
    """Count the samples of a task in their order, as one stream would."""
    done = 0
    for position, text in result["bad"]:
        tally.good(position - done, position - done)
        tally.failed(SampleError(text))
        done = position + 1
    tally.good(result["read"] - done, result["read"] - done)
    counted.samples += result["samples"]
    for part, stages in result["parts"].items():
        for stage, n_bytes in stages.items():
            counted.parts[part][stage] += n_bytes
