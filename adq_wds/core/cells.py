"""Splits a budget over classes and over the bins of each: shares, and the seats rounded from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from adq_wds.core.allocation import exact_shares, split_budget, weigh_classes
from adq_wds.core.fresh import ONE
from adq_wds.core.share_table import ShareTable

Balance = Literal["class", "equal", "none"]
_Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Cells:
    """The cells that samples are drawn from: C classes of K bins.

    Attributes:
        size: (C, K) int64, samples that are neither left out nor must-includes.
        n_must: (C,) int64.
        weight: (C, K) float64, by the allocation rule.
        budget: samples to keep, must-includes among them.
        balance, seed: as in `build_plan`.
    """

    size: _Counts
    n_must: _Counts
    weight: NDArray[np.float64]
    budget: int
    balance: Balance | float
    seed: int

    @property
    def n_class(self) -> _Counts:
        """(C,) int64: samples of each class that may be kept."""
        n: _Counts = self.size.sum(axis=1) + self.n_must
        return n

    @cached_property
    def quota(self) -> _Counts:
        """(C, K) int64: samples kept by rank in each class and bin; must-include samples come on top."""
        return self._share_out(partial(split_budget, seed=self.seed), np.zeros_like(self.size))

    @cached_property
    def share(self) -> _Counts:
        """(C, K) int64: the exact shares that quotas are rounded from, in units of 1/ONE.

        A cell that has samples and a weight has at least one unit, where the budget allows it.
        """
        least = self.least if self._allows_least(self.budget) else np.zeros_like(self.size)
        return self._share_out(lambda *args, name, low: exact_shares(*args, low=low), least, ONE)

    @property
    def least(self) -> _Counts:
        """(C, K) int64: one unit for each cell that has samples and a weight."""
        return ((self.size > 0) & (self.weight > 0)).astype(np.int64)

    def shares(self, budgets: _Counts) -> _Counts:
        """`share` for E other budgets at once: (E, C, K) int64."""
        budgets = np.asarray(budgets)
        out = np.empty((len(budgets), *self.size.shape), dtype=np.int64)
        allows = self._allows_least(budgets)
        for i in np.flatnonzero(~allows).tolist():
            out[i] = replace(self, budget=int(budgets[i])).share
        must = self.n_must * ONE
        if self.balance == "none":
            flat = self._table.at(budgets[allows, None] * ONE - must.sum())
            out[allows] = flat.reshape(-1, *self.size.shape)
        else:
            out[allows] = self.shares_in_classes(self._table.at(budgets[allows, None] * ONE)[:, 0] - must)
        return out

    @cached_property
    def _table(self) -> ShareTable:
        """The shares of all cells where the balance is "none", else of classes with their must-includes."""
        if self.balance == "none":
            size, weight, low = self.size * ONE, self.weight, self.least
        else:
            size, weight = self.n_class * ONE, weigh_classes(self.n_class, self.balance)
            low = self.n_must * ONE + self.least.sum(axis=1)
        return ShareTable(size.reshape(1, -1), weight.reshape(1, -1), low.reshape(1, -1))

    def shares_in_classes(self, of_class: _Counts) -> _Counts:
        """The shares of bins where classes have these: (E, C) int64 in units of 1/ONE → (E, C, K) int64.

        Each class has at least the units of `least` and at most its samples.
        """
        return self._of_bins.at(of_class)

    @cached_property
    def _of_bins(self) -> ShareTable:
        return ShareTable(self.size * ONE, self.weight, self.least)

    def _allows_least(self, budget: int | _Counts) -> NDArray[np.bool_]:
        """Whether a budget, or each of some, has a unit for each cell that should have one."""
        return np.asarray((np.asarray(budget) - self.n_must.sum()) * ONE >= self.least.sum())

    def _share_out(self, split: Callable[..., _Counts], least: _Counts, unit: int = 1) -> _Counts:
        """(C, K) int64: the budget less must-includes, split over classes and then over the bins of each.

        Counted in 1/unit samples; each cell gets at least `least`, (C, K) int64.
        """
        size, must, budget = self.size * unit, self.n_must * unit, self.budget * unit
        if self.balance == "none":
            left = budget - int(must.sum())
            flat = split(size.ravel(), self.weight.ravel(), left, name="", low=least.ravel())
            return flat.reshape(size.shape)
        low, weight = must + least.sum(axis=1), weigh_classes(self.n_class, self.balance)
        of_class = split(self.n_class * unit, weight, budget, name="classes", low=low) - must
        cells = zip(size, self.weight, of_class.tolist(), least, strict=True)
        return np.stack(
            [split(s, w, b, name=f"class {c}", low=low) for c, (s, w, b, low) in enumerate(cells)]
        )
