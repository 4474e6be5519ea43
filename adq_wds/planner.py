"""How do features become a plan? Bins class by class, scores per bin, quotas per cell, ranks per sample."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adq_wds.buckets import ClassBuckets
from adq_wds.core.allocation import budget_for, split_budget
from adq_wds.core.graphcut import graphcut_bins
from adq_wds.core.kernel import unit_rows
from adq_wds.core.rng import check_seed, draws
from adq_wds.core.scores import DECIMALS, BinSums, diversity, importance, representativeness
from adq_wds.errors import FeaturesError, PlanError, shorten
from adq_wds.files import canonical_json, sha256_text
from adq_wds.shards import base_name
from adq_wds.tables.bins import Bins
from adq_wds.tables.features import NO_LABEL, Features, FeaturesFile
from adq_wds.tables.plan import ALWAYS, NEVER, Plan, PlanShard
from adq_wds.tables.spans import Spans

Allocation = Callable[[NDArray[np.int64], NDArray[np.float64], float], NDArray[np.float64]]
Progress = Callable[[int], object]
SampleId = str | tuple[str, str]  # a key, or (shard, key) where the key stands in several shards

logger = logging.getLogger("adq_wds")


# ---- Features -> Bins


def bin_features(
    features: Features,
    *,
    bins: int,
    classes: Iterable[int | str] | None = None,
    memory_bytes: int = 1 << 30,
    scratch: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Bins:
    """Bin every class by exact GraphCut and score the bins.

    Args:
        features: the set; N samples of width D.
        bins: K, bins per class. A class with fewer samples gets fewer bins, said in a warning.
        classes: classes to bin, by number or name; the others are left out of the plan. All by default.
        memory_bytes: what one class's similarity matrix may take; larger classes are binned without one.
        scratch: folder for a scratch file of N·D·2 bytes.
        progress: called with numbers of samples done, which add up to 2·N.

    Returns:
        Bins of all N samples, with the mean texture and the diversity of each bin over all classes.

    Raises:
        ValueError: `bins` is not a positive integer below 32,768, or a class is unknown.
        FeaturesError: damaged features, or a NaN.
    """
    if isinstance(bins, bool) or not isinstance(bins, (int, np.integer)) or not 1 <= bins < 2**15:
        raise ValueError(f"bins must be an integer in 1 … 32767, got {bins!r}")
    if len(features) == 0:
        raise FeaturesError(f"{features.folder}: no usable samples in {len(features.files)} shards")
    label, names = global_labels(features)
    chosen = _chosen_classes(label, names, classes)
    counts = [int((label == c).sum()) for c in chosen]
    _say_what_it_takes(features, chosen, counts, int(bins), memory_bytes)
    texture = np.concatenate([file.read(["texture"])["texture"].to_numpy() for file in features])
    bin = np.full(len(label), -1, dtype=np.int16)
    pick = np.full(len(label), -1, dtype=np.int32)
    sums = BinSums.empty(int(bins), features.width)
    buckets = ClassBuckets(features, label, chosen, scratch=scratch, progress=progress)
    try:
        for c in chosen:
            where, embedding = buckets.read(c)
            rows = unit_rows(embedding)
            binning = graphcut_bins(rows, int(bins), memory_bytes=memory_bytes, progress=progress)
            bin[where], pick[where] = binning.bin, binning.pick
            sums.add(binning.bin, rows, texture[where])
    finally:
        buckets.close()
    header = {
        "n_bins": int(bins),
        "kernel": "features",
        "features": features.hash,
        "classes": chosen,
        "names": names,
        "scores": {
            "texture": _listed(representativeness(sums)),
            "diversity": _listed(diversity(sums)),
        },
    }
    return Bins([(file.shard, file.n) for file in features], label, bin, pick, header)


def global_labels(features: Features) -> tuple[NDArray[np.int32], list[str] | None]:
    """(N,) int32 class of every sample over the whole set, and the names of string labels, sorted."""
    kinds = {file.names is None for file in features if file.n}
    if len(kinds) > 1:
        raise FeaturesError(f"{features.folder}: some shards have integer labels and some string labels")
    labels = [file.read(["label"])["label"].to_numpy() for file in features]
    names = None
    if kinds == {False}:
        names = sorted({name for file in features for name in file.names or []})
        number = {name: i for i, name in enumerate(names)}
        for i, file in enumerate(features):
            known = np.array([number[name] for name in file.names or []], dtype=np.int32)
            if file.n and not 0 <= labels[i].min() <= labels[i].max() < len(known):
                raise FeaturesError(f"{file.path}: a label is not one of its {len(known)} names")
            labels[i] = known[labels[i]] if file.n else labels[i]
    return np.concatenate(labels), names


def _chosen_classes(
    label: NDArray[np.int32], names: list[str] | None, classes: Iterable[int | str] | None
) -> list[int]:
    present = np.unique(label).tolist()
    if classes is None:
        return [int(c) for c in present]
    number = {name: i for i, name in enumerate(names or [])}
    chosen = set()
    for c in classes:
        value = number.get(c) if isinstance(c, str) else c
        if value is None and isinstance(c, str) and names is None and c.lstrip("-").isdigit():
            value = int(c)
        if value is None or value not in present:
            known = names if names is not None else present
            raise ValueError(f"class {c!r} has no samples here; the classes are {shorten(known, 200)}")
        chosen.add(int(value))
    return sorted(chosen)


def _say_what_it_takes(
    features: Features, classes: list[int], counts: list[int], bins: int, memory_bytes: int
) -> None:
    """Memory and disk, before the work starts; and what will not be as asked."""
    largest = max(counts, default=0)
    rows = largest * features.width * 10  # float16 as read, float64 as used
    matrix = largest * largest * 8
    gram = (
        f"{matrix / 2**30:.2f} GiB"
        if matrix <= memory_bytes
        else f"up to {memory_bytes / 2**30:.2f} GiB (pooled)"
    )
    logger.info(
        "binning %d samples in %d classes, largest %d: embeddings %.2f GiB, similarities %s, scratch file %.2f GiB",
        sum(counts), len(classes), largest, rows / 2**30, gram, len(features) * features.width * 2 / 2**30,
    )  # fmt: skip
    if classes == [NO_LABEL]:
        logger.info("no labels: all samples are one class")
    few = [(c, n) for c, n in zip(classes, counts, strict=True) if n < bins]
    if few:
        logger.warning(
            "%d classes have fewer samples than bins (class %d has %d): fewer bins there", len(few), *few[0]
        )


def _listed(score: NDArray[np.float64]) -> list[float | None]:
    """For a header: rounded, so that equal features give equal headers on any machine; None for NaN."""
    return [None if np.isnan(v) else round(float(v), DECIMALS) for v in score]


# ---- Bins -> Plan


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
    """

    keep: float
    seed: int = 0
    alpha: float = 0.65
    allocation: str = "adaptive"
    balance: str = "class"
    draw: str = "random"
    scores: tuple[str, ...] = ("texture", "diversity")
    normalise: str = "sum"

    def __post_init__(self) -> None:
        budget_for(self.keep, 0)
        check_seed(self.seed)
        for name, known in (("balance", ("class", "none")), ("draw", ("random", "ordered"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}")


def plan_bins(
    features: Features,
    bins: Bins,
    settings: PlanSettings,
    allocation: Allocation,
    *,
    must_include: Iterable[SampleId] = (),
) -> Plan:
    """Turn bins into exact decisions.

    Args:
        features: the set that was binned.
        bins: its bins.
        settings: ratio, seed and rules.
        allocation: the rule that `settings.allocation` names: (size, importance, keep) → weights.
        must_include: samples that are kept whatever their bin; they count against their class's budget.

    Returns:
        a plan in memory, over all samples, usable or not.

    Raises:
        PlanError: bins of other features, a must-include sample that is not there or not usable, or more of
            them in a class than its budget.
    """
    if bins.header["features"] != features.hash:
        raise PlanError(f"{features.folder}: the bins were made from other features; bin these again")
    draw, must = _draws_and_musts(features, settings.seed, must_include)
    if (must & (bins.bin < 0)).any():
        raise PlanError("a must-include sample is of a class that is left out; add its class")
    classes, n_bins = bins.classes, bins.n_bins
    free = (bins.bin >= 0) & ~must
    class_row = np.searchsorted(classes, bins.label)
    size = _counts(class_row[free], bins.bin[free], len(classes), n_bins)
    n_must = np.bincount(class_row[must], minlength=len(classes))
    chosen = {name: score for name, score in bins.scores().items() if name in settings.scores}
    value = importance(list(chosen.values()), normalise=settings.normalise)
    quota = _quotas(size, n_must, classes, value, settings, allocation)
    rank = _ranks(class_row, bins, free, draw if settings.draw == "random" else bins.pick)
    rank[must] = ALWAYS
    shards, kept_texture = _rows(features, bins, rank, class_row, quota)
    header = _header(features, bins, settings, size, quota, n_must, value, shards, kept_texture)
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


def _draws_and_musts(
    features: Features, seed: int, must_include: Iterable[SampleId]
) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
    """(N,) uint64 keyed draws, and (N,) bool: is this sample asked for by name?"""
    asked = set(must_include)
    found: dict[SampleId, int] = dict.fromkeys(asked, 0)
    all_draws, all_musts = [], []
    for file in features:
        keys = file.read(["key"])["key"].to_pylist()
        all_draws.append(draws(seed, 0, base_name(file.shard), keys))
        must = np.zeros(len(keys), dtype=bool)
        if asked:
            for i, key in enumerate(keys):
                for name in {key, (file.shard, key)} & asked:
                    found[name] += 1
                    must[i] = True
        all_musts.append(must)
    for name, count in found.items():
        if count != 1:
            problem = (
                "is not among the usable samples" if count == 0 else "is in several shards; give (shard, key)"
            )
            raise PlanError(f"must-include sample {shorten(name)} {problem}")
    return np.concatenate(all_draws), np.concatenate(all_musts)


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
    weight = np.asarray(allocation(size, value, settings.keep), dtype=np.float64)
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
        texture = file.read(["texture"])["texture"].to_numpy().astype(np.float64)
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


def _header(
    features: Features,
    bins: Bins,
    settings: PlanSettings,
    size: NDArray[np.int64],
    quota: NDArray[np.int64],
    n_must: NDArray[np.int64],
    value: NDArray[np.float64],
    shards: list[PlanShard],
    texture: tuple[float, float],
) -> dict[str, Any]:
    """What `adq show` shows, and what makes two plans equal."""
    scores = bins.header["scores"]
    n_kept = sum(int(shard.kept.sum()) for shard in shards)
    bytes_kept = sum(int(shard.spans.n_bytes[shard.kept].sum()) for shard in shards)
    names = bins.header["names"]
    return {
        "settings": {
            **{name: getattr(settings, name) for name in settings.__dataclass_fields__},
            "scores": list(settings.scores),
            "keep": float(settings.keep),
            "n_bins": bins.n_bins,
            "kernel": bins.header["kernel"],
        },
        "features": {**features.header, "hash": features.hash, "limit": features.limit},
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
                **{name: values[k] for name, values in scores.items()},
            }
            for k in range(bins.n_bins)
        ],
        "bytes": {"all": sum(int(shard.spans.n_bytes.sum()) for shard in shards), "kept": bytes_kept},
        "texture": {
            "all": round(texture[0] / max(1, len(features)), 6),
            "kept": round(texture[1] / max(1, n_kept), 6),
        },
        "bad": sum(len(file.bad) for file in features),
    }
