"""Holds a plan's rows of one shard, and checks that they are consistent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from adq_wds.errors import PlanError, shorten
from adq_wds.tables.members import MEMBERS
from adq_wds.tables.spans import SPAN_FIELDS, Spans

ALWAYS = -1  # rank of a sample that is kept whatever the budget
NEVER = 2**31 - 1  # rank of a sample outside all bins: damaged, a copy, or of a class left out
REASONS = ("kept", "quota", "duplicate", "label", "bad", "excluded")
KEPT, QUOTA, DUPLICATE, LABEL, BAD, EXCLUDED = range(len(REASONS))
UNKNOWN = len(REASONS)  # of a sample outside all bins, in a plan of version 1
SHOWN_REASONS = (*REASONS, "left out")
REASON_COLUMNS = ("reason", "duplicate_of")
MARGIN = pa.field("margin", pa.float32(), nullable=False)
OPTIONAL = (*REASON_COLUMNS, MEMBERS.name, MARGIN.name)
SCHEMA = pa.schema(
    [
        *SPAN_FIELDS,
        pa.field("label", pa.int32(), nullable=False),
        pa.field("bin", pa.int16(), nullable=False),
        pa.field("pick", pa.int32(), nullable=False),
        pa.field("rank", pa.int32(), nullable=False),
        pa.field("kept", pa.bool_(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("duplicate_of", pa.string(), nullable=False),
        MEMBERS,
        MARGIN,
    ]
)


@dataclass(frozen=True)
class PlanShard:
    """The plan's rows for one shard, in the shard's order.

    Attributes:
        name: the shard's name.
        spans: of its n samples.
        label: (n,) int32, class over the whole set; -1 for unlabelled data.
        bin: (n,) int16, from 0 in the order filled; -1 for a sample in no bin.
        pick: (n,) int32, position in which its bin took it; -1 for a sample in no bin.
        rank: (n,) int32, kept when below the quota of its class and bin; -1 is always kept.
        kept: (n,) bool.
        reason: (n,) uint8, why each is kept or not, a position in `REASONS`; None where it was not read, or the plan is
            of version 1.
        duplicate_of: "SHARD/KEY" of the sample that stays, by row, for each row whose reason is "duplicate".
        margin: (n,) float32, how well each label fits, NaN where not measured; None where measured for none.
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
    margin: NDArray[np.float32] | None = None

    @classmethod
    def chosen(
        cls, name: str, spans: Spans, kept: NDArray[np.bool_], label: NDArray[np.int32] | None = None
    ) -> PlanShard:
        """The rows of a selection without bins: samples are kept in every epoch, or never.

        Args:
            name, spans, label: as in the class; without `label` the samples have no class.
            kept: (n,) bool.
        """
        nowhere = np.full(len(spans), -1, dtype=np.int32)
        rank = np.where(kept, ALWAYS, NEVER).astype(np.int32)
        reason = np.where(kept, KEPT, EXCLUDED).astype(np.uint8)
        classes = nowhere if label is None else label
        return cls(name, spans, classes, nowhere.astype(np.int16), nowhere, rank, kept, reason)

    @cached_property
    def by_key(self) -> dict[str, tuple[bool, int, int]]:
        """Key → (kept, crc32, row)."""
        crc32 = self.spans.crc32.tolist()
        rows = zip(self.kept.tolist(), crc32, range(len(crc32)), strict=True)
        return dict(zip(self.spans.keys, rows, strict=True))

    def table(self, *, members: bool | None = None) -> pa.Table:
        """As an Arrow table with the plan's columns; with `members` by default where these are known."""
        columns = self.spans.columns(self.name, members=members)
        columns |= {name: getattr(self, name) for name in ("label", "bin", "pick", "rank", "kept")}
        if self.reason is not None:
            copies = self.duplicate_of or {}
            columns["reason"] = pa.array(REASONS).take(pa.array(self.reason))
            columns["duplicate_of"] = [copies.get(row, "") for row in range(len(self.reason))]
        if self.margin is not None:
            columns["margin"] = self.margin
        return pa.table(columns, schema=pa.schema([field for field in SCHEMA if field.name in columns]))

    @classmethod
    def from_table(cls, name: str, table: pa.Table) -> PlanShard:
        """The inverse of `table`, without reasons."""
        columns = [table[c].to_numpy() for c in ("label", "bin", "pick", "rank", "kept")]
        return cls(name, Spans.from_table(table), *columns)

    def with_reasons(self, table: pa.Table) -> PlanShard:
        """The same rows with the reasons in a table's columns `reason` and `duplicate_of`, and its `margin` if any.

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
        margin = table["margin"].to_numpy() if "margin" in table.column_names else None
        return replace(self, reason=reason, duplicate_of=copies, margin=margin)

    def derived_reason(self) -> NDArray[np.uint8]:
        """(n,) uint8: `reason`; where it is None what follows from the rows, `UNKNOWN` for a sample outside all bins."""
        if self.reason is not None:
            return self.reason
        outside = np.where(self.bin >= 0, QUOTA, UNKNOWN)
        return np.where(self.kept, KEPT, outside).astype(np.uint8)

    def check(self, n_kept: int, classes: Sequence[int], quota: NDArray[np.int64]) -> None:
        """Raise `PlanError` unless the rows are consistent and agree with the quotas.

        Args:
            n_kept: kept samples of this shard, by the header.
            classes: the C classes of the plan, ascending.
            quota: (C, K) int64, kept samples of each class and bin.
        """
        spans, place = self.spans, f"shard {shorten(self.name)}"
        if (fault := spans.fault()) is not None:
            raise PlanError(f"{place}: {fault}")
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
