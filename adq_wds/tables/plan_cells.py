"""Derives from a plan's header the cells that its rules share any budget over."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adq_wds.core.allocation import adaptive, check_ratio, published
from adq_wds.core.cells import Cells
from adq_wds.core.fresh import ONE
from adq_wds.errors import PlanError, shorten
from adq_wds.tables.plan_rows import BAD
from adq_wds.tables.plan_view import PlanView


def weigh_cells(header: Mapping[str, Any], size: NDArray[np.int64]) -> NDArray[np.float64] | None:
    """(C, K) float64: the weights of cells by the plan's allocation; None where that is a function of the user's.

    Raises:
        KeyError, TypeError, ValueError: a damaged header.
    """
    settings = header["settings"]
    name, keep = settings.get("allocation"), settings.get("keep")
    if name == "uniform":
        return size.astype(np.float64)
    if name not in ("adaptive", "published"):
        return None
    importance = np.array([entry["importance"] for entry in header["bins"]], dtype=np.float64)
    if not ((importance >= 0) & (importance <= 1)).all():  # nor NaN
        raise ValueError("an importance that is no number in [0, 1]")
    rule = partial(adaptive if name == "adaptive" else published, alpha=settings["alpha"])
    return np.stack([rule(of_class, importance, keep) for of_class in size])


def plan_cells(plan: PlanView) -> Cells:
    """The cells of a plan, with its budget.

    Weights of a user's allocation are not in a plan: its shares stand for them.

    Raises:
        PlanError: the plan cannot share another budget: it is of version 1, or has no bins, or its shares do not follow from
            its settings.
    """
    header: Mapping[str, Any] = plan.header
    where = plan.path or "plan"
    if not header["classes"]:
        raise PlanError(f"{where}: has no bins to draw from at another ratio; leave keep= out")
    if header["version"] == 1:
        raise PlanError(
            f"{where}: version 1 has its quotas only, for one ratio; plan again, or leave keep= out"
        )
    try:
        size = np.array(header["cells"]["size"], dtype=np.int64)
        share = np.array(header["cells"]["share"], dtype=np.float64) * ONE
        n_must = np.array([entry["must_include"] for entry in header["classes"]], dtype=np.int64)
        weight, balance = weigh_cells(header, size), header["settings"]["balance"]
        if balance not in ("class", "equal", "none"):
            check_ratio("balance", balance)
        seed = header["settings"]["seed"]
        cells = Cells(size, n_must, share if weight is None else weight, plan.n_kept, balance, seed)
        valid = (n_must >= 0).all() and n_must.sum() <= plan.n_kept <= cells.n_class.sum()
        follows = valid and (weight is None or (cells.shares(np.array([plan.n_kept])) == share).all())
    except (KeyError, TypeError, ValueError, OverflowError) as cause:
        raise PlanError(f"{where}: damaged header: {shorten(str(cause))}") from cause
    if not follows:
        raise PlanError(
            f"{where}: its shares are not those that its settings give now, so it cannot draw at another ratio; plan "
            "again, or leave keep= out"
        )
    return cells


def n_planned(plan: PlanView) -> int:
    """How many samples the keep ratio counts: those of the chosen classes, whatever was left out of these."""
    header: Mapping[str, Any] = plan.header
    if "exclude" not in header["settings"]:  # so what is excluded is of classes that were not chosen
        counts = header.get("reasons", {})
        return plan.n_samples - int(counts.get("bad", 0)) - int(counts.get("excluded", 0))
    classes = [entry["label"] for entry in header["classes"]]
    return sum(
        int((np.isin(shard.label, classes) & (shard.reason != BAD)).sum())
        for shard in plan
        if shard.reason is not None
    )
