"""How do bins become a plan? Importance per bin, quotas per class and bin, ranks per sample."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from adq_wds.checks import listed
from adq_wds.core.allocation import budget_for, check_alpha, exact_shares, split_budget, uniform
from adq_wds.core.copies import who_stays
from adq_wds.core.fresh import ONE
from adq_wds.core.rng import check_seed, draws
from adq_wds.core.scores import DECIMALS, importance
from adq_wds.errors import PlanError, shorten
from adq_wds.files import canonical_json, sha256_text
from adq_wds.planning.bins import find_copies, rounded
from adq_wds.protocols import Allocation
from adq_wds.shards.names import base_name
from adq_wds.tables.bins import Bins
from adq_wds.tables.features import Features
from adq_wds.tables.features_file import NO_LABEL, FeaturesFile
from adq_wds.tables.plan import Plan
from adq_wds.tables.plan_rows import (
    ALWAYS,
    BAD,
    DUPLICATE,
    EXCLUDED,
    KEPT,
    NEVER,
    QUOTA,
    REASONS,
    PlanShard,
)
from adq_wds.tables.spans import Spans

SampleId = str | tuple[str, str]  # a key, or (shard, key) where the key stands in several shards

logger = logging.getLogger("adq_wds")

Balance = Literal["class", "none"]
Draw = Literal["random", "ordered"]
Normalise = Literal["sum", "minmax"]
_CHOICES = {"balance": Balance, "draw": Draw, "normalise": Normalise}


@dataclass(frozen=True)
class PlanSettings:
    """Everything that decides a plan, given its bins; checked when made, stored in the plan's header.

    Args:
        keep: ratio of samples kept, in [0, 1].
        seed: of the keyed draw.
        alpha: share of the importance in a bin's rate, in [0, 1].
        allocation: name of the allocation rule.
        balance: "class" gives each class its share of the budget first; "none" lets all cells compete.
        draw: "random" ranks the samples of a bin by keyed draw, "ordered" by GraphCut's pick order.
        scores: which scores add up to the importance.
        normalise: "sum" or "minmax".
        diversity_head: what the diversity was measured behind; "none" for the embeddings themselves.
    """

    keep: float
    seed: int = 0
    alpha: float = 0.65
    allocation: str = "adaptive"
    balance: Balance = "class"
    draw: Draw = "random"
    scores: tuple[str, ...] = ("texture", "diversity")
    normalise: Normalise = "sum"
    diversity_head: str = "none"

    def __post_init__(self) -> None:
        budget_for(self.keep, 0)
        check_seed(self.seed)
        check_alpha(self.alpha)
        if not self.scores or len(set(self.scores)) != len(self.scores):
            raise ValueError(f"scores must name one or more, each once, got {self.scores}")
        for name, known in _CHOICES.items():
            if getattr(self, name) not in get_args(known):
                raise ValueError(f"{name} must be one of {get_args(known)}, got {getattr(self, name)!r}")


def plan_bins(
    features: Features,
    bins: Bins,
    settings: PlanSettings,
    allocation: Allocation,
    *,
    values: Mapping[str, NDArray[np.float64]] | None = None,
    must_include: Iterable[SampleId] = (),
) -> Plan:
    """Turn bins into exact decisions.

    Args:
        features: the set that was binned.
        bins: its bins.
        settings: ratio, seed and rules.
        allocation: the rule that `settings.allocation` names: (size, importance, keep) → weights.
        values: (K,) float64 of each score that the bins do not hold, or that is to replace theirs; NaN for an empty
            bin. All are shown, `settings.scores` are used.
        must_include: samples that are kept whatever their bin; they count against their class's budget.

    Returns:
        a plan in memory, over all samples, usable or not.

    Raises:
        ValueError: the bins lack a score, or the allocation gives weights that cannot be used.
        PlanError: bins of other features, a must-include sample that is not there or not usable, or more of
            them than the budget.
    """
    if bins.header["features"] != features.hash or bins.shards != [(file.shard, file.n) for file in features]:
        raise PlanError(f"{features.folder}: the bins were made from other features; bin these again")
    scores = bins.scores() | dict(values or {})
    for name in settings.scores:
        if name not in scores:
            raise ValueError(f"the bins have no score {name!r}, only {sorted(scores)}")
    draw, asked = _draws_and_asked(features, settings.seed, must_include)
    chosen = np.isin(bins.label, bins.classes)
    for sample, i in asked.items():
        if not chosen[i]:
            raise PlanError(
                f"must-include sample {shorten(sample)} is of class {bins.label[i]}, which is left out; add its class"
            )
    must = np.zeros(len(draw), dtype=bool)
    must[list(asked.values())] = True
    value = importance([scores[name] for name in sorted(settings.scores)], normalise=settings.normalise)
    rows = _sort_samples(features, bins, must)
    cells = _Cells.of(rows, bins, value, settings, allocation)
    quota = cells.quotas(settings)
    rows.rank_within(cells.row, draw if settings.draw == "random" else bins.pick, quota)
    shards, kept_texture = _shards(features, bins, rows)
    header = _header(features, bins, settings, cells, quota, value, scores, shards, kept_texture)
    header["copies_of_other_label"] = _say_other_labels(features, bins.label, rows.stays)
    header["settings"]["must_include"] = (
        sha256_text(canonical_json(np.flatnonzero(must).tolist())) if must.any() else None
    )
    plan = Plan.from_shards(shards, header)
    if settings.keep > 0 and plan.n_kept == 0:
        logger.warning("keep=%s keeps 0 of %d samples", settings.keep, plan.n_samples)
    return plan


@dataclass
class _Rows:
    """Each of the N usable samples: what it is, and what becomes of it.

    Attributes:
        bin, pick: as in `Bins`, -1 also for a copy that only a must-include sample made one.
        must: (N,) bool.
        chosen: (N,) bool, of a class that is planned.
        stays: (N,) int64, position of the copy that stays; its own where it stays itself.
        rank, kept: as in `PlanShard`; set by `rank_within`.
    """

    bin: NDArray[np.int16]
    pick: NDArray[np.int32]
    must: NDArray[np.bool_]
    chosen: NDArray[np.bool_]
    stays: NDArray[np.int64]
    rank: NDArray[np.int32]
    kept: NDArray[np.bool_]

    @property
    def copy(self) -> NDArray[np.bool_]:
        """(N,) bool: left out as a copy."""
        copy: NDArray[np.bool_] = self.stays != np.arange(len(self.stays))
        return copy

    @property
    def free(self) -> NDArray[np.bool_]:
        """(N,) bool: in a bin and to be drawn from it."""
        return (self.bin >= 0) & ~self.must

    @property
    def reason(self) -> NDArray[np.uint8]:
        """(N,) uint8, as in `PlanShard`."""
        outside = np.where(self.copy, DUPLICATE, EXCLUDED)
        return np.where(self.kept, KEPT, np.where(self.bin >= 0, QUOTA, outside)).astype(np.uint8)

    def rank_within(self, row: NDArray[np.int64], order: NDArray[Any], quota: NDArray[np.int64]) -> None:
        """Rank the free samples of each class and bin by ascending `order`, ties by position; keep rank < quota."""
        rows = np.flatnonzero(self.free)
        cell = row[rows] * quota.shape[1] + self.bin[rows]
        by_cell = np.lexsort((order[rows], cell))  # stable, so ties keep their position
        _, starts, counts = np.unique(cell[by_cell], return_index=True, return_counts=True)
        self.rank[rows[by_cell]] = np.arange(len(rows)) - np.repeat(starts, counts)
        self.rank[self.must] = ALWAYS
        self.kept = self.must.copy()
        self.kept[rows] = self.rank[rows] < quota.ravel()[cell]


def _sort_samples(features: Features, bins: Bins, must: NDArray[np.bool_]) -> _Rows:
    """The samples with their bins, of which copies are taken out that the bins still hold."""
    n = len(must)
    first = find_copies(features, bins.label, bins.classes, bins.header.get("dedup"))
    stays = who_stays(first, must)
    gone = stays != np.arange(n)
    bin, pick = bins.bin.copy(), bins.pick.copy()
    bin[gone] = pick[gone] = -1
    rank = np.full(n, NEVER, dtype=np.int32)
    chosen = np.isin(bins.label, bins.classes)
    return _Rows(bin, pick, must, chosen, stays, rank, np.zeros(n, dtype=bool))


@dataclass(frozen=True)
class _Cells:
    """What is drawn from: C classes of K bins.

    Attributes:
        row: (N,) int64, each sample's class as a position among the C.
        size: (C, K) int64, samples that are neither copies nor must-includes.
        n_must: (C,) int64.
        weight: (C, K) float64, by the allocation rule.
        budget: samples to keep, must-includes among them.
    """

    row: NDArray[np.int64]
    size: NDArray[np.int64]
    n_must: NDArray[np.int64]
    weight: NDArray[np.float64]
    budget: int

    @classmethod
    def of(
        cls,
        rows: _Rows,
        bins: Bins,
        value: NDArray[np.float64],
        settings: PlanSettings,
        allocation: Allocation,
    ) -> _Cells:
        """The cells of samples, and the budget of keep · the samples of the chosen classes, copies too."""
        row = np.searchsorted(bins.classes, bins.label)
        n_classes, free = len(bins.classes), rows.free
        cells = np.bincount(row[free] * bins.n_bins + rows.bin[free], minlength=n_classes * bins.n_bins)
        size = cells.reshape(n_classes, bins.n_bins)
        n_must = np.bincount(row[rows.must], minlength=n_classes)
        weight = np.stack([_weights(allocation, of_class, value, settings) for of_class in size])
        n_chosen, n_left = int(rows.chosen.sum()), int(size.sum() + n_must.sum())
        budget = budget_for(settings.keep, n_chosen)
        if budget < n_must.sum():
            raise PlanError(
                f"{n_must.sum()} must-include samples, but keep={settings.keep} leaves a budget of {budget}; raise "
                "keep or name fewer"
            )
        if budget > n_left:
            logger.warning(
                "keep=%s of %d samples is %d, but %d are left without copies: all of them are kept",
                settings.keep, n_chosen, budget, n_left,
            )  # fmt: skip
        return cls(row, size, n_must, weight, min(budget, n_left))

    @property
    def n_class(self) -> NDArray[np.int64]:
        """(C,) int64: samples of each class that may be kept."""
        n: NDArray[np.int64] = self.size.sum(axis=1) + self.n_must
        return n

    def quotas(self, settings: PlanSettings) -> NDArray[np.int64]:
        """(C, K) int64: samples kept by rank in each class and bin; must-include samples come on top."""
        left, seed = self.budget - int(self.n_must.sum()), int(settings.seed)
        if settings.balance == "none":
            return split_budget(self.size.ravel(), self.weight.ravel(), left, seed=seed).reshape(
                self.size.shape
            )
        n, weight = self.n_class, _CLASS_WEIGHTS[settings.balance](self.n_class)
        budgets = (
            split_budget(n, weight, self.budget, seed=seed, name="classes", low=self.n_must) - self.n_must
        )
        split = zip(self.size, self.weight, budgets.tolist(), strict=True)
        return np.stack(
            [split_budget(s, w, b, seed=seed, name=f"class {c}") for c, (s, w, b) in enumerate(split)]
        )

    def shares(self, settings: PlanSettings) -> NDArray[np.int64]:
        """(C, K) int64: what the quotas are rounded from, in units of 1/ONE.

        A cell that has samples and a weight has at least one unit, where the budget allows it.
        """
        size, left = self.size * ONE, (self.budget - int(self.n_must.sum())) * ONE
        least = ((self.size > 0) & (self.weight > 0)).astype(np.int64)
        if least.sum() > left:
            least[:] = 0
        if settings.balance == "none":
            shares = exact_shares(size.ravel(), self.weight.ravel(), left, low=least.ravel())
            return shares.reshape(size.shape)
        n, weight, must = self.n_class, _CLASS_WEIGHTS[settings.balance](self.n_class), self.n_must * ONE
        budgets = exact_shares(n * ONE, weight, self.budget * ONE, low=must + least.sum(axis=1)) - must
        split = zip(size, self.weight, budgets.tolist(), least, strict=True)
        return np.stack([exact_shares(s, w, b, low=low) for s, w, b, low in split])


_CLASS_WEIGHTS: dict[str, Callable[[NDArray[np.int64]], NDArray[np.float64]]] = {
    "class": lambda n: n.astype(np.float64),
}


def _say_other_labels(features: Features, label: NDArray[np.int32], stays: NDArray[np.int64]) -> int:
    """How many copies have another label than the sample that stays; a warning names one."""
    other = np.flatnonzero(label != label[stays])
    if len(other):
        i, j = int(other[0]), int(stays[other[0]])
        names = _names_of(features, [i, j])
        logger.warning(
            "%d copies have another label than the sample that stays, such as %s (class %d) of %s (class %d)",
            len(other), shorten(names[i]), label[i], shorten(names[j]), label[j],
        )  # fmt: skip
    return len(other)


def _names_of(features: Features, positions: Iterable[int]) -> dict[int, str]:
    """SHARD/KEY of some samples, by position."""
    names: dict[int, str] = {}
    wanted, first = np.unique(np.fromiter(positions, dtype=np.int64)), 0
    for file in features:
        here = wanted[(wanted >= first) & (wanted < first + file.n)]
        if len(here):
            keys = file.read(["key"])["key"].take(here - first).to_pylist()
            names |= {i: f"{file.shard}/{key}" for i, key in zip(here.tolist(), keys, strict=True)}
        first += file.n
    return names


def _draws_and_asked(
    features: Features, seed: int, must_include: Iterable[SampleId]
) -> tuple[NDArray[np.uint64], dict[SampleId, int]]:
    """(N,) uint64 keyed draws, and the position of every must-include sample."""
    asked = [tuple(name) if isinstance(name, list) else name for name in listed("must_include", must_include)]
    places: dict[SampleId, list[int]] = {name: [] for name in asked}
    all_draws, first = [], 0
    for file in features:
        keys = file.read(["key"])["key"].to_pylist()
        all_draws.append(draws(seed, 0, base_name(file.shard), keys))
        if places:
            for i, key in enumerate(keys, first):
                for name in (key, (file.shard, key)):
                    if name in places:
                        places[name].append(i)
        first += file.n
    for name, found in places.items():
        if len(found) != 1:
            problem = (
                "is in several shards; give (shard, key)"
                if found
                else "is not among the usable samples; expected a key, or (shard, key)"
            )
            raise PlanError(f"must-include sample {shorten(name)} {problem}")
    return np.concatenate(all_draws), {name: i for name, (i,) in places.items()}


def _weights(
    allocation: Allocation, size: NDArray[np.int64], value: NDArray[np.float64], settings: PlanSettings
) -> NDArray[np.float64]:
    given = allocation(size.copy(), value.copy(), settings.keep)  # copies: a rule may work in place
    weight = np.asarray(given, dtype=np.float64)
    if weight.shape != size.shape or not np.isfinite(weight).all() or (weight < 0).any():
        raise ValueError(
            f"allocation {settings.allocation!r} must give {size.shape} weights, finite and >= 0, got {shorten(weight)}"
        )
    return weight


def _shards(features: Features, bins: Bins, rows: _Rows) -> tuple[list[PlanShard], tuple[float, float]]:
    """The plan's rows per shard, and the sums of texture over all and over kept samples."""
    names, reason = _names_of(features, np.unique(rows.stays[rows.copy]).tolist()), rows.reason
    stays = np.where(rows.copy, rows.stays, -1)
    shards, first, total, total_kept = [], 0, 0.0, 0.0
    for file in features:
        part = slice(first, first + file.n)
        texture = file.texture().astype(np.float64) if file.has_texture else np.zeros(file.n)
        total += float(texture.sum())
        total_kept += float(texture[rows.kept[part]].sum())
        columns = (bins.label, rows.bin, rows.pick, rows.rank, rows.kept, reason, stays)
        shards.append(_with_bad(file, [column[part] for column in columns], names))
        first += file.n
    return shards, (total, total_kept)


def _with_bad(file: FeaturesFile, columns: list[NDArray[Any]], names: Mapping[int, str]) -> PlanShard:
    """One shard's rows, with its unusable samples in their places, never kept."""
    spans = file.spans()
    if file.bad:
        bad = file.bad_spans()
        order = np.argsort(np.concatenate([spans.index, bad.index]), kind="stable")
        spans = Spans.joined([spans, bad]).take(order)
        fills = (NO_LABEL, -1, -1, NEVER, False, BAD, -1)
        columns = [
            np.concatenate([column, np.full(len(bad), fill, dtype=column.dtype)])[order]
            for column, fill in zip(columns, fills, strict=True)
        ]
    label, bin, pick, rank, kept, reason, stays = columns
    copies = {row: names[int(stays[row])] for row in np.flatnonzero(stays >= 0).tolist()}
    return PlanShard(file.shard, spans, label, bin, pick, rank, kept, reason, copies)


def _more_columns(features: Features, bins: Bins, settings: PlanSettings) -> dict[str, Any]:
    """Kind of gradient and revisions of scores, where a plan used them."""
    first = features.files[0]
    used = {name: revision for name, revision in first.scores.items() if name in settings.scores}
    gradient = {"logit_grad": first.header["logit_grad"]} if bins.header["kernel"] == "gradient" else {}
    return gradient | ({"scores": used} if used else {})


def _header(
    features: Features,
    bins: Bins,
    settings: PlanSettings,
    cells: _Cells,
    quota: NDArray[np.int64],
    value: NDArray[np.float64],
    scores: Mapping[str, NDArray[np.float64]],
    shards: list[PlanShard],
    texture: tuple[float, float],
) -> dict[str, Any]:
    """What `adq show` shows, and what makes two plans equal."""
    size, n_must = cells.size, cells.n_must
    shown = {name: rounded(score) for name, score in scores.items()}
    n_kept = sum(int(shard.kept.sum()) for shard in shards)
    bytes_kept = sum(int(shard.spans.n_bytes[shard.kept].sum()) for shard in shards)
    names = bins.header["names"]
    return {
        "settings": {
            **{name: getattr(settings, name) for name in settings.__dataclass_fields__},
            "scores": sorted(settings.scores),
            "seed": int(settings.seed),  # as plain numbers, so that 1 and 1.0 make one plan
            "keep": float(settings.keep),
            "alpha": float(settings.alpha),
            "n_bins": bins.n_bins,
            "kernel": bins.header["kernel"],
            "dedup": bins.header.get("dedup"),
        },
        "features": {
            **features.header,
            "hash": features.hash,
            "limit": features.limit,
            **_more_columns(features, bins, settings),
        },
        "names": names,
        "classes": [
            {
                "label": c,
                "name": names[c] if names is not None and c >= 0 else None,
                "n": int(size[i].sum() + n_must[i]),
                "kept": int(quota[i].sum() + n_must[i]),
                "must_include": int(n_must[i]),
            }
            for i, c in enumerate(bins.classes)
        ],
        "cells": {
            "size": size.tolist(),
            "quota": quota.tolist(),
            "share": (cells.shares(settings) / ONE).tolist(),
        },
        "equal_to_alpha_0": _equal_to_alpha_0(cells, quota, settings),
        "bins": [
            {
                "size": int(size[:, k].sum()),
                "kept": int(quota[:, k].sum()),
                "rate": round(float(quota[:, k].sum() / max(1, size[:, k].sum())), DECIMALS),
                "importance": float(value[k]),
                **{name: score[k] for name, score in shown.items()},
            }
            for k in range(bins.n_bins)
        ],
        "bytes": {"all": sum(int(shard.spans.n_bytes.sum()) for shard in shards), "kept": bytes_kept},
        "texture": {
            "all": round(texture[0] / max(1, len(features)), 6),
            "kept": round(texture[1] / max(1, n_kept), 6),
        }
        if all(file.has_texture for file in features)
        else None,
        "bad": sum(len(file.bad) for file in features),
        "reasons": _count_reasons(shards),
    }


def _equal_to_alpha_0(cells: _Cells, quota: NDArray[np.int64], settings: PlanSettings) -> bool | None:
    """Whether importance made no difference: the quotas are those of weights by size.

    None where nothing could differ: no importance was asked for, there is one bin, none or all are kept.
    """
    asked = settings.allocation != "uniform" and (settings.allocation != "adaptive" or settings.alpha > 0)
    if not asked or cells.size.shape[1] == 1 or cells.budget in (0, cells.n_class.sum()):
        return None
    weight = np.stack([uniform(size, size, settings.keep) for size in cells.size])
    return bool((replace(cells, weight=weight).quotas(settings) == quota).all())


def _count_reasons(shards: list[PlanShard]) -> dict[str, int]:
    """How many samples have each reason."""
    reasons = [shard.reason for shard in shards if shard.reason is not None]
    counts = np.bincount(np.concatenate(reasons), minlength=len(REASONS))
    return dict(zip(REASONS, counts.tolist(), strict=True))
