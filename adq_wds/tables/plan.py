"""Which samples are kept? A plan: one exact decision for every sample of a set of shards."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from adq_wds.core.allocation import fresh_draw
from adq_wds.errors import PlanError, shorten
from adq_wds.files import canonical_json, sha256_text
from adq_wds.shards import ShardNames, check_shard_name, expand_urls, shard_names
from adq_wds.tables.parquet import GroupFile, Header, column_hashes, write_groups
from adq_wds.tables.spans import SPAN_FIELDS, Spans, no_samples, scan_spans

VERSION = 1
ALWAYS = -1  # rank of a sample that is kept whatever the budget
NEVER = 2**31 - 1  # rank of a sample outside all bins: damaged, or of a class left out
HELD_SHARDS = (
    72  # shards whose rows are held: streams that read several shards in turn read each one's rows once
)
_SCHEMA = pa.schema(
    [
        *SPAN_FIELDS,
        pa.field("label", pa.int32(), nullable=False),
        pa.field("bin", pa.int16(), nullable=False),
        pa.field("pick", pa.int32(), nullable=False),
        pa.field("rank", pa.int32(), nullable=False),
        pa.field("kept", pa.bool_(), nullable=False),
    ]
)


@dataclass(frozen=True)
class PlanShard:
    """The plan's rows for one shard, in the shard's order.

    Attributes:
        name: the shard's name.
        spans: where its n samples lie.
        label: (n,) int32, class over the whole set; -1 for unlabelled data.
        bin: (n,) int16, from 0 in the order filled; -1 for a sample in no bin.
        pick: (n,) int32, position in which its bin took it; -1 for a sample in no bin.
        rank: (n,) int32, kept when below the quota of its class and bin; -1 is always kept.
        kept: (n,) bool.
    """

    name: str
    spans: Spans
    label: NDArray[np.int32]
    bin: NDArray[np.int16]
    pick: NDArray[np.int32]
    rank: NDArray[np.int32]
    kept: NDArray[np.bool_]

    @cached_property
    def by_key(self) -> dict[str, tuple[bool, int]]:
        """Key → (kept, crc32)."""
        return dict(
            zip(self.spans.keys, zip(self.kept.tolist(), self.spans.crc32.tolist(), strict=True), strict=True)
        )

    def table(self) -> pa.Table:
        """As an Arrow table with the plan's columns."""
        columns = {name: getattr(self, name) for name in ("label", "bin", "pick", "rank", "kept")}
        return pa.table({**self.spans.columns(self.name), **columns}, schema=_SCHEMA)

    @classmethod
    def from_table(cls, name: str, table: pa.Table) -> PlanShard:
        """The way back from `table`."""
        columns = [table[c].to_numpy() for c in ("label", "bin", "pick", "rank", "kept")]
        return cls(name, Spans.from_table(table), *columns)

    def check(self, n_kept: int, classes: Sequence[int], quota: NDArray[np.int64]) -> None:
        """Raise `PlanError` unless the rows make sense together and agree with the quotas.

        Args:
            n_kept: kept samples of this shard, as the header says.
            classes: the C classes of the plan, ascending.
            quota: (C, K) int64, kept samples of each class and bin.
        """
        spans, place = self.spans, f"shard {shorten(self.name)}"
        if len(set(spans.keys)) != len(spans):
            raise PlanError(f"{place}: a key is listed twice")
        if len(spans) and (spans.index[0] < 0 or (np.diff(spans.index) <= 0).any()):
            raise PlanError(f"{place}: positions are not ascending")
        ends = spans.byte_offset + spans.n_bytes
        if len(spans) and (spans.byte_offset[0] < 0 or (spans.n_bytes <= 0).any() or (ends < 0).any()):
            raise PlanError(f"{place}: a span is empty or out of range")
        if (spans.byte_offset[1:] < ends[:-1]).any():
            raise PlanError(f"{place}: spans overlap")
        if self.kept.sum() != n_kept:
            raise PlanError(f"{place}: keeps {self.kept.sum()} samples, its header says {n_kept}")
        binned = self.bin >= 0
        known = np.isin(self.label, classes)
        if (self.bin < -1).any() or (self.bin >= quota.shape[1]).any() or (binned & ~known).any():
            raise PlanError(f"{place}: a sample's class or bin is not one of the plan's")
        if (self.rank < ALWAYS).any():
            raise PlanError(f"{place}: a rank is below {ALWAYS}")
        limit = np.zeros(len(spans), dtype=np.int64)
        if binned.any():
            limit[binned] = quota[np.searchsorted(classes, self.label[binned]), self.bin[binned]]
        if ((self.rank < limit) | (self.rank == ALWAYS)).tolist() != self.kept.tolist():
            raise PlanError(f"{place}: what is kept does not follow from ranks and quotas")


class Plan:
    """A selection for a set of shards; opened lazily, one shard at a time.

    Make one with `build_plan`, `load_plan` or `Plan.from_keys`. It pickles as its path and hash when it has a
    file, so that workers read the same file instead of copying it. Iterating gives its shards, a `PlanShard` each;
    `len` counts kept samples, not shards.

    Attributes:
        header: settings, counts per shard, class and bin, scores; see `adq show`.
        hash: SHA-256 of the header, which vouches for every column: equal hashes, equal plans.
        path: its file, or None while it is only in memory.
        shards: names of the shards, sorted: the order of the plan's rows.
    """

    def __init__(
        self, header: Header, groups: GroupFile | Sequence[pa.Table], *, path: Path | None = None
    ) -> None:
        self.header, self.path, self._groups = header, path, groups
        self.hash = groups.hash if isinstance(groups, GroupFile) else sha256_text(canonical_json(header))
        self._held: OrderedDict[str, PlanShard] = OrderedDict()
        try:
            self.shards = [check_shard_name(entry["name"]) for entry in header["shards"]]
            self._kept = [int(entry["kept"]) for entry in header["shards"]]
            self._classes = [int(entry["label"]) for entry in header["classes"]]
            self._quota = np.array(header["cells"]["quota"], dtype=np.int64).reshape(
                len(self._classes) or 1, -1
            )
            self._size = np.array(header["cells"]["size"], dtype=np.int64).reshape(self._quota.shape)
            self.n_samples = sum(int(entry["n"]) for entry in header["shards"])
            self.n_kept = sum(self._kept)
            agrees = (header["n_samples"], header["n_kept"]) == (self.n_samples, self.n_kept)
        except PlanError as cause:
            raise PlanError(f"{self._where}: damaged header: {cause}") from cause
        except (KeyError, TypeError, ValueError, OverflowError) as cause:
            raise PlanError(f"{self._where}: damaged header: {shorten(str(cause))}") from cause
        if (
            not agrees
            or self.shards != sorted(set(self.shards))
            or self._classes != sorted(set(self._classes))
        ):
            raise PlanError(
                f"{self._where}: damaged header: its counts, shards or classes contradict each other"
            )
        self._position = {name: i for i, name in enumerate(self.shards)}

    @classmethod
    def from_shards(cls, shards: Iterable[PlanShard], header: Header) -> Plan:
        """A plan in memory from the rows of each shard; the header's counts per shard are filled in here."""
        tables: list[pa.Table] = []
        entries: list[dict[str, Any]] = []
        for shard in sorted(shards, key=lambda shard: shard.name):
            tables.append(shard.table())
            entries.append(
                {
                    "name": shard.name,
                    "n": len(shard.spans),
                    "kept": int(shard.kept.sum()),
                    "columns": column_hashes(tables[-1]),
                }
            )
        counts = {"n_samples": sum(e["n"] for e in entries), "n_kept": sum(e["kept"] for e in entries)}
        plan = cls(
            {**header, **counts, "format": "adq_wds.plan", "version": VERSION, "shards": entries}, tables
        )
        for name in plan.shards:
            plan.shard(name)  # a plan that would be refused when loaded is refused when made
        return plan

    @classmethod
    def from_keys(cls, urls: str | Iterable[str], keys: Iterable[str | tuple[str, str]] | None) -> Plan:
        """A plan that keeps the samples you name, for a selection made elsewhere.

        Args:
            urls: the shards, as `expand_urls` reads them; every one is scanned once.
            keys: the keys to keep; (shard, key) where a key stands in several shards; None keeps all.

        Raises:
            PlanError: a key is in no shard, or in several and given without its shard.
            ShardError: a shard is damaged, or none holds a sample.

        The samples have no bins: `kept_in` keeps the same ones in every epoch, and `adq show` has no table.
        """
        paths = expand_urls(urls)
        names = shard_names(paths)
        spans = {name: scan_spans(path, shard=name) for name, path in zip(names, paths, strict=True)}
        if not any(map(len, spans.values())):
            raise no_samples(len(spans))
        wanted = None if keys is None else _find_keys(spans, keys)
        shards = []
        for name, found in spans.items():
            kept = np.array([wanted is None or (name, key) in wanted for key in found.keys], dtype=bool)
            nowhere = np.full(len(found), -1, dtype=np.int32)
            rank = np.where(kept, ALWAYS, NEVER).astype(np.int32)
            shards.append(PlanShard(name, found, nowhere, nowhere.astype(np.int16), nowhere, rank, kept))
        header = {
            "settings": {"source": "keys"},
            "classes": [],
            "cells": {"size": [], "quota": []},
            "bins": [],
        }
        return cls.from_shards(shards, header)

    @property
    def _where(self) -> str:
        return str(self.path) if self.path is not None else "plan"

    def __len__(self) -> int:
        """Kept samples."""
        return self.n_kept

    def __repr__(self) -> str:
        return f"<Plan {self.n_kept:,} of {self.n_samples:,} samples in {len(self.shards)} shards, {self.hash[:12]}>"

    def shard(self, name: str) -> PlanShard:
        """The rows of one shard, checked; the last 72 are held.

        Raises:
            PlanError: the shard is not in the plan, or its rows are damaged.
        """
        held = self._held.get(name)
        if held is not None:
            return held
        if name not in self._position:
            raise PlanError(f"shard {shorten(name)} is not in the plan {self._where}")
        i = self._position[name]
        table = self._groups.group(i, _SCHEMA) if isinstance(self._groups, GroupFile) else self._groups[i]
        if table["shard"].unique().to_pylist() not in ([name], []):
            raise PlanError(f"{self._where}: damaged: rows of another shard under {shorten(name)}")
        shard = PlanShard.from_table(name, table)
        try:
            shard.check(self._kept[i], self._classes, self._quota)
        except PlanError as error:
            raise PlanError(f"{self._where}: {error}") from None
        self._held[name] = shard
        while len(self._held) > HELD_SHARDS:
            self._held.popitem(last=False)
        return shard

    def kept_in(self, name: str, epoch: int) -> NDArray[np.bool_]:
        """Which samples of a shard an epoch keeps, with fresh draws: (n,) bool, rows as in `shard(name)`.

        Every epoch takes as many of each class and bin as the plan does, going through them in the order of their
        ranks; epoch 0 is the plan itself. Must-include samples are kept in all.

        Raises:
            PlanError: the shard is not in the plan, its rows are damaged, or a rank contradicts its cell's size.
        """
        rows = self.shard(name)
        kept: NDArray[np.bool_] = rows.rank == ALWAYS
        drawn = np.flatnonzero((rows.bin >= 0) & ~kept)
        cell = np.searchsorted(self._classes, rows.label[drawn]), rows.bin[drawn]
        size = self._size[cell]
        if (rows.rank[drawn] >= size).any():
            raise PlanError(f"{self._where}: shard {shorten(name)}: a rank is beyond the size of its bin")
        kept[drawn] = fresh_draw(rows.rank[drawn], size, self._quota[cell], epoch)
        return kept

    def __iter__(self) -> Iterator[PlanShard]:
        """The rows of each shard, in order."""
        return (self.shard(name) for name in self.shards)

    def names(self, *, root: str | None = None) -> ShardNames:
        """The way from a sample's `__url__` to a shard of this plan."""
        return ShardNames(self.shards, root=root)

    def table(self) -> pa.Table:
        """All rows as one Arrow table: shard, index, key, byte_offset, n_bytes, crc32, label, bin, pick, rank, kept."""
        return pa.concat_tables([shard.table() for shard in self]) if self.shards else _SCHEMA.empty_table()

    def keys(self) -> list[str]:
        """The kept keys, in the order of shards and of samples in them."""
        return [key for shard in self for key, kept in zip(shard.spans.keys, shard.kept, strict=True) if kept]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to one Parquet file, whole or not at all; the hash stays."""
        write_groups(path, _SCHEMA, (shard.table() for shard in self), self.header)

    def __reduce__(self) -> tuple[Any, ...]:
        if self.path is not None:
            return _reopen, (str(self.path), self.hash)
        return Plan, (self.header, [shard.table() for shard in self])


def load_plan(path: str | os.PathLike[str]) -> Plan:
    """Open a plan's file: the header is read and checked now, each shard's rows when first needed.

    Raises:
        PlanError: missing, damaged, of another kind, or of a newer version.
    """
    file = GroupFile(path, kind="plan", version=VERSION, error=PlanError)
    return Plan(file.header, file, path=Path(path).absolute())


def as_plan(plan: Plan | str | os.PathLike[str]) -> Plan:
    """`plan` itself, or the plan at that path."""
    return plan if isinstance(plan, Plan) else load_plan(plan)


def _reopen(path: str, expected: str) -> Plan:
    plan = load_plan(path)
    if plan.hash != expected:
        raise PlanError(f"{path}: changed since it was opened (hash {plan.hash[:12]}, was {expected[:12]})")
    return plan


def _find_keys(spans: dict[str, Spans], keys: Iterable[str | tuple[str, str]]) -> set[tuple[str, str]]:
    """The (shard, key) of every key asked for."""
    holders: dict[str, list[str]] = {}
    for name, found in spans.items():
        for key in found.keys:
            holders.setdefault(key, []).append(name)
    if isinstance(keys, str):
        raise ValueError(f"keys must be a list, got the text {shorten(keys)}; write [{shorten(keys)}]")
    wanted = set()
    for asked in keys:
        shard, key = (None, asked) if isinstance(asked, str) else asked
        names = [name for name in holders.get(key, []) if shard in (None, name)]
        if not names:
            place = "any shard" if shard is None else f"shard {shorten(shard)}"
            raise PlanError(f"key {shorten(key)} is not in {place}")
        if len(names) > 1:
            raise PlanError(f"key {shorten(key)} is in {names[0]} and {names[1]}; give it as (shard, key)")
        wanted.add((names[0], key))
    return wanted
