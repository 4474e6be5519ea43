"""A work without an encoder, and a process that does it: ``python -m tests.engines.stand_in FOLDER TASKS BEAT SECONDS``."""

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from adq_wds.engines.engine import Resources, Result, Task
from adq_wds.engines.shared import Shared, lock_for
from adq_wds.engines.threads import in_order


@dataclass(frozen=True)
class WriteFiles:
    """Work: a file for each task, two side by side; files that are there are passed over.

    Attributes:
        folder: of the files.
        seconds: that a batch of a task takes.
        done: the tasks that this process did.
    """

    folder: Path
    seconds: float
    done: list[str]

    def __call__(self, tasks: Iterator[Task]) -> Iterator[tuple[Task, Result]]:
        batches = in_order(tasks, lambda task: 3, self._batch, batch_size=1, workers=2, name="stand-in")
        for task, _, _, is_last in batches:
            if is_last:
                path = self.folder / f"{task.what}.out"
                if not path.exists():
                    partial = path.with_suffix(f".{os.getpid()}")
                    partial.write_text(task.name * 100)
                    os.replace(partial, path)
                    self.done.append(task.name)
                yield task, {"bytes": path.stat().st_size}

    def _batch(self, task: Task, rows: range) -> None:
        if not (self.folder / f"{task.what}.out").exists():
            time.sleep(self.seconds)


def tasks_of(n: int) -> list[Task]:
    return [Task(f"folder/shard {i}.tar", i) for i in range(n)]


def main(folder: str, n: str, beat: str, seconds: str, settings: str = "") -> None:
    work, engine = WriteFiles(Path(folder), float(seconds), []), Shared(folder, beat=float(beat))
    with lock_for(engine, folder, "stand-in", settings):
        results = dict(engine.run(tasks_of(int(n)), work, Resources()))
    assert {task.name for task in results} == {task.name for task in tasks_of(int(n))}
    sys.stdout.write(str(len(work.done)))


if __name__ == "__main__":
    main(*sys.argv[1:])
