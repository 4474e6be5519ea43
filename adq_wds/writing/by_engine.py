"""Writes what a plan keeps by the tasks of an engine: each is one new shard, whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tqdm import tqdm

from adq_wds.checks import no_bar
from adq_wds.engines.engine import Engine, Resources, Result, Task, Work
from adq_wds.errors import PlanError
from adq_wds.remote.url_path import AnyPath, as_path
from adq_wds.tables.index import read_index, save_index
from adq_wds.tables.spans import Spans, scan_spans
from adq_wds.writing.kept import Kept, Run, runs_of
from adq_wds.writing.tars import ShardPattern, WrittenShard, write_tar
from adq_wds.writing.unfinished import Unfinished


@dataclass(frozen=True)
class WriteRuns:
    """Work: writes each `Run` of kept samples to its shard, and the shard's index, read back."""

    kept: Kept
    unfinished: Unfinished

    def __call__(self, tasks: Iterator[Task]) -> Iterator[tuple[Task, Result]]:
        """Do the tasks in their order."""
        for task in tasks:
            path = as_path(task.what.path)
            if not (path.exists() and _index(self.unfinished, task.name).exists()):
                self.unfinished.check()
                self._write(path, task.what)
            yield task, {"bytes": path.stat().st_size}

    def _write(self, path: AnyPath, run: Run) -> None:
        written = write_tar(path, self.kept.samples(run.first, run.stop))
        if written.payload_bytes != run.payload_bytes:
            raise PlanError(
                f"shard {path.name}: {written.payload_bytes:,} bytes of payload, and by the plan's column members "
                f"{run.payload_bytes:,}: plan again"
            )
        index_shard(self.unfinished, path)


def write_runs(
    kept: Kept,
    pattern: ShardPattern,
    unfinished: Unfinished,
    engine: Engine,
    *,
    max_samples: int,
    max_bytes: int,
    progress: bool | None,
) -> tuple[list[WrittenShard], list[Spans]]:
    """Write the kept samples to new shards; those that are written already are passed over.

    Args:
        kept: the samples, its plan in a file.
        pattern: of the new shards.
        unfinished: where each shard's index stays until all are written.
        engine: runs the tasks.
        max_samples, max_bytes: of a shard.
        progress: show a bar.

    Returns:
        the shards, and the spans of each.
    """
    tasks = runs_of(kept, pattern, max_samples=max_samples, max_bytes=max_bytes)
    run_tasks(engine, tasks, WriteRuns(kept, unfinished), "write", progress)
    written = [
        WrittenShard(pattern.folder / task.name, task.what.stop - task.what.first, task.what.payload_bytes)
        for task in tasks
    ]
    return written, [spans_of(unfinished, task.name) for task in tasks]


def run_tasks(
    engine: Engine, tasks: Sequence[Task], work: Work, name: str, progress: bool | None
) -> dict[str, Result]:
    """The result of each task, by the task's name; a bar of that name counts the samples of their runs."""
    n_samples = {task.name: task.what.stop - task.what.first for task in tasks}
    results = {}
    with tqdm(
        total=sum(n_samples.values()), unit=" samples", desc=name, disable=no_bar(progress)
    ) as bar:  # fmt: skip
        for task, result in engine.run(tasks, work, Resources()):
            results[task.name] = result
            bar.update(n_samples[task.name])
    return results


def index_shard(unfinished: Unfinished, path: AnyPath) -> None:
    """Read a new shard back, and write its index to the folder of unfinished work."""
    save_index(_index(unfinished, path.name), [(path.name, scan_spans(path, shard=path.name))])


def spans_of(unfinished: Unfinished, shard: str) -> Spans:
    """The spans of a new shard, by its index."""
    return read_index(_index(unfinished, shard))[shard].spans


def _index(unfinished: Unfinished, shard: str) -> AnyPath:
    return unfinished.folder / f"{shard}.parquet"
