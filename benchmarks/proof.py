"""Where does choosing pay? The trainings of `benchmarks.accuracy` on all sets: what to run, and what came of
it.

    python -m benchmarks.proof [--net tiny] [--keep 0.1] [--against random] [--goals] [--stages] [--compute]
    python -m benchmarks.proof --figure FILE.svg
    python -m benchmarks.proof --commands --data DATA --work WORK
    python -m benchmarks.proof --run --budget SECONDS --data DATA --work WORK --at-once 2

Without more it prints a table of what lies in the folder of results: a row is an arm, a column a set, mean ±
standard deviation over seeds of the reported half of the test set (and how many seeds finished), or with
`--against ARM` the difference from that arm, paired by seed, with its 95 % interval; then which seeds have
all arms that any seed has. `full` stands in every table, with the compute that it takes. `--goals` puts the
goals that were set beforehand beside the results, `--stages` shows what each stage adds, `--compute`
accuracy by share of the compute of training on everything. `--commands` prints every training of the proof
as a shell's script, in the order in which they are worth running, with the seconds of a core that each
takes; `--run` does them, and ends before the one that would end after `--budget`. What has finished is not
done again.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.arms import ARMS
from benchmarks.common import RESULTS
from benchmarks.nets import NETS
from benchmarks.proof_commands import listing, run
from benchmarks.proof_figure import compute_table, figure
from benchmarks.proof_goals import Runs, goals_table, points, stages_table
from benchmarks.records import differences, summary
from benchmarks.sets import SETS


def read(folder: Path, net: str) -> dict[str, list[dict[str, Any]]]:
    """Set → its finished trainings of a network, sets in the order of `SETS`."""
    paths = {name: folder / f"{name}-{net}.json" for name in SETS}
    return {
        name: json.loads(path.read_text(encoding="utf-8"))["runs"]
        for name, path in paths.items()
        if path.exists()
    }


def table(runs: Runs, keep: float, against: str | None = None) -> str:
    """The table in Markdown."""
    cells: dict[tuple[str, str], str] = {}
    for name, of_set in runs.items():
        for row in summary(of_set) if against is None else differences(of_set, against):
            arm = ARMS[row["arm"]]
            if row["keep"] not in (keep, arm.keep) or row["encoder"] != (arm.encoder or "builtin-free"):
                continue
            if against is None:
                spread = "" if row["std"] is None else f" ± {row['std']:.2f}"
                cells[row["arm"], name] = f"{row['mean']:.2f}{spread} ({row['n']})"
            else:
                cells[row["arm"], name] = points(row)
    lines = [f"| arm | {' | '.join(runs)} |", f"|---|{'---|' * len(runs)}"]
    for arm_name in ARMS:
        if any((arm_name, name) in cells for name in runs):
            texts = [cells.get((arm_name, name), "") for name in runs]
            lines.append(f"| {arm_name} | {' | '.join(texts)} |")
    return "\n".join(lines)


def finished(runs: Sequence[dict[str, Any]], keep: float) -> list[int]:
    """The seeds that have every arm that any seed has."""
    of_seed: dict[int, set[str]] = {}
    for row in runs:
        if row["keep"] == (ARMS[row["arm"]].keep or keep):
            of_seed.setdefault(row["seed"], set()).add(row["arm"])
    every = set().union(*of_seed.values())
    return sorted(seed for seed, arms in of_seed.items() if arms == every)


def _arguments() -> argparse.Namespace:
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--results", type=Path, default=RESULTS / "accuracy", help="folder of result files")
    made.add_argument("--net", choices=sorted(NETS), default="tiny")
    made.add_argument("--keep", type=float, default=0.1)
    made.add_argument("--against", choices=list(ARMS), metavar="ARM")
    for name in ("goals", "stages", "compute", "commands", "run"):
        made.add_argument(f"--{name}", action="store_true")
    made.add_argument("--figure", type=Path, metavar="FILE.svg")
    made.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS", help="of the clock")
    made.add_argument("--data", default=os.environ.get("ADQ_DATA", "DATA"), help="folder that holds cifar10/")
    made.add_argument("--work", default="accuracy-work", help="folder for sets and features")
    made.add_argument("--at-once", type=int, default=2, help="trainings side by side")
    return made.parse_args()


def main() -> None:
    """Print what was asked for, or run what is left."""
    a = _arguments()
    if a.commands:
        print(listing(a.results, a.data, a.work, a.at_once))
    elif a.run:
        run(a.results, a.data, a.work, a.at_once, a.budget)
    else:
        runs = read(a.results, a.net)
        print(table(runs, a.keep, a.against))
        print("\nseeds with all arms:", *(f"{name} {finished(runs[name], a.keep)}" for name in runs))
        for asked, text in (
            (a.goals, goals_table(runs)),
            (a.stages, stages_table(runs, a.keep)),
            (a.compute, compute_table(runs, a.net)),
        ):
            if asked:
                print(f"\n{text}")
        if a.figure:
            a.figure.write_text(figure(runs, a.net, a.keep), encoding="utf-8")


if __name__ == "__main__":
    main()
