"""Makes the table of a plan: the rows of each shard, and the header with settings, counts and hashes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adq_wds.core.cells import Cells
from adq_wds.core.fresh import ONE
from adq_wds.core.scores import DECIMALS, rounded
from adq_wds.planning.options import Options
from adq_wds.planning.samples import Samples, name_samples
from adq_wds.planning.seats import equal_to_alpha_0
from adq_wds.tables.features_file import NO_LABEL, FeaturesFile
from adq_wds.tables.plan import Plan
from adq_wds.tables.plan_rows import BAD, DUPLICATE, KEPT, NEVER, QUOTA, REASONS, PlanShard


def make_table(
    samples: Samples, cells: Cells, scores: Mapping[str, NDArray[np.float64]], options: Options
) -> Plan:
    """The plan of all samples, usable or not, in memory.

    Args:
        samples: N samples, with the results of all stages.
        cells: C classes of K bins.
        scores: (K,) float64 of each score, "importance" among them.
        options: of the plan.
    """
    features = samples.features
    reason = np.where(samples.kept, KEPT, np.where(samples.reason == KEPT, QUOTA, samples.reason))
    stays = np.where(samples.reason == DUPLICATE, samples.stays, -1)
    names = name_samples(features, stays[stays >= 0].tolist())
    columns: list[NDArray[Any]] = [samples.label, samples.bin, samples.pick, samples.rank, samples.kept]
    columns += [reason.astype(np.uint8), stays, *([] if samples.margin is None else [samples.margin])]
    ends = np.cumsum([file.n for file in features])[:-1]
    parts = zip(*(np.split(column, ends) for column in columns), strict=True)
    shards = [_with_bad(file, part, names) for file, part in zip(features, parts, strict=True)]
    header = {
        "settings": {**options.settings(), **samples.settings, "n_bins": cells.size.shape[1]},
        **_header_of_set(samples, shards, options),
        **_header_of_cells(samples, cells, scores),
        "equal_to_alpha_0": equal_to_alpha_0(cells, options),
    }
    return Plan.from_shards(shards, header)


def _with_bad(file: FeaturesFile, columns: Sequence[NDArray[Any]], names: Mapping[int, str]) -> PlanShard:
    """One shard's rows, unusable samples included in their order and never kept."""
    spans, order = file.all_spans()
    if file.bad:
        fills = (NO_LABEL, -1, -1, NEVER, False, BAD, -1, np.nan)
        columns = [
            np.concatenate([column, np.full(len(file.bad), fill, dtype=column.dtype)])[order]
            for column, fill in zip(columns, fills, strict=False)  # margins are not always there
        ]
    label, bin, pick, rank, kept, reason, stays, *margin = columns
    copies = {row: names[int(stays[row])] for row in np.flatnonzero(stays >= 0).tolist()}
    return PlanShard(file.shard, spans, label, bin, pick, rank, kept, reason, copies, *margin)


def _header_of_set(samples: Samples, shards: list[PlanShard], options: Options) -> dict[str, Any]:
    """Features, and sums over all samples and over the kept ones."""
    features = samples.features
    first = features.files[0]
    used = {name: revision for name, revision in first.scores.items() if name in options.scores}
    more: dict[str, Any] = {"scores": used} if used else {}
    if options.kernel == "gradient":
        more["logit_grad"] = first.header["logit_grad"]
    reasons = np.concatenate([shard.reason for shard in shards if shard.reason is not None])
    n_bytes = np.concatenate([shard.spans.n_bytes for shard in shards])
    kept = np.concatenate([shard.kept for shard in shards])
    texture = features.texture()
    return {
        "features": {**features.header, "hash": features.hash, "limit": features.limit, **more},
        "bytes": {"all": int(n_bytes.sum()), "kept": int(n_bytes[kept].sum())},
        "texture": None if texture is None else _mean_texture(texture, samples.kept),
        "bad": sum(len(file.bad) for file in features),
        "reasons": dict(zip(REASONS, np.bincount(reasons, minlength=len(REASONS)).tolist(), strict=True)),
        "copies_of_other_label": int((samples.label != samples.label[samples.stays]).sum()),
        **({} if samples.doubts is None else {"clean": samples.doubts}),
    }


def _header_of_cells(
    samples: Samples, cells: Cells, scores: Mapping[str, NDArray[np.float64]]
) -> dict[str, Any]:
    """Counts and rates of classes, of bins, and of the cells of both."""
    names, size, quota = samples.names, cells.size, cells.quota
    n_class, kept = cells.n_class.tolist(), (quota.sum(axis=1) + cells.n_must).tolist()
    shown = {name: rounded(score) for name, score in scores.items()}
    return {
        "names": names,
        "classes": [
            {
                "label": c,
                "name": names[c] if names is not None and c >= 0 else None,
                "n": n_class[i],
                "kept": kept[i],
                "must_include": int(cells.n_must[i]),
            }
            for i, c in enumerate(samples.classes)
        ],
        "cells": {
            "size": size.tolist(),
            "quota": quota.tolist(),
            "share": (cells.share / ONE).tolist(),
        },
        "bins": [
            {
                "size": n,
                "kept": n_kept,
                "rate": round(n_kept / max(1, n), DECIMALS),
                **{name: score[k] for name, score in shown.items()},
            }
            for k, (n, n_kept) in enumerate(
                zip(size.sum(axis=0).tolist(), quota.sum(axis=0).tolist(), strict=True)
            )
        ],
    }


def _mean_texture(texture: NDArray[np.float32], kept: NDArray[np.bool_]) -> dict[str, float]:
    """Of all samples, and of those kept."""
    parts = {"all": texture, "kept": texture[kept]}
    return {
        name: round(float(part.sum(dtype=np.float64)) / max(1, len(part)), 6) for name, part in parts.items()
    }
