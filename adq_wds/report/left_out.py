"""Lists the samples that a plan leaves out, each with the reason."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from adq_wds.errors import PlanError, located, shorten
from adq_wds.tables.plan import Plan
from adq_wds.tables.plan_rows import BAD, DUPLICATE, EXCLUDED, LABEL, REASONS

_REASONS = [REASONS[code] for code in (DUPLICATE, LABEL, BAD, EXCLUDED)]


def left_out_samples(plan: Plan) -> Iterator[dict[str, Any]]:
    """Each sample that no bin holds, in the plan's order, as JSON values.

    Yields:
        `reason`, `shard`, `key`, `label`; of a copy also `duplicate_of` ("SHARD/KEY" of the sample that stays) and
        `label_there`; of a doubted label `margin`. Labels are names where classes have names; a bad sample has none.

    Raises:
        PlanError: a copy names a sample that the plan lacks. Located.
    """
    table, names = plan.table(), plan.header.get("names")
    if "reason" not in table.column_names:  # version 1 gives none
        return
    out = table.filter(pc.is_in(table["reason"], value_set=pa.array(_REASONS)))
    stays = set(out["duplicate_of"].to_pylist())
    named = zip(*(table[name].to_pylist() for name in ("shard", "key", "label")), strict=True)
    label_of = {name: label for shard, key, label in named if (name := f"{shard}/{key}") in stays}

    def shown(label: int) -> int | str | None:
        return names[label] if names and label >= 0 else label if label >= 0 else None

    for row in out.to_pylist():
        entry = {name: row[name] for name in ("reason", "shard", "key")} | {"label": shown(row["label"])}
        if row["duplicate_of"]:
            if row["duplicate_of"] not in label_of:
                error = PlanError(f"duplicate_of {shorten(row['duplicate_of'])} names no sample of the plan")
                raise located(error, shard=row["shard"], key=row["key"])
            there = shown(label_of[row["duplicate_of"]])
            entry |= {"duplicate_of": row["duplicate_of"], "label_there": there}
        if row["reason"] == REASONS[LABEL]:
            entry["margin"] = row["margin"]
        yield entry


def show_left_out(samples: Iterable[dict[str, Any]]) -> str:
    """The same as lines for people: reason, shard, key, label, and what the reason goes by, with tabs between."""
    lines = []
    for sample in samples:
        why = ""
        if "margin" in sample:
            why = f"margin {sample['margin']:.3f}"
        if "duplicate_of" in sample:
            other = sample["label_there"] != sample["label"]
            why = f"of {sample['duplicate_of']}" + (
                f", whose label is {sample['label_there']}" if other else ""
            )
        label = "" if sample["label"] is None else str(sample["label"])
        lines.append("\t".join([sample["reason"], sample["shard"], sample["key"], label, why]).rstrip())
    return "\n".join(lines) or "no sample is left out"
