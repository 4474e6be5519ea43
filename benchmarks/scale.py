"""How do time and memory grow with the number of samples, shards and ranks?

    python -m benchmarks.scale --work FOLDER

measures the rows that `benchmarks/results/scale.json` lacks, each in a process of its own, and writes each there when it is
done: run again, it goes on. `--only` names rows (a name's beginning is enough), `--list` prints them, `--table` prints the
tables of docs/scale.md, and `--figure` draws docs/pictures/scale.svg.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks import scale_billion
from benchmarks.common import RESULTS, in_own_process, machine
from benchmarks.scale_figure import figure, fits, tables

SIZES = (1_250_000, 2_500_000, 5_000_000, 10_000_000)
DEFAULTS: dict[str, Any] = {"keep": 0.1, "balance": "class"}

Row = Callable[[Path], dict[str, Any]]


def _row(module: str, function: str, *values: Any, **options: Any) -> Row:
    """A function of a module that is imported when the row is measured, so that its memory is the row's own."""
    return lambda work: getattr(import_module(f"benchmarks.{module}"), function)(work, *values, **options)


def _plan(n: int, **options: Any) -> Row:
    return _row("scale_plan", "plan_once", n, **DEFAULTS | options)


def _ranks(worlds: list[int], steps: list[int], **options: Any) -> Row:
    return _row("scale_ranks", "ranks_row", worlds, steps, **options)


ROWS: dict[str, Row] = {
    **{f"plan {n}": _plan(n) for n in SIZES},
    "plan 250000 clean-equal": _plan(250_000, per_class=1_000, clean="auto", balance="equal"),
    "plan 100000 classes-of-20000": _plan(100_000, per_class=20_000, memory_bytes=4 << 30),
    "plan 1000000 classes-of-20": _plan(1_000_000, per_class=20),
    "shards 12000": _row("scale_shards", "shards_row", 12_000),
    "shards 100000": _row("scale_shards", "shards_row", 100_000),
    "order": _row("scale_ranks", "order_row"),
    "ranks unbroken": _ranks([1_024], [], batch_size=16),
    "ranks 768": _ranks([1_024, 768], [37], batch_size=16),
    "ranks 1021": _ranks([1_024, 1_021], [37], batch_size=16),
    "ranks 768, 1021, global_batch": _ranks([1_024, 768, 1_021], [31, 20], global_batch=16_384),
}


def measure(names: list[str], results: Path, work: Path) -> None:
    """Measure rows one by one, each in a process of its own; `results` has each when it is done."""
    for name in names:
        row = in_own_process("benchmarks.scale", "--row", name, "--work", str(work))
        rows = read(results) | {name: row}
        ordered = {known: rows[known] for known in ROWS if known in rows}
        results.write_text(
            json.dumps({"machine": machine(), "rows": ordered}, indent=1) + "\n", encoding="utf-8"
        )
        print(name, json.dumps(row), flush=True)


def read(results: Path) -> dict[str, Any]:
    """The rows of a result file; none where there is no file."""
    rows: dict[str, Any] = json.loads(results.read_text())["rows"] if results.exists() else {}
    return rows


def main() -> None:
    """Measure what is missing, or show what is there."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument(
        "--work", type=Path, help="folder for what is measured on, 15 GB for the largest row"
    )
    arguments.add_argument("--out", type=Path, default=RESULTS / "scale.json")
    arguments.add_argument("--only", nargs="*", default=[""], help="beginnings of the names of rows")
    arguments.add_argument("--row", choices=list(ROWS), help=argparse.SUPPRESS)
    arguments.add_argument("--list", action="store_true")
    arguments.add_argument(
        "--table", action="store_true", help="print the tables, and how time and memory grow"
    )
    arguments.add_argument(
        "--billion", action="store_true", help="print what 1,000,000,000 samples would take"
    )
    arguments.add_argument("--figure", type=Path, help="draw time and memory of planning into this SVG")
    a = arguments.parse_args()
    wanted = [name for name in ROWS if name.startswith(tuple(a.only))]
    if a.row:
        print(json.dumps(ROWS[a.row](a.work)))
    elif a.list:
        print("\n".join(wanted))
    elif a.table:
        print(tables(read(a.out)), json.dumps(fits(read(a.out))), sep="\n\n")
    elif a.billion:
        print(scale_billion.table(read(a.out)))
    elif a.figure is not None:
        a.figure.write_text(figure(read(a.out)), encoding="utf-8")
    elif a.work is None:
        sys.exit("--work names a folder for what is measured on")
    else:
        a.work.mkdir(parents=True, exist_ok=True)
        done = read(a.out)
        measure([name for name in wanted if name not in done], a.out, a.work)


if __name__ == "__main__":
    main()
