"""What the proof is to show: differences set as goals before they were measured, and what each stage adds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.records import accuracies, paired

Runs = Mapping[str, Sequence[dict[str, Any]]]


@dataclass(frozen=True)
class Goal:
    """At this keep ratio of this set, the mean of `arm` is ahead of that of `base` by so many points."""

    of: str
    arm: str
    base: str
    points: float
    keep: float = 0.1


# Classes of equal size: there `random`, in proportion, is the class-balanced random selection.
GOALS = (
    Goal("noise20", "chosen", "random", 6),
    Goal("noise20", "fresh-chosen", "fresh-random", 5),
    Goal("noise40", "chosen", "random", 10),
    Goal("noise40", "fresh-chosen", "fresh-random", 9),
    Goal("tail50", "equal", "random", 12),
    *(Goal("tail50", arm, "equal", 1) for arm in ("chosen", "chosen-20")),
    Goal("tail50", "fresh-chosen", "fresh-random", 14),
    *(Goal("tail50", arm, "fresh-equal", 1) for arm in ("fresh-chosen", "fresh-chosen-20")),
    Goal("copies", "chosen", "random", 1.5),
    Goal("copies", "fresh-chosen", "fresh-random", 1),
    Goal("all-three", "chosen", "random", 22),
    Goal("all-three", "chosen", "equal", 10),
    Goal("all-three", "fresh-chosen", "fresh-random", 22),
    Goal("all-three", "fresh-chosen", "fresh-equal", 7),
    *(
        Goal("clean", arm, "random", points, keep)
        for keep, points in ((0.05, 2.5), (0.1, 1.5), (0.2, 0.5))
        for arm in ("chosen", "clean-20")
    ),
    *(
        Goal("clean", "soft-proxy", "random", points, keep)
        for keep, points in ((0.05, 4), (0.1, 3), (0.2, 1))
    ),
    *(Goal("clean", "fresh-chosen", "fresh-random", 0, keep) for keep in (0.05, 0.1, 0.2)),
    Goal("all-three", "fresh-chosen", "full", 15),
)

SEEDS = 5  # of a goal's rows
STAGES = (
    ("copies left out", "dedup", "random"),
    ("doubted labels left out", "dedup-clean", "dedup"),
    ("equal seats a class", "chosen-one-bin", "dedup-clean"),
    ("bins and rates", "chosen", "chosen-one-bin"),
    ("fresh draws", "fresh-chosen", "chosen"),
)
"""What is added, the arm that has it, and the arm without."""


def points(row: Mapping[str, Any] | None) -> str:
    """A difference as text.

    >>> points({"n": 3, "mean": 1.5, "half_width": 0.4}), points(None)
    ('+1.50 ± 0.40 (3)', '')
    """
    if row is None:
        return ""
    spread = "" if row["half_width"] is None else f" ± {row['half_width']:.2f}"
    return f"{row['mean']:+.2f}{spread} ({row['n']})"


def verdict(goal: Goal, row: Mapping[str, Any] | None) -> str:
    """Whether the mean reaches the goal; of fewer than `SEEDS` seeds, so far."""
    if row is None:
        return "not measured yet"
    return ("met" if row["mean"] >= goal.points else "missed") + (" so far" if row["n"] < SEEDS else "")


def goals_table(runs: Runs) -> str:
    """Each goal beside what was measured."""
    lines = ["| set | kept | arm | against | goal | measured | |", "|---|---|---|---|---|---|---|"]
    for goal in GOALS:
        row = paired(runs.get(goal.of, ()), goal.arm, goal.base, goal.keep)
        lines.append(
            f"| {goal.of} | {100 * goal.keep:g} % | {goal.arm} | {goal.base} | ≥ {goal.points:+g} "
            f"| {points(row)} | {verdict(goal, row)} |"
        )
    return "\n".join(lines)


def stages_table(runs: Runs, keep: float) -> str:
    """What each stage adds, by set; sets where the first was not trained are left out."""
    names = [name for name in runs if accuracies(runs[name], STAGES[0][1], keep)]
    lines = [f"| added | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for added, arm, base in STAGES:
        cells = [points(paired(runs[name], arm, base, keep)) for name in names]
        lines.append(f"| {added} | {' | '.join(cells)} |")
    return "\n".join(lines)
