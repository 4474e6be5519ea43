"""Finds the kept sample of a class whose embedding is most similar to a sample's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adq_wds.core.kernel import unit_rows
from adq_wds.errors import PlanError, located
from adq_wds.tables.features import Features
from adq_wds.tables.plan_rows import PlanShard
from adq_wds.tables.plan_view import PlanView


@dataclass(frozen=True)
class Nearest:
    """The kept sample of the same class whose embedding is most similar to a sample's."""

    shard: str
    key: str
    cosine: float


def nearest_kept(plan: PlanView, features: Features, shard: PlanShard, row: int) -> Nearest | None:
    """The most similar other sample of a row's class that is kept, the first of equal ones; None where there is none.

    Raises:
        PlanError: a sample is not among the features, or other bytes were embedded. Located.
    """
    (one,) = _embeddings(features, shard, np.array([row]))
    best: Nearest | None = None
    for name in plan.shards:
        other = plan.shard(name, hold=False)
        rows = np.flatnonzero(other.kept & (other.label == shard.label[row]))
        rows = rows[rows != row] if name == shard.name else rows
        if len(rows):
            cosine = _embeddings(features, other, rows) @ one
            i = int(cosine.argmax())
            if best is None or cosine[i] > best.cosine:
                best = Nearest(name, other.spans.keys[rows[i]], float(cosine[i]))
    return best


def bad_reason(features: Features, shard: PlanShard, row: int) -> str:
    """Why a sample could not be used, by the features; empty where they do not say."""
    files = [file for file in features if file.shard == shard.name]
    return next((bad[-1] for file in files for bad in file.bad if bad[0] == shard.spans.index[row]), "")


def _embeddings(features: Features, shard: PlanShard, rows: NDArray[np.int64]) -> NDArray[Any]:
    """(n, D) float64 unit rows of some samples of a shard, checked to be of the same bytes."""
    file = next((file for file in features if file.shard == shard.name), None)
    if file is None:
        raise PlanError(f"shard {shard.name} is not among the features {features.folder}")
    columns = file.read_columns(["index", "crc32"])
    index, crc32 = (columns[name].to_numpy() for name in ("index", "crc32"))
    where = np.searchsorted(index, shard.spans.index[rows]).clip(max=max(0, len(index) - 1))
    same = np.zeros(len(rows), dtype=bool)
    if len(index):
        same = (index[where] == shard.spans.index[rows]) & (crc32[where] == shard.spans.crc32[rows])
    if not same.all():
        error = PlanError(
            "is not among these features, or changed since; give those that the plan was made of"
        )
        raise located(error, shard=shard.name, key=shard.spans.keys[rows[int(same.argmin())]])
    return unit_rows(file.embedding()[where])
