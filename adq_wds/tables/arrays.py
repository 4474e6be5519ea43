"""Matches arrays in memory with the samples of shards on disk, by key, and gives the features of each shard."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adq_wds.core.unit_rows import unit_rows
from adq_wds.errors import FeaturesError, shorten
from adq_wds.protocols import Label
from adq_wds.remote.open_shard import open_shard
from adq_wds.samples.fields import content_digest
from adq_wds.shards.names import base_name
from adq_wds.shards.samples_in_tar import read_sample
from adq_wds.tables.features_file import DIGEST_BYTES, NO_LABEL, FeaturesSource, ShardFeatures
from adq_wds.tables.spans import Spans, source_stamp, walk_shard

SampleId = str | tuple[str, str]
ENCODER = "arrays"


def numbered(labels: Sequence[int | str | None]) -> tuple[NDArray[np.int32], list[str] | None]:
    """Labels of one kind as int32, and the names they stand for, sorted, when they are words.

    >>> numbered(["dog", "cat", "dog"])
    (array([1, 0, 1], dtype=int32), ['cat', 'dog'])
    """
    if labels and isinstance(labels[0], str):
        names = sorted({str(label) for label in labels})
        number = {name: i for i, name in enumerate(names)}
        return np.array([number[str(label)] for label in labels], dtype=np.int32), names
    return np.array([NO_LABEL if label is None else label for label in labels], dtype=np.int32), None


def unit_and_norm(rows: NDArray[np.float32]) -> tuple[NDArray[np.float16], NDArray[np.float32]]:
    """(n, D) float16 rows of length 1, zero rows left zero, and the (n,) float32 norms they had.

    >>> unit_and_norm(np.array([[3.0, 4.0]], np.float32))
    (array([[0.6, 0.8]], dtype=float16), array([5.], dtype=float32))
    """
    unit, norm = unit_rows(rows)
    return unit.astype(np.float16), np.minimum(norm, np.finfo(np.float32).max).astype(np.float32)


def features_of_arrays(
    paths: Sequence[str],
    names: Sequence[str],
    keys: Sequence[SampleId],
    embeddings: Any,
    labels: Sequence[Label] | None,
) -> Iterator[ShardFeatures]:
    """The features of each shard, in the order given; see `Features.from_arrays`. Everything is checked before the
    first."""
    h = _checked_embeddings(embeddings, keys)
    y = _checked_labels(labels, len(h))
    # before they are read: a shard replaced meanwhile is seen to differ
    stamps = [source_stamp(path) for path in paths]
    scanned = [_scanned(path, name) for path, name in zip(paths, names, strict=True)]
    rows = _matched(dict(zip(names, (spans.keys for spans, _ in scanned), strict=True)), keys)
    header: FeaturesSource = {
        "encoder": ENCODER,
        "revision": hashlib.sha256(h.tobytes()).hexdigest(),
        "preprocessing_hash": "",
        "image": "none",
        "label": "none" if labels is None else ENCODER,
        "complete": True,
        "source": {},
    }
    for name, stamp, (spans, digest), of_shard in zip(names, stamps, scanned, rows, strict=True):
        embedding, norm = unit_and_norm(h[of_shard])
        label, words = numbered([y[i] for i in of_shard.tolist()])
        of: FeaturesSource = {**header, "source": stamp}
        yield ShardFeatures(name, spans, label, embedding, norm, None, of, words, digest=digest)


def _checked_embeddings(embeddings: Any, keys: Sequence[SampleId]) -> NDArray[np.float32]:
    given = np.asarray(embeddings)
    if given.ndim != 2 or given.shape[1] < 1 or given.dtype.kind != "f" or len(given) != len(keys):
        raise ValueError(
            f"embeddings must be ({len(keys)}, D) floats, one row for each of {len(keys)} keys, got {given.dtype} of "
            f"shape {given.shape}"
        )
    with np.errstate(over="ignore"):  # float64 beyond float32 becomes infinity, which is refused by name
        h: NDArray[np.float32] = np.ascontiguousarray(given, dtype=np.float32)
    wrong = np.flatnonzero(~np.isfinite(h).all(axis=1))
    if len(wrong):
        raise FeaturesError(
            f"{len(wrong)} rows of embeddings hold NaN or infinity, the first row {wrong[0]}, key "
            f"{shorten(keys[wrong[0]])}; leave their samples out of the shards, or mend them"
        )
    return h


def _checked_labels(labels: Sequence[Label] | None, n: int) -> list[Label]:
    if labels is None:
        return [None] * n
    given = [label.item() if isinstance(label, np.generic) else label for label in labels]
    if len(given) != n:
        raise ValueError(f"{len(given)} labels for {n} keys; give one for each, or labels=None")
    for label in given:
        fits = type(label) in (int, str) and type(label) is type(given[0])
        if not fits or (isinstance(label, int) and label < 0):
            raise ValueError(f"labels must be all integers >= 0 or all text, got {shorten(label)} among them")
    return given


def _scanned(path: str, name: str) -> tuple[Spans, NDArray[np.uint8]]:
    """Where the samples of a shard lie, and (n, 16) digests of their contents."""
    spans, digests = [], []
    with open_shard(path) as buffer:
        for span in walk_shard(buffer, shard=name):
            spans.append(span)
            digests.append(content_digest(read_sample(buffer, span, url=path)))
        digest = np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, DIGEST_BYTES)
        return Spans.from_walk(buffer, spans), digest


def _matched(keys_of: dict[str, list[str]], keys: Sequence[SampleId]) -> list[NDArray[np.int64]]:
    """For each shard the row of each of its samples; every key names one sample, and every sample has a row."""
    row_of: dict[SampleId, int] = {}
    for i, key in enumerate(keys):
        key = key if isinstance(key, str) else (str(key[0]), str(key[1]))
        if row_of.setdefault(key, i) != i:
            raise FeaturesError(
                f"key {shorten(key)} stands twice, for rows {row_of[key]} and {i}; where two shards have it, give "
                "(shard, key)"
            )
    shard_of: dict[int, str] = {}  # by row
    missing: list[str] = []
    rows: list[list[int]] = []
    for shard, of_shard in keys_of.items():
        rows.append([])
        for key in of_shard:
            names: list[SampleId] = [(shard, key), (base_name(shard), key), key]
            row = next((row_of[name] for name in names if name in row_of), None)
            if row is None:
                missing.append(f"shard {shard}, key {shorten(key)}")
                continue
            if row in shard_of:
                raise FeaturesError(
                    f"key {shorten(keys[row])} stands in shard {shard_of[row]} and in shard {shard}; give (shard, key)"
                )
            shard_of[row] = shard
            rows[-1].append(row)
    extra = [key for i, key in enumerate(keys) if i not in shard_of]
    troubles = [f"{len(missing)} samples have no row, such as {missing[0]}"] if missing else []
    troubles += [f"{len(extra)} keys name no sample, such as {shorten(extra[0])}"] if extra else []
    if troubles:
        raise FeaturesError("; ".join(troubles) + "; keys must be those of all samples of the shards")
    return [np.array(each, dtype=np.int64) for each in rows]
