"""Does a training that is killed and goes on with other ranks, workers and batches see each sample once in an epoch?

Epochs of 203 samples are read by 1 to 8 ranks with 0 to 3 workers each. After one to three steps the state is saved; one or two
more are read, and then everything is thrown away, with what workers had read ahead: a kill. The run goes on from the saved
state with another number of ranks and workers, and in a quarter of the changes with another size of batches; a state that is
refused is counted, and another layout is drawn. At the epoch's end its samples are counted: missing, and repeated. `unbroken` is
the same without a change, so that what a library pads or drops anyway is known.

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
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks import resume_libraries as libraries
from benchmarks.common import parser, report, spread
from benchmarks.resume_libraries import Layout, Open, Opened

N = 203
Steps = list[list[int]]


@dataclass(frozen=True)
class Row:
    """A library, and how it is used.

    Attributes:
        make: opens it over N samples in a folder.
        package: whose version is noted.
        batches: sizes to draw from: of a rank, or of all ranks.
        every: one of so many of the `--changes` is done.
    """

    make: Callable[[int, Path], Open]
    package: str | None = None
    batches: tuple[int, ...] = tuple(range(1, 9))
    every: int = 1


ROWS: dict[str, Row] = {
    "adq, global_batch": Row(
        lambda n, folder: libraries.adq_ranks(n, folder, together=True), batches=(24, 25, 31)
    ),
    "adq, batch_size": Row(lambda n, folder: libraries.adq_ranks(n, folder, together=False)),
    "adq, global_batch, processes": Row(
        lambda n, folder: libraries.adq_ranks(n, folder, together=True, processes=True),
        batches=(24, 25, 31),
        every=100,
    ),
    "adq, batch_size, processes": Row(
        lambda n, folder: libraries.adq_ranks(n, folder, together=False, processes=True), every=100
    ),
    "mosaicml-streaming": Row(libraries.mosaic_ranks, "mosaicml-streaming"),
    "torchdata": Row(libraries.torchdata_ranks, "torchdata"),
    "torchdata, processes": Row(
        lambda n, folder: libraries.torchdata_ranks(n, folder, processes=True), "torchdata", every=100
    ),
    "litdata": Row(libraries.litdata_ranks, "litdata", every=5),
    "litdata, processes": Row(
        lambda n, folder: libraries.litdata_ranks(n, folder, processes=True), "litdata", every=100
    ),
    "lancedb": Row(libraries.lancedb_ranks, "lancedb", batches=(24, 48), every=100),
}


@dataclass
class Tally:
    """What became of the samples.

    Attributes:
        n_changes: states that were loaded or refused.
        refused: how often, by the error's first words.
    """

    n_changes: int = 0
    n_epochs: int = 0
    missing: int = 0
    repeated: int = 0
    refused: Counter[str] = field(default_factory=Counter)

    def end_epoch(self, seen: Counter[int]) -> None:
        """Count an epoch's samples."""
        if not seen.keys() <= set(range(N)):
            raise SystemExit(f"samples that there are not: {seen.keys() - set(range(N))}")
        self.n_epochs += 1
        self.missing += N - len(seen)
        self.repeated += seen.total() - len(seen)

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


def drawn(rng: random.Random, row: Row, before: Layout | None) -> Layout:
    """A layout; the batch's size changes in a quarter of the cases."""
    batch = rng.choice(row.batches) if before is None or rng.random() < 0.25 else before.batch
    return Layout(rng.randint(1, 8), rng.randint(0, 3), batch)


def torture(row: Row, open_: Open, n_changes: int, seed: int) -> Tally:
    """Epochs with changes, until there were so many."""
    rng, tally, epoch = random.Random(seed), Tally(), 0  # noqa: S311 - no secret
    while tally.n_changes < n_changes:
        epoch += 1
        seen: Counter[int] = Counter()
        state, layout, ended = None, None, False
        while not ended:
            now = drawn(rng, row, layout)
            tally.n_changes += state is not None
            try:
                opened = open_(now, state, epoch)
                steps, ended = read(opened, rng.randint(1, 3))
                saved = opened.save()
                if (
                    not ended
                ):  # steps that nobody keeps; none is left where the epoch is over, as a training knows
                    lost, over = read(opened, rng.randint(1, 2))
                    ended = over and not lost
                opened.close()
            except Exception as error:  # whatever it says, this change is not possible
                ended = False
                if state is not None:
                    tally.refused[f"{type(error).__name__}: {error}"[:60]] += 1
                continue
            state, layout = saved, now
            seen.update(i for step in steps for i in step)
            if seen.total() > 100 * N:
                raise SystemExit("an epoch that does not end")
        tally.end_epoch(seen)
    return tally


def unbroken(row: Row, open_: Open, n_epochs: int) -> Tally:
    """Epochs without a change."""
    rng, tally, epoch = random.Random(1), Tally(), 10**6  # noqa: S311 - no secret
    while tally.n_epochs < n_epochs:
        epoch += 1
        try:
            opened = open_(drawn(rng, row, None), None, epoch)
            steps, _ = read(opened, 100 * N)
        except Exception as error:  # a layout that the library has not
            logging.getLogger(__name__).info("%s", error)
            continue
        opened.close()
        tally.end_epoch(Counter(i for step in steps for i in step))
    return tally


def measure(row: Row, n_changes: int, seeds: int) -> dict[str, Any]:
    """A row of the table."""
    with libraries.scratch() as folder:
        open_ = row.make(N, folder)
        control = unbroken(row, open_, 20 if row.every == 1 else 5)
        each = [torture(row, open_, -(-n_changes // row.every // seeds), seed) for seed in range(seeds)]
    missing, repeated = zip(*(tally.percents() for tally in each), strict=True)
    reasons = sum((tally.refused for tally in each), Counter[str]())
    return {
        "version": version(row.package) if row.package else None,
        "changes": sum(tally.n_changes for tally in each),
        "epochs": sum(tally.n_epochs for tally in each),
        "missing": sum(tally.missing for tally in each),
        "repeated": sum(tally.repeated for tally in each),
        "missing_percent": spread(list(missing)),
        "repeated_percent": spread(list(repeated)),
        "refused": reasons.total(),
        "refusals": dict(reasons.most_common(6)),
        "unbroken_percent": [float(f"{value:.3g}") for value in control.percents()],
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    """In Markdown."""
    head = "| | changes | refused | missing | repeated | missing, repeated without a change |\n|---|---|---|---|---|---|"
    lines = [head]
    for name, row in rows.items():
        shares = [
            f"{row[what]:,}" + (f" ({row[what + '_percent']['median']} %)" if row[what] else "")
            for what in ("missing", "repeated")
        ]
        control = " %, ".join(map(str, row["unbroken_percent"]))
        label = f"{name} {row['version']}" if row["version"] and "," not in name else name
        lines.append(
            f"| {label} | {row['changes']:,} | {row['refused']:,} | {shares[0]} | {shares[1]} | {control} % |"
        )
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
    before = json.loads(Path(a.out).read_text())["rows"] if a.out and Path(a.out).exists() else {}
    if not a.table:
        now = {name: measure(ROWS[name], a.changes, a.runs) for name in a.only}
        before = {name: (before | now)[name] for name in ROWS if name in before | now}
        report({"samples": N, "rows": before}, a.out)
    print(table(before))


if __name__ == "__main__":
    main()
