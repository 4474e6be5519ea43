"""Finds one sample of a plan by its key, and names keys like one that is not there."""

from __future__ import annotations

import difflib
from bisect import bisect_left

from adq_wds.errors import PlanError, shorten
from adq_wds.tables.plan_view import PlanView

_NEIGHBOURS = 50  # keys on either side of a wrong one, in the order of text, that are compared with it


def find_sample(plan: PlanView, key: str | tuple[str, str]) -> tuple[str, int]:
    """The shard and the row of the sample of a key.

    Args:
        plan: the plan.
        key: KEY, or "SHARD/KEY", or (shard, key).

    Raises:
        PlanError: no sample has that key (close ones are named), or several do (their shards are named).
    """
    pairs = (
        [(name, key[len(name) + 1 :]) for name in plan.shards if key.startswith(f"{name}/")]
        if isinstance(key, str)
        else [key]
    )
    rows = [(name, row) for name, rest in pairs if name in plan.shards for row in _rows(plan, name, rest)]
    if not rows and isinstance(key, str):
        rows = [(name, row) for name in plan.shards for row in _rows(plan, name, key)]
    if len(rows) == 1:
        return rows[0]
    if rows:
        names = ", ".join(name for name, _ in rows[:5]) + (", ..." if len(rows) > 5 else "")
        raise PlanError(f"sample {shorten(key)} stands in {len(rows)} shards, {names}; give SHARD/KEY")
    close = _close(plan, key if isinstance(key, str) else key[1])
    remedy = (
        f"did you mean {', '.join(map(shorten, close))}?" if close else "`adq show --keys` lists those kept"
    )
    raise PlanError(f"sample {shorten(key)} is not in the plan; {remedy}")


def _rows(plan: PlanView, name: str, key: str) -> list[int]:
    keys = plan.shard(name, hold=False).spans.keys
    return [keys.index(key)] if key in keys else []


def _close(plan: PlanView, key: str) -> list[str]:
    """At most three keys like one that is not there: a part of it or around it, or next to it in the order of text."""
    keys = sorted({each for name in plan.shards for each in plan.shard(name, hold=False).spans.keys})
    at = bisect_left(keys, key)
    parts = [each for each in keys if each and (each in key or key in each)][: 2 * _NEIGHBOURS]
    near = keys[max(0, at - _NEIGHBOURS) : at + _NEIGHBOURS]
    return difflib.get_close_matches(key, dict.fromkeys([*parts, *near]), cutoff=0.5) or parts[:3]
