"""Splits the budget over classes and bins by importance and size, and ranks the samples inside each."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from adq_wds.core.allocation import budget_for, published, uniform
from adq_wds.core.cells import Cells
from adq_wds.errors import PlanError, shorten
from adq_wds.planning.options import Options
from adq_wds.planning.samples import Samples, keyed_draws
from adq_wds.protocols import Allocation
from adq_wds.registry import ALLOCATIONS
from adq_wds.tables.bins import Bins
from adq_wds.tables.plan_rows import ALWAYS, KEPT, NEVER

Draw = Literal["random", "ordered"]
_Counts = NDArray[np.int64]

logger = logging.getLogger("adq_wds")


def equal_to_alpha_0(cells: Cells, options: Options) -> bool | None:
    """Whether importance made no difference: the quotas are those of alpha 0.

    None where nothing could differ: no importance is used, there is one bin, or none or all are kept.
    """
    function = options.allocation not in ALLOCATIONS
    asked = options.allocation != "uniform" and (function or options.alpha > 0)
    if not asked or cells.size.shape[1] == 1 or cells.budget in (0, cells.n_class.sum()):
        return None
    rule = partial(published, alpha=0.0) if options.allocation == "published" else uniform
    weight = np.stack([rule(size, np.zeros(len(size)), options.keep) for size in cells.size])
    return bool((replace(cells, weight=weight).quota == cells.quota).all())


def make_cells(samples: Samples, bins: Bins, importance: NDArray[np.float64], options: Options) -> Cells:
    """The cells of samples, and the budget of keep · the samples of the chosen classes, copies too.

    Raises:
        PlanError: more must-includes than the budget.
        ValueError: the allocation gives weights that cannot be used.
    """
    size = np.zeros((len(samples.classes), bins.n_bins), dtype=np.int64)
    for i, rows in samples.by_class(samples.free):
        size[i] = np.bincount(bins.bin[rows], minlength=bins.n_bins)
    n_must = np.bincount(samples.row_of(samples.label[samples.must]), minlength=len(size))
    weight = np.stack([weigh_bins(options, of_class, importance) for of_class in size])
    n_chosen = int(np.isin(samples.label, samples.classes).sum())
    n_left = int(size.sum() + n_must.sum())
    budget = budget_for(options.keep, n_chosen)
    if budget < n_must.sum():
        raise PlanError(
            f"{n_must.sum()} must-include samples, but keep={options.keep} leaves a budget of {budget}; raise keep or "
            "name fewer"
        )
    if budget > n_left:
        logger.warning(
            "keep=%s of %d samples is %d, but %d are left without copies and other samples left out: all of them are kept",
            options.keep, n_chosen, budget, n_left,
        )  # fmt: skip
    return Cells(size, n_must, weight, min(budget, n_left), options.balance, int(options.seed))


def weigh_bins(options: Options, size: _Counts, importance: NDArray[np.float64]) -> NDArray[np.float64]:
    """(K,) float64: the weights that the allocation gives bins of (K,) sizes."""
    rule: Allocation = options.rule
    result = rule(size.copy(), importance.copy(), options.keep)  # it may work in place
    weight = np.asarray(result, dtype=np.float64)
    if weight.shape != size.shape or not np.isfinite(weight).all() or (weight < 0).any():
        raise ValueError(
            f"allocation {options.allocation!r} must give {size.shape} weights, finite and >= 0, got {shorten(weight)}"
        )
    return weight


def take_seats(samples: Samples, bins: Bins, quota: _Counts, options: Options) -> None:
    """Rank the free samples of each cell by keyed draw or pick, ties by position; keep those with rank <
    quota (C, K)."""
    left_out = samples.reason != KEPT
    samples.bin = np.where(left_out, np.int16(-1), bins.bin)
    samples.pick = np.where(left_out, np.int32(-1), bins.pick)
    keyed = options.draw == "random"
    order: NDArray[Any] = keyed_draws(samples.features, options.seed) if keyed else samples.pick
    samples.rank = np.where(samples.must, np.int32(ALWAYS), np.int32(NEVER))
    samples.kept = samples.must.copy()
    for i, of_class in samples.by_class(samples.free):
        bin = samples.bin[of_class]
        by_bin = np.lexsort((order[of_class], bin))  # stable, so ties keep their position
        rows, size = of_class[by_bin], np.bincount(bin, minlength=bins.n_bins)
        rank = np.arange(len(rows)) - np.repeat(np.cumsum(size) - size, size)
        samples.rank[rows] = rank
        samples.kept[rows] = rank < np.repeat(quota[i], size)
