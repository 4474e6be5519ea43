"""The trainings of the proof as commands, in the order in which they are worth running; resumable."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.arms import ABLATIONS, ARMS, PATCHES
from benchmarks.plans import Task, tasks
from benchmarks.training import recipe_for

SIZES = {"clean": 50_000, "noise20": 50_000, "noise40": 50_000, "noise-pairs": 50_000, "copies": 50_000}
SIZES |= {"tail50": 13_999, "tail100": 12_408, "all-three": 23_460}
STEP_SECONDS = {"tiny": 0.0147, "small": 0.029, "resnet20": 0.0911, "convnext": 0.0941}
"""Of one core of an AMD EPYC with bfloat16, for 32 images, augmentation and update included."""
PLAN_SECONDS = 2e-4  # a sample: a plan with margins and bins takes 14 s at 50,000, one without 4
START_SECONDS = 20.0  # reading the images


@dataclass(frozen=True)
class Command:
    """One seed of some arms on a set: one run of `benchmarks.accuracy`."""

    of: str
    net: str
    arms: tuple[str, ...]
    keeps: tuple[float, ...]
    seed: int

    def tasks(self) -> list[Task]:
        """Its trainings."""
        return tasks(self.arms, ["builtin-free"], self.keeps, [self.seed])

    def out(self, folder: Path) -> Path:
        """Its result file."""
        return folder / f"{self.of}-{self.net}.json"

    def arguments(self, folder: Path, data: str, work: str, at_once: int) -> list[str]:
        """What `python -m benchmarks.accuracy` takes."""
        return [
            *("--data", data, "--work", work, "--set", self.of, "--net", self.net),
            *("--keep", *(f"{keep:g}" for keep in self.keeps), "--seeds", str(self.seed)),
            *("--arms", *self.arms, "--at-once", str(at_once), "--out", os.path.relpath(self.out(folder))),
        ]


def _seconds(of: str, net: str, task: Task) -> float:
    """Seconds of a core that a training takes, its plan included."""
    recipe = recipe_for(net, task.keep)
    steps = ARMS[task.arm].times * recipe.epochs * int(task.keep * SIZES[of]) / recipe.batch
    proxy = _seconds(of, "small", replace(task, arm="random")) if ARMS[task.arm].soft == "proxy" else 0.0
    return steps * STEP_SECONDS[net] + PLAN_SECONDS * SIZES[of] + proxy


RIVALS = ("random", "chosen", "fresh-random", "fresh-chosen")
UNEQUAL = ("equal", "fresh-equal")
MAIN: dict[str, tuple[str, ...]] = {
    "all-three": (*RIVALS, *UNEQUAL, "full", "full-chosen"),
    "noise20": RIVALS,
    "tail50": (*RIVALS, *UNEQUAL, "chosen-20", "fresh-chosen-20"),
    "clean": (*RIVALS, "clean-20", "soft-proxy"),
    "copies": RIVALS,
    "noise40": RIVALS,
}
"""The arms that the goals are of, by set."""
STATIC = ("dq", "adq", "k-centre", "clean", "chosen-one-bin", "soft-ridge", "chosen-soft")
VARYING = ("fresh-random-rates", "fresh-chosen-rates", "fresh-chosen-rising", "fresh-chosen-falling")
OTHERS = (*STATIC, "fresh-dq", "fresh-adq", "fresh-chosen-one-bin", "fresh-chosen-soft")
COPIES_OUT = ("dedup", "dedup-clean")


def commands() -> list[Command]:
    """All of them: five seeds of the goals' arms on `tiny`, then the first seed of all else, then the next."""
    goals = [Command(name, "tiny", arms, (0.1,), seed) for seed in range(5) for name, arms in MAIN.items()]
    ablations = ("chosen", "chosen-one-bin", "clean-20", "clean-50", "easiest-20", *ABLATIONS)
    both = ("clean", "all-three")
    rest: list[tuple[Iterable[str], str, Iterable[str], tuple[float, ...], int]] = [
        (("all-three",), "small", MAIN["all-three"], (0.1,), 5),
        (("clean",), "tiny", MAIN["clean"], (0.05, 0.2), 5),
        (both, "tiny", (*RIVALS, "full"), (0.02, 0.05, 0.1, 0.2, 0.3), 3),  # time to accuracy
        (("all-three", "copies"), "tiny", COPIES_OUT, (0.1,), 3),
        (("all-three", "tail50", "clean"), "tiny", OTHERS, (0.1,), 3),
        (both, "tiny", ("random", *PATCHES), (0.1,), 3),
        (("tail100",), "tiny", (*RIVALS, *UNEQUAL, *OTHERS), (0.1,), 3),
        (("noise20", "tail50"), "tiny", ("full", "full-chosen"), (0.1,), 3),
        (("all-three", "tail50", "clean"), "tiny", VARYING, (0.1,), 3),
        (("all-three",), "tiny", ablations, (0.1,), 3),
        (("noise-pairs",), "tiny", (*RIVALS, *OTHERS), (0.1,), 3),
        (("noise20", "copies", "noise40"), "tiny", OTHERS, (0.1,), 3),
        (("clean",), "tiny", (*ablations, "full-chosen"), (0.1,), 3),
        *(((name,), "small", arms, (0.1,), 5) for name, arms in MAIN.items() if name != "all-three"),
        (("all-three",), "resnet20", MAIN["all-three"], (0.1,), 3),
        (("all-three",), "convnext", MAIN["all-three"], (0.1,), 3),
        (("clean",), "small", MAIN["clean"], (0.05, 0.2), 5),
    ]
    return goals + [
        Command(name, net, tuple(arms), keeps, seed)
        for seed in range(5)
        for sets, net, arms, keeps, seeds in rest
        if seed < seeds
        for name in sets
    ]


def left(folder: Path) -> Iterator[tuple[Command, int, float]]:
    """Commands with trainings that no file and no command before has, their number and core seconds."""
    counted: set[tuple[Path, Task]] = set()
    for command in commands():
        path = command.out(folder)
        runs = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else []
        counted |= {(path, Task(*(run[name] for name in ("arm", "encoder", "keep", "seed")))) for run in runs}
        todo = [task for task in command.tasks() if (path, task) not in counted]
        counted |= {(path, task) for task in todo}
        if todo:
            seconds = START_SECONDS + sum(_seconds(command.of, command.net, task) for task in todo)
            yield command, len(todo), seconds


def listing(folder: Path, data: str, work: str, at_once: int) -> str:
    """What is left as a script for a shell, each command below its cost and that of all so far."""
    lines, total = [], 0.0
    for command, n, seconds in left(folder):
        total += seconds
        typed = shlex.join(command.arguments(folder, data, work, at_once))
        lines += [
            f"# {n} trainings, {seconds:,.0f} core seconds, {total:,.0f} so far",
            f"python -m benchmarks.accuracy {typed}",
        ]
    return "\n".join(lines)


def run(folder: Path, data: str, work: str, at_once: int, budget: float) -> None:
    """Run what is left, one after another, until the next would end after `budget` seconds.

    Raises:
        subprocess.CalledProcessError: a command failed; those before it have ended well.
    """
    start = time.monotonic()
    for command, n, seconds in left(folder):
        name = f"{command.of} {command.net} seed {command.seed}"
        if time.monotonic() - start + seconds / at_once > budget:
            print(f"stopped: {name} would take {seconds / at_once:,.0f} s")
            return
        print(f"{name}: {n} trainings", flush=True)
        arguments = command.arguments(folder, data, work, at_once)
        subprocess.run([sys.executable, "-m", "benchmarks.accuracy", *arguments], check=True)
