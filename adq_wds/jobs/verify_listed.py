"""Reads plans, indexes and features into one form for comparing shards."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adq_wds.errors import PlanError, ShardError, shorten
from adq_wds.protocols import Label
from adq_wds.remote.url_path import as_path
from adq_wds.tables.features import Features
from adq_wds.tables.index import VERSION as INDEX_VERSION
from adq_wds.tables.index import IndexedShard, read_index
from adq_wds.tables.plan import Plan, load_plan
from adq_wds.tables.spans import Spans
from adq_wds.tables.table import open_table


@dataclass(frozen=True)
class Expected:
    """The entries of a table for one shard.

    Attributes:
        name: the shard's name.
        spans: its n samples.
        used: (n,) bool, those that training reads.
        labels: n labels; None in a table without labels.
        complete: whether the table lists every sample of the shard.
    """

    name: str
    spans: Spans
    used: NDArray[np.bool_]
    labels: Sequence[Label] | None
    complete: bool


@dataclass(frozen=True)
class Listed:
    """A plan, an index or features as a sequence of expected shards.

    Attributes:
        kind: "plan", "index" or "features".
        names: of its shards.
        n_samples: samples in all of them.
        labelled: whether there are labels.
        shard: the entries of one shard, by name.
    """

    kind: str
    names: list[str]
    n_samples: int
    labelled: bool
    shard: Callable[[str], Expected]

    def __iter__(self) -> Iterator[Expected]:
        return map(self.shard, self.names)


def open_listed(source: Plan | Features | str | os.PathLike[str]) -> Listed:
    """A plan, an index or features, by object or path.

    Raises:
        PlanError, ShardError, FeaturesError: missing, damaged or of another kind.
    """
    if isinstance(source, (str, os.PathLike)):
        if as_path(source).is_dir():
            source = Features(source)
        elif _is_index(source):
            return _of_index(read_index(source))
        else:
            source = load_plan(source)
    if isinstance(source, Features):
        return _of_features(source)
    if not isinstance(source, Plan):
        raise TypeError(f"expected a plan, an index or features, got a {type(source).__name__}")
    return _of_plan(source)


def _is_index(path: str | os.PathLike[str]) -> bool:
    try:
        open_table(path, kind="index", version=INDEX_VERSION, error=ShardError)
    except ShardError:
        return False  # a plan, or a file that `load_plan` refuses
    return True


def _of_plan(plan: Plan) -> Listed:
    names = plan.header.get("names")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise PlanError(f"{plan.path or 'plan'}: damaged header: names {shorten(names)}")

    def shard(name: str) -> Expected:
        rows = plan.shard(name)
        try:
            labels = _labels(rows.label.tolist(), names)
        except IndexError:
            raise PlanError(f"{plan.path or 'plan'}: shard {name}: a label is beyond its names") from None
        return Expected(name, rows.spans, rows.kept, labels, True)

    labelled = any(entry["label"] >= 0 for entry in plan.header["classes"])
    return Listed("plan", plan.shards, plan.n_samples, labelled, shard)


def _of_features(features: Features) -> Listed:
    files = {file.shard: file for file in features}

    def shard(name: str) -> Expected:
        file = files[name]
        spans, order = file.all_spans()
        columns = file.read_columns(file.header["columns"])  # all of them: each is compared with its hash
        labels = [*_labels(columns["label"].to_pylist(), file.names), *[None] * len(file.bad)]
        complete = file.header["complete"] and features.limit is None
        return Expected(name, spans, order < file.n, [labels[i] for i in order], complete)

    n_samples = sum(file.n_read for file in features)
    return Listed("features", list(files), n_samples, features.header["label"] != "none", shard)


def _of_index(index: dict[str, IndexedShard]) -> Listed:
    if not all(shard.checked for shard in index.values()):
        raise ShardError("the index has no checksums to compare with: make it without --no-checksums")

    def shard(name: str) -> Expected:
        spans = index[name].spans
        return Expected(name, spans, np.ones(len(spans), dtype=bool), None, True)

    return Listed("index", list(index), sum(len(s.spans) for s in index.values()), False, shard)


def _labels(numbers: list[int], names: list[str] | None) -> list[Label]:
    return [None if number < 0 else number if names is None else names[number] for number in numbers]
