"""The growth of planning as tables and as one SVG, light or dark as its reader's system: time and memory against samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Rows = dict[str, Any]

WIDTH, HEIGHT = 300, 170  # of a panel
LEFT, TOP, RIGHT, BOTTOM = 58, 40, 22, 52  # around it
TITLE = "Time and memory of planning"
ABOUT = "Two diagrams with logarithmic axes: processor time of planning in minutes and memory in GiB, against millions of samples."
STYLE = """
svg { --ink: #24292f; --faint: #d0d7de; --paper: #ffffff; --time: #bc4c00; --memory: #0969da }
@media (prefers-color-scheme: dark) {
 svg { --ink: #e6edf3; --faint: #30363d; --paper: #0d1117; --time: #f0883e; --memory: #58a6ff } }
text { font: 12px sans-serif; fill: var(--ink) } .title { font-weight: bold } .end { text-anchor: end }
.middle { text-anchor: middle } .paper { fill: var(--paper) } .grid { stroke: var(--faint) }
.line { fill: none; stroke-width: 2 } .bound { fill: none; stroke: var(--ink); stroke-dasharray: 5 3 }
.time { stroke: var(--time) } .memory { stroke: var(--memory) } circle { fill: var(--paper); stroke-width: 2 }
"""


def exponent(n: Sequence[float], values: Sequence[float]) -> float:
    """The exponent a of values that grow as n^a: least squares of the logarithms.

    >>> round(exponent([1, 2, 4], [5, 20, 80]), 6)
    2.0
    """
    return float(np.polyfit(np.log(n), np.log(values), 1)[0])


def line(n: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """(a, b) of a + b · n, by least squares.

    >>> [round(value, 6) for value in line([1, 2, 3], [5, 7, 9])]
    [3.0, 2.0]
    """
    b, a = np.polyfit(n, values, 1)
    return float(a), float(b)


def sizes(rows: Rows) -> list[dict[str, Any]]:
    """The rows of planning with default options, by size."""
    return sorted(
        (row for name, row in rows.items() if name.startswith("plan ") and name.count(" ") == 1),
        key=lambda row: int(row["samples"]),
    )


def beyond(row: dict[str, Any], *, bins: bool = True) -> float:
    """Peak memory of planning, in MiB, beyond that of the process when it had opened the features; without `bins`, of
    the other stages."""
    stages = row["stages"]
    peaks = [stage["peak_mib"] for name, stage in stages.items() if bins or name != "sort and bin"]
    return float(max(peaks) - stages["open features"]["peak_mib"])


def fits(rows: Rows) -> dict[str, float]:
    """Exponents of planning's time, and of N log N over the same sizes; and bytes that a sample takes of memory."""
    planned = sizes(rows)
    n = [row["samples"] for row in planned]
    return {
        "processor_seconds": exponent(n, [row["processor_seconds"] for row in planned]),
        "n_log_n": exponent(n, [k * math.log(k) for k in n]),
        "bytes_per_sample": line(n, [beyond(row) for row in planned])[1] * 2**20,
        "bytes_per_sample_outside_bins": line(n, [beyond(row, bins=False) for row in planned])[1] * 2**20,
    }


def tables(rows: Rows) -> str:
    """The tables of docs/scale.md."""
    return "\n\n".join((_of_plans(rows), _of_stages(rows), _of_shards(rows), _of_ranks(rows)))


def _of_plans(rows: Rows) -> str:
    lines = [
        "| samples | classes, shards | features | clock | processor | peak memory | plan |",
        f"|{'---|' * 7}",
    ]
    for name, row in rows.items():
        if name.startswith("plan "):
            options = "".join(f", `{word}`" for word in name.split()[2:])
            lines.append(
                f"| {row['samples']:,}{options} | {row['classes']:,} | {row['features_bytes'] / 1e9:.2f} GB | "
                f"{row['seconds']:.0f} s | {row['processor_seconds']:.0f} s | {row['peak_mib'] / 1024:.2f} GiB | "
                f"{row['plan_bytes'] / 1e6:.0f} MB |"
            )
    return "\n".join(lines)


def _of_stages(rows: Rows) -> str:
    """Each stage: processor seconds, and the peak of the process meanwhile."""
    planned = sizes(rows)
    heads = [f"{row['samples'] / 1e6:g} M" for row in planned]
    lines = [f"| stage | {' | '.join(heads)} | exponent |", f"|{'---|' * (len(heads) + 2)}"]
    for stage in planned[0]["stages"] if planned else ():
        of_stage = [row["stages"][stage] for row in planned]
        cells = [f"{cell['processor_seconds']:.1f} s, {cell['peak_mib']:,} MiB" for cell in of_stage]
        took = [cell["processor_seconds"] for cell in of_stage]
        grows = f"{exponent([row['samples'] for row in planned], took):.2f}" if min(took) >= 0.05 else ""
        lines.append(f"| {stage} | {' | '.join(cells)} | {grows} |")
    return "\n".join(lines)


def _of_shards(rows: Rows) -> str:
    lines = ["| shards | step | clock | processor | memory beyond imports | bytes read |", f"|{'---|' * 6}"]
    for name, row in rows.items():
        for step, cell in row.items() if name.startswith("shards ") else ():
            if isinstance(cell, dict):
                beyond = cell["peak_mib"] - cell["imports_mib"]
                lines.append(
                    f"| {row['shards']:,} | {step.replace('_', ' ')} | {cell['seconds']:,.1f} s | "
                    f"{cell['processor_seconds']:,.1f} s | "
                    f"{beyond:,} MiB | {cell['read_bytes'] / 1e6:,.1f} MB |"
                )
    return "\n".join(lines)


def _of_ranks(rows: Rows) -> str:
    lines = [
        "| ranks, one after another | after steps | missing | repeated | in order | samples of a rank | of a worker |",
        f"|{'---|' * 7}",
    ]
    for name, row in rows.items():
        if name.startswith("ranks "):
            together = ", `global_batch`" if "global_batch" in row else ""
            spans = (
                ", ".join(f"{least:,} to {most:,}" for least, most in row[f"samples_of_a_{whose}"])
                for whose in ("rank", "worker")
            )
            lines.append(
                f"| {', '.join(f'{n:,}' for n in row['ranks'])}{together} | "
                f"{', '.join(map(str, row['steps_before_change'])) or 'none'} | {row['missing']} | {row['repeated']} | "
                f"{'yes' if row['in_order'] else 'no'} | {' | '.join(spans)} |"
            )
    return "\n".join(lines)


def figure(rows: Rows) -> str:
    """The SVG of the rows of planning."""
    planned, grows = sizes(rows), fits(rows)
    n = [row["samples"] for row in planned]
    minutes = [row["processor_seconds"] / 60 for row in planned]
    gib = [beyond(row) / 1024 for row in planned]
    a, b = line(n, gib)
    first = minutes[0] / (n[0] * math.log(n[0]))
    panels = (
        (
            "time",
            f"Processor minutes: grow as N^{grows['processor_seconds']:.2f}",
            minutes,
            lambda k: first * k * math.log(k),
            "N log N",
        ),
        (
            "memory",
            f"Memory of planning, GiB: {a:.2f} + {b * 1e6:.3f} a million",
            gib,
            lambda k: 2.0,
            "goal: 2 GiB",
        ),
    )
    height = TOP + HEIGHT + BOTTOM
    parts = [
        _panel(style, title, n, values, bound, name, i * height)
        for i, (style, title, values, bound, name) in enumerate(panels)
    ]
    width = LEFT + WIDTH + RIGHT
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {2 * height}" width="{width}" height="{2 * height}" '
        f'role="img" aria-labelledby="t d"><title id="t">{TITLE}</title><desc id="d">{ABOUT}</desc>'
        f'<style>{STYLE}</style><rect class="paper" width="100%" height="100%" rx="8"/>{"".join(parts)}</svg>\n'
    )


def _panel(
    style: str,
    title: str,
    n: Sequence[int],
    values: Sequence[float],
    bound: Callable[[float], float],
    bound_name: str,
    top: float,
) -> str:
    """One diagram with two logarithmic axes, and a dashed line to compare with."""
    bounds = [bound(k) for k in n]
    marks = [m * 10.0**e for e in range(-2, 4) for m in (1, 2, 5)]
    low = max(m for m in marks if m <= min(*values, *bounds))
    high = min(m for m in marks if m >= max(*values, *bounds))
    first, last, y0 = math.log(n[0]) - 0.1, math.log(n[-1]) + 0.1, top + TOP

    def across(k: float) -> float:
        return round(LEFT + WIDTH * (math.log(k) - first) / (last - first), 1)

    def up(value: float) -> float:
        return round(y0 + HEIGHT * math.log(high / value) / math.log(high / low), 1)

    parts = [f'<text class="title" x="12" y="{top + 24}">{title}</text>']
    for mark in marks:
        if low <= mark <= high:
            parts.append(f'<path class="grid" d="M{LEFT} {up(mark)}h{WIDTH}"/>')
            parts.append(f'<text class="end" x="{LEFT - 6}" y="{up(mark) + 4}">{mark:g}</text>')
    for k in n:
        parts.append(f'<text class="middle" x="{across(k)}" y="{y0 + HEIGHT + 18}">{k / 1e6:g}</text>')
    parts.append(
        f'<text class="middle" x="{LEFT + WIDTH / 2}" y="{y0 + HEIGHT + 36}">million samples, in classes of 10,000</text>'
    )
    dashed = "L".join(f"{across(k)} {up(value)}" for k, value in zip(n, bounds, strict=True))
    parts.append(f'<path class="bound" d="M{dashed}"/>')
    parts.append(f'<text x="{LEFT + 8}" y="{y0 + 16}">dashed: {bound_name}</text>')
    path = "L".join(f"{across(k)} {up(value)}" for k, value in zip(n, values, strict=True))
    parts.append(f'<path class="line {style}" d="M{path}"/>')
    for k, value in zip(n, values, strict=True):
        parts.append(f'<circle class="{style}" cx="{across(k)}" cy="{up(value)}" r="4"/>')
    return "".join(parts)
