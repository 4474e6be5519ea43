"""Which epoch is it, and where in it does reading start? A few integers that a data set shares with its workers.

`set_epoch` reaches workers that are running already, and the epoch that workers finish is known where they were
started. All workers of one iteration must agree on its epoch, though some may end before others begin: new workers
take what stood there when they were forked or sent, running ones what the first of them to begin took.
"""

from __future__ import annotations

import functools
import os
import weakref
from dataclasses import dataclass
from typing import Any

import torch

from adq_wds.errors import AdqError

_EPOCH, _START_EPOCH, _START, _LANES, _SEED, _TURN, _TURN_EPOCH = range(7)


@dataclass(frozen=True)
class Begin:
    """Where an iteration begins.

    Attributes:
        epoch: which one.
        start: t₀, the position all ranks start at; 0 but in an epoch that is resumed.
        lanes: lanes of the saved state; 0 for the stream's own.
    """

    epoch: int
    start: int
    lanes: int


class Clock:
    """The shared integers."""

    def __init__(self) -> None:
        self._values = _shared(torch.zeros(7, dtype=torch.int64))
        self._values[_START_EPOCH] = self._values[_SEED] = -1
        self._settle()

    def _settle(self) -> None:
        self._pid = os.getpid()
        self._seen = 0  # the epoch when this copy was made
        self._turns = 0  # iterations begun by this copy in a worker
        _watched().add(self)

    @property
    def epoch(self) -> int:
        """The epoch that the next iteration reads."""
        self._part()
        return int(self._values[_EPOCH])

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._part()
        self._values[_EPOCH] = epoch

    def resume(self, begin: Begin) -> None:
        """Let iterations over `begin.epoch`, and no other, begin there."""
        self._part()
        for place, value in ((_START_EPOCH, begin.epoch), (_START, begin.start), (_LANES, begin.lanes)):
            self._values[place] = value

    def begin(self) -> Begin:
        """Where the iteration that begins now begins."""
        worker = torch.utils.data.get_worker_info()
        if worker is None:
            return self.at(self.epoch)
        values, seed, turn = self._values, worker.seed - worker.id, self._turns
        self._turns += 1
        if turn == 0:
            epoch = self._seen
        elif (int(values[_SEED]), int(values[_TURN])) == (seed, turn):
            return self.at(int(values[_TURN_EPOCH]))
        else:
            epoch = int(values[_EPOCH])
        values[_TURN_EPOCH] = epoch
        values[_TURN] = turn
        values[_SEED] = seed
        return self.at(epoch)

    def at(self, epoch: int) -> Begin:
        """Where an iteration over `epoch` begins."""
        values = self._values.tolist()
        if values[_START_EPOCH] != epoch:
            return Begin(epoch, 0, 0)
        return Begin(epoch, values[_START], values[_LANES])

    def look(self) -> None:
        """Note the epoch for a copy that is about to be made."""
        self._seen = int(self._values[_EPOCH])

    def _part(self) -> None:
        """In a process that is no worker of the one it was made in, another rank's perhaps, share no more."""
        if self._pid != os.getpid() and torch.utils.data.get_worker_info() is None:
            self._values = _shared(self._values.clone())
            self._settle()

    def __getstate__(self) -> dict[str, Any]:
        return {"values": self._values, "pid": self._pid, "seen": int(self._values[_EPOCH])}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._values = _shared(state["values"])  # as it is, when sent to a worker
        self._settle()
        self._pid, self._seen = state["pid"], state["seen"]


def _shared(values: torch.Tensor) -> torch.Tensor:
    """The same, where forked and spawned workers see it too.

    Raises:
        AdqError: there is no shared memory left.
    """
    try:
        return values.share_memory_()  # type: ignore[no-any-return,no-untyped-call,unused-ignore]
    except RuntimeError as error:
        raise AdqError(f"no shared memory for the epoch's number, make room in /dev/shm: {error}") from error


@functools.cache
def _watched() -> weakref.WeakSet[Clock]:
    """Every clock of this process: before it forks, each notes its epoch."""
    clocks: weakref.WeakSet[Clock] = weakref.WeakSet()

    def look() -> None:
        for clock in list(clocks):
            clock.look()

    os.register_at_fork(before=look)
    return clocks
