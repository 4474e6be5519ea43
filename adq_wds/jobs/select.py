"""Makes a plan from one number per sample, the job behind `adq select`."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from adq_wds.checks import Ratio, no_bar
from adq_wds.core.allocation import budget_for
from adq_wds.errors import FeaturesError, PlanError, SampleError, located, shorten
from adq_wds.protocols import Label
from adq_wds.remote.open_shard import open_shard
from adq_wds.remote.outputs import lock, make_folder
from adq_wds.remote.url_path import as_path
from adq_wds.samples.fields import check_spec
from adq_wds.samples.label import read_label
from adq_wds.samples.number import read_number
from adq_wds.shards.names import expand_urls, plain_shard_names
from adq_wds.shards.samples_in_tar import read_sample
from adq_wds.tables.column import Column
from adq_wds.tables.features import Features
from adq_wds.tables.plan import Plan, load_plan
from adq_wds.tables.plan_header import header_without_bins
from adq_wds.tables.plan_rows import PlanShard
from adq_wds.tables.spans import Spans, no_samples, walk_shard

BALANCES = ("class", "none")
Urls = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]


def select_samples(
    urls: Urls,
    by: str | Column,
    *,
    keep: Ratio | None = None,
    at_least: float | None = None,
    between: tuple[float, float] | None = None,
    balance: Literal["class", "none"] = "class",
    label: str | None = "cls",
    out: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> Plan:
    """A plan that keeps the samples whose number is large, or lies between two bounds.

    Numbers are compared as float32. Give one of `keep`, `at_least` and `between`. The plan has no bins: every epoch
    keeps the same samples.

    Args:
        urls: the shards, as `expand_urls` reads them; every one is read once.
        by: the number of each sample: "json:cos" for an entry of its json field, another field of text, or
            "FILE.parquet:COLUMN", which a folder of features may be too ("features/:texture").
        keep: the share with the largest numbers, in (0, 1], rounded half to even in each class; of equal numbers
            the first by shard and key.
        at_least: keep numbers from this one up.
        between: keep numbers from the first to the second, both included.
        balance: "class" takes the share `keep` of every class, "none" of all samples together. Without `keep` it
            changes nothing: bounds take what lies within them, of any class.
        label: field with the class, for the balance "class"; "none" for one class.
        out: file to write the plan to; a plan without one stays in memory.
        progress: show a bar; only on a terminal by default.

    Raises:
        ValueError: none or several rules, one that is no finite number or out of range, another balance, or a malformed
            field.
        SampleError: a sample lacks the number or the class, or holds something else there.
        FeaturesError: the file lacks the number of a sample.
        PlanError: the rule keeps nothing; has the least and the largest number.
        ShardError: a shard is damaged, or none holds a sample.

    Source: ours.
    """
    rule = _rule(keep, at_least, between, balance)
    source = _source(by)
    needs_label = keep is not None and balance == "class" and label not in (None, "none")
    if needs_label:
        check_spec(label, "label")
    field = None if isinstance(source, Column) else source
    shards = _read_all(urls, field, label if needs_label else None, progress)
    keys = {shard.name: shard.spans.keys for shard in shards}
    by_name, value = str(source), np.concatenate([shard.value for shard in shards])
    if isinstance(source, Column):
        by_name = f"{Path(source.path).name}:{source.name}"  # its folder is no part of the plan's hash
        value = _of_features(source, keys) if os.path.isdir(source.path) else source.join(keys.items())
    classes, names = _classes([label for shard in shards for label in shard.labels])
    kept = _choose(value, classes, _order_of_keys(list(keys.values())), rule)
    if not kept.any():
        asked = ", ".join(f"{name}={number}" for name, number in rule.items())
        raise PlanError(
            f"{asked} keeps none of {len(value):,} samples: {by_name} goes from {value.min():g} to {value.max():g}"
        )
    least, most = float(str(value[kept].min())), float(str(value[kept].max()))  # 0.1, not 0.10000000149
    settings = {"source": "select", "by": by_name, **rule}
    settings |= {"balance": balance if keep is not None else None, "least_kept": least, "most_kept": most}
    ends = np.cumsum([len(of_shard) for of_shard in keys.values()])[:-1]
    parts = zip(shards, np.split(kept, ends), np.split(classes, ends), strict=True)
    rows = [PlanShard.chosen(shard.name, shard.spans, mask, label) for shard, mask, label in parts]
    plan = Plan.from_shards(rows, {**header_without_bins(settings), "names": names})
    if out is None:
        return plan
    with lock(make_folder(as_path(out).parent)):
        plan.save(out)
    return load_plan(out)


@dataclass(frozen=True)
class _Shard:
    """What is read of a shard: (n,) float32 numbers, or none without a field, and n labels."""

    name: str
    spans: Spans
    value: NDArray[np.float32]
    labels: list[Label]


def _rule(
    keep: float | None, at_least: float | None, between: tuple[float, float] | None, balance: str
) -> dict[str, Any]:
    """The one rule that was given, for the plan's header: `keep`, or bounds."""
    if balance not in BALANCES:
        raise ValueError(f"balance must be one of {', '.join(BALANCES)}, got {shorten(balance)}")
    rules = {"keep": keep, "at_least": at_least, "between": between}
    given = [f"{name}=" for name, value in rules.items() if value is not None]
    if len(given) != 1:
        what = " and ".join(given) or "none"
        raise ValueError(f"give one of keep=, at_least= and between=; got {what}")
    if keep is not None:
        if not _is_finite(keep) or not 0 < keep <= 1:
            raise ValueError(f"keep must lie in (0, 1], got {keep!r}")
        return {"keep": float(keep)}
    if between is not None:
        bounds = list(between) if isinstance(between, Iterable) else []
        if len(bounds) != 2 or not all(map(_is_finite, bounds)) or not bounds[0] <= bounds[1]:
            raise ValueError(f"between must be two finite numbers, the lower first, got {shorten(between)}")
        return {"at_least": float(bounds[0]), "at_most": float(bounds[1])}
    if at_least is None or not _is_finite(at_least):
        raise ValueError(f"at_least must be a finite number, got {at_least!r}")
    return {"at_least": float(at_least)}


def _is_finite(number: Any) -> bool:
    """Whether it is a number of Python or numpy, neither NaN nor infinite."""
    is_number = isinstance(number, (int, float, np.integer, np.floating)) and not isinstance(number, bool)
    return is_number and bool(np.isfinite(number))


def _source(by: str | Column) -> str | Column:
    """The field of every sample, or the column of numbers."""
    if isinstance(by, Column):
        return by
    if not isinstance(by, str):
        raise ValueError(f"by must be one field or FILE.parquet:COLUMN, got {shorten(by)}")
    path, colon, name = by.rpartition(":")
    if colon and (path.endswith(".parquet") or os.path.isdir(path)):
        return Column(path, name)
    check_spec(by, "number")
    return by


def _of_features(column: Column, keys: dict[str, list[str]]) -> NDArray[np.float32]:
    """(N,) float32: a column of a folder of features for each sample."""
    value: list[float] = []
    for file in Features(column.path, shards=list(keys)):
        known = {"texture": file.texture, "norm": file.norm}
        numbers = known[column.name]() if column.name in known else file.score(column.name)
        number_of = dict(zip(file.spans().keys, numbers.tolist(), strict=True))
        if lacking := [key for key in keys[file.shard] if key not in number_of]:
            error = FeaturesError(f"not among the usable samples of {column.path}; embed it, or leave it out")
            raise located(error, shard=file.shard, key=lacking[0])
        value += [number_of[key] for key in keys[file.shard]]
    return np.array(value, dtype=np.float32)


def _read_all(urls: Urls, field: str | None, label: str | None, progress: bool | None) -> list[_Shard]:
    """Each shard, by name, with numbers and labels as far as fields are given for them.

    Raises:
        ShardError: a shard is damaged, or none holds a sample.
    """
    paths = expand_urls(urls)
    named = sorted(zip(plain_shard_names(paths), paths, strict=True))
    bar = tqdm(named, desc="select", unit=" shards", disable=no_bar(progress))
    shards = [_read_shard(path, name, field, label) for name, path in bar]
    if not any(len(shard.spans) for shard in shards):
        raise no_samples(len(shards))
    return shards


def _read_shard(path: str, name: str, field: str | None, label: str | None) -> _Shard:
    value: list[float] = []
    labels: list[Label] = []
    with open_shard(path) as buffer:
        spans = list(walk_shard(buffer, shard=name))
        for span in spans if field is not None or label is not None else ():
            try:
                sample = read_sample(buffer, span, url=name)
            except SampleError as error:
                raise located(error, shard=name, key=span.key) from None
            if field is not None:
                value.append(read_number(sample, field))
            labels.append(read_label(sample, label))
        table = Spans.from_walk(buffer, spans)
    with np.errstate(over="ignore"):
        number = np.array(value, dtype=np.float32)
    if not np.isfinite(number).all():
        key = table.keys[int((~np.isfinite(number)).argmax())]
        raise located(SampleError("beyond float32"), shard=name, key=key, field=field)
    return _Shard(name, table, number, labels or [None] * len(table))


def _classes(labels: list[Label]) -> tuple[NDArray[np.int32], list[str] | None]:
    """(N,) int32 classes, -1 without labels, and the names of string labels, sorted."""
    words = sorted({label for label in labels if isinstance(label, str)})
    if not words:
        return np.array([-1 if label is None else label for label in labels], dtype=np.int32), None
    number = {word: i for i, word in enumerate(words)}
    if not_words := [label for label in labels if not isinstance(label, str)]:
        raise PlanError(f"labels are words such as {shorten(words[0])}, and numbers such as {not_words[0]}")
    return np.array([number[str(label)] for label in labels], dtype=np.int32), words


def _order_of_keys(keys: list[list[str]]) -> NDArray[np.int64]:
    """(N,) int64: each sample's position when sorted by shard and key."""
    position = np.empty(sum(map(len, keys)), dtype=np.int64)
    first = 0
    for of_shard in keys:
        order = np.array(sorted(range(len(of_shard)), key=of_shard.__getitem__), dtype=np.int64)
        position[first + order] = np.arange(first, first + len(order))
        first += len(order)
    return position


def _choose(
    value: NDArray[np.float32], classes: NDArray[np.int32], position: NDArray[np.int64], rule: dict[str, Any]
) -> NDArray[np.bool_]:
    """(N,) bool: whether the rule keeps a sample."""
    if "keep" not in rule:
        low, high = np.float32(rule["at_least"]), np.float32(rule.get("at_most", np.inf))
        inside: NDArray[np.bool_] = (value >= low) & (value <= high)
        return inside
    order = np.lexsort((position, -value, classes))
    _, starts, counts = np.unique(classes[order], return_index=True, return_counts=True)
    rank = np.arange(len(value)) - np.repeat(starts, counts)
    quota = [budget_for(rule["keep"], n) for n in counts.tolist()]
    kept = np.zeros(len(value), dtype=bool)
    kept[order] = rank < np.repeat(quota, counts)
    return kept
