"""Which samples are kept? A plan: one exact decision for every sample of a set of shards."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from adq_wds.core.allocation import fresh_draw
from adq_wds.core.fresh import ONE, FreshDraws
from adq_wds.core.rng import check_seed, draw
from adq_wds.errors import PlanError, shorten
from adq_wds.files import canonical_json, sha256_text
from adq_wds.shards.names import ShardNames, check_shard_name, expand_urls, plain_shard_names
from adq_wds.tables.parquet import GroupFile, Header, column_hashes, write_groups
from adq_wds.tables.spans import SPAN_FIELDS, Spans, no_samples, scan_spans

VERSION = 2
"""1: no reasons, no shares; fresh draws by whole rounds. 2: `reason`, `duplicate_of` and the header's `cells.share`."""
ALWAYS = -1  # rank of a sample that is kept whatever the budget
NEVER = 2**31 - 1  # rank of a sample outside all bins: damaged, a copy, or of a class left out
REASONS = ("kept", "quota", "duplicate", "label", "bad", "excluded")
KEPT, QUOTA, DUPLICATE, LABEL, BAD, EXCLUDED = range(len(REASONS))
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
_REASON_FIELDS = [
    pa.field("reason", pa.string(), nullable=False),
    pa.field("duplicate_of", pa.string(), nullable=False),
]
_MORE = [field.name for field in _REASON_FIELDS]
_FULL_SCHEMA = pa.schema([*_SCHEMA, *_REASON_FIELDS])
_HELD_EPOCHS = 4  # epochs whose places in all cells are held: workers of one stream may be in two


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
        reason: (n,) uint8, why each is kept or not, a position in `REASONS`; None where it was not read, or the plan is
            of version 1.
        duplicate_of: "SHARD/KEY" of the sample that stays, by row, for each row whose reason is "duplicate".
    """

    name: str
    spans: Spans
    label: NDArray[np.int32]
    bin: NDArray[np.int16]
    pick: NDArray[np.int32]
    rank: NDArray[np.int32]
    kept: NDArray[np.bool_]
    reason: NDArray[np.uint8] | None = None
    duplicate_of: Mapping[int, str] | None = None

    @cached_property
    def by_key(self) -> dict[str, tuple[bool, int, int]]:
        """Key → (kept, crc32, row)."""
        crc32 = self.spans.crc32.tolist()
        rows = zip(self.kept.tolist(), crc32, range(len(crc32)), strict=True)
        return dict(zip(self.spans.keys, rows, strict=True))

    def table(self) -> pa.Table:
        """As an Arrow table with the plan's columns."""
        columns = {name: getattr(self, name) for name in ("label", "bin", "pick", "rank", "kept")}
        columns = {**self.spans.columns(self.name), **columns}
        if self.reason is None:
            return pa.table(columns, schema=_SCHEMA)
        copies = self.duplicate_of or {}
        columns["reason"] = pa.array(REASONS).take(pa.array(self.reason))
        columns["duplicate_of"] = [copies.get(row, "") for row in range(len(self.reason))]
        return pa.table(columns, schema=_FULL_SCHEMA)

    @classmethod
    def from_table(cls, name: str, table: pa.Table) -> PlanShard:
        """The way back from `table`, without reasons."""
        columns = [table[c].to_numpy() for c in ("label", "bin", "pick", "rank", "kept")]
        return cls(name, Spans.from_table(table), *columns)

    def with_reasons(self, table: pa.Table) -> PlanShard:
        """The same rows with the reasons in a table's columns `reason` and `duplicate_of`.

        Raises:
            PlanError: the reasons contradict the rows.
        """
        place = f"shard {shorten(self.name)}"
        codes = pc.index_in(table["reason"], value_set=pa.array(REASONS))
        if codes.null_count:
            raise PlanError(f"{place}: a reason is not one of {', '.join(REASONS)}")
        reason = codes.to_numpy().astype(np.uint8)
        names = table["duplicate_of"]
        rows = np.flatnonzero(pc.not_equal(names, "").to_numpy())
        copies = dict(zip(rows.tolist(), names.take(pa.array(rows)).to_pylist(), strict=True))
        binned = self.bin >= 0
        expected = np.where(self.kept, KEPT, np.where(binned, QUOTA, reason))
        outside = ~self.kept & ~binned
        if (reason != expected).any() or ((reason <= QUOTA) | (self.rank != NEVER))[outside].any():
            raise PlanError(f"{place}: a reason contradicts what is kept, or in which bin")
        if not np.array_equal(rows, np.flatnonzero(reason == DUPLICATE)):
            raise PlanError(f"{place}: a copy names no sample that stays, or another sample names one")
        return replace(self, reason=reason, duplicate_of=copies)

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
        self._epochs: OrderedDict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = OrderedDict()
        try:
            self.shards = [check_shard_name(entry["name"]) for entry in header["shards"]]
            self._kept = [int(entry["kept"]) for entry in header["shards"]]
            self._classes = [int(entry["label"]) for entry in header["classes"]]
            self._quota = np.array(header["cells"]["quota"], dtype=np.int64).reshape(
                len(self._classes) or 1, -1
            )
            self._size = np.array(header["cells"]["size"], dtype=np.int64).reshape(self._quota.shape)
            self._draws = None if header["version"] == 1 else _fresh_draws(header, self._size, self._quota)
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
        """A plan in memory from the rows of each shard; the header's counts per shard are filled in here.

        With reasons in the rows and shares in the header it is of version 2, without both of version 1.
        """
        shards = list(shards)
        reasons = {shard.reason is not None for shard in shards} or {"share" in header["cells"]}
        if reasons != {"share" in header["cells"]}:
            raise PlanError("a plan has reasons for all samples and shares of all cells, or neither")
        version = VERSION if reasons == {True} else 1
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
            {**header, **counts, "format": "adq_wds.plan", "version": version, "shards": entries}, tables
        )
        for _ in plan:  # a plan that would be refused when loaded is refused when made
            pass
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
        names = plain_shard_names(paths)
        spans = {name: scan_spans(path, shard=name) for name, path in zip(names, paths, strict=True)}
        if not any(map(len, spans.values())):
            raise no_samples(len(spans))
        wanted = None if keys is None else _find_keys(spans, keys)
        shards = []
        for name, found in spans.items():
            kept = np.array([wanted is None or (name, key) in wanted for key in found.keys], dtype=bool)
            nowhere = np.full(len(found), -1, dtype=np.int32)
            rank = np.where(kept, ALWAYS, NEVER).astype(np.int32)
            reason = np.where(kept, KEPT, EXCLUDED).astype(np.uint8)
            bin = nowhere.astype(np.int16)
            shards.append(PlanShard(name, found, nowhere, bin, nowhere, rank, kept, reason))
        header = {
            "settings": {"source": "keys"},
            "classes": [],
            "cells": {"size": [], "quota": [], "share": []},
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
        """The rows of one shard without their reasons, checked; the last 72 are held.

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

        Every epoch keeps as many samples as the plan and goes through each class and bin in the order of ranks, each
        sample once before any twice; epoch 0 is the plan itself. Over the epochs each class and bin gets its exact
        share of `cells.share`, so that every sample of a share above 0 is reached. Must-include samples are kept in
        all. A plan of version 1 takes its quotas in every epoch.

        Raises:
            PlanError: the shard is not in the plan, its rows are damaged, or a rank contradicts its cell's size.
        """
        rows = self.shard(name)
        kept: NDArray[np.bool_] = rows.rank == ALWAYS
        drawn = np.flatnonzero((rows.bin >= 0) & ~kept)
        cell = np.searchsorted(self._classes, rows.label[drawn]) * self._size.shape[1] + rows.bin[drawn]
        rank, size = rows.rank[drawn], self._size.ravel()[cell]
        if (rank >= size).any():
            raise PlanError(f"{self._where}: shard {shorten(name)}: a rank is beyond the size of its bin")
        if self._draws is None:
            kept[drawn] = fresh_draw(rank, size, self._quota.ravel()[cell], epoch)
        else:
            first, n = self._seats(self._draws, epoch)
            kept[drawn] = (rank - first[cell]) % size < n[cell]
        return kept

    def _seats(self, draws: FreshDraws, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """`FreshDraws.seats`, held for the last few epochs: every shard asks for them."""
        held = self._epochs.get(epoch)
        if held is None:
            held = self._epochs[epoch] = draws.seats(epoch)
            while len(self._epochs) > _HELD_EPOCHS:
                self._epochs.popitem(last=False)
        return held

    def __iter__(self) -> Iterator[PlanShard]:
        """The rows of each shard with their reasons, in order."""
        return (self._with_reasons(i, self.shard(name)) for i, name in enumerate(self.shards))

    def _with_reasons(self, i: int, shard: PlanShard) -> PlanShard:
        """A shard's rows with their reasons, where the plan has them: two columns that streams do not need."""
        if not self._explained:
            return shard
        file = self._groups
        table = file.group(i, _FULL_SCHEMA, _MORE) if isinstance(file, GroupFile) else file[i]
        try:
            return shard.with_reasons(table)
        except PlanError as error:
            raise PlanError(f"{self._where}: {error}") from None

    def names(self, *, root: str | None = None) -> ShardNames:
        """The way from a sample's `__url__` to a shard of this plan."""
        return ShardNames(self.shards, root=root)

    def table(self) -> pa.Table:
        """All rows as one Arrow table: shard, index, key, byte_offset, n_bytes, crc32, label, bin, pick, rank, kept.

        Plans of version 2 also have `reason` (kept, quota, duplicate, label, bad, excluded) and `duplicate_of`
        ("SHARD/KEY" of the sample that a copy is one of, else "").
        """
        if not self.shards:
            return self._schema.empty_table()
        return pa.concat_tables([shard.table() for shard in self])

    @property
    def _schema(self) -> pa.Schema:
        return _FULL_SCHEMA if self._explained else _SCHEMA

    @property
    def _explained(self) -> bool:
        """Whether the rows have reasons."""
        if isinstance(self._groups, GroupFile):
            return all(map(self._groups.has, _MORE))
        return all(set(_MORE) <= set(table.column_names) for table in self._groups)

    def keys(self) -> list[str]:
        """The kept keys, in the order of shards and of samples in them."""
        shards = map(self.shard, self.shards)
        return [
            key for shard in shards for key, kept in zip(shard.spans.keys, shard.kept, strict=True) if kept
        ]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to one Parquet file, whole or not at all; the hash stays."""
        write_groups(path, self._schema, (shard.table() for shard in self), self.header)

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


def _fresh_draws(header: Header, size: NDArray[np.int64], quota: NDArray[np.int64]) -> FreshDraws | None:
    """The draws of a plan of version 2, held against its sizes and quotas; None for a plan without bins.

    Raises:
        KeyError, TypeError, ValueError: the header lacks shares, or they contradict it.
    """
    share = np.array(header["cells"]["share"], dtype=np.float64).reshape(size.shape)
    if not size.size:
        return None
    units = np.rint(share * ONE)
    fits = (units == share * ONE) & (share >= 0) & (share <= size)
    # 2⁴² samples: below it all sums of units are exact, as integers and as floats
    if not fits.all() or not share.sum() == quota.sum() < 2**42:
        raise ValueError("shares that contradict the sizes and quotas")
    start = draw(check_seed(header["settings"]["seed"]), 0, "", "", purpose="fresh")
    return FreshDraws(size.ravel(), quota.ravel(), units.astype(np.int64).ravel(), start)


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
