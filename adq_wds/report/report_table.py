"""Makes the report's table: one row a sample, in flat columns that notebooks and Embedding Atlas open."""

from __future__ import annotations

import os
from typing import Any, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from adq_wds.errors import PlanError
from adq_wds.files import atomic_path, canonical_json
from adq_wds.report.feature_rows import feature_rows
from adq_wds.tables.features import Features
from adq_wds.tables.parquet import HEADER_KEY
from adq_wds.tables.plan import Plan

VERSION = 1
_COPIED = ("key", "label", "bin", "pick", "rank", "kept")
_ORDER = (
    *("shard", "key", "label", "class", "bin", "pick", "rank", "kept", "reason", "duplicate_of"),
    *("margin", "texture", "x", "y"),
)


class ReportHeader(TypedDict):
    """The header of `report.parquet`, see FORMAT.md."""

    format: str
    version: int
    plan: str
    features: str | None


def report_table(
    plan: Plan, features: Features | None = None, xy: NDArray[np.float32] | None = None
) -> pa.Table:
    """One row for each sample of a plan, in the plan's order.

    Args:
        plan: the plan.
        features: those that it was made of; without them there is no texture.
        xy: (N, 2), places of the N usable samples of `features`, as `project` gives them.

    Returns:
        `shard`, `key`, `label`, `class` (the class's name, its number where it has none, "" where unlabelled), `bin`,
        `pick`, `rank`, `kept`; where the plan says them `reason`, `duplicate_of` and `margin`; where they are known
        `texture`, `x` and `y`, NaN for a sample that could not be used.

    Raises:
        PlanError: a class that the header does not name.
        FeaturesError: features of other samples.
    """
    table = plan.table()
    columns: dict[str, Any] = {"shard": _dictionary(table["shard"])}
    columns |= {name: table[name] for name in _COPIED}
    columns["class"] = _class_names(plan, table["label"].to_numpy())
    if "reason" in table.column_names:
        columns |= {"reason": _dictionary(table["reason"]), "duplicate_of": table["duplicate_of"]}
    if "margin" in table.column_names:
        columns["margin"] = table["margin"]
    if features is not None:
        row = feature_rows(plan, features)
        texture = features.texture()
        if texture is not None:
            columns["texture"] = _taken(texture, row)
        if xy is not None:
            columns |= {"x": _taken(xy[:, 0], row), "y": _taken(xy[:, 1], row)}
    header: ReportHeader = {
        "format": "adq_wds.report",
        "version": VERSION,
        "plan": plan.hash,
        "features": None if features is None else features.hash,
    }
    made = pa.table({name: columns[name] for name in _ORDER if name in columns})
    return made.replace_schema_metadata({HEADER_KEY: canonical_json(header).encode()})


def save_report_table(table: pa.Table, path: str | os.PathLike[str]) -> None:
    """Write the table to one Parquet file, whole or not at all.

    Raises:
        AdqError: the file cannot be written.
    """
    with atomic_path(path) as partial:
        pq.write_table(table, partial, compression="zstd")


def _taken(values: NDArray[np.float32], row: NDArray[np.int64]) -> NDArray[np.float32]:
    """The value of each of the plan's samples, NaN where it has no row."""
    taken = np.full(len(row), np.nan, dtype=np.float32)
    taken[row >= 0] = values[row[row >= 0]]
    return taken


def _class_names(plan: Plan, label: NDArray[np.int32]) -> pa.DictionaryArray:
    names, present = plan.header.get("names"), np.unique(label)
    if names is not None and len(present) and present[-1] >= len(names):
        raise PlanError(
            f"{plan.path or 'plan'}: damaged header: label {present[-1]} of {len(names)} named classes"
        )
    words = ["" if i < 0 else names[i] if names is not None else str(i) for i in present.tolist()]
    codes = np.searchsorted(present, label).astype(np.int32)
    return pa.DictionaryArray.from_arrays(codes, pa.array(words, type=pa.string()))


def _dictionary(column: pa.ChunkedArray) -> pa.DictionaryArray:
    return column.combine_chunks().dictionary_encode()
