"""One of the processes that share a folder: its heartbeats, the leases that it holds, and its view of the others."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from types import TracebackType

from adq_wds.engines.lease import (
    LeaseStore,
    holder_of,
    holder_of_file,
    lease_bytes,
    new_holder,
    parse,
    process_file,
    shown,
    task_file,
)
from adq_wds.errors import AdqError
from adq_wds.remote.leases import NoLeases

BEAT = 5.0
"""Seconds between two heartbeats of a process."""

PATIENCE = 6
"""Heartbeats; a process whose file stays the same for so long is taken for dead."""

logger = logging.getLogger("adq_wds")


class Participant:
    """A process that shares a folder with equal ones, for as long as the block runs.

    It counts its heartbeats in a file of its own. Whether another process lives is judged by that process' file
    alone, and by this machine's monotonic clock: it is dead when the file has stayed the same for `PATIENCE`
    heartbeats of looking at it. No two machines' clocks are compared. A process that was only slow, or stopped, loses
    its leases, goes on, and makes the same files again.

    Args:
        store: the leases.
        job: what is done in the folder, equal for equal commands only: ``embed 3f2a…``.
        beat: seconds between heartbeats; the same for all.

    Raises:
        AdqError: a process lives that does another job in the folder; the store cannot be written, or it creates a
            file that exists, so that two processes could hold one lease.
    """

    def __init__(self, store: LeaseStore, job: str, *, beat: float = BEAT) -> None:
        self.holder = new_holder()
        self._store, self._job, self._beat = store, job, beat
        self._lease = lease_bytes({"holder": self.holder})
        self._held: set[str] = set()
        self._seen: dict[str, tuple[bytes | None, float]] = {}  # of a file: its bytes, and since when
        self._end = threading.Event()
        self._heart = threading.Thread(target=self._beat_on, name="adq-lease", daemon=True)

    def __enter__(self) -> Participant:
        file = process_file(self.holder)
        self._store.create(file, self._process(0))
        try:
            if self._store.create(file, self._process(0)):
                raise NoLeases(
                    f"{self._store} creates a file that exists already, so that two processes could hold one lease: "
                    "take a store with conditional writes, or another engine"
                )
            self._heart.start()
            self._refuse_other_jobs()
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._leave()
        except AdqError as failure:  # others take the leases over in time
            logger.warning("%s", failure)

    def claim(self, task: str) -> bool:
        """Take the lease of a task, if no living process has it; whether this process has it now."""
        name = task_file(task)
        if not self._store.create(name, self._lease):
            lease = self._store.read(name)
            holder = holder_of(parse(lease))
            if holder != self.holder:  # else the store created it, and its answer was lost
                if lease is None or not self._is_dead(name if holder is None else process_file(holder)):
                    return False
                logger.warning("the lease of %s is taken over: its holder gave no sign for long", task)
                self._bury(holder)
                if holder is None:
                    self._store.remove(name)
                if not self._store.create(name, self._lease):
                    return False
        self._held.add(name)
        return True

    def release(self, task: str) -> None:
        """Give up the lease of a task, unless another process has taken it over."""
        name = task_file(task)
        self._held.discard(name)
        if holder_of(parse(self._store.read(name))) == self.holder:
            self._store.remove(name)

    def _process(self, beat: int) -> bytes:
        return lease_bytes(
            {"job": self._job, "beat": beat, "pid": os.getpid(), "host": socket.gethostname()[:200]}
        )

    def _beat_on(self) -> None:
        beat, fails = 0, False
        while not self._end.wait(self._beat):
            beat += 1
            try:
                self._store.write(process_file(self.holder), self._process(beat))
                fails = False
            except Exception as error:  # of any kind: a heart that stops would cost the others' time
                if not fails:
                    logger.warning("%s; other processes may do the same tasks once more", error)
                fails = True

    def _is_dead(self, name: str) -> bool:
        """Whether a file has stayed the same for long, as far as this process has looked."""
        data, now = self._store.read(name), time.monotonic()
        before, since = self._seen.setdefault(name, (data, now))
        if data != before:
            self._seen[name] = data, now
            return False
        return now - since >= PATIENCE * self._beat

    def _refuse_other_jobs(self) -> None:
        """Look at all processes; wait until those of other jobs are known to be dead."""
        others: dict[str, bytes | None] = {}
        for name in self._store.names():
            if holder_of_file(name) not in (None, self.holder):
                self._is_dead(name)
                others[name] = self._store.read(name)
        others = {name: data for name, data in others.items() if parse(data).get("job") != self._job}
        if others:
            logger.info("%s: waiting to see whether another job's processes live", self._store)
        while others:
            self._end.wait(self._beat / 4)
            for name, before in list(others.items()):
                data = self._store.read(name)
                process = parse(data)
                if data is None or process.get("job") == self._job:
                    del others[name]
                elif data != before and process:
                    raise AdqError(
                        f"{self._store} is in use by another job or by other arguments, of {shown(process)}: "
                        "wait for it, give the same arguments, or choose another folder"
                    )
                elif self._is_dead(name):
                    self._bury(holder_of_file(name))
                    del others[name]

    def _bury(self, holder: str | None) -> None:
        """Remove the file and the leases of a dead process."""
        if holder is None:
            return
        for name in self._store.names():
            if name.startswith("task-") and holder_of(parse(self._store.read(name))) == holder:
                self._store.remove(name)
        self._store.remove(process_file(holder))

    def _leave(self) -> None:
        """Remove what is this process', and what those left that died meanwhile."""
        self._end.set()
        if self._heart.is_alive():
            self._heart.join()
        for name in list(self._seen):
            if (holder := holder_of_file(name)) is not None and self._is_dead(name):
                self._bury(holder)
        for name in self._held:
            if holder_of(parse(self._store.read(name))) == self.holder:
                self._store.remove(name)
        self._store.remove(process_file(self.holder))
