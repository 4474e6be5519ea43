"""What an engine is: it does the tasks of a job, on whatever runs tasks; its answer never depends on which."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Result = dict[str, Any]
"""What is said of a finished task: few numbers and words, as JSON has them. What a task makes is in its files."""


@dataclass(frozen=True)
class Task:
    """One part of a job, such as a shard or a class.

    Attributes:
        name: unique in its job, and the same on every machine.
        what: what the job's work needs to know of it; small, and pickled for other processes.
    """

    name: str
    what: Any


Work = Callable[[Iterator[Task]], Iterator[tuple[Task, Result]]]
"""Does tasks in one process, and yields each with its result once its files have their final names.

It may ask for a few tasks before it yields the first, and work on them side by side. A task that was done
before, here or elsewhere, is passed over and has the same result. For other processes it is pickled; what it
loads, such as an encoder, it loads with the first task and keeps for the next.
"""


@dataclass(frozen=True)
class Resources:
    """What each process of a job uses.

    Attributes:
        workers: threads.
        gpus: accelerators, as a share.
    """

    workers: int = 1
    gpus: float = 0.0


class Engine(Protocol):
    """Runs the tasks of a job."""

    def run(self, tasks: Sequence[Task], work: Work, resources: Resources) -> Iterator[tuple[Task, Result]]:
        """Do all tasks, and yield each with its result, in the order in which they end.

        The first error of a task ends the job; tasks that are done stay done.
        """


class ThisProcess:
    """The engine `threads`: this process does all tasks, by threads of the work's own."""

    def run(self, tasks: Sequence[Task], work: Work, resources: Resources) -> Iterator[tuple[Task, Result]]:
        """Do the tasks in their order."""
        return work(iter(tasks))
