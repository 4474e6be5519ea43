"""Defines draws that a stream takes in place of its plan's: `Schedule`, another keep ratio in every epoch."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from adq_wds.core.allocation import budget_for
from adq_wds.core.fresh import VaryingDraws
from adq_wds.errors import StateError, shorten
from adq_wds.tables.plan import Plan
from adq_wds.tables.plan_cells import n_planned, plan_cells
from adq_wds.tables.plan_header import fresh_start

_MAX_EPOCHS = 1 << 20  # whose ratios are all asked for
_BLOCK = 64  # budgets that are shared out together


class StreamDraws(ABC):
    """The samples that each epoch of a stream takes, and what its state says of them.

    Attributes:
        generation: changes when earlier epochs get other draws.
    """

    generation: int = 0

    @abstractmethod
    def n_total(self, epoch: int) -> int:
        """Samples in an epoch."""

    @abstractmethod
    def seats(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """See `core.fresh.FreshDraws.seats`."""

    @abstractmethod
    def record(self, epoch: int, *, begun: bool) -> str:
        """What a state says of the draws of all epochs before one, and of that one if it has `begun`."""

    @abstractmethod
    def check(self, record: str, epoch: int, *, begun: bool) -> None:
        """Raise `StateError` unless a state's record is of draws like these."""

    @abstractmethod
    def begin(self, epoch: int) -> None:
        """Note that an epoch is read: its draws may not change any more."""

    @abstractmethod
    def restore(self, record: str, epoch: int, *, begun: bool) -> None:
        """Continue from a checked record."""


class Schedule(StreamDraws):
    """Fresh draws at another keep ratio in every epoch, by the rules of the plan.

    An epoch of ratio r has round(r · N) samples, as a plan of that ratio has, shared over classes and bins as that
    plan's are. Each cell goes on where the last epoch ended, so that each sample comes once before any twice.

    Args:
        plan: of version 2, made by `build_plan`.
        keep: gives the ratio of an epoch, in (0, 1]; always the same for an epoch. Or one ratio for all.

    Raises:
        ValueError: a ratio of the first epoch is out of range, or keeps no sample.
        PlanError: the plan cannot share another budget.

    Source: ours.
    """

    def __init__(self, plan: Plan, keep: float | Callable[[int], float]) -> None:
        self._keep, self._cells, self._n = keep, plan_cells(plan), n_planned(plan)
        self._least, self._most = int(self._cells.n_must.sum()), int(self._cells.n_class.sum())
        self._totals: list[int] = []  # samples of each epoch so far
        self._draws = VaryingDraws(
            self._cells.size.ravel(), fresh_start(plan.header), self._quota, self._shares
        )
        self.n_total(0)  # checks it

    def n_total(self, epoch: int) -> int:
        """Samples in an epoch.

        Raises:
            ValueError: the ratio of this or an earlier epoch is out of range, or keeps fewer than the must-includes.
        """
        if epoch >= _MAX_EPOCHS:
            raise ValueError(
                f"keep: epoch {epoch:,} is too far, a schedule reaches to epoch {_MAX_EPOCHS - 1:,}"
            )
        while len(self._totals) <= epoch:
            self._totals.append(self._total_of(len(self._totals)))
        return self._totals[epoch]

    def _total_of(self, epoch: int) -> int:
        keep = self._keep
        try:
            ratio = keep(epoch) if callable(keep) else keep
        except Exception as error:
            raise ValueError(f"keep: epoch {epoch}: {type(error).__name__}: {shorten(str(error))}") from error
        number = isinstance(ratio, (int, float, np.integer, np.floating)) and not isinstance(ratio, bool)
        if not number or not 0 < ratio <= 1:  # NaN fails too
            raise ValueError(
                f"keep: epoch {epoch} has {shorten(ratio)}, expected a number in (0, 1] (0.2 is 20 %)"
            )
        total = min(budget_for(float(ratio), self._n), self._most)
        if total < max(1, self._least):
            must = f", and {self._least} are must-include" if self._least else ""
            raise ValueError(
                f"keep: epoch {epoch} keeps {ratio} of {self._n}, which is {total}{must}; raise it"
            )
        return total

    def seats(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """See `core.fresh.FreshDraws.seats`."""
        self.n_total(epoch)
        return self._draws.seats(epoch)

    def _quota(self) -> NDArray[np.int64]:
        return replace(self._cells, budget=self.n_total(0)).quota.ravel()

    def _shares(self, epochs: range) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """The epochs of each budget, and its shares."""
        totals = np.array(self._totals[epochs.start : epochs.stop], dtype=np.int64)
        order = np.argsort(totals, kind="stable")
        budgets, starts = np.unique(totals[order], return_index=True)
        of_budget = np.split(order + epochs.start, starts[1:])
        for i in range(0, len(budgets), _BLOCK):
            shares = self._cells.shares(budgets[i : i + _BLOCK])
            for share, group in zip(shares, of_budget[i : i + _BLOCK], strict=True):
                yield group, share.ravel()

    def record(self, epoch: int, *, begun: bool) -> str:
        """16 hexadecimal digits that stand for the numbers of samples of the epochs; see `StreamDraws`."""
        n = epoch + begun
        if n:
            self.n_total(n - 1)
        totals = np.array(self._totals[:n], dtype="<i8")
        return hashlib.sha256(totals.tobytes()).hexdigest()[:16]

    def check(self, record: str, epoch: int, *, begun: bool) -> None:
        """Raise `StateError` unless the epochs had as many samples as now; see `StreamDraws`."""
        try:
            same = epoch < _MAX_EPOCHS and record == self.record(epoch, begun=begun)
        except ValueError as error:
            raise StateError(
                f"state is of epoch {epoch}, to which this schedule does not reach: {error}"
            ) from error
        if not same:
            raise StateError(
                f"state is of another schedule: keep= does not give the ratios that epochs up to {epoch} were read with; "
                "use that schedule (later epochs may change), or start anew"
            )

    def begin(self, epoch: int) -> None:
        """Do nothing: a schedule never changes."""

    def restore(self, record: str, epoch: int, *, begun: bool) -> None:
        """Do nothing: a schedule never changes."""
