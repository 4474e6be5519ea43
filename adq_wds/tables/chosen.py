"""Makes a plan's rows of a selection made elsewhere: by keys, by positions, or by a mask."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adq_wds.checks import listed
from adq_wds.errors import PlanError, reason_of, shorten
from adq_wds.shards.names import expand_urls, plain_shard_names
from adq_wds.tables.plan_rows import PlanShard
from adq_wds.tables.spans import Spans, find_ids, no_samples, scan_spans


def choose_keys(urls: str | Iterable[str], keys: Iterable[str | tuple[str, ...]] | None) -> list[PlanShard]:
    """The rows of each shard with these keys kept, or all; see `Plan.from_keys`."""
    spans = _scan(urls)
    wanted = np.full(sum(map(len, spans.values())), keys is None)
    if keys is not None:
        wanted[find_ids(((name, each.keys) for name, each in spans.items()), listed("keys", keys))] = True
    return _rows(spans, wanted)


def choose_indices(urls: str | Iterable[str], indices: Any) -> list[PlanShard]:
    """The rows of each shard with the samples at these positions kept; see `Plan.from_indices`."""
    chosen = np.asarray(indices)
    chosen = chosen.astype(np.int64) if chosen.size == 0 and chosen.dtype != np.bool_ else chosen
    if chosen.ndim != 1 or chosen.dtype.kind not in "biu":
        raise ValueError(
            f"indices have shape {chosen.shape} and dtype {chosen.dtype}; expected (n,) integers or bools"
        )
    spans = _scan(urls)
    for name, other in zip(spans, sorted(spans), strict=True):
        if name != other:
            raise ValueError(
                f"indices count shards in the order of their names, where {shorten(other)} comes before {shorten(name)}; "
                "give the shards in that order, or keys"
            )
    n = sum(map(len, spans.values()))
    if chosen.dtype == np.bool_:
        if len(chosen) != n:
            raise ValueError(f"the mask has {len(chosen):,} entries, the shards hold {n:,} samples")
        return _rows(spans, chosen)
    beyond = chosen[(chosen < 0) | (chosen >= n)]
    if len(beyond):
        raise ValueError(f"index {beyond[0]} is out of range; the shards hold {n:,} samples")
    wanted = np.bincount(chosen.astype(np.int64), minlength=n)
    if wanted.max(initial=0) > 1:
        raise ValueError(f"index {int(wanted.argmax())} is given {wanted.max()} times; name each sample once")
    return _rows(spans, wanted > 0)


def read_indices(path: str | os.PathLike[str]) -> NDArray[Any]:
    """The array of a .npy file.

    Raises:
        PlanError: missing, damaged, or of Python objects.
    """
    try:
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except Exception as error:  # numpy parses the file's header as Python
        raise PlanError(
            f"{os.fspath(path)}: not an array of indices or a mask ({reason_of(error)})"
        ) from error


def _scan(urls: str | Iterable[str]) -> dict[str, Spans]:
    """The spans of each shard, by name, in the order given; every shard is scanned once."""
    paths = expand_urls(urls)
    names = plain_shard_names(paths)
    spans = {name: scan_spans(path, shard=name) for name, path in zip(names, paths, strict=True)}
    if not any(map(len, spans.values())):
        raise no_samples(len(spans))
    return spans


def _rows(spans: dict[str, Spans], wanted: NDArray[np.bool_]) -> list[PlanShard]:
    ends = np.cumsum([len(each) for each in spans.values()])[:-1]
    parts = np.split(wanted, ends)
    return [
        PlanShard.chosen(name, each, kept) for (name, each), kept in zip(spans.items(), parts, strict=True)
    ]
