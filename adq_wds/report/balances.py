"""Says how unequal the classes of a plan are, and what each choice of balance would keep of them."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from adq_wds.core.allocation import budget_for, split_budget, weigh_classes
from adq_wds.tables.plan_cells import weigh_cells

_BALANCES: tuple[str | float, ...] = ("class", 0.5, "equal")


def describe_balances(header: dict[str, Any]) -> dict[str, Any]:
    """What plans of the same budget with other balances keep.

    Returns:
        `kept`, by balance a count for each class, exactly that of such a plan ("none" is missing where the weights come
        from a function of the user's); `equal_up_to`, the largest keep ratio at which "equal" gives each class as many
        as any other, null where there are no samples.

    Raises:
        ValueError: counts that contradict each other.
    """
    classes, settings = header["classes"], header["settings"]
    n, must, kept = (
        np.array([entry[name] for entry in classes], dtype=np.int64) for name in ("n", "must_include", "kept")
    )
    budget = int(kept.sum())
    if (must < 0).any() or (must > n).any() or not must.sum() <= budget <= n.sum():
        raise ValueError("counts of classes contradict each other")
    split = partial(split_budget, seed=settings.get("seed", 0))
    balances = {
        str(balance): split(n, weigh_classes(n, balance), budget, name="classes", low=must)
        for balance in _BALANCES
    }
    size = np.array(header["cells"]["size"], dtype=np.int64).reshape(len(n), -1)
    weight = weigh_cells(header, size)
    if weight is not None:
        if (size < 0).any() or (size.sum(axis=1) + must != n).any():
            raise ValueError("counts of cells and classes contradict each other")
        cells = split(size.ravel(), weight.ravel(), budget - int(must.sum()))
        balances["none"] = cells.reshape(size.shape).sum(axis=1) + must
    present = n[n > 0]
    equal = len(present) * int(present.min()) if len(present) else None
    return {
        "kept": {balance: counts.tolist() for balance, counts in balances.items()},
        "equal_up_to": None if equal is None else equal / _n_chosen(header, int(n.sum()), budget),
    }


def _n_chosen(header: dict[str, Any], n_left: int, budget: int) -> float:
    """How many samples the keep ratio counts: those of the chosen classes, whatever is left out of these."""
    reasons, settings = header.get("reasons", {}), header["settings"]
    n = n_left + reasons.get("duplicate", 0) + reasons.get("label", 0)
    if settings.get("exclude"):
        n += reasons["excluded"]  # some of them may be of classes that were not chosen
    keep = settings.get("keep")
    if keep and 0 < budget < n_left and budget_for(keep, n) != budget:
        return float(budget / keep)
    return float(n)


def show_balances(balances: dict[str, Any], classes: list[dict[str, Any]]) -> list[str]:
    """The same as lines for people."""
    n = [entry["n"] for entry in classes]
    least, most = min(filter(None, n)), max(n)
    smallest, kept = n.index(least), balances["kept"]
    counts = ", ".join(f"{of_class[smallest]:,} with {balance}" for balance, of_class in kept.items())
    up_to = f"--balance equal gives classes equal numbers up to --keep {balances['equal_up_to']:.2g}"
    used_up = sum(a == b > 0 for a, b in zip(kept["equal"], n, strict=True))
    if used_up:
        up_to += f"; at this ratio {used_up:,} of {len(n):,} classes would give all they have"
    return [
        f"classes hold {least:,} to {most:,} samples ({most / least:,.0f} : 1); "
        f"by --balance the smallest would keep {counts}",
        up_to,
    ]
