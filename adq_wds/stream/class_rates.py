"""Defines `ClassRates`: fresh draws that give more seats to the classes with the higher losses."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from adq_wds.core.allocation import exact_shares
from adq_wds.core.fresh import ONE, VaryingDraws
from adq_wds.errors import AdqError, StateError, shorten
from adq_wds.reading.schedule import Schedule, StreamDraws
from adq_wds.stream.clock import Clock
from adq_wds.stream.ranks import Ranks
from adq_wds.stream.rate_history import RateHistory
from adq_wds.tables.plan import Plan
from adq_wds.tables.plan_cells import plan_cells
from adq_wds.tables.plan_header import fresh_start

_FAR = 2.0**62  # seats, in units of 1/ONE, that no class has


class ClassRates(StreamDraws):
    """Rates by class that follow the training: the higher the mean loss of a class, the more seats it gets.

    An epoch has as many samples as the plan keeps. The first one is the plan; after `update` each class's share of the
    seats is in proportion to its share in the plan times its mean loss, between 1/bound and bound times the former, and
    never more than it has samples. Inside a class bins share by the plan's rule. Each cell goes on where the last epoch
    ended. Without an update an epoch has the rates of the one before.

    One update an epoch, on all ranks, with equal numbers: it counts for the epoch that begins next, in running workers
    too, and never for one that has begun. Where torch.distributed gives the ranks it is compared between them. The state
    holds the shares of all epochs, of at most 4096 updates (fewer from 512 classes on, as 16 MiB hold them, but 256 at
    least): after these the rates stay as they are, and `update` raises. Losses that were summed up before a crash are the training's matter::

        rates = adq.ClassRates(plan)
        ds = adq.ShardDataset(urls, plan=plan, fresh=True, keep=rates, batch_size=64, fields=("image", "label"))
        for epoch in range(30):
            totals = torch.zeros(2, len(rates.classes))  # sums and counts
            for images, labels in loader:
                losses = F.cross_entropy(model(images), labels, reduction="none")
                totals.index_add_(1, labels, torch.stack([losses.detach(), torch.ones_like(losses)]))
                ...
            torch.distributed.all_reduce(totals)  # with several ranks
            rates.update(*totals)

    Args:
        plan: the data set's, of version 2 and of two or more classes.
        bound: how far a class may go from its share in the plan, above 1.

    Attributes:
        classes: C labels, ascending; arrays of losses are in this order.

    Raises:
        ValueError: `bound` is out of range, or there is nothing to shift between classes.
        PlanError: the plan cannot share another budget.

    Source: ours, after the idea of RCAP (Hassan et al. 2026, arXiv 2606.11761), which adapts the fraction of each class
    to its loss in every epoch.
    """

    def __init__(self, plan: Plan, *, bound: float = 2.0) -> None:
        number = isinstance(bound, (int, float, np.integer, np.floating)) and not isinstance(bound, bool)
        if not number or not 1 < bound < math.inf:
            raise ValueError(f"bound must be a number above 1, got {shorten(bound)}")
        self._bound = float(min(bound, _FAR))
        self._plan_hash, self._cells = plan.hash, plan_cells(plan)
        self.classes: list[int] = [entry["label"] for entry in plan.header["classes"]]
        self._row = {label: row for row, label in enumerate(self.classes)}
        self._of_class = self._cells.share.sum(axis=1)  # (C,) seats in the plan, in units of 1/ONE
        if np.count_nonzero(self._of_class) < 2:
            raise ValueError(
                "ClassRates: the plan draws from fewer than two classes, so no seat can move; leave it out"
            )
        self._history = RateHistory(len(self.classes))
        self._draws = VaryingDraws(
            self._cells.size.ravel(), fresh_start(plan.header), self._quota, self._shares
        )
        self._counted = 0  # the generation that `_draws` has counted
        self._clock: Clock | None = None
        self._ranks: Ranks | None = None

    def for_plan(self, plan: Plan) -> ClassRates:
        """These rates; a `ValueError` unless they are of that plan."""
        if plan.hash != self._plan_hash:
            raise ValueError("keep= has the ClassRates of another plan: make them of the data set's plan")
        return self

    def join(self, clock: Clock, ranks: Ranks) -> None:
        """Count the epochs of a data set from now on; a `ValueError` if there is one already."""
        if self._clock is not None:
            raise ValueError("keep= has the ClassRates of another data set: make new ones for this one")
        self._clock, self._ranks = clock, ranks

    @property
    def rates(self) -> dict[int, float]:
        """By class, the part of its samples that the next epoch takes, as far as it is known."""
        n_class = np.maximum(self._cells.n_class, 1)
        of_class = self._history.of_class(self._history.n) if self._history.n else self._of_class
        rates = (of_class / ONE + self._cells.n_must) / n_class
        return dict(zip(self.classes, rates.tolist(), strict=True))

    def update(self, loss: Mapping[int, float] | Any, counts: Any = None) -> None:
        """Set the rates of the epochs from the next one on. With torch.distributed call it on all ranks.

        Args:
            loss: the mean loss of each class, >= 0: by label, or (C,) numbers in the order of `classes`, a tensor of
                any device or an array. With `counts`, sums. A class without a loss counts as the mean of the others.
            counts: (C,) how many losses each sum is of.

        Raises:
            ValueError: a loss is negative or not finite, of a class that is not in the plan, or there is none; the
                shape is wrong; or ranks differ. The rates stay.
            AdqError: no data set has these rates, or there is no room for another update; see `ClassRates`.
        """
        if self._clock is None or self._ranks is None:
            raise AdqError(
                "ClassRates.update: no data set has these rates yet: ShardDataset(..., keep=rates)"
            )
        of_class = self._agreed(loss, counts, self._ranks)
        since = max(1, self._clock.epoch, self._history.begun + 1)
        self._history.add(since, of_class)
        self._draws.forget(since)

    def _agreed(self, loss: Mapping[int, float] | Any, counts: Any, ranks: Ranks) -> NDArray[np.int64]:
        """(C,) int64: seats of each class, equal on all ranks; if not, or if one has an error, all raise."""
        error: Exception | None = None
        try:
            of_class = self._shifted(self._means(loss, counts))
            own = hashlib.sha256(of_class.astype("<i8").tobytes()).hexdigest(), ""
        except Exception as raised:  # the other ranks wait for an answer
            error, own = raised, ("", f"{type(raised).__name__}: {raised}")
        values = ranks.all_values(own)
        if error is not None and len(values) == 1:
            raise error
        for rank, (_, trouble) in enumerate(values):
            if trouble:
                raise ValueError(f"ClassRates.update: rank {rank}: {trouble}") from error
        for rank, value in enumerate(values):
            if value != values[0]:
                raise ValueError(
                    f"ClassRates.update: rank {rank} has other losses than rank 0; sum them up over all ranks "
                    "(all_reduce) first"
                )
        return of_class

    def _means(self, loss: Mapping[int, float] | Any, counts: Any) -> NDArray[np.float64]:
        """(C,) float64 mean losses."""
        if isinstance(loss, Mapping):
            if counts is not None:
                raise ValueError("counts go with an array of sums; a mapping has means")
            if unknown := [label for label in loss if label not in self._row]:
                known = shorten(self.classes, 200)
                raise ValueError(
                    f"loss of class {shorten(unknown[0])}, which the plan lacks; its classes are {known}"
                )
            seen = np.isin(self.classes, list(loss))
            sums = _numbers("loss", [_plain(loss.get(label, 0.0)) for label in self.classes], len(seen))
        else:
            sums = _numbers("loss", loss, len(self.classes))
            n = np.ones(len(sums)) if counts is None else _numbers("counts", counts, len(sums))
            self._refuse(~(np.isfinite(n) & (n >= 0)), n, "count")
            seen = n > 0
            sums = np.divide(sums, n, out=np.zeros_like(sums), where=seen)
        self._refuse(seen & ~(np.isfinite(sums) & (sums >= 0)), sums, "loss")
        if not seen.any():
            raise ValueError("ClassRates.update: no class has a loss")
        return np.where(seen, sums, math.fsum(sums[seen] / seen.sum()))

    def _refuse(self, wrong: NDArray[np.bool_], values: NDArray[np.float64], what: str) -> None:
        for row in np.flatnonzero(wrong).tolist():
            raise ValueError(
                f"{what} of class {self.classes[row]} is {values[row]}, expected a finite number >= 0"
            )

    def _shifted(self, loss: NDArray[np.float64]) -> NDArray[np.int64]:
        """(C,) int64: seats of each class, in units of 1/ONE, by the mean losses."""
        base, cells = self._of_class, self._cells
        low = np.maximum(
            cells.least.sum(axis=1), np.minimum(base, np.ceil(base / self._bound).astype(np.int64))
        )
        most = np.minimum(base * self._bound, _FAR).astype(np.int64)  # in floats first: int64 would overflow
        most = np.minimum(cells.size.sum(axis=1) * ONE, most)
        weight = base * (loss / loss.max() if loss.any() else np.ones_like(loss))
        return exact_shares(np.maximum(base, most), weight, int(base.sum()), low=low)

    def n_total(self, epoch: int) -> int:
        """Samples in an epoch."""
        return self._cells.budget

    def seats(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """See `core.fresh.FreshDraws.seats`."""
        if self._counted != self.generation:
            self._draws.forget()
            self._counted = self.generation
        return self._draws.seats(epoch)

    def _quota(self) -> NDArray[np.int64]:
        return self._cells.quota.ravel()

    def _shares(self, epochs: range) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """The epochs of each update, and its shares."""
        numbers = np.arange(epochs.start, epochs.stop)
        update = np.searchsorted(self._history.since, numbers, side="right")
        for number in np.unique(update).tolist():
            if number == 0:
                share = self._cells.share
            else:
                share = self._cells.shares_in_classes(self._history.of_class(number)[None])[0]
            yield numbers[update == number], share.ravel()

    @property
    def generation(self) -> int:  # type: ignore[override]
        """Changes when a state is loaded."""
        return self._history.generation

    def begin(self, epoch: int) -> None:
        """Note that an epoch is read: its rates may not change any more."""
        self._history.begun = max(self._history.begun, epoch)

    def record(self, epoch: int, *, begun: bool) -> str:
        """The updates that count for an epoch and the next one, in base64; see FORMAT.md."""
        n = int(np.searchsorted(self._history.since, epoch + 1, side="right"))
        return self._history.packed(n)

    def check(self, record: str, epoch: int, *, begun: bool) -> None:
        """Raise `StateError` unless a record is of updates of this plan's classes."""
        since, of_class = self._history.unpacked(record)
        size, least = self._cells.size.sum(axis=1) * ONE, self._cells.least.sum(axis=1)
        if not (
            (np.diff(since, prepend=0) > 0).all()
            and (since <= epoch + 1).all()
            and ((least <= of_class) & (of_class <= size)).all()
            and (of_class.sum(axis=1) == self._of_class.sum()).all()
        ):
            raise StateError("damaged state: its rates by class contradict the plan; load another checkpoint")

    def restore(self, record: str, epoch: int, *, begun: bool) -> None:
        """Continue from a checked record of an epoch, which may still get other rates unless it has `begun`."""
        self._history.replace(*self._history.unpacked(record), begun=epoch if begun else epoch - 1)


Keep = float | Callable[[int], float] | ClassRates


def draws_of(plan: Plan, keep: Keep | None) -> StreamDraws | None:
    """The draws of a plan by a ratio, a function that gives ratios, or rates; None for the plan's own."""
    if keep is None:
        return None
    return keep.for_plan(plan) if isinstance(keep, ClassRates) else Schedule(plan, keep)


def _numbers(name: str, values: Any, n: int) -> NDArray[np.float64]:
    """(n,) float64 of a tensor, an array or a list; `ValueError` where they are not n numbers."""
    try:
        numbers = np.asarray(_plain(values), dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be {n} numbers, got {shorten(values)}") from None
    if numbers.shape != (n,):
        raise ValueError(
            f"{name} must be {n} numbers, in the order of ClassRates.classes; got shape {numbers.shape}"
        )
    return numbers


def _plain(value: Any) -> Any:
    """A tensor of any device as an array; all else as it is."""
    return value.detach().double().cpu().numpy() if isinstance(value, torch.Tensor) else value
