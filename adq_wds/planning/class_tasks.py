"""Runs the tasks of a plan, one for each class or for some small ones, on any engine."""

from __future__ import annotations

import hashlib
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from adq_wds.engines.engine import Engine, Resources, Result, Task, ThisProcess
from adq_wds.engines.shared import Shared, once
from adq_wds.errors import AdqError, FeaturesError, shorten
from adq_wds.files import atomic_path, canonical_json, make_folder, sha256_text
from adq_wds.planning.buckets import Buckets, Column, DiskRows
from adq_wds.tables.features import Features

Arrays = dict[str, NDArray[Any]]
Made = TypeVar("Made")

_PREFIX = ".adq-scratch-"
_TASK_ROWS = 4096  # classes are taken together up to so many rows: a task then takes far longer than its file
_FORMAT = 1  # of the scratch files; another number where an equal job would make others


class ClassJob(Protocol):
    """What is done with the rows of a class; pickled for other processes."""

    def of_class(self, rows: Mapping[str, DiskRows], progress: Callable[[int], object]) -> Arrays:
        """The result for one class.

        Args:
            rows: its columns.
            progress: called with the number of rows done since its last call; they sum to its rows.
        """

    def joined(self, parts: Sequence[Arrays]) -> Arrays:
        """The results of the classes of one task as one."""


@dataclass
class Workplace:
    """Who does the tasks of a plan, and where its scratch files lie.

    Attributes:
        engine: runs the tasks.
        folder: that all processes of the engine see; the system's temporary folder when None.
        made: scratch folders that this command has made or come to; with the engine `shared` others may still read them.
    """

    engine: Engine = field(default_factory=ThisProcess)
    folder: Path | None = None
    made: list[Path] = field(default_factory=list)

    @property
    def is_shared(self) -> bool:
        """Whether other commands do the same job."""
        return isinstance(self.engine, Shared)

    @property
    def is_durable(self) -> bool:
        """Whether a later job, or another command, may go on with the scratch files."""
        return self.folder is not None

    def finish(self, make: Callable[[], Made], save: Callable[[Made], object]) -> Made | None:
        """Make and save the result of a job, and remove its scratch files; None where another command did meanwhile.

        With the engine `shared` one command saves, for which the others wait: they see by the scratch files, which are
        gone then, that it has.
        """
        try:
            made = make()
        except (AdqError, OSError):
            if not self._ended_elsewhere():
                raise
            result = None
        else:
            result = made

            def end() -> None:
                save(made)
                self._clear()

            self.once("save", self._ended_elsewhere, end)
        self._clear()  # also what was made after another had ended the job
        return result

    def _ended_elsewhere(self) -> bool:
        return self.is_shared and any(not folder.exists() for folder in self.made)

    def once(self, name: str, is_done: Callable[[], bool], do: Callable[[], None]) -> None:
        """Do something in one command, for which others of the job wait."""

        def work() -> None:
            if not is_done():
                do()

        once(self.engine, name, work)

    @contextmanager
    def scratch(self, name: str, key: str) -> Iterator[Path]:
        """The folder of a job's scratch files, removed when the block succeeds or fails.

        After a kill they stay, and an equal job finds them again.

        With the engine `shared` it stays until the job's end, since other commands may read it.
        """
        if self.folder is None:
            with tempfile.TemporaryDirectory(prefix=f"adq-{name}-") as temporary:
                yield Path(temporary)
            return
        folder = self.folder / f"{_PREFIX}{name}-{key}"
        if not self.is_shared:
            self._clear(but=folder)  # those of a killed job
        make_folder(folder)
        self.made.append(folder)
        try:
            yield folder
        except AdqError:
            if not self.is_shared:
                self._clear()
            raise
        if not self.is_shared:
            self._clear()

    def _clear(self, *, but: Path | None = None) -> None:
        """Remove all scratch folders, since the lock of the folder keeps other jobs out: also those of killed ones."""
        for folder in () if self.folder is None else list(self.folder.glob(f"{_PREFIX}*")):
            if folder != but:
                gone = folder.with_name(f"{folder.name}-{secrets.token_hex(4)}")
                with suppress(OSError):
                    folder.rename(gone)  # at once: by it another command sees that the job has ended
                shutil.rmtree(gone, ignore_errors=True)
        self.made.clear()


@dataclass(frozen=True)
class ClassPart:
    """The rows of one class in the scratch file: `name` is the class as users know it."""

    name: str
    start: int
    end: int


@dataclass(frozen=True)
class ClassWork:
    """The work of an engine: makes the file of each task's classes, whole or not at all.

    A task whose file is there is passed over. The file lies beside the rows, under the task's name.
    """

    job: ClassJob
    buckets: Buckets
    durable: bool = True
    progress: Callable[[int], object] | None = None

    def __call__(self, tasks: Iterator[Task]) -> Iterator[tuple[Task, Result]]:
        for task in tasks:
            file = file_of(self.buckets.path.parent, task)
            if not file.exists():
                arrays = self.job.joined([self._of_class(part) for part in task.what])
                with atomic_path(file, durable=self.durable) as partial:
                    save_file(
                        {name: np.ascontiguousarray(values) for name, values in arrays.items()}, partial
                    )
            yield task, {"rows": sum(part.end - part.start for part in task.what)}

    def _of_class(self, part: ClassPart) -> Arrays:
        try:
            rows = self.buckets.rows(part.start, part.end)
            return self.job.of_class(rows, self.progress or (lambda n: None))
        except (AdqError, MemoryError, OSError) as error:
            what = "not enough memory" if isinstance(error, MemoryError) else str(error)
            raise FeaturesError(
                f"class {shorten(part.name)} of {part.end - part.start:,} samples: {what}"
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "progress": None}  # a bar is one process' own


def run_classes(
    place: Workplace,
    name: str,
    job: ClassJob,
    *,
    features: Features,
    label: NDArray[np.int32],
    classes: Sequence[int],
    names: Sequence[str] | None,
    columns: Sequence[Column],
    depends: Any,
    progress: Callable[[int], object] = lambda n: None,
) -> Iterator[tuple[NDArray[np.int64], Arrays]]:
    """Do a job with the rows of each class; at most one shard or one class is in a process' memory.

    The rows are sorted by class into a scratch file, then each task makes a small file of its own, and this process
    reads these. A job that was killed goes on where it was; its scratch files go with its end.

    Args:
        place: engine and folder.
        name: of the job, for its folder.
        job: what is done.
        features: the set.
        label: (N,) int32, class of each row; rows of other classes are skipped.
        classes: those wanted, ascending.
        names: of the classes, where labels are strings.
        columns: what the job needs.
        depends: all that its results depend on beside features and labels, as JSON has it.
        progress: called with numbers of rows that sum to N while they are sorted, and to those of `classes` after.

    Yields:
        for one task after another, in the order of classes: (n,) int64 positions of its rows in the set, class by
        class and ascending in each; and the job's arrays.

    Raises:
        FeaturesError: damaged features, no space for scratch files, or a task that fails, with its class.
    """
    order = np.flatnonzero(np.isin(label, np.array(classes, dtype=np.int32)))
    order = order[np.argsort(label[order], kind="stable")]
    sorted_label = label[order]
    starts = np.searchsorted(sorted_label, classes).tolist()
    ends = np.searchsorted(sorted_label, classes, side="right").tolist()
    del sorted_label
    parts = [
        ClassPart(str(c) if names is None or c < 0 else names[c], start, end)
        for c, start, end in zip(classes, starts, ends, strict=True)
        if end > start
    ]
    tasks = list(_grouped(parts, name))
    of_label = hashlib.sha256(label.astype("<i4", copy=False).data).hexdigest()
    of_job = [_FORMAT, features.hash, of_label, list(classes), [column.name for column in columns], depends]
    key = sha256_text(canonical_json(of_job))[:16]
    with place.scratch(name, key) as folder:
        buckets = Buckets.of(folder / "rows", len(order), columns)
        row_of_class = dict(zip(classes, starts, strict=True))
        place.once(
            f"{name}-rows",
            lambda: buckets.path.exists() or all(file_of(folder, task).exists() for task in tasks),
            lambda: buckets.write(
                features, label, row_of_class, columns, durable=place.is_durable, progress=progress
            ),
        )
        n_done = n_seen = 0

        def seen(n: int) -> None:
            nonlocal n_seen
            n_seen += n
            progress(n)

        work = ClassWork(job, buckets, place.is_durable, seen)
        for _, result in place.engine.run(tasks, work, Resources()):
            n_done += int(result["rows"])
            if n_done > n_seen:  # done by another process, or before
                seen(n_done - n_seen)
        for task in tasks:
            positions = order[task.what[0].start : task.what[-1].end]
            yield positions, load_file(file_of(folder, task))


def file_of(folder: Path, task: Task) -> Path:
    """The file that a task makes."""
    return folder / f"{task.name}.safetensors"


def _grouped(parts: Sequence[ClassPart], name: str) -> Iterator[Task]:
    """Tasks of one class, or of some neighbours with few rows."""
    group: list[ClassPart] = []
    for i, part in enumerate(parts):
        group.append(part)
        n = part.end - group[0].start
        if n >= _TASK_ROWS or i + 1 == len(parts) or n + parts[i + 1].end - parts[i + 1].start > _TASK_ROWS:
            yield Task(f"{name}-{group[0].start}-{part.end}", tuple(group))
            group = []
