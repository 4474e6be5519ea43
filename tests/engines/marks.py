"""Marks tasks while they run, so that a kill is known to have hit one; a task is done, and waits until it is let go."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adq_wds.engines.engine import Resources, Result, Task, Work
from adq_wds.files import sha256_text


@dataclass(frozen=True)
class Marks:
    """A file for each task that runs, in a folder.

    Attributes:
        folder: of the marks.
    """

    folder: Path

    def of(self, pid: int, task: str) -> Path:
        """The mark of a task in a process."""
        return self.folder / f"{pid}-{sha256_text(task)[:12]}.runs"

    def running(self) -> list[Path]:
        """The marks of tasks that run, or whose process was killed meanwhile; not of those that are let go."""
        return [mark for mark in sorted(self.folder.glob("*.runs")) if not mark.with_suffix(".go").exists()]

    def let_go(self, mark: Path) -> None:
        """Let a task end."""
        mark.with_suffix(".go").touch()

    def let_all_go(self) -> None:
        """Let tasks end, those that begin later as well."""
        (self.folder / "all").touch()

    def remove_of(self, pid: int) -> int:
        """Remove what a killed process left; the number of its tasks that ran."""
        marks = list(self.folder.glob(f"{pid}-*.runs"))
        for mark in marks:
            mark.unlink()
            mark.with_suffix(".go").unlink(missing_ok=True)
        return len(marks)


def pid_of(mark: Path) -> int:
    """The process whose task is marked."""
    return int(mark.name.partition("-")[0])


def ended(pid: int) -> bool:
    """Whether a process is no more; one that only its parent still counts is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("Z")
    except (FileNotFoundError, ProcessLookupError):
        return True


@dataclass(frozen=True)
class Marked:
    """Work whose tasks are marked while they run."""

    work: Work
    marks: Marks

    def __call__(self, tasks: Iterator[Task]) -> Iterator[tuple[Task, Result]]:
        for task, result in self.work(self._begun(tasks)):
            mark = self.marks.of(os.getpid(), task.name)
            while not (mark.with_suffix(".go").exists() or (mark.parent / "all").exists()):
                time.sleep(0.005)
            mark.unlink(missing_ok=True)
            mark.with_suffix(".go").unlink(missing_ok=True)
            yield task, result

    def _begun(self, tasks: Iterator[Task]) -> Iterator[Task]:
        for task in tasks:
            self.marks.of(os.getpid(), task.name).touch()
            yield task


def mark_tasks(engine: type[Any], folder: str) -> None:
    """Mark the tasks of every job that this process gives to engines of a class."""
    run, marks = engine.run, Marks(Path(folder))

    def marked(self: Any, tasks: Sequence[Task], work: Work, resources: Resources) -> Any:
        return run(self, tasks, Marked(work, marks), resources)

    engine.run = marked
