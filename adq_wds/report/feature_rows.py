"""Matches the samples of a plan with the rows of the features that it was made of."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from adq_wds.errors import FeaturesError, located, shorten
from adq_wds.tables.features import Features
from adq_wds.tables.plan import Plan


def feature_rows(plan: Plan, features: Features) -> NDArray[np.int64]:
    """(n,) int64: the row of each of the plan's samples among those of the features; -1 for one that has none.

    Raises:
        FeaturesError: a shard of the plan has no features, or a sample there is another (located).
    """
    first, file_of = 0, {}
    for file in features:
        file_of[file.shard] = (first, file)
        first += file.n
    rows = [np.empty(0, dtype=np.int64)]
    for shard in plan.shards:
        if shard not in file_of:
            raise FeaturesError(f"{features.folder}: no features of shard {shorten(shard)} of the plan")
        first, file = file_of[shard]
        spans, there = plan.shard(shard, hold=False).spans, file.spans()
        _, ours, theirs = np.intersect1d(spans.index, there.index, assume_unique=True, return_indices=True)
        other = np.flatnonzero(spans.crc32[ours] != there.crc32[theirs])
        if len(other):
            text = f"{features.folder} has features of other bytes; give those that the plan was made of"
            raise located(FeaturesError(text), shard=shard, key=spans.keys[ours[other[0]]])
        row = np.full(len(spans), -1, dtype=np.int64)
        row[ours] = first + theirs
        rows.append(row)
    return np.concatenate(rows)
