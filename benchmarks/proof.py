"""Where does choosing pay? One table over all sets, from the result files of `benchmarks.accuracy`.

    python -m benchmarks.proof benchmarks/results/accuracy/*-tiny.json --keep 0.1 [--against random]

A row is an arm, a column a set: mean ± standard deviation over seeds of the reported half of the test set (and how many
seeds finished), or with `--against ARM` the difference from that arm, paired by seed, with its 95 % interval. `full`
stands in every table, with the compute that it takes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.accuracy import ARMS, differences, summary
from benchmarks.sets import SETS


def read(paths: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Set → its finished trainings, sets in the order of `SETS`.

    Raises:
        ValueError: two files are of one set, or the files are of several networks.
    """
    runs: dict[str, list[dict[str, Any]]] = {}
    nets = set()
    for path in paths:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        name = content["settings"]["set"]
        nets.add(content["settings"]["net"])
        if name in runs:
            raise ValueError(f"{path}: a second file of the set {name!r}")
        runs[name] = content["runs"]
    if len(nets) > 1:
        raise ValueError(f"results of several networks, {sorted(nets)}: name the files of one")
    return {name: runs[name] for name in SETS if name in runs}


def table(runs: Mapping[str, list[dict[str, Any]]], keep: float, against: str | None = None) -> str:
    """The table in Markdown."""
    cells: dict[tuple[str, str], str] = {}
    for name, of_set in runs.items():
        rows = summary(of_set) if against is None else differences(of_set, against)
        for row in rows:
            if row["keep"] not in (keep, ARMS[row["arm"]][0].get("keep")):
                continue
            spread = row["std" if against is None else "half_width"]
            number = f"{row['mean']:.2f}" if against is None else f"{row['mean']:+.2f}"
            cells[row["arm"], name] = f"{number}{'' if spread is None else f' ± {spread:.2f}'} ({row['n']})"
    lines = [f"| arm | {' | '.join(runs)} |", f"|---|{'---|' * len(runs)}"]
    for arm in ARMS:
        if any((arm, name) in cells for name in runs):
            lines.append(f"| {arm} | {' | '.join(cells.get((arm, name), '') for name in runs)} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument(
        "files", nargs="+", help="result files of `benchmarks.accuracy`, one a set, of one network"
    )
    made.add_argument("--keep", type=float, default=0.1)
    made.add_argument("--against", choices=list(ARMS))
    a = made.parse_args()
    print(table(read(a.files), a.keep, a.against))


if __name__ == "__main__":
    main()
