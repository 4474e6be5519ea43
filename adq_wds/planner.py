"""How do bins become a plan? Importance per bin, quotas per class and bin, ranks per sample."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adq_wds.binning import listed, rounded
from adq_wds.core.allocation import budget_for, check_alpha, split_budget
from adq_wds.core.rng import check_seed, draws
from adq_wds.core.scores import DECIMALS, importance
from adq_wds.errors import PlanError, shorten
from adq_wds.files import canonical_json, sha256_text
from adq_wds.shards import base_name
from adq_wds.tables.bins import Bins
from adq_wds.tables.features import Features
from adq_wds.tables.features_file import NO_LABEL, FeaturesFile
from adq_wds.tables.plan import ALWAYS, NEVER, Plan, PlanShard
from adq_wds.tables.spans import Spans

Allocation = Callable[[NDArray[np.int64], NDArray[np.float64], float], NDArray[np.float64]]
SampleId = str | tuple[str, str]  # a key, or (shard, key) where the key stands in several shards

logger = logging.getLogger("adq_wds")

_CHOICES = {"balance": ("class", "none"), "draw": ("random", "ordered"), "normalise": ("sum", "minmax")}


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
    balance: str = "class"
    draw: str = "random"
    scores: tuple[str, ...] = ("texture", "diversity")
    normalise: str = "sum"
    diversity_head: str = "none"

    def __post_init__(self) -> None:
        budget_for(self.keep, 0)
        check_seed(self.seed)
        check_alpha(self.alpha)
        if not self.scores or len(set(self.scores)) != len(self.scores):
            raise ValueError(f"scores must name one or more, each once, got {self.scores}")
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}")


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
            them in a class than its budget.
    """
    if bins.header["features"] != features.hash or bins.shards != [(file.shard, file.n) for file in features]:
        raise PlanError(f"{features.folder}: the bins were made from other features; bin these again")
    scores = bins.scores() | dict(values or {})
    for name in settings.scores:
        if name not in scores:
            raise ValueError(f"the bins have no score {name!r}, only {sorted(scores)}")
    draw, asked = _draws_and_asked(features, settings.seed, must_include)
    for sample, i in asked.items():
        if bins.bin[i] < 0:
            raise PlanError(
                f"must-include sample {shorten(sample)} is of class {bins.label[i]}, which is left out; add its class"
            )
    must = np.zeros(len(draw), dtype=bool)
    must[list(asked.values())] = True
    classes, n_bins = bins.classes, bins.n_bins
    free = (bins.bin >= 0) & ~must
    class_row = np.searchsorted(classes, bins.label)
    size = _counts(class_row[free], bins.bin[free], len(classes), n_bins)
    n_must = np.bincount(class_row[must], minlength=len(classes))
    value = importance([scores[name] for name in sorted(settings.scores)], normalise=settings.normalise)
    quota = _quotas(size, n_must, classes, value, settings, allocation)
    rank = _ranks(class_row, bins, free, draw if settings.draw == "random" else bins.pick)
    rank[must] = ALWAYS
    shards, kept_texture = _rows(features, bins, rank, class_row, quota)
    header = _header(features, bins, settings, size, quota, n_must, value, scores, shards, kept_texture)
    header["settings"]["must_include"] = (
        sha256_text(canonical_json(np.flatnonzero(must).tolist())) if must.any() else None
    )
    plan = Plan.from_shards(shards, header)
    if settings.keep > 0 and plan.n_kept == 0:
        logger.warning("keep=%s keeps 0 of %d samples", settings.keep, plan.n_samples)
    return plan


def _counts(
    class_row: NDArray[np.int64], bin: NDArray[np.int16], n_classes: int, n_bins: int
) -> NDArray[np.int64]:
    """(C, K) int64: samples in each class and bin."""
    cells = class_row * n_bins + bin
    return np.bincount(cells, minlength=n_classes * n_bins).reshape(n_classes, n_bins)


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
                "is in several shards; give (shard, key)" if found else "is not among the usable samples"
            )
            raise PlanError(f"must-include sample {shorten(name)} {problem}")
    return np.concatenate(all_draws), {name: i for name, (i,) in places.items()}


def _quotas(
    size: NDArray[np.int64],
    n_must: NDArray[np.int64],
    classes: Sequence[int],
    value: NDArray[np.float64],
    settings: PlanSettings,
    allocation: Allocation,
) -> NDArray[np.int64]:
    """(C, K) int64: samples kept by rank in each class and bin; must-include samples come on top."""
    n_class = size.sum(axis=1) + n_must
    budget = budget_for(settings.keep, int(n_class.sum()))
    weight = np.stack([_weights(allocation, cells, value, settings) for cells in size])
    if settings.balance == "none":
        left = budget - int(n_must.sum())
        if left < 0:
            raise PlanError(
                f"{n_must.sum()} must-include samples, but keep={settings.keep} leaves a budget of {budget}"
            )
        return split_budget(size.ravel(), weight.ravel(), left).reshape(size.shape)
    budgets = split_budget(n_class, n_class.astype(np.float64), budget)
    over = np.flatnonzero(n_must > budgets)
    if len(over):
        c = over[0]
        raise PlanError(
            f"class {classes[c]}: {n_must[c]} must-include samples, but keep={settings.keep} gives it a budget of "
            f"{budgets[c]}; raise keep or name fewer"
        )
    return np.stack(
        [split_budget(cells, w, int(b)) for cells, w, b in zip(size, weight, budgets - n_must, strict=True)]
    ).reshape(size.shape)


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


def _ranks(
    class_row: NDArray[np.int64], bins: Bins, free: NDArray[np.bool_], order: NDArray[Any]
) -> NDArray[np.int32]:
    """(N,) int32: 0, 1, … within each class and bin by ascending `order`, ties by position; NEVER elsewhere."""
    rank = np.full(len(free), NEVER, dtype=np.int32)
    rows = np.flatnonzero(free)
    cell = class_row[rows] * bins.n_bins + bins.bin[rows]
    by_cell = np.lexsort((order[rows], cell))  # stable, so ties keep their position
    _, starts, counts = np.unique(cell[by_cell], return_index=True, return_counts=True)
    rank[rows[by_cell]] = np.arange(len(rows)) - np.repeat(starts, counts)
    return rank


def _rows(
    features: Features,
    bins: Bins,
    rank: NDArray[np.int32],
    class_row: NDArray[np.int64],
    quota: NDArray[np.int64],
) -> tuple[list[PlanShard], tuple[float, float]]:
    """The plan's rows per shard, and the sums of texture over all and over kept samples."""
    limit = np.where(bins.bin >= 0, quota[class_row.clip(max=len(quota) - 1), bins.bin], 0)
    kept = (rank < limit) | (rank == ALWAYS)
    shards, first, total, total_kept = [], 0, 0.0, 0.0
    for file in features:
        part = slice(first, first + file.n)
        texture = file.texture().astype(np.float64) if file.has_texture else np.zeros(file.n)
        total += float(texture.sum())
        total_kept += float(texture[kept[part]].sum())
        columns = [bins.label[part], bins.bin[part], bins.pick[part], rank[part], kept[part]]
        shards.append(_with_bad(file, columns))
        first += file.n
    return shards, (total, total_kept)


def _with_bad(file: FeaturesFile, columns: list[NDArray[Any]]) -> PlanShard:
    """One shard's rows, with its unusable samples in their places, never kept."""
    spans = file.spans()
    if file.bad:
        bad = file.bad_spans()
        order = np.argsort(np.concatenate([spans.index, bad.index]), kind="stable")
        spans = Spans.joined([spans, bad]).take(order)
        fills = (NO_LABEL, -1, -1, NEVER, False)
        columns = [
            np.concatenate([column, np.full(len(bad), fill, dtype=column.dtype)])[order]
            for column, fill in zip(columns, fills, strict=True)
        ]
    return PlanShard(file.shard, spans, *columns)


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
    size: NDArray[np.int64],
    quota: NDArray[np.int64],
    n_must: NDArray[np.int64],
    value: NDArray[np.float64],
    scores: Mapping[str, NDArray[np.float64]],
    shards: list[PlanShard],
    texture: tuple[float, float],
) -> dict[str, Any]:
    """What `adq show` shows, and what makes two plans equal."""
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
        "cells": {"size": size.tolist(), "quota": quota.tolist()},
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
    }
