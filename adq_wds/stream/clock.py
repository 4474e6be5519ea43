"""Holds the next epoch and its start position in memory that a data set shares with its workers.

The first batch handed on in an epoch advances the clock, so the next iteration reads the next epoch. `set_epoch`
reaches running workers too. All workers of one iteration must agree on its epoch, though one may start the next iteration
before another has. `adq.Loader` announces the epoch to them; with other loaders they use the epoch of the first worker.
"""

from __future__ import annotations

import functools
import os
import weakref
from typing import Any, NamedTuple

import torch
from torch.utils.data import get_worker_info

from adq_wds.errors import AdqError

# Places of the shared integers. An iteration that was not announced is recorded by (seed, turn) and the workers in it.
_EPOCH, _START_EPOCH, _START, _LANES, _ANNOUNCED, _SEED, _TURN, _TURN_EPOCH, _RECORD, _JOINED = range(10)
_N_JOINED = 64  # workers that are told apart


class Start(NamedTuple):
    """Where an iteration starts."""

    epoch: int
    position: int = 0  # t₀, the same for all ranks; not 0 in an epoch that is resumed
    lanes: int = 0  # lanes of the saved state; 0 for the stream's own


class Clock:
    """The shared integers."""

    def __init__(self) -> None:
        self._values = shared(torch.zeros(_JOINED + _N_JOINED, dtype=torch.int64))
        self._values[_START_EPOCH] = self._values[_SEED] = -1
        self._settle()

    def _settle(self, pid: int | None = None, epoch: int = 0, announced: int = 0) -> None:
        self._pid = os.getpid() if pid is None else pid
        self._epoch_when_copied = epoch
        self._announced = announced  # to copies made since
        self._turns = 0  # iterations that this copy has started in a worker
        _noted_at_fork().add(self)

    @property
    def epoch(self) -> int:
        """The epoch that the next iteration reads."""
        self._part()
        return int(self._values[_EPOCH])

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._part()
        self._values[_EPOCH] = epoch

    def resume_at(self, start: Start) -> None:
        """Let iterations over `start.epoch`, and no other, start there."""
        self._part()
        self._values[_START_EPOCH : _LANES + 1] = torch.tensor(start)

    def advance_past(self, epoch: int) -> None:
        """Let the next iteration read the epoch after `epoch`, unless another was set."""
        if self.epoch == epoch:
            self.epoch = epoch + 1

    def announce(self, epoch: int) -> None:
        """Make the workers of the iteration that starts now read `epoch`, whenever they start."""
        self._part()
        self._announced = epoch  # for workers started now
        self._values[_ANNOUNCED] = epoch  # for those that run already

    def start_of(self, epoch: int) -> Start:
        """Where an iteration over `epoch` starts."""
        values = self._values.tolist()
        return Start(epoch, values[_START], values[_LANES]) if values[_START_EPOCH] == epoch else Start(epoch)

    def next_start(self, *, announced: bool = False) -> Start:
        """The start of the iteration that begins now; in a worker, in the epoch `announced` or agreed on."""
        worker = get_worker_info()
        if worker is None:
            return self.start_of(self.epoch)
        turn = self._turns
        self._turns += 1
        if announced:
            return self.start_of(int(self._values[_ANNOUNCED]) if turn else self._announced)
        return self.start_of(self._agreed(worker.seed - worker.id, turn, worker.id % _N_JOINED))

    def _agreed(self, seed: int, turn: int, worker: int) -> int:
        """The epoch that the first worker of an iteration took.

        An iteration is known by its seed and turn, and, as the seed may be the same in each, by the workers that
        have joined it: one that is there already starts another iteration.
        """
        values = self._values.tolist()  # at one moment: the record is written before the epoch is advanced
        known = (values[_SEED], values[_TURN]) == (seed, turn)
        if known and values[_JOINED + worker] != values[_RECORD]:
            epoch, record = int(values[_TURN_EPOCH]), values[_RECORD]
        else:
            epoch, record = values[_EPOCH] if turn else self._epoch_when_copied, values[_RECORD] + 1
            for place, value in ((_TURN_EPOCH, epoch), (_RECORD, record), (_TURN, turn), (_SEED, seed)):
                self._values[place] = value  # in this order: the seed makes the record known
        self._values[_JOINED + worker] = record
        return epoch

    def note_epoch(self) -> None:
        """Note the epoch for a copy that is about to be made."""
        self._epoch_when_copied = int(self._values[_EPOCH])

    def _part(self) -> None:
        """Stop sharing in a process that is no worker of the creating one."""
        if apart(self._pid):
            self._values = shared(self._values.clone())
            self._settle()

    def __getstate__(self) -> tuple[Any, ...]:
        return self._values, self._pid, int(self._values[_EPOCH]), self._announced

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._values = shared(state[0])  # as it is, when sent to a worker
        self._settle(*state[1:])


def apart(pid: int) -> bool:
    """Whether this process is neither the one that made something shared nor a worker of it, such as another rank."""
    return pid != os.getpid() and get_worker_info() is None


def shared(values: torch.Tensor) -> torch.Tensor:
    """The same values in memory shared with forked and spawned workers."""
    try:
        return values.share_memory_()  # type: ignore[no-any-return,no-untyped-call,unused-ignore]
    except RuntimeError as error:
        raise AdqError(f"no shared memory for the epoch's number, make room in /dev/shm: {error}") from error


@functools.cache
def _noted_at_fork() -> weakref.WeakSet[Clock]:
    """Every clock of this process; each notes its epoch before a fork."""
    clocks: weakref.WeakSet[Clock] = weakref.WeakSet()

    def note() -> None:
        for clock in list(clocks):
            clock.note_epoch()

    os.register_at_fork(before=note)
    return clocks
