"""Writes a plan's file shard by shard; the rows of one shard are in memory."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from adq_wds.tables.members import MEMBERS
from adq_wds.tables.parquet import Header
from adq_wds.tables.plan import VERSION, Plan
from adq_wds.tables.plan_rows import OPTIONAL, SCHEMA, PlanShard
from adq_wds.tables.table import InMemory
from adq_wds.tables.write_table import write_table


def write_plan(
    path: str | os.PathLike[str],
    shards: Iterable[PlanShard],
    header: Header,
    *,
    n_shards: int,
    optional: Collection[str],
) -> None:
    """Write a plan of version 2; the file is that of `Plan.from_shards` and `save`, byte for byte.

    Args:
        path: the file, written whole or not at all.
        shards: the rows of each shard with their reasons, in the order of the shards' names.
        header: its entries, without those that follow from the rows: counts, and `shards`.
        n_shards: S.
        optional: which of the columns in `OPTIONAL` there are.

    Raises:
        PlanError: rows and header contradict each other.
        AdqError: the file cannot be written, or is too large to be read back.
    """
    schema = pa.schema([field for field in SCHEMA if field.name not in OPTIONAL or field.name in optional])
    classes = [int(entry["label"]) for entry in header["classes"]]
    quota = np.array(header["cells"]["quota"], dtype=np.int64).reshape(len(classes) or 1, -1)
    entries: list[dict[str, Any]] = []

    def groups() -> Iterator[tuple[Header, pa.Table]]:
        for shard in shards:
            table = shard.table(members=MEMBERS.name in optional)
            n_kept = int(shard.kept.sum())
            shard.check(n_kept, classes, quota)
            shard.with_reasons(table)  # raises where they contradict the rows
            entries.append({"name": shard.name, "n": len(table), "kept": n_kept})
            yield {"name": shard.name, "kept": n_kept}, table

    def whole() -> Header:
        counts = {"n_samples": sum(e["n"] for e in entries), "n_kept": sum(e["kept"] for e in entries)}
        made = {**header, **counts, "format": "adq_wds.plan", "version": VERSION}
        Plan(InMemory({**made, "shards": entries}, []))  # raises for a plan that would be refused when opened
        return made

    write_table(path, schema, groups(), whole, n_shards=n_shards)
