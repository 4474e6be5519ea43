"""Which epoch is it, and where in it does reading start? A few integers that a data set shares with its workers.

An epoch is begun with the first batch of it that is handed on: then the next iteration reads the next one. `set_epoch`
reaches workers that are running already, and the epoch that workers begin is known where they were started. All workers
of one iteration must agree on its epoch, though some may begin the next one before others begin: `adq.Loader` tells them;
with other loaders they take what the first of them to begin took.
"""

from __future__ import annotations

import functools
import os
import weakref
from dataclasses import dataclass
from typing import Any

import torch

from adq_wds.errors import AdqError

_EPOCH, _START_EPOCH, _START, _LANES, _TOLD, _SEED, _TURN, _TURN_EPOCH, _RECORD, _JOINED = range(10)
_N_JOINED = 64  # workers that are told apart


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
        self._values = _shared(torch.zeros(_JOINED + _N_JOINED, dtype=torch.int64))
        self._values[_START_EPOCH] = self._values[_SEED] = -1
        self._settle()

    def _settle(self) -> None:
        self._pid = os.getpid()
        self._seen = 0  # the epoch when this copy was made
        self._told = 0  # the epoch of the iteration that this copy was made for
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

    def begun(self, epoch: int) -> None:
        """Note that `epoch` is begun: the next iteration reads the one after it, unless another was set."""
        if self.epoch == epoch:
            self.epoch = epoch + 1

    def tell(self, epoch: int) -> None:
        """Let the workers of the iteration that begins now read `epoch`, whenever they begin."""
        self._part()
        self._told = epoch  # for copies made now
        self._values[_TOLD] = epoch  # for those that run already

    def begin(self, *, told: bool = False) -> Begin:
        """Where the iteration that begins now begins; in a worker that is `told`, where `tell` said."""
        worker = torch.utils.data.get_worker_info()
        if worker is None:
            return self.at(self.epoch)
        turn = self._turns
        self._turns += 1
        if told:
            return self.at(int(self._values[_TOLD]) if turn else self._told)
        return self.at(self._agreed(worker.seed - worker.id, turn, worker.id % _N_JOINED))

    def _agreed(self, seed: int, turn: int, worker: int) -> int:
        """The epoch that all workers of one iteration take: the one that the first of them to begin wrote down.

        An iteration is known by its seed and turn, and, as the seed may be the same in each, by the workers that
        have joined it: one that is there already begins another iteration.
        """
        values = self._values.tolist()  # at one moment: before the epoch is moved on, its record is written
        known = (values[_SEED], values[_TURN]) == (seed, turn)
        if known and values[_JOINED + worker] != values[_RECORD]:
            epoch, record = int(values[_TURN_EPOCH]), values[_RECORD]
        else:
            epoch, record = self._seen if turn == 0 else int(values[_EPOCH]), values[_RECORD] + 1
            for place, value in ((_TURN_EPOCH, epoch), (_RECORD, record), (_TURN, turn), (_SEED, seed)):
                self._values[place] = value
        self._values[_JOINED + worker] = record
        return epoch

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
        seen = int(self._values[_EPOCH])
        return {"values": self._values, "pid": self._pid, "seen": seen, "told": self._told}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._values = _shared(state["values"])  # as it is, when sent to a worker
        self._settle()
        self._pid, self._seen, self._told = state["pid"], state["seen"], state["told"]


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
