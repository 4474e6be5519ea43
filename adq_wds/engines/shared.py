"""The engine `shared`: any number of equal commands, on any machines, divide the tasks of one folder by leases."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adq_wds.engines.alone import alone_at_url
from adq_wds.engines.engine import Engine, Resources, Result, Task, ThisProcess, Work
from adq_wds.engines.lease import FOLDER, LeaseStore, LocalLeases
from adq_wds.engines.participant import BEAT, Participant
from adq_wds.files import canonical_json, sha256_text
from adq_wds.remote.outputs import lock
from adq_wds.remote.url_path import as_path


class Shared:
    """One of the equal commands that share a folder: it does the tasks whose lease it gets.

    Each command ends with the results of all tasks, since the work passes over what another has done. The folder is
    the state: commands may start late, be killed, or be started again.

    Args:
        folder: that all commands see.
        beat: seconds between heartbeats; see `Participant`.
    """

    def __init__(self, folder: str | os.PathLike[str], *, beat: float = BEAT) -> None:
        self._leases = leases_in(folder)
        self._beat = beat
        self._me: Participant | None = None

    @contextmanager
    def take_part(self, job: str) -> Iterator[Participant]:
        """Share the folder while the block runs. Raises `AdqError`: another job is done in it; see `Participant`."""
        if self._me is not None:
            yield self._me
            return
        with Participant(self._leases, job, beat=self._beat) as me:
            self._me = me
            try:
                yield me
            finally:
                self._me = None

    def run(self, tasks: Sequence[Task], work: Work, resources: Resources) -> Iterator[tuple[Task, Result]]:
        """Do the tasks whose lease is free; then, until all are done, those that come free.

        The work gets no task that another process holds, so that it never waits: results that it has ready would
        wait with it, and two processes might wait for each other.
        """
        with self.take_part("") as me:
            first = int(me.holder, 16) % max(1, len(tasks))  # each begins elsewhere
            left = {task.name: task for task in (*tasks[first:], *tasks[:first])}
            pause = self._beat / 50
            while left:
                n_left = len(left)
                results = work(_claimed(me, list(left.values())))
                try:
                    for task, result in results:
                        del left[task.name]
                        me.release(task.name)
                        yield task, result
                finally:
                    if (close := getattr(results, "close", None)) is not None:
                        close()  # before the leases are given up
                if len(left) < n_left:
                    pause = self._beat / 50
                else:
                    time.sleep(pause)
                    pause = min(2 * pause, self._beat)


def _claimed(me: Participant, tasks: Sequence[Task]) -> Iterator[Task]:
    """The tasks whose lease can be had, each when it is asked for."""
    return (task for task in tasks if me.claim(task.name))


def once(engine: Engine, name: str, do: Callable[[], object]) -> None:
    """Do something in this process; of several commands that share a folder, in one after another."""

    def work(tasks: Iterator[Task]) -> Iterator[tuple[Task, Result]]:
        for task in tasks:
            do()
            yield task, {}

    one = engine if isinstance(engine, Shared) else ThisProcess()
    for _ in one.run([Task(name, None)], work, Resources()):
        pass


def leases_in(folder: str | os.PathLike[str]) -> LeaseStore:
    """The leases of a folder. Raises `AdqError`: it is at a URL, in a store that takes none; see `RemoteLeases`."""
    path = as_path(folder) / FOLDER
    if isinstance(path, Path):
        return LocalLeases(path)
    from adq_wds.remote.leases import RemoteLeases

    return RemoteLeases(path)


@contextmanager
def lock_for(engine: Engine, folder: str | os.PathLike[str], job: str, settings: Any) -> Iterator[None]:
    """Lock a folder for one job; with the engine `shared`, for all commands of the same job and settings.

    Args:
        engine: that will run the job's tasks.
        folder: that is written to.
        job: a word for it.
        settings: all that the files depend on, as JSON has it: equal on every machine, and for equal commands only.

    Raises:
        AdqError: another job works in the folder.
    """
    if not isinstance(engine, Shared):
        with lock(folder), alone_at_url(folder):
            yield
        return
    with (
        lock(folder, shared=True),
        engine.take_part(f"{job} {sha256_text(canonical_json(settings))[:16]}"),
    ):
        yield
