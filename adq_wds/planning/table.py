"""Makes the table of a plan: the rows of each shard, and the header with settings, counts and hashes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adq_wds.core.cells import Cells
from adq_wds.core.fresh import ONE
from adq_wds.core.scores import DECIMALS, rounded
from adq_wds.errors import PlanError
from adq_wds.files import canonical_json
from adq_wds.planning.options import Options
from adq_wds.planning.samples import NamesOfSamples, Samples
from adq_wds.planning.seats import equal_to_alpha_0
from adq_wds.tables import bounds
from adq_wds.tables.features_file import NO_LABEL, FeaturesFile
from adq_wds.tables.members import MEMBERS
from adq_wds.tables.plan import Plan
from adq_wds.tables.plan_rows import (
    BAD,
    DUPLICATE,
    KEPT,
    MARGIN,
    NEVER,
    QUOTA,
    REASON_COLUMNS,
    REASONS,
    PlanShard,
)
from adq_wds.tables.write_plan import write_plan


@dataclass(frozen=True)
class PlanTable:
    """The plan of all samples, usable or not, before it is written: its header, and the rows of one shard at a time.

    Attributes:
        samples: N samples, with the results of all stages.
        header: the entries of the plan's header that do not follow from its rows.
    """

    samples: Samples
    header: dict[str, Any]

    def plan(self) -> Plan:
        """The plan in memory, with the rows of all shards."""
        return Plan.from_shards(self.shards(), self.header)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan's file shard by shard; raises as `write_plan` does."""
        optional = [*REASON_COLUMNS, *([] if self.samples.margin is None else [MARGIN.name])]
        if any(file.has_members for file in self.samples.features):
            optional.append(MEMBERS.name)
        n_shards = len(self.samples.features.files)
        write_plan(path, self.shards(), self.header, n_shards=n_shards, optional=optional)

    def shards(self) -> Iterator[PlanShard]:
        """The rows of each shard with their reasons, unusable samples included in their order and never kept."""
        samples, first = self.samples, 0
        names = NamesOfSamples(samples.features, samples.stays[samples.reason == DUPLICATE])
        for file in samples.features:
            here = slice(first, first + file.n)
            reason, stays, kept = samples.reason[here], samples.stays[here], samples.kept[here]
            columns: list[NDArray[Any]] = [samples.label[here], samples.bin[here], samples.pick[here]]
            columns += [samples.rank[here], kept]
            columns += [final_reason(reason, kept), np.where(reason == DUPLICATE, stays, -1)]
            columns += [] if samples.margin is None else [samples.margin[here]]
            yield _with_bad(file, columns, names)
            first += file.n


def make_table(
    samples: Samples, cells: Cells, scores: Mapping[str, NDArray[np.float64]], options: Options
) -> PlanTable:
    """The plan of all samples.

    Args:
        samples: N samples, with the results of all stages.
        cells: C classes of K bins.
        scores: (K,) float64 of each score, "importance" among them.
        options: of the plan.
    """
    header = {
        "settings": {**options.settings(), **samples.settings, "n_bins": cells.size.shape[1]},
        **_header_of_set(samples, options),
        **_header_of_cells(samples, cells, scores),
        "equal_to_alpha_0": equal_to_alpha_0(cells, options),
    }
    return PlanTable(samples, header)


def check_size(n_classes: int, n_bins: int) -> None:
    """Raise `PlanError` where the header of a plan would be too large to be written, before hours of binning.

    A header that passes may still be too large by its names and shards.
    """
    entry = {"label": 0, "name": None, "n": 0, "kept": 0, "must_include": 0}
    cells = [[0] * n_bins] * 3  # size, quota, share
    weight = n_classes * bounds.header_weight(canonical_json([entry, *cells]).encode())
    if weight > bounds.MAX_HEADER_WEIGHT:
        raise PlanError(
            f"{n_classes:,} classes of {n_bins} bins make a header of values of about {weight:,} bytes, at most "
            f"{bounds.MAX_HEADER_WEIGHT:,}; use fewer bins (bins=), or plan some of the classes (classes=)"
        )


def final_reason(reason: NDArray[np.uint8], kept: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """(n,) uint8: why each sample is kept or not, once the seats are taken."""
    left = np.where(reason == KEPT, np.uint8(QUOTA), reason)
    return np.where(kept, np.uint8(KEPT), left)


def _with_bad(file: FeaturesFile, columns: Sequence[NDArray[Any]], names: NamesOfSamples) -> PlanShard:
    """One shard's rows, unusable samples included in their order and never kept."""
    spans, order = file.all_spans()
    if file.bad:
        fills = (NO_LABEL, -1, -1, NEVER, False, BAD, -1, np.nan)
        columns = [
            np.concatenate([column, np.full(len(file.bad), fill, dtype=column.dtype)])[order]
            for column, fill in zip(columns, fills, strict=False)  # margins are not always there
        ]
    label, bin, pick, rank, kept, reason, stays, *margin = columns
    rows = np.flatnonzero(stays >= 0)
    copies = dict(zip(rows.tolist(), names.of(stays[rows]), strict=True))
    return PlanShard(file.shard, spans, label, bin, pick, rank, kept, reason, copies, *margin)


def _header_of_set(samples: Samples, options: Options) -> dict[str, Any]:
    """Features, and sums over all samples and over the kept ones."""
    features = samples.features
    first = features.files[0]
    used = {name: revision for name, revision in first.scores.items() if name in options.scores}
    more: dict[str, Any] = {"scores": used} if used else {}
    if options.kernel == "gradient":
        more["logit_grad"] = first.header["logit_grad"]
    reasons = np.bincount(final_reason(samples.reason, samples.kept), minlength=len(REASONS))
    n_bad = sum(len(file.bad) for file in features)
    reasons[BAD] += n_bad
    texture = features.texture()
    return {
        "features": {**features.header, "hash": features.hash, "limit": features.limit, **more},
        "bytes": _bytes_of(samples),
        "texture": None if texture is None else _mean_texture(texture, samples.kept),
        "bad": n_bad,
        "reasons": dict(zip(REASONS, reasons.tolist(), strict=True)),
        "copies_of_other_label": int((samples.label != samples.label[samples.stays]).sum()),
        **({} if samples.doubts is None else {"clean": samples.doubts}),
    }


def _bytes_of(samples: Samples) -> dict[str, int]:
    """Bytes of all samples, unusable ones too, and of those kept."""
    total = kept = first = 0
    for file in samples.features:
        n_bytes = file.read_columns(["n_bytes"])["n_bytes"].to_numpy()
        total += int(n_bytes.sum()) + sum(row[3] for row in file.bad)
        kept += int(n_bytes[samples.kept[first : first + file.n]].sum())
        first += file.n
    return {"all": total, "kept": kept}


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
