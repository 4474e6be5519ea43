"""Compares the samples of a report by the cosine of their embeddings: nearest ones, and how typical each is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from adq_wds.report.samples import Samples
from adq_wds.tables.features import Features
from adq_wds.tables.plan_rows import KEPT


def each_embedding(
    samples: Samples, features: Features
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """The embeddings of a plan's samples, a shard at a time, matched by shard and key.

    Yields:
        (n,) rows of the samples, and (n, D) float32 unit rows.
    """
    first_row, first = {}, 0
    for entry in samples.header["shards"]:
        first_row[entry["name"]] = first, first + entry["n"]
        first += entry["n"]
    for file in features:
        if file.shard not in first_row:
            continue
        start, stop = first_row[file.shard]
        row_of = {key: start + i for i, key in enumerate(samples.key[start:stop].to_pylist())}
        rows = np.array([row_of.get(key, -1) for key in file.spans().keys], dtype=np.int64)
        yield rows[rows >= 0], file.embedding()[rows >= 0].astype(np.float32)


def _embeddings_of(
    samples: Samples, features: Features, asked: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """(Q, D) the embeddings of Q different rows, and (Q,) whether each has one."""
    queries = np.zeros((len(asked), features.width), dtype=np.float32)
    known = np.zeros(len(asked), dtype=bool)
    for there, embedding in each_embedding(samples, features):
        _, ours, theirs = np.intersect1d(asked, there, assume_unique=True, return_indices=True)
        queries[ours], known[ours] = embedding[theirs], True
    return queries, known


def nearest_samples(
    samples: Samples, features: Features, rows: Sequence[int], n: int
) -> list[list[tuple[int, float]]]:
    """The n nearest other samples of each row, the nearest first, with their cosine; none for a row without features."""
    asked = np.array(rows, dtype=np.int64)
    queries, known = _embeddings_of(samples, features, asked)
    best_row = np.zeros((len(asked), 0), dtype=np.int64)
    best = np.zeros((len(asked), 0), dtype=np.float32)
    for there, embedding in each_embedding(samples, features):
        cosine = queries @ embedding.T  # (Q, n)
        cosine[asked[:, None] == there] = -np.inf
        best = np.concatenate([best, cosine], axis=1)
        best_row = np.concatenate([best_row, np.broadcast_to(there, cosine.shape)], axis=1)
        order = np.argsort(-best, axis=1, kind="stable")[:, :n]
        best = np.take_along_axis(best, order, axis=1)
        best_row = np.take_along_axis(best_row, order, axis=1)
    return [
        [
            (int(row), float(c))
            for row, c in zip(best_row[i], best[i], strict=True)
            if known[i] and c > -np.inf
        ]
        for i in range(len(asked))
    ]


def nearest_kept(samples: Samples, features: Features, rows: Sequence[int]) -> dict[int, int]:
    """By row, the row of the other kept sample of the same class with the largest cosine, the first of equal ones.

    A row without features is missing, and one whose class keeps no other sample.
    """
    asked = np.unique(np.array(rows, dtype=np.int64))
    queries, known = _embeddings_of(samples, features, asked)
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


def typicality(samples: Samples, features: Features, class_rows: Sequence[int]) -> NDArray[np.float32]:
    """(N,) float32: the cosine of each sample with the mean of its class, NaN of other classes and without features.

    Args:
        class_rows: positions of the classes among `samples.classes`.
    """
    at = np.full(len(samples.classes), -1)
    at[list(class_rows)] = np.arange(len(class_rows))
    centre = np.zeros((len(class_rows), features.width), dtype=np.float64)
    for rows, embedding in each_embedding(samples, features):
        of = at[samples.class_row[rows]]
        np.add.at(centre, of[of >= 0], embedding[of >= 0])
    centre /= np.maximum(np.linalg.norm(centre, axis=1, keepdims=True), 1e-12)
    typical = np.full(len(samples), np.nan, dtype=np.float32)
    for rows, embedding in each_embedding(samples, features):
        of = at[samples.class_row[rows]]
        mine = of >= 0
        typical[rows[mine]] = np.einsum("nd,nd->n", embedding[mine], centre[of[mine]].astype(np.float32))
    return typical
