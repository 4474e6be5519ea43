"""The result file of `benchmarks.accuracy`: records of finished trainings, their means and differences."""

from __future__ import annotations

import json
import statistics
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from adq_wds.errors import AdqError
from adq_wds.files import write_text
from adq_wds.tables.plan import Plan
from benchmarks.arms import ARMS
from benchmarks.common import machine
from benchmarks.plans import Task, selection

T_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # Student's t for 95 %, of 2 to 10 pairs


class Results:
    """The result file: what was asked, with which settings, one record for each finished training, a summary.

    Raises:
        AdqError: the file there was made with other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any], command: str) -> None:
        self.path = path
        self._lock = threading.Lock()
        empty: dict[str, Any] = {
            "commands": [],
            "machine": {},
            "settings": settings,
            "recipes": {},
            "encoders": {},
            "runs": [],
        }
        self.content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else empty
        self._same("settings", self.content["settings"], settings)
        self.content["machine"] = machine()
        if command not in self.content["commands"]:
            self.content["commands"].append(command)

    def _same(self, what: str, before: Any, now: Any) -> None:
        if before != now:
            raise AdqError(
                f"{self.path} was made with other {what}: {before}, now {now}; give another --out, or remove it"
            )

    def expect(self, what: str, name: str, value: Any) -> None:
        """Note the recipe of a ratio or the revision of an encoder, once and for all of this file's records."""
        self._same(f"{what} of {name}", self.content[what].setdefault(name, value), value)

    def done(self, task: Task, plan: Callable[[], Plan]) -> bool:
        """Is this training recorded? With the same selection, or it is an error."""
        with self._lock:
            records = [r for r in self.content["runs"] if all(r[k] == v for k, v in asdict(task).items())]
        if records:
            self._same(f"selection for {task}", records[0]["selection"], selection(plan()))
        return bool(records)

    def add(self, record: dict[str, Any]) -> None:
        """Put a record into the file, whole or not at all."""
        with self._lock:
            self.content["runs"].append(record)
            self.content["summary"] = summary(self.content["runs"])
            write_text(self.path, json.dumps(self.content, indent=1) + "\n")


def summary(runs: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and deviation (ddof = 1; None for one run) of the last accuracy, in percent, by arm, encoder and ratio."""
    groups: dict[tuple[str, str, float], list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["arm"], run["encoder"], run["keep"]), []).append(run)
    order = list(ARMS)
    rows = []
    for arm, encoder, keep in sorted(groups, key=lambda g: (g[2], order.index(g[0]), g[1])):
        group = groups[arm, encoder, keep]
        last = [100 * run["last"] for run in group]
        rows.append(
            {
                "arm": arm,
                "encoder": encoder,
                "keep": keep,
                "n": len(last),
                "mean": round(statistics.mean(last), 3),
                "std": round(statistics.stdev(last), 3) if len(last) > 1 else None,
                "mean_of_choosing": round(statistics.mean(100 * run["choosing"] for run in group), 3),
                "images_seen": round(statistics.mean(run["seen"] for run in group)),
            }
        )
    return rows


def differences(runs: Iterable[dict[str, Any]], base: str) -> list[dict[str, Any]]:
    """Each arm's accuracy less that of `base` at the same ratio, paired by seed, in points.

    An arm with a ratio of its own, such as `full`, stands against every other one. `half_width` is that of the 95 %
    interval by Student's t; None for fewer than two pairs.
    """
    values: dict[tuple[str, str, float], dict[int, float]] = {}
    for run in runs:
        values.setdefault((run["arm"], run["encoder"], run["keep"]), {})[run["seed"]] = 100 * run["last"]
    bases = {keep: of_base for (arm, _, keep), of_base in values.items() if arm == base}
    fixed = {arm: ARMS[arm].keep is not None for arm, _, _ in values}
    rows = []
    for arm, encoder, keep in sorted(values, key=lambda v: (v[2], list(ARMS).index(v[0]))):
        for ratio, of_base in bases.items():
            of_arm = values[arm, encoder, keep]
            pairs = [of_arm[seed] - of_base[seed] for seed in sorted(of_arm.keys() & of_base.keys())]
            if arm == base or not pairs or not (ratio == keep or fixed[arm] or fixed[base]):
                continue
            row = {"arm": arm, "encoder": encoder, "keep": ratio if fixed[arm] else keep}
            rows.append(row | mean_of(pairs))
    return rows


def accuracies(runs: Iterable[dict[str, Any]], arm: str, keep: float) -> dict[int, float]:
    """Seed → an arm's last accuracy in percent, with `builtin-free` where it has no encoder of its own."""
    of_arm = (arm, ARMS[arm].encoder or "builtin-free", ARMS[arm].keep or keep)
    return {
        run["seed"]: 100 * run["last"] for run in runs if (run["arm"], run["encoder"], run["keep"]) == of_arm
    }


def paired(runs: Sequence[dict[str, Any]], arm: str, base: str, keep: float) -> dict[str, Any] | None:
    """`mean_of` an arm's accuracy less that of another, in points, by seed; None without a seed of both."""
    of_arm, of_base = (accuracies(runs, name, keep) for name in (arm, base))
    pairs = [of_arm[seed] - of_base[seed] for seed in sorted(of_arm.keys() & of_base.keys())]
    return mean_of(pairs) if pairs else None


def mean_of(pairs: Sequence[float]) -> dict[str, Any]:
    """`n`, `mean`, and half the width of the mean's 95 % interval by Student's t, None for one pair."""
    half = None
    if len(pairs) > 1:
        half = round(T_95[min(len(pairs), 10) - 2] * statistics.stdev(pairs) / len(pairs) ** 0.5, 2)
    return {"n": len(pairs), "mean": round(statistics.mean(pairs), 2), "half_width": half}


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The summary as a table: a line for each arm and encoder, a column for each ratio."""
    keeps = sorted({row["keep"] for row in rows})
    lines = [
        f"| arm | encoder | {' | '.join(f'{100 * keep:g} %' for keep in keeps)} |",
        f"|---|---|{'---|' * len(keeps)}",
    ]
    cells = {(row["arm"], row["encoder"], row["keep"]): row for row in rows}
    order = list(ARMS)
    for arm, encoder in sorted({cell[:2] for cell in cells}, key=lambda c: (order.index(c[0]), c[1])):
        shown = "–" if ARMS[arm].encoder == "thumbnail" else encoder
        texts = [_cell(cells.get((arm, encoder, keep))) for keep in keeps]
        lines.append(f"| {arm} | {shown} | {' | '.join(texts)} |")
    return "\n".join(lines)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    spread = "" if row["std"] is None else f" ± {row['std']:.2f}"
    return f"{row['mean']:.2f}{spread} ({row['n']})"
