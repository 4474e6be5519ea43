"""Does a training that is killed, and goes on with other ranks, workers and batches, see each sample once in an epoch?

Epochs of 203 samples are read by 1 to 8 ranks with 0 to 3 workers each. After one to three steps the state is saved; one or two
more are read, and then everything is thrown away, with what workers had read ahead: a kill. The run goes on from the saved
state. At the epoch's end its samples are counted: missing, and repeated. What changes at a kill:

    kills    nothing
    elastic  ranks and workers, of ranks that divide the 24 samples of all ranks' batches, which stay
    any      ranks, workers and, in a quarter of the changes, the size of batches

A state that is refused is counted, and another layout is drawn. `unbroken` is the same without a change, so that what a library
pads or drops anyway is known. Where the batch of all ranks stays, each step is compared with the unbroken run of the epoch's
first layout: steps with other samples are counted.

Ranks, and workers where a library allows it, are played in this process, as 10,000 changes with processes would take days; rows
with `processes` have real workers, and fewer changes. `benchmarks/resume_libraries.py` says how each library is used.

    pip install "adq-wds[bench]" lancedb
    python -m benchmarks.resume --out benchmarks/results/resume.json
    python -m benchmarks.resume --table --out benchmarks/results/resume.json

With `--only`, these rows are measured anew and the others of the file stay.
"""

from __future__ import annotations

import json
import logging
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from benchmarks import resume_libraries as libraries
from benchmarks.common import parser, report, spread
from benchmarks.resume_libraries import Layout, Open, Opened

N = 203
ALL_RANKS = 24  # samples in the batches of all ranks together, of `elastic`
DIVISORS = (1, 2, 3, 4, 6, 8)
SETTINGS = ("kills", "elastic", "any")
Steps = list[list[int]]


@dataclass(frozen=True)
class Row:
    """A library, and how it is used.

    Attributes:
        make: opens it over N samples in a folder.
        package: whose version is noted.
        together: its batches are of all ranks.
        batches: sizes to draw from in `any`.
        every: one of so many of the `--changes` is done in `any`, a fifth of that in the others.
        settings: those that it is measured in.
    """

    make: Callable[[int, Path], Open]
    package: str | None = None
    together: bool = False
    batches: tuple[int, ...] = tuple(range(1, 9))
    every: int = 1
    settings: tuple[str, ...] = SETTINGS


OWN_SETTINGS = ("kills", "any")  # with a rank's batch that stays, all ranks' batch does not


def _own(*, together: bool, processes: bool, every: int = 1) -> Row:
    """A row of this package."""
    make = partial(libraries.adq_ranks, together=together, processes=processes)
    if together:
        return Row(make, together=True, batches=(24, 25, 31), every=every)
    return Row(make, every=every, settings=OWN_SETTINGS)


ROWS: dict[str, Row] = {
    "adq, global_batch": _own(together=True, processes=False),
    "adq, batch_size": _own(together=False, processes=False),
    "adq, global_batch, processes": _own(together=True, processes=True, every=100),
    "adq, batch_size, processes": _own(together=False, processes=True, every=100),
    "mosaicml-streaming": Row(libraries.mosaic_ranks, "mosaicml-streaming", every=5),
    "torchdata": Row(libraries.torchdata_ranks, "torchdata", every=5),
    "torchdata, processes": Row(partial(libraries.torchdata_ranks, processes=True), "torchdata", every=100),
    "litdata": Row(libraries.litdata_ranks, "litdata", every=20),
    "litdata, processes": Row(partial(libraries.litdata_ranks, processes=True), "litdata", every=100),
    "lancedb": Row(libraries.lancedb_ranks, "lancedb", together=True, batches=(24, 48), every=100),
}


@dataclass
class Tally:
    """What became of the samples.

    Attributes:
        n_changes: states that were loaded or refused.
        n_steps: global steps that were compared; `differ`: those that had other samples.
        refused: how often, by the error's first words.
    """

    n_changes: int = 0
    n_epochs: int = 0
    missing: int = 0
    repeated: int = 0
    n_steps: int = 0
    differ: int = 0
    refused: Counter[str] = field(default_factory=Counter)

    def end_epoch(self, seen: Counter[int]) -> None:
        """Count an epoch's samples."""
        if not seen.keys() <= set(range(N)):
            raise SystemExit(f"samples that there are not: {seen.keys() - set(range(N))}")
        self.n_epochs += 1
        self.missing += N - len(seen)
        self.repeated += seen.total() - len(seen)

    def compare(self, steps: Steps, expected: Steps) -> None:
        """Count the steps of an epoch that are not those of the unbroken run."""
        pairs = list(zip_longest(map(sorted, steps), map(sorted, expected)))
        self.n_steps += len(pairs)
        self.differ += sum(step != other for step, other in pairs)

    def percents(self) -> tuple[float, float]:
        """Missing and repeated samples, of all."""
        whole = max(1, self.n_epochs) * N / 100
        return self.missing / whole, self.repeated / whole


def read(opened: Opened, n_steps: int) -> tuple[Steps, bool]:
    """Some global steps, all ranks together, and whether the epoch ended before."""
    steps: Steps = []
    for _ in range(n_steps):
        batches = [next(rank, None) for rank in opened.ranks]
        if all(batch is None for batch in batches):
            return steps, True
        steps.append([i for batch in batches for i in batch or ()])
    return steps, False


def drawn(rng: random.Random, row: Row, setting: str, before: Layout | None) -> Layout:
    """The layout after one; the first where there is none."""
    if setting == "elastic":
        world = rng.choice(DIVISORS)
        return Layout(world, rng.randint(0, 3), ALL_RANKS if row.together else ALL_RANKS // world)
    if setting == "kills" and before is not None:
        return before
    batch = rng.choice(row.batches) if before is None or rng.random() < 0.25 else before.batch
    return Layout(rng.randint(1, 8), rng.randint(0, 3), batch)


def torture(row: Row, open_: Open, setting: str, n_changes: int, seed: int) -> Tally:
    """Epochs with changes, until there were so many."""
    rng, tally, epoch = random.Random(seed), Tally(), 0  # noqa: S311 - no secret
    while tally.n_changes < n_changes:
        epoch += 1
        steps, layouts = one_epoch(rng, row, open_, setting, epoch, tally)
        tally.end_epoch(Counter(i for step in steps for i in step))
        if setting != "any" or (row.together and len({layout.batch for layout in layouts}) == 1):
            opened = open_(layouts[0], None, epoch)
            tally.compare(steps, read(opened, 100 * N)[0])
            opened.close()
    return tally


def one_epoch(
    rng: random.Random, row: Row, open_: Open, setting: str, epoch: int, tally: Tally
) -> tuple[Steps, list[Layout]]:
    """The steps of an epoch with changes, and the layouts that read them."""
    kept: Steps = []
    layouts: list[Layout] = []
    state, ended = None, False
    while not ended:
        now = drawn(rng, row, setting, layouts[-1] if layouts else None)
        tally.n_changes += state is not None
        try:
            opened = open_(now, state, epoch)
            steps, ended = read(opened, rng.randint(1, 3))
            saved = opened.save()
            if opened.over(saved):  # no run goes on from it: what other ranks have left is read now
                steps, ended = steps + read(opened, 100 * N)[0], True
            if not ended:  # steps that nobody keeps; if none is left the epoch is over, as a training knows
                lost, over = read(opened, rng.randint(1, 2))
                ended = over and not lost
            opened.close()
        except Exception as error:  # whatever it says, this change is not possible
            ended = False
            if state is not None:
                tally.refused[f"{type(error).__name__}: {error}"[:60]] += 1
            continue
        state = saved
        layouts.append(now)
        kept += steps
        if len(kept) > 100 * N:
            raise SystemExit("an epoch that does not end")
    return kept, layouts


def unbroken(row: Row, open_: Open, setting: str, n_epochs: int) -> Tally:
    """Epochs without a change."""
    rng, tally, epoch = random.Random(1), Tally(), 10**6  # noqa: S311 - no secret
    while tally.n_epochs < n_epochs:
        epoch += 1
        try:
            opened = open_(drawn(rng, row, setting, None), None, epoch)
            steps, _ = read(opened, 100 * N)
        except Exception as error:  # a layout that the library has not
            logging.getLogger(__name__).info("%s", error)
            continue
        opened.close()
        tally.end_epoch(Counter(i for step in steps for i in step))
    return tally


def measure(row: Row, setting: str, n_changes: int, seeds: int) -> dict[str, Any]:
    """A row of the table."""
    with libraries.scratch() as folder:
        open_ = row.make(N, folder)
        control = unbroken(row, open_, setting, 20 if row.every < 100 else 5)
        n = max(1, n_changes // row.every // seeds // (1 if setting == "any" else 5))
        each = [torture(row, open_, setting, n, seed) for seed in range(seeds)]
    missing, repeated = zip(*(tally.percents() for tally in each), strict=True)
    reasons = sum((tally.refused for tally in each), Counter[str]())
    return {
        "changes": sum(tally.n_changes for tally in each),
        "epochs": sum(tally.n_epochs for tally in each),
        "missing": sum(tally.missing for tally in each),
        "repeated": sum(tally.repeated for tally in each),
        "missing_percent": spread(list(missing)),
        "repeated_percent": spread(list(repeated)),
        "steps_compared": sum(tally.n_steps for tally in each),
        "steps_differ": sum(tally.differ for tally in each),
        "refused": reasons.total(),
        "refusals": dict(reasons.most_common(6)),
        "unbroken_percent": [float(f"{value:.3g}") for value in control.percents()],
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    """In Markdown."""
    lines = [
        "| | changed | changes | refused | missing | repeated | other steps | missing, repeated without a change |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        label = f"{name} {row['version']}" if row["version"] and "," not in name else name
        for setting, of in row["settings"].items():
            shares = [
                f"{of[what]:,}" + (f" ({of[what] / of['epochs'] / N:.2%})" if of[what] else "")
                for what in ("missing", "repeated")
            ]
            control = " %, ".join(map(str, of["unbroken_percent"]))
            steps = f"{of['steps_differ']:,} of {of['steps_compared']:,}" if of["steps_compared"] else ""
            cells = (
                label,
                setting,
                f"{of['changes']:,}",
                f"{of['refused']:,}",
                *shares,
                steps,
                f"{control} %",
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure."""
    arguments = parser(__doc__)
    arguments.set_defaults(runs=5)
    arguments.add_argument("--changes", type=int, default=10_000, help="of all runs together")
    arguments.add_argument("--only", nargs="*", default=list(ROWS), choices=list(ROWS), help="rows")
    arguments.add_argument("--table", action="store_true", help="print the table of --out")
    a = arguments.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # thousands of runs begin
    rows = {}
    for name in [] if a.table else a.only:
        row = ROWS[name]
        settings = {setting: measure(row, setting, a.changes, a.runs) for setting in row.settings}
        rows = of_file(a.out) | {name: {"version": version(row.package or "adq-wds"), "settings": settings}}
        rows = {name: rows[name] for name in ROWS if name in rows}
        report({"samples": N, "rows": rows}, a.out)
    print(table(rows or of_file(a.out)))


def of_file(out: str | None) -> dict[str, Any]:
    """The rows measured before."""
    return json.loads(Path(out).read_text())["rows"] if out and Path(out).exists() else {}


if __name__ == "__main__":
    main()
