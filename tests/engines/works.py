"""Works that other processes can be handed, for tests of engines."""

import logging
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from adq_wds.engines.engine import Result, Task
from adq_wds.errors import SampleError


class PickyError(SampleError):
    """An error whose constructor takes other arguments than its text."""

    def __init__(self, shard: str, key: str) -> None:
        super().__init__(f"shard {shard}, key {key!r}: no good")


class StrangeError(Exception):
    """An error that cannot be pickled."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(first + second)


@dataclass
class Write:
    """Writes a task's number to a file of its name, and its process' id to another; or fails as the task says."""

    folder: Path
    n_loads: int = 0

    def __call__(self, tasks: Iterator[Task]) -> Iterator[tuple[Task, Result]]:
        self.n_loads += 1
        for task in tasks:
            match task.what:
                case "picky":
                    raise PickyError("a.tar", "k")
                case "strange":
                    raise StrangeError("one ", "two")
                case "value":
                    raise ValueError("no such thing")
                case "log":
                    logging.getLogger("adq_wds").warning("a line of %s", task.name)
                case "threads":
                    yield task, {"threads": os.environ["OMP_NUM_THREADS"]}
                    continue
                case "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "wait":
                    (self.folder / f"{task.name}.pid").write_text(str(os.getpid()))
                    time.sleep(600)
            (self.folder / task.name).write_text(str(task.what))
            yield task, {"pid": os.getpid(), "calls": self.n_loads}


def tasks_of(*whats: object) -> list[Task]:
    return [Task(f"t{i:03d}", what) for i, what in enumerate(whats)]
