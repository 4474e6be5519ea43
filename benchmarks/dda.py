"""Does diffusion, or its filter, help a student that is trained without data? And what does `Vary` cost?

    python -m benchmarks.dda digits --seeds 5 --work WORK --out benchmarks/results/dda_digits.json
    python -m benchmarks.dda tables --out benchmarks/results/dda_digits.json
    python -m benchmarks.dda picture --work WORK/seed-0 --out docs/pictures/dda.svg
    python -m benchmarks.dda cifar10 --teacher wrn40-2 --student wrn16-1 --data DATA --work WORK --out FILE.json
    python -m benchmarks.dda cifar10 --teacher resnet34 --student resnet18 --data DATA --work WORK --out FILE.json
    python -m benchmarks.dda folder --train "train-*.tar" --test "test-*.tar" --work WORK --out FILE.json
    python -m benchmarks.dda overhead --runs 10 --out benchmarks/results/dda_overhead.json

`digits` trains all arms of `benchmarks.dda_arms`: the seed varies split, teacher, bank, diffusion and students. Differences are
paired by seed, with 95 % intervals (Student's t). A seed that the result file holds is not run again. `tables` prints
them as Markdown, `picture` draws parents and variants. `cifar10` and `folder` (CIFAR-100's shards, 64 × 64 images, ...) distil at NAYER's budget, say their hours
first, and go on where they were stopped. `overhead` times `Vary` beside its engine called alone on the same images, in turns.

Last measured: see docs/dda.md; `overhead`: 1.03 times the engine's CPU time (an engine of 8 ms an image, 32 × 32, batches of
64, one thread of a loaded machine). `cifar10` and `folder` were not run at their full budget.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path
from statistics import mean, median
from typing import Any, TypeVar

import numpy as np
import torch

import adq_wds as adq
from adq_wds.errors import AdqError
from adq_wds.models.forward import pick_device
from adq_wds.shards.names import expand_urls
from benchmarks.common import data_folder, report
from benchmarks.dda_arms import (
    BANK,
    CE,
    CHOSEN,
    DRAWN,
    MORE,
    NOISY,
    ORACLE,
    RANDOM,
    REAL,
    TOP,
    VARIANTS,
    Budget,
    one_seed,
)
from benchmarks.dda_images import Schedule, distil, hours
from benchmarks.dda_picture import picture
from benchmarks.records import mean_of
from benchmarks.training import read_images

T = TypeVar("T", Budget, Schedule)

PAIRS = [
    (VARIANTS, BANK), (NOISY, BANK), (MORE, BANK), (VARIANTS, NOISY), (VARIANTS, MORE), (TOP, RANDOM), (TOP, VARIANTS),
    (VARIANTS + CE, BANK + CE), (VARIANTS + CE, NOISY + CE), (TOP + CE, RANDOM + CE), (TOP + CE, VARIANTS + CE),
    (TOP + CE, TOP), (BANK + CE, BANK), (CHOSEN, DRAWN),
    (ORACLE + VARIANTS, NOISY), (ORACLE + VARIANTS, VARIANTS), (ORACLE + TOP, ORACLE + RANDOM),
    (ORACLE + TOP + CE, ORACLE + RANDOM + CE), (ORACLE + TOP + CE, ORACLE + VARIANTS + CE), (REAL, VARIANTS),
]  # fmt: skip


def digits(seeds: Iterable[int], work: Path, budget: Budget, out: str | None) -> dict[str, Any]:
    """The record of each seed, means over them, and paired differences; seeds that `out` holds are not run again.

    Raises:
        AdqError: `out` was made with another budget.
    """
    records: dict[str, dict[str, Any]] = {}
    if out is not None and Path(out).exists():
        before = json.loads(Path(out).read_text(encoding="utf-8"))
        if before["budget"] != asdict(budget):
            raise AdqError(
                f"{out} was made with {before['budget']}, now {asdict(budget)}; give another --out"
            )
        records = before["seeds"]
    result: dict[str, Any] = {}
    for seed in seeds:
        if str(seed) not in records:
            records[str(seed)] = one_seed(seed, work / f"seed-{seed}", budget)
        result = {"budget": asdict(budget), **summary(records), "seeds": records}
        report(result, out)
    return result


def summary(records: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds of all that was measured, and differences paired by seed with their 95 % intervals."""
    runs = list(records.values())
    means = {
        part: {
            name: {measure: round(mean(run[part][name][measure] for run in runs), 3) for measure in measures}
            for name, measures in runs[0][part].items()
        }
        for part in ("arms", "sets")
    }
    pairs = {
        f"{a} − {b}": {
            measure: mean_of([run["arms"][a][measure] - run["arms"][b][measure] for run in runs])
            for measure in ("accuracy", "agreement")
        }
        for a, b in PAIRS
    }
    return {"mean": means, "paired": pairs}


def tables(result: dict[str, Any]) -> str:
    """Arms, differences and sets of images, as Markdown."""
    arms, sets, paired = result["mean"]["arms"], result["mean"]["sets"], result["paired"]
    names = ("accuracy", "agreement")
    rows = [["student on", "accuracy %", "agreement %", "with CE: accuracy", "agreement"]]
    for arm in [arm for arm in arms if not arm.endswith(CE)]:
        rows.append([arm, *[f"{arms[of][m]:.2f}" for of in (arm, arm + CE) if of in arms for m in names]])
    differences = [["difference, paired by seed", *names]]
    for pair, of in paired.items():
        differences.append([pair, *[f"{of[m]['mean']:+.2f} ± {of[m]['half_width'] or 0:.2f}" for m in names]])
    columns = {
        "images": 0,
        "cosine of pairs": 3,
        "Fréchet distance": 1,
        "cos": 3,
        "agree": 1,
    }  # and their decimals
    measured = [
        ["set", "images", "cosine of pairs", "Fréchet distance", "cosine with parent", "parent's label %"]
    ]
    for name, of in sets.items():
        measured.append([name, *[f"{of[c]:.{digits}f}" if c in of else "" for c, digits in columns.items()]])
    return "\n\n".join(map(_markdown, (rows, differences, measured)))


def _markdown(rows: list[list[str]]) -> str:
    width = len(rows[0])
    padded = [row + [""] * (width - len(row)) for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in padded]
    return "\n".join([lines[0], "|---" * width + "|", *lines[1:]])


def overhead(side: int, batch: int, runs: int) -> dict[str, Any]:
    """CPU seconds of a batch through `Vary`, as a multiple of the engine's own; a convolution stands for the network."""
    torch.manual_seed(0)
    layers = [
        torch.nn.Conv2d(3, 64, 3, padding=1),
        *[torch.nn.Conv2d(64, 64, 3, padding=1) for _ in range(7)],
    ]
    network = torch.nn.Sequential(*layers, torch.nn.Conv2d(64, 3, 3, padding=1)).eval()

    @torch.inference_mode()
    def engine(images: Any, labels: Any, noise: Any) -> Any:
        return network(torch.from_numpy(images + noise)).numpy()

    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (batch, side, side, 3), dtype=np.uint8)
    samples = [
        {"__key__": str(i), "__url__": "a.tar", "image": image, "label": i % 10}
        for i, image in enumerate(pixels)
    ]
    images = pixels.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
    vary, noise = adq.Vary(engine, batch_size=batch), rng.standard_normal(images.shape, np.float32)
    labels, times = np.arange(batch) % 10, []
    for _ in range(runs + 1):
        a = time.process_time()
        vary.apply(samples)
        b = time.process_time()
        engine(images, labels, noise)
        times.append((b - a, time.process_time() - b))
    ratios = [with_vary / alone for with_vary, alone in times[1:]]  # the first warms up
    return {
        "side": side, "batch": batch, "runs": runs, "ratio": median(ratios), "ratios": ratios,
        "engine_ms_an_image": median(1000 * alone / batch for _, alone in times[1:]),
    }  # fmt: skip


def images(a: argparse.Namespace) -> dict[str, Any]:
    """A student of any shards' classes; says its hours first."""
    if a.what == "cifar10":
        a.train, a.test = (
            str(data_folder("cifar10", a.data) / f"*-{split}-*.tar") for split in ("train", "test")
        )
    device = pick_device(a.device)
    train, test = (
        read_images([Path(path) for path in expand_urls(urls)], device) for urls in (a.train, a.test)
    )
    schedule = settings(Schedule, a)
    needed = hours(train, schedule)
    parts = ", ".join(f"{name} {value:.2f}" for name, value in needed.items())
    print(
        f"{sum(needed.values()):.2f} hours on {device} ({parts}); saved in {a.work} after every epoch",
        flush=True,
    )
    return {"hours": needed, **distil(train, test, a.work, schedule)}


def settings(kind: type[T], a: argparse.Namespace) -> T:
    """A dataclass from the flags that `add_flags` made."""
    return kind(**{name: getattr(a, name) for name in kind.__dataclass_fields__})


def add_flags(command: argparse.ArgumentParser, kind: Any) -> None:
    """A flag for each field of a dataclass."""
    for field in fields(kind):
        command.add_argument(
            f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default
        )


def main() -> None:
    """Run one of the commands."""
    whole = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = whole.add_subparsers(dest="what", required=True)
    words = ("digits", "tables", "picture", "cifar10", "folder", "overhead")
    made = {what: commands.add_parser(what) for what in words}
    for command in made.values():
        command.add_argument("--out", help="the result file")
    made["digits"].add_argument("--seeds", type=int, default=5)
    made["digits"].add_argument("--first-seed", type=int, default=0)
    made["digits"].add_argument("--work", type=Path, help="folder to keep; a temporary one by default")
    add_flags(made["digits"], Budget)
    made["picture"].add_argument("--work", type=Path, required=True, help="folder of a seed of `digits`")
    for what in ("cifar10", "folder"):
        made[what].add_argument("--work", type=Path, required=True, help="folder of teacher, bank and states")
        made[what].add_argument("--device", default="auto")
        add_flags(made[what], Schedule)
    made["cifar10"].add_argument("--data", help="folder with cifar10/; ADQ_DATA by default")
    for split in ("train", "test"):
        made["folder"].add_argument(
            f"--{split}", required=True, help="shards with images of one size and labels"
        )
    made["overhead"].add_argument("--runs", type=int, default=10)
    a = whole.parse_args()
    if a.what == "digits":
        with tempfile.TemporaryDirectory() as folder:
            seeds = range(a.first_seed, a.first_seed + a.seeds)
            print(tables(digits(seeds, a.work or Path(folder), settings(Budget, a), a.out)))
    elif a.what == "tables":
        print(tables(json.loads(Path(a.out).read_text(encoding="utf-8"))))
    elif a.what == "picture":
        Path(a.out).write_text(picture(a.work), encoding="utf-8")
    elif a.what == "overhead":
        torch.set_num_threads(1)
        report(overhead(32, 64, a.runs), a.out)
    else:
        report(images(a), a.out)


if __name__ == "__main__":
    main()
