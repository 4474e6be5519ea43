"""Explains the decision on one sample of a plan: why it is kept or not, and what would have kept it."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from typing import Any

from adq_wds.errors import PlanError, shorten
from adq_wds.tables.features import Features
from adq_wds.tables.nearest import Nearest, bad_reason, nearest_kept
from adq_wds.tables.plan_cells import n_planned, plan_cells
from adq_wds.tables.plan_find import find_sample
from adq_wds.tables.plan_rows import (
    ALWAYS,
    BAD,
    DUPLICATE,
    EXCLUDED,
    KEPT,
    LABEL,
    QUOTA,
    SHOWN_REASONS,
)
from adq_wds.tables.plan_view import PlanView

AnyFeatures = Features | str | os.PathLike[str]


@dataclass(frozen=True)
class Why:
    """The decision on one sample; its text says it in words.

    Attributes:
        shard, key, index: the sample, and its position in the shard.
        kept: the decision.
        reason: "kept", "quota", "duplicate", "label", "bad" or "excluded"; "left out" in a plan of version 1, which
            does not say why.
        words: the reason in words.
        label, name: its class and the class's name; None where there is none.
        bin, pick: its bin, and the position in which the bin took it; None for a sample in no bin.
        rank: it is kept when below `quota`; None for a sample in no bin, and for one that is kept in any case.
        quota, size: of its class and bin: how many are kept by rank, of how many; None for a sample in no bin.
        keep: the plan's keep ratio; None for a selection made elsewhere.
        keep_needed: the least keep ratio that keeps it, all else equal; None where it is kept, is in no bin, or the plan
            does not say (version 1, the allocation "published", or one of yours).
        duplicate_of: "SHARD/KEY" of the sample that stays, of a copy; else None.
        margin: how well the label fits; None where it was not measured.
        nearest: with features, the most similar other sample that is kept, of its class; None where there is none.
    """

    shard: str
    key: str
    index: int
    kept: bool
    reason: str
    words: str
    label: int | None
    name: str | None
    bin: int | None
    pick: int | None
    rank: int | None
    quota: int | None
    size: int | None
    keep: float | None
    keep_needed: float | None
    duplicate_of: str | None
    margin: float | None
    nearest: Nearest | None

    @property
    def ranks_short(self) -> int | None:
        """By how many ranks it misses the quota; None where it is kept, or is in no bin."""
        return None if self.kept or self.rank is None else self.rank - (self.quota or 0) + 1

    def __str__(self) -> str:
        lines = [
            f"{_shown(f'{self.shard}/{self.key}')} is {'kept' if self.kept else 'not kept'}: {self.words}"
        ]
        if self.label is not None:
            name = "" if self.name is None else f" ({_shown(self.name)})"
            lines.append(f"class {self.label}{name}")
        if self.bin is not None:
            rank = "" if self.rank is None else f", rank {self.rank}"
            lines.append(
                f"bin {self.bin} keeps {self.quota} of {self.size} of its class; pick {self.pick}{rank}, from 0"
            )
        if self.keep_needed is not None:
            least = math.ceil(self.keep_needed * 1e4) / 1e4
            lines.append(f"kept from a keep ratio of {least:g} on; the plan's is {self.keep:g}")
        if self.margin is not None:
            lines.append(f"margin of its label {self.margin:.3f}")
        if self.nearest is not None:
            kept = _shown(f"{self.nearest.shard}/{self.nearest.key}")
            lines.append(f"nearest kept sample of its class {kept}, cosine {self.nearest.cosine:.4f}")
        return "\n".join(lines)


def explain(
    plan: PlanView,
    key: str | tuple[str, str],
    *,
    features: AnyFeatures | None = None,
) -> Why:
    """Explain the decision on one sample.

    Args:
        plan: the plan.
        key: the sample's; "SHARD/KEY" or (shard, key) where a key stands in several shards.
        features: folder of the features, for the nearest kept sample of its class.

    Raises:
        PlanError: no sample has that key (close ones are named), or several do (their shards are named); damaged rows,
            or features of other shards.
        FeaturesError: a shard's features are missing or damaged.
    """
    name, row = find_sample(plan, key)
    try:
        return _explain(plan, name, row, features)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as cause:
        raise PlanError(f"{plan.path or 'plan'}: damaged header: {shorten(str(cause))}") from cause


def _explain(plan: PlanView, name: str, row: int, features: AnyFeatures | None) -> Why:
    shard = plan.with_reasons(name)
    header = plan.header
    classes = [entry["label"] for entry in header["classes"]]
    label, bin, rank = (int(column[row]) for column in (shard.label, shard.bin, shard.rank))
    kept, reason = bool(shard.kept[row]), int(shard.derived_reason()[row])
    binned, always = bin >= 0, rank == ALWAYS
    c = classes.index(label) if binned else -1
    quota, size = (int(header["cells"][cells][c][bin]) if binned else None for cells in ("quota", "size"))
    keep = header["settings"].get("keep")
    margin = float("nan") if shard.margin is None else float(shard.margin[row])
    why = Why(
        shard=name,
        key=shard.spans.keys[row],
        index=int(shard.spans.index[row]),
        kept=kept,
        reason=SHOWN_REASONS[reason],
        words="",
        label=label if label >= 0 else None,
        name=header["names"][label] if header.get("names") and label >= 0 else None,
        bin=bin if binned else None,
        pick=int(shard.pick[row]) if binned else None,
        rank=rank if binned and not always else None,
        quota=quota,
        size=size,
        keep=None if keep is None else float(keep),
        keep_needed=_keep_needed(plan, c, bin, rank) if reason == QUOTA else None,
        duplicate_of=(shard.duplicate_of or {}).get(row),
        margin=None if math.isnan(margin) else margin,
        nearest=None,
    )
    detail = ""
    if features is not None:
        features = features if isinstance(features, Features) else Features(features, shards=plan.shards)
        if reason == BAD:
            detail = bad_reason(features, shard, row)
        else:
            why = replace(why, nearest=nearest_kept(plan, features, shard, row))
    return replace(why, words=_words(why, reason, always, header, detail))


def _words(why: Why, reason: int, always: bool, header: Any, detail: str) -> str:
    """The reason in words."""
    if not header["classes"]:
        by = header["settings"].get("by")
        chosen = "by hand" if by is None else f"by {_shown(str(by))}"
        return f"it was {'' if why.kept else 'not '}chosen {chosen}"
    if reason == KEPT:
        return (
            "it is on the list of those to include"
            if always
            else f"its rank {why.rank} is below the quota {why.quota}"
        )
    if reason == QUOTA:
        return f"its rank {why.rank} is not below the quota {why.quota}, {why.ranks_short} short"
    if reason == DUPLICATE:
        return f"it is a copy of {_shown(str(why.duplicate_of))}"
    if reason == LABEL:
        return "its label is doubted"
    if reason == BAD:
        return f"it could not be used{detail and ': '}{_shown(detail)}"
    if reason == EXCLUDED:
        planned = why.label is None or why.label in [entry["label"] for entry in header["classes"]]
        return "it is on the list of those to exclude" if planned else "its class was not planned"
    return "it is in no bin, and a plan of version 1 does not say why"


def _shown(name: str) -> str:
    """A name on one line; names in a plan come from strangers."""
    return name if name.isprintable() else repr(name)


def _keep_needed(plan: PlanView, c: int, bin: int, rank: int) -> float | None:
    """The least keep ratio at which the quota of a class (its position) and bin is above a rank."""
    if plan.header["settings"].get("allocation") not in ("adaptive", "uniform"):
        return None  # else weights hang on the keep ratio, or are not in the plan
    try:
        cells = plan_cells(plan)
    except PlanError:  # it can share no other budget: of version 1, or its shares follow from other rules
        return None
    less, enough = plan.n_kept, int(cells.n_class.sum())
    while enough - less > 1:  # quotas never fall as the budget grows
        budget = (less + enough) // 2
        if replace(cells, budget=budget).quota[c, bin] > rank:
            enough = budget
        else:
            less = budget
    return enough / n_planned(plan)
