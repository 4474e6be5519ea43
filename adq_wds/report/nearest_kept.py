"""Finds for some samples the nearest sample of their class that is kept."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from adq_wds.report.neighbours import each_embedding
from adq_wds.report.samples import Samples
from adq_wds.tables.features import Features
from adq_wds.tables.plan_rows import KEPT


def nearest_kept(samples: Samples, features: Features, rows: Sequence[int]) -> dict[int, int]:
    """By row, the row of the other kept sample of the same class with the largest cosine, the first of equal ones.

    A row without features is missing, and one whose class keeps no other sample.
    """
    asked = np.unique(np.array(rows, dtype=np.int64))
    queries = np.zeros((len(asked), features.width), dtype=np.float32)
    known = np.zeros(len(asked), dtype=bool)
    for there, embedding in each_embedding(samples, features):
        _, ours, theirs = np.intersect1d(asked, there, assume_unique=True, return_indices=True)
        queries[ours], known[ours] = embedding[theirs], True
    best, best_row = np.full(len(asked), -np.inf, dtype=np.float32), np.full(len(asked), -1)
    asked_class = samples.class_row[asked]
    for there, embedding in each_embedding(samples, features):
        kept = samples.reason[there] == KEPT
        there, embedding = there[kept], embedding[kept]
        kept_class = samples.class_row[there]
        for c in np.intersect1d(asked_class, kept_class).tolist():
            q, k = np.flatnonzero(asked_class == c), np.flatnonzero(kept_class == c)
            cosine = queries[q] @ embedding[k].T
            cosine[asked[q][:, None] == there[k]] = -np.inf
            nearest = cosine.argmax(axis=1)
            value = cosine[np.arange(len(q)), nearest]
            better = value > best[q]
            best[q[better]], best_row[q[better]] = value[better], there[k[nearest[better]]]
    found = known & (best_row >= 0)
    return dict(zip(asked[found].tolist(), best_row[found].tolist(), strict=True))
