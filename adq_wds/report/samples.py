"""Holds the samples of a plan as arrays, for the sections of the report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from adq_wds.report.escaped import shown
from adq_wds.tables.headers import Natural, checked
from adq_wds.tables.plan import Plan
from adq_wds.tables.plan_rows import EXCLUDED, KEPT, QUOTA, REASONS


class BinEntry(TypedDict):
    """What the header of a plan says of a bin, besides its scores."""

    size: Natural
    kept: Natural
    rate: float


@dataclass(frozen=True)
class Samples:
    """The N samples of a plan, in its order.

    Attributes:
        header: the plan's, with `shards`: name and number of samples of each.
        shard: N names of shards.
        key: N keys.
        classes: C labels that occur, ascending; -1 stands for unlabelled and unreadable samples.
        names: of these classes, as a page may show them.
        class_row: (N,) int64, position of each sample's class among `classes`.
        bin: (N,) int16, -1 in no bin.
        rank: (N,) int32.
        reason: (N,) uint8, position in `REASONS`.
        margin: (N,) float32, NaN where not measured; None where measured for none.
        stays: (N,) int64, of a copy the row of the sample that stays; -1 of others.
        n_bytes: (N,) int64, tar headers included.
    """

    header: dict[str, Any]
    shard: pa.ChunkedArray
    key: pa.ChunkedArray
    classes: NDArray[np.int64]
    names: list[str]
    class_row: NDArray[np.int64]
    bin: NDArray[np.int16]
    rank: NDArray[np.int32]
    reason: NDArray[np.uint8]
    margin: NDArray[np.float32] | None
    stays: NDArray[np.int64]
    n_bytes: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.reason)

    @classmethod
    def of_plan(cls, plan: Plan) -> Samples:
        """The samples of a plan; one of version 1 has fewer reasons.

        Raises:
            ValueError: an entry on a bin in the header lacks a number.
        """
        checked(plan.header["bins"], list[BinEntry], "bins")
        checked(plan.header["bins"], list[dict[str, float | None]], "bins")
        table = plan.table()
        label = table["label"].to_numpy().astype(np.int64)
        classes, class_row = np.unique(label, return_inverse=True)
        sizes = zip(plan.shards, plan.shard_sizes.tolist(), strict=True)
        header = {**plan.header, "shards": [{"name": name, "n": n} for name, n in sizes]}
        bin, rank, kept = (table[name].to_numpy() for name in ("bin", "rank", "kept"))
        stays = np.full(len(table), -1)
        if "reason" in table.column_names:
            reason = pc.index_in(table["reason"], value_set=pa.array(REASONS)).to_numpy().astype(np.uint8)
            stays = _rows_of(table, table["duplicate_of"])
        else:
            reason = np.where(kept, KEPT, np.where(bin >= 0, QUOTA, EXCLUDED)).astype(np.uint8)
        margin = table["margin"].to_numpy() if "margin" in table.column_names else None
        names = [_class_name(int(c), header.get("names"), alone=len(classes) == 1) for c in classes]
        columns = (
            classes,
            names,
            class_row.reshape(-1),
            bin,
            rank,
            reason,
            margin,
            stays,
            table["n_bytes"].to_numpy(),
        )
        return cls(header, table["shard"], table["key"], *columns)

    def place(self, row: int) -> str:
        """SHARD/KEY of a sample, as a page may show it."""
        return shown(f"{self.shard[row].as_py()}/{self.key[row].as_py()}")

    def class_name(self, row: int) -> str:
        """The name of a sample's class."""
        return self.names[int(self.class_row[row])]

    def reason_name(self, row: int) -> str:
        """Why a sample is kept or not, a word of `REASONS`."""
        return REASONS[int(self.reason[row])]

    @property
    def counts(self) -> list[int]:
        """Samples by reason, in the order of `REASONS`."""
        return np.bincount(self.reason, minlength=len(REASONS)).tolist()  # type: ignore[no-any-return]

    @property
    def labelled(self) -> NDArray[np.bool_]:
        """(C,) whether a class is one: that of samples without a label is where there is no other."""
        labelled = self.classes >= 0
        return labelled if labelled.any() else ~labelled

    @property
    def reasons_by_class(self) -> NDArray[np.int64]:
        """(C, 6) samples of each class by reason."""
        cell = self.class_row * len(REASONS) + self.reason
        return np.bincount(cell, minlength=len(self.classes) * len(REASONS)).reshape(-1, len(REASONS))


def _class_name(label: int, names: list[str] | None, *, alone: bool) -> str:
    if label < 0:
        return "all samples" if alone else "no label"
    if names is not None and label < len(names):
        return shown(names[label], 40)
    return f"class {label}"


def _rows_of(table: pa.Table, duplicate_of: pa.ChunkedArray) -> NDArray[np.int64]:
    """(N,) the row of the sample that each copy names, -1 for no copy or a name that is not there."""
    rows = np.full(len(table), -1)
    copies = np.flatnonzero(pc.not_equal(duplicate_of, "").to_numpy())
    if len(copies):
        place = pc.binary_join_element_wise(table["shard"], table["key"], "/")
        found = pc.index_in(duplicate_of.take(pa.array(copies)), value_set=place.combine_chunks())
        rows[copies] = found.fill_null(-1).to_numpy()
    return rows
