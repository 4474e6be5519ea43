"""Extends the measured rows to 1,000,000,000 samples on a cluster that is stated here; prices and rates of it are assumptions.

The set: 100,000 shards of 10,000 samples of 100 kB, in 50,000 classes of 20,000; features of D = 256; a tenth is kept.
"""

from __future__ import annotations

import json
from typing import Any

from benchmarks.scale_figure import fits

Rows = dict[str, Any]

N, SHARDS, SAMPLE_BYTES, CLASSES, KEEP = 1_000_000_000, 100_000, 100_000, 50_000, 0.1
CLEAN_BYTES = (
    72  # a sample, of the answer of `ridge_margins`: eight classes and predictions, a margin, and its label's
)
# Assumed, not measured:
NODES, GPUS, CORES = 16, 8, 64  # of GPU nodes, and one planner node of as many cores
GPU_PER_SECOND = 2_500  # photographs a second that a GPU embeds
NODE_BYTES_PER_SECOND = 2e9  # that a node reads from the store, and 1e9 that it writes
EFFICIENCY = 0.5  # of a core beside 63 others, as bins are bound by memory
GPU_HOUR, PLANNER_HOUR, STORE_GB_MONTH, GET, PUT = 2.5, 4.0, 0.023, 0.4e-6, 5e-6  # dollars


def stages(rows: Rows) -> list[tuple[str, float, float, float, str]]:
    """Of each stage: name, hours, GB that it writes, dollars, and where the hours come from."""
    largest = max(
        (row for name, row in rows.items() if name.count(" ") == 1 and "plan " in name), key=_samples
    )
    of_stage = {
        name: stage["processor_seconds"] / largest["samples"] for name, stage in largest["stages"].items()
    }
    n_features, n_plan = (largest[name] / largest["samples"] * N for name in ("features_bytes", "plan_bytes"))
    classes = rows["plan 100000 classes-of-20000"]
    in_bins = (
        classes["stages"]["sort and bin"]["processor_seconds"]
        - classes["stages"]["sort by class"]["processor_seconds"]
    )
    bins = in_bins / classes["samples"] * N / (CORES * EFFICIENCY) / 3600
    many = rows["plan 1000000 classes-of-20"]["stages"]
    of_classes = sum(many[name]["processor_seconds"] for name in ("share", "header")) / 3600
    alone = sum(of_stage[name] for name in ("open features", "read labels", "leave out", "draw")) * N / 3600
    save = of_stage["write the plan"] * N / 3600
    embed = (
        max(N / (NODES * GPUS * GPU_PER_SECOND), N * SAMPLE_BYTES / (NODES * NODE_BYTES_PER_SECOND)) / 3600
    )
    kept = N * KEEP * SAMPLE_BYTES
    write = kept / (NODES * NODE_BYTES_PER_SECOND / 2) / 3600
    sort = of_stage["sort by class"] * N / 3600
    gpus = NODES * GPUS * GPU_HOUR
    return [
        ("embed", embed, n_features / 1e9, embed * gpus + SHARDS * GET + 3 * SHARDS * PUT, "assumed rates"),
        (
            "sort by class",
            sort,
            N * (2 * 256 + 4) / 1e9,
            sort * PLANNER_HOUR,
            "one process, measured at 10 M",
        ),
        ("bin", bins, 0, bins * PLANNER_HOUR, "64 processes, measured with classes of 20,000"),
        ("leave out, draw", alone, 0, alone * PLANNER_HOUR, "one process, measured at 10 M"),
        (
            "share, header",
            of_classes,
            0,
            of_classes * PLANNER_HOUR,
            "one process, measured with 50,000 classes",
        ),
        ("write the plan", save, n_plan / 1e9, save * PLANNER_HOUR, "one process, measured at 10 M"),
        (
            "write kept shards",
            write,
            kept / 1e9,
            write * gpus + N * KEEP * GET,
            "assumed rates; at most a request a sample",
        ),
    ]


def _samples(row: dict[str, Any]) -> int:
    return int(row["samples"])


def breaks(rows: Rows) -> dict[str, float]:
    """Numbers of what breaks: memory of planning, and what one worker pays in an epoch for the plan's rows."""
    order = rows["order"]
    return {
        "plan_memory_gb": fits(rows)["bytes_per_sample"] * N / 1e9,
        "plan_memory_outside_bins_gb": fits(rows)["bytes_per_sample_outside_bins"] * N / 1e9,
        "clean_memory_gb": CLEAN_BYTES * N / 1e9,
        "worker_seconds_an_epoch": order["processor_seconds_a_shard"] * SHARDS,
        "worker_gb_an_epoch": order["bytes_a_shard"] * SHARDS / 1e9,
        "all_workers_core_hours": order["processor_seconds_a_shard"] * SHARDS * 1_021 * 8 / 3600,
    }


def table(rows: Rows) -> str:
    """The table of docs/scale.md, and the numbers below it."""
    lines = ["| stage | hours | GB written | dollars | hours by |", f"|{'---|' * 5}"]
    all_stages = stages(rows)
    for name, hours, gb, dollars, by in all_stages:
        lines.append(f"| {name} | {hours:.2f} | {gb:,.0f} | {dollars:,.0f} | {by} |")
    hours, dollars = sum(stage[1] for stage in all_stages), sum(stage[3] for stage in all_stages)
    lines.append(f"| together | {hours:.1f} | | {dollars:,.0f} | |")
    return "\n".join(
        [*lines, "", json.dumps({name: round(value, 1) for name, value in breaks(rows).items()})]
    )
