"""Compares the samples of a report by the cosine of their embeddings: nearest ones, and how typical each is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from adq_wds.report.samples import Samples
from adq_wds.tables.features import Features


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


def nearest_samples(
    samples: Samples, features: Features, rows: Sequence[int], n: int
) -> list[list[tuple[int, float]]]:
    """The n nearest other samples of each row, the nearest first, with their cosine; none for a row without features."""
    asked = np.array(rows, dtype=np.int64)
    queries = np.zeros((len(asked), features.width), dtype=np.float32)
    for there, embedding in each_embedding(samples, features):
        at = {int(row): i for i, row in enumerate(there)}
        for i, row in enumerate(asked.tolist()):
            if row in at:
                queries[i] = embedding[at[row]]
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
    known = (queries != 0).any(axis=1)
    return [
        [
            (int(row), float(c))
            for row, c in zip(best_row[i], best[i], strict=True)
            if known[i] and c > -np.inf
        ]
        for i in range(len(asked))
    ]


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
