"""The proof as one SVG, light or dark as its reader's system, in one column that a phone shows whole: accuracy
against compute and against distinct samples seen, on a clean and on a dirty set, and what each stage adds. Dots are
means over seeds, bars one standard deviation.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.arms import ARMS
from benchmarks.proof_goals import STAGES, Runs
from benchmarks.records import paired
from benchmarks.training import recipe_for

SETS = {"clean": "Clean labels", "all-three": "Wrong labels, copies, long tail"}
WIDTH, HEIGHT = 350, 170  # of a panel
LEFT, TOP, RIGHT, BOTTOM = 40, 34, 30, 48  # around it
TITLE = "Accuracy of chosen and of random samples"
ABOUT = "Four diagrams of accuracy against the share of compute and the distinct samples seen, and bars of what each stage adds."
LINES = {  # arm → (what it is called, its class in the style)
    "random": ("random", "random"),
    "chosen": ("cleaned, balanced, binned", "chosen"),
    "fresh-random": ("random, fresh draws", "random fresh"),
    "fresh-chosen": ("cleaned, balanced, binned, fresh draws", "chosen fresh"),
    "full": ("all samples", "full"),
    "full-chosen": ("the same by tenths, for all the compute", "full-chosen"),
}
STYLE = """
svg { --ink: #24292f; --faint: #d0d7de; --paper: #ffffff; --random: #6e7781; --chosen: #bc4c00; --full: #0969da }
@media (prefers-color-scheme: dark) {
 svg { --ink: #e6edf3; --faint: #30363d; --paper: #0d1117; --random: #8b949e; --chosen: #f0883e; --full: #58a6ff } }
text { font: 12px sans-serif; fill: var(--ink) } .title { font-weight: bold } .end { text-anchor: end }
.middle { text-anchor: middle } .paper { fill: var(--paper) } .grid { stroke: var(--faint) }
.line, .bar { fill: none; stroke-width: 2 } .line { stroke-dasharray: 5 3 } .fresh { stroke-dasharray: none }
.random { stroke: var(--random) } .chosen, .full-chosen { stroke: var(--chosen) } .full { stroke: var(--full) }
circle { fill: var(--paper); stroke-width: 2 } circle.fresh { fill: var(--random) }
circle.chosen.fresh, rect.full-chosen, rect.chosen { fill: var(--chosen) } rect.full { fill: var(--full) }
"""


@dataclass(frozen=True)
class Point:
    """An arm at one ratio: share of the compute of `full`, distinct samples, accuracies in percent."""

    compute: float
    seen: float
    accuracies: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over seeds."""
        return statistics.mean(self.accuracies)


AXES: tuple[tuple[str, str, Callable[[Point], float]], ...] = (
    ("accuracy by compute, %", "share of the compute of all samples", lambda point: 100 * point.compute),
    ("accuracy by samples, %", "distinct samples seen", lambda point: point.seen),
)


def points_of(runs: Sequence[dict[str, Any]], arm: str, net: str) -> list[Point]:
    """An arm's points, by compute."""
    encoder = ARMS[arm].encoder or "builtin-free"
    of_arm = [run for run in runs if (run["arm"], run["encoder"]) == (arm, encoder)]
    made = []
    for keep in sorted({run["keep"] for run in of_arm}):
        group = [run for run in of_arm if run["keep"] == keep]
        epochs = ARMS[arm].times * recipe_for(net, keep).epochs
        seen = statistics.mean(run["seen"] for run in group)
        values = tuple(100 * run["last"] for run in group)
        made.append(Point(keep * epochs / recipe_for(net, 1).epochs, seen, values))
    return sorted(made, key=lambda point: point.compute)


def compute_table(runs: Runs, net: str) -> str:
    """Accuracy by share of the compute of training on everything: a line for each set and arm."""
    rows = {(name, arm): points_of(runs[name], arm, net) for name in runs for arm in LINES}
    shares = sorted({round(point.compute, 4) for row in rows.values() for point in row})
    lines = [f"| set | arm | {' | '.join(f'{100 * share:g} %' for share in shares)} |"]
    lines.append(f"|---|---|{'---|' * len(shares)}")
    for (name, arm), row in rows.items():
        cells = {round(point.compute, 4): f"{point.mean:.2f} ({len(point.accuracies)})" for point in row}
        if row:
            lines.append(f"| {name} | {arm} | {' | '.join(cells.get(share, '') for share in shares)} |")
    return "\n".join(lines)


def figure(runs: Runs, net: str, keep: float) -> str:
    """The SVG. What is not measured yet is left out of it."""
    width, y = LEFT + WIDTH + RIGHT, 24
    parts = []
    for text, style in LINES.values():
        if not style.startswith("full"):
            parts.append(f'<path class="line {style}" d="M{LEFT - 24} {y}h24"/>')
        parts.append(_mark(style, LEFT - 12, y))
        parts.append(f'<text x="{LEFT + 8}" y="{y + 4}">{text}</text>')
        y += 20
    for by, below, value in AXES:
        for name, shown in SETS.items():
            data = {arm: points_of(runs.get(name, ()), arm, net) for arm in LINES}
            if any(data.values()):
                parts.append(f'<text class="title" x="{LEFT}" y="{y + TOP - 12}">{shown}: {by}</text>')
                parts.append(_panel(LEFT, y + TOP, below, data, value))
                y += TOP + HEIGHT + BOTTOM
    bars, height = _stages(runs, keep, y + TOP - 12)
    height += y
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-labelledby="t d"><title id="t">{TITLE}</title><desc id="d">{ABOUT}</desc>'
        f'<style>{STYLE}</style><rect class="paper" width="100%" height="100%" rx="8"/>{"".join(parts)}{bars}</svg>\n'
    )


def _mark(style: str, x: float, y: float) -> str:
    if style.startswith("full"):
        return f'<rect class="{style}" x="{x - 4}" y="{y - 4}" width="8" height="8"/>'
    return f'<circle class="{style}" cx="{x}" cy="{y}" r="4"/>'


def _panel(
    left: float,
    top: float,
    below: str,
    data: Mapping[str, Sequence[Point]],
    value: Callable[[Point], float],
) -> str:
    """One diagram: a logarithmic axis to the right, points in percent upwards."""
    flat = [point for row in data.values() for point in row]
    accuracies = [accuracy for point in flat for accuracy in point.accuracies]
    low, high = 5 * math.floor(min(accuracies) / 5), 5 * (math.floor(max(accuracies) / 5) + 1)
    values = [math.log10(value(point)) for point in flat]
    first, last = min(values) - 0.05, max(values) + 0.05

    def across(x: float) -> float:
        return round(left + WIDTH * (math.log10(x) - first) / (last - first), 1)

    def up(y: float) -> float:
        return round(top + HEIGHT * (high - y) / (high - low), 1)

    parts = []
    for y in range(low, high + 1, 5 if high - low <= 40 else 10):
        parts.append(f'<path class="grid" d="M{left} {up(y)}h{WIDTH}"/>')
        parts.append(f'<text class="end" x="{left - 6}" y="{up(y) + 4}">{y}</text>')
    for x in (m * 10**e for e in range(7) for m in (1, 2, 5)):
        if first <= math.log10(x) <= last:
            shown = f"{x:,}" if below.startswith("distinct") else f"{x} %"
            parts.append(f'<text class="middle" x="{across(x)}" y="{top + HEIGHT + 18}">{shown}</text>')
    parts.append(f'<text class="middle" x="{left + WIDTH / 2}" y="{top + HEIGHT + 36}">{below}</text>')
    for arm, row in data.items():
        style = LINES[arm][1]
        path = "L".join(f"{across(value(point))} {up(point.mean)}" for point in row)
        if len(row) > 1:
            parts.append(f'<path class="line {style}" d="M{path}"/>')
        for point in row:
            x, spread = across(value(point)), statistics.pstdev(point.accuracies)
            parts.append(
                f'<path class="bar {style}" d="M{x} {up(point.mean - spread)}V{up(point.mean + spread)}"/>'
            )
            parts.append(_mark(style, x, up(point.mean)))
    return "".join(parts)


def _stages(runs: Runs, keep: float, top: float) -> tuple[str, int]:
    """What each stage adds on the dirty set, as bars; and their height."""
    name = list(SETS)[1]
    rows = [(added, paired(runs.get(name, ()), arm, base, keep)) for added, arm, base in STAGES]
    known = [(added, row) for added, row in rows if row is not None]
    if not known:
        return "", 0
    most = max(0, *(row["mean"] for _, row in known))
    least = min(0, *(row["mean"] for _, row in known))
    scale = (WIDTH - 90) / max(most - least, 1)
    zero = LEFT - least * scale
    title = f"On the latter set, {100 * keep:g} % kept: points each stage adds"
    parts = [f'<text class="title" x="{LEFT}" y="{top}">{title}</text>']
    for i, (added, row) in enumerate(known):
        y, size = top + 14 + 38 * i, abs(row["mean"]) * scale
        x = zero if row["mean"] >= 0 else zero - size
        spread = "" if row["half_width"] is None else f" ± {row['half_width']:.1f}"
        parts.append(f'<text x="{LEFT}" y="{y + 12}">{added}</text>')
        parts.append(f'<rect class="chosen" x="{x:.1f}" y="{y + 17}" width="{size:.1f}" height="13"/>')
        parts.append(
            f'<text x="{max(zero, x + size) + 8:.1f}" y="{y + 28}">{row["mean"]:+.1f}{spread}</text>'
        )
    return "".join(parts), TOP + 14 + 38 * len(known)
