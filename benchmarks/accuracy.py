"""How well does a network trained from scratch on a selection do on the whole test set?

CIFAR-10: class-balanced random selections, DQ and ADQ at several keep ratios, each as one selection and as fresh
draws (the same number of images an epoch, others in each), over several seeds; a plan's seed is its training's seed.
At one ratio all arms get the same epochs and images a step, so equal compute; fresh draws get more data for it. `full`
trains on everything for the epochs of the largest ratio and so has far more compute. The result is the last epoch's
accuracy; the best one is recorded beside it and never chosen by.

    python -m benchmarks.accuracy --data DATA --work WORK --net small --keep 0.05 0.1 0.2 --seeds 0 1 2 3 4 \\
        --arms random dq adq fresh-random fresh-dq fresh-adq --encoder builtin-free --at-once 2 \\
        --out benchmarks/results/accuracy.json

Every finished training is written to the result file at once, and the same command goes on where it was stopped; a
file made with other settings is refused. `--out FILE --table` prints the file's summary. With an accelerator:
`--net resnet18 --device cuda`.

Last measured (two cores of an AMD EPYC, torch 2.15, seeds 0 to 2 of the command above; mean and standard deviation): at keep
5, 10 and 20 % random 67.12 ± 0.32, 73.54 ± 0.21, 77.70 ± 0.45; DQ 67.70 ± 0.75, 73.53 ± 0.20, 77.54 ± 0.15; ADQ 67.77 ± 0.54,
73.85 ± 0.18, 77.75 ± 0.15; fresh random 75.85 ± 0.29, 77.83 ± 0.10, 79.67 ± 0.10; fresh DQ 75.84 ± 0.78, 77.93 ± 0.20,
79.84 ± 0.20; fresh ADQ 75.90 ± 0.67, 78.05 ± 0.39, 80.22 ± 0.23. The accelerator's part has not been run.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import adq_wds as adq
from adq_wds.errors import AdqError
from adq_wds.files import canonical_json, lock, make_folder, sha256_text, write_text
from adq_wds.models.timm_encoder import pick_device
from adq_wds.planning.build_plan import find_bins
from adq_wds.tables.bins import Bins
from adq_wds.tables.features import Features
from adq_wds.tables.plan import Plan
from benchmarks.common import data_folder, machine
from benchmarks.training import NETS, Images, Recipe, read_images, recipe_for, train

# One bin: a class-balanced keyed draw. Embeddings play no part, so the cheapest encoder does.
ONE_BIN = {"encoder": "thumbnail", "bins": 1, "allocation": "uniform", "scores": ("texture",)}
DQ = {"bins": 10, "allocation": "uniform"}

ARMS: dict[str, tuple[dict[str, Any], bool]] = {
    "full": ({**ONE_BIN, "keep": 1.0}, False),
    "random": (ONE_BIN, False),
    "dq": (DQ, False),
    "adq": ({}, False),
    "adq-minmax": ({"normalise": "minmax"}, False),
    "adq-contrastive": ({"diversity_head": "contrastive", "views": 20_000}, False),
    "adq-builtin": ({"encoder": "builtin"}, False),  # what adq-gradient is to be compared with
    "adq-gradient": ({"encoder": "builtin", "kernel": "gradient", "logit_grad": True}, False),
    "fresh-random": (ONE_BIN, True),
    "fresh-dq": (DQ, True),
    "fresh-adq": ({}, True),
}
"""Name → (options of `build_plan` and `embed_shards`, whether every epoch draws anew). `encoder` or `keep` among the
options is the arm's own, in place of what the command asks for."""

_PLAN, _EMBED = (set(inspect.signature(f).parameters) for f in (adq.build_plan, adq.embed_shards))
BIN_OPTIONS = {"bins", "kernel", "classes", "dedup"}  # which a plan's bins are decided by
EMBED_OPTIONS = _EMBED - _PLAN - {"urls", "encoder", "out"}  # views=, logit_grad=: what some plans need


@dataclass(frozen=True)
class Task:
    """One training: what it trains on and its seed."""

    arm: str
    encoder: str
    keep: float
    seed: int


def tasks(
    arms: Sequence[str], encoders: Sequence[str], keeps: Sequence[float], seeds: Sequence[int]
) -> list[Task]:
    """All trainings, seed by seed, so that whoever stops early has whole seeds; none twice.

    >>> [(t.arm, t.encoder, t.keep) for t in tasks(["full", "dq"], ["a", "b"], [0.1], [0])]
    [('full', 'thumbnail', 1.0), ('dq', 'a', 0.1), ('dq', 'b', 0.1)]
    """
    found = [
        Task(arm, options.get("encoder", encoder), options.get("keep", keep), seed)
        for seed in seeds
        for keep in sorted(keeps, reverse=True)  # the longest first, so that no core waits for the last
        for arm in arms
        for options in [ARMS[arm][0]]
        for encoder in encoders
    ]
    return list(dict.fromkeys(found))


class Plans:
    """The plans of some shards, made by the package: embedded once into a folder, binned once, drawn for each seed."""

    def __init__(self, shards: Sequence[Path], work: Path) -> None:
        self._shards, self._work = shards, work
        self._features: dict[str, Features] = {}
        self._bins: dict[str, Bins] = {}
        self._lock = threading.Lock()

    def features(self, task: Task) -> Features:
        """What an arm's plans are made from, embedded where it is not there yet."""
        options = {k: v for k, v in ARMS[task.arm][0].items() if k in EMBED_OPTIONS}
        name = "--".join([task.encoder, *(f"{k}={v}" for k, v in sorted(options.items()))])
        if name not in self._features:
            out = self._work / "features" / name.replace("/", "--").replace(":", "--")
            self._features[name] = adq.embed_shards(
                self._shards, task.encoder, out, progress=False, **options
            )
        return self._features[name]

    def plan(self, task: Task) -> Plan:
        """The plan that a training follows."""
        options = {"bins": 10, **ARMS[task.arm][0]}
        of_bins = {k: v for k, v in options.items() if k in BIN_OPTIONS}
        own = (BIN_OPTIONS - {"kernel"}) | EMBED_OPTIONS | {"encoder", "keep"}
        of_plan = {k: v for k, v in options.items() if k not in own}
        with self._lock:
            features = self.features(task)
            key = canonical_json([str(features.folder), of_bins])
            if key not in self._bins:
                self._bins[key] = find_bins(features, progress=False, **of_bins)
            return adq.build_plan(
                features, bins=self._bins[key], keep=task.keep, seed=task.seed, progress=False, **of_plan
            )


def rows_of(plan: Plan, keys: dict[str, list[str]], *, fresh: bool) -> Callable[[int], NDArray[np.int64]]:
    """Epoch → the rows that a plan keeps of images in the order of `keys`, by shard.

    Raises:
        AdqError: plan and images are not of the same samples.
    """
    if {name: plan.shard(name).spans.keys for name in plan.shards} != keys:
        raise AdqError(
            "the plan's samples are not the images read: the shards have changed; give another --work"
        )
    fixed = np.flatnonzero(np.concatenate([shard.kept for shard in plan]))

    def rows(epoch: int) -> NDArray[np.int64]:
        if not fresh:
            return fixed
        return np.flatnonzero(np.concatenate([plan.kept_in(name, epoch) for name in plan.shards]))

    return rows


def selection(plan: Plan) -> str:
    """SHA-256 of all that a training takes from a plan: each shard's columns, and the sizes and quotas of its cells."""
    return sha256_text(canonical_json([plan.header["shards"], plan.header["cells"]]))


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
                "mean_of_best": round(statistics.mean(100 * run["best"] for run in group), 3),
                "images_seen": round(statistics.mean(run["seen"] for run in group)),
            }
        )
    return rows


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
        shown = "–" if ARMS[arm][0].get("bins") == 1 else encoder
        texts = [_cell(cells.get((arm, encoder, keep))) for keep in keeps]
        lines.append(f"| {arm} | {shown} | {' | '.join(texts)} |")
    return "\n".join(lines)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    spread = "" if row["std"] is None else f" ± {row['std']:.2f}"
    return f"{row['mean']:.2f}{spread} ({row['n']})"


def trained(task: Task, plan: Plan, recipe: Recipe, data: Images, test: Images) -> dict[str, Any]:
    """The record of one training."""
    if data.pixels.device.type == "cpu":
        torch.set_num_threads(1)  # of this thread: the trainings side by side share the cores
    start, busy = time.perf_counter(), time.thread_time()
    outcome = train(recipe, data, test, rows_of(plan, data.keys, fresh=ARMS[task.arm][1]), seed=task.seed)
    best_epoch, best = max(outcome.curve, key=lambda entry: entry[1])
    return {
        **asdict(task),
        "plan": plan.hash,
        "selection": selection(plan),
        "kept": plan.n_kept,
        "seen": outcome.n_seen,
        "steps": outcome.n_steps,
        "last": outcome.curve[-1][1],
        "best": best,
        "best_epoch": best_epoch,
        "seconds": round(time.perf_counter() - start, 1),
        "thread_seconds": round(time.thread_time() - busy, 1),
    }


def run_all(
    todo: Sequence[Task],
    plans: Plans,
    data: Images,
    test: Images,
    results: Results,
    recipe: Callable[[float], Recipe],
    *,
    at_once: int = 1,
) -> None:
    """Do every training that the result file does not hold yet, `at_once` of them side by side in threads.

    Raises:
        AdqError: the file's records were made with another recipe, encoder or plan.
    """
    for task in todo:
        results.expect("recipes", f"{task.keep:g}", asdict(recipe(task.keep)))
        results.expect("encoders", task.encoder, plans.features(task).header["revision"])
    left = [task for task in todo if not results.done(task, lambda: plans.plan(task))]

    def work(task: Task) -> dict[str, Any]:
        record = trained(task, plans.plan(task), recipe(task.keep), data, test)
        results.add(record)
        return record

    with ThreadPoolExecutor(at_once, thread_name_prefix="training") as pool:
        futures = [pool.submit(work, task) for task in left]
        try:
            for i, future in enumerate(as_completed(futures)):
                _say(future.result(), len(todo) - len(left) + i + 1, len(todo))
        except BaseException:
            pool.shutdown(cancel_futures=True)  # those under way still end well
            raise


def _say(record: dict[str, Any], n_done: int, n_all: int) -> None:
    arm, encoder, keep, seed = (record[name] for name in ("arm", "encoder", "keep", "seed"))
    print(
        f"{n_done}/{n_all} {time.strftime('%H:%M:%S')} {arm} ({encoder}) keep {keep:g} seed {seed}: "
        f"{100 * record['last']:.2f} %, {record['steps']} steps, {record['seen']} images seen, "
        f"{record['thread_seconds']} s of this thread",
        flush=True,
    )


def _command(folders: dict[str, str | None]) -> str:
    """What was typed, with names in place of the folders of this machine."""
    typed = " ".join(sys.argv[1:])
    for name, folder in folders.items():
        typed = typed.replace(folder, name) if folder else typed
    return f"python -m benchmarks.accuracy {typed}"


def _arguments() -> argparse.Namespace:
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--data", default=os.environ.get("ADQ_DATA"), help="folder that holds cifar10/")
    made.add_argument("--net", choices=sorted(NETS), default="small")
    made.add_argument("--device", default="cpu", help="cpu, cuda, cuda:N or auto")
    made.add_argument("--keep", type=float, nargs="+", default=[0.05, 0.1, 0.2], metavar="RATIO")
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED")
    made.add_argument("--arms", choices=list(ARMS), nargs="+", default=list(ARMS), metavar="ARM")
    made.add_argument("--encoder", nargs="+", default=["builtin-free"], help="one or several, side by side")
    made.add_argument("--at-once", type=int, default=1, help="trainings side by side, each in a thread")
    made.add_argument("--work", default="accuracy-work", help="folder for features, used again when there")
    made.add_argument("--out", required=True, help="the result file; what it holds is not done again")
    made.add_argument("--table", action="store_true", help="print the table of the result file and end")
    return made.parse_args()


def main() -> None:
    """Train whatever the result file lacks, and print its table."""
    a = _arguments()
    if not a.table:
        folder = data_folder("cifar10", a.data)
        device = pick_device(a.device)
        shards, test_shards = (sorted(folder.glob(f"cifar10-{part}-*.tar")) for part in ("train", "test"))
        data, test = read_images(shards, device), read_images(test_shards, device)
        settings = {
            "net": a.net,
            "device": device.type if device.type == "cpu" else torch.cuda.get_device_name(device),
            "torch": torch.__version__,
            "autocast": "bfloat16",
            "train": data.hash(),
            "test": test.hash(),
        }
        work = make_folder(a.work)
        make_folder(Path(a.out).absolute().parent)
        with lock(work):
            results = Results(Path(a.out), settings, _command({"DATA": a.data, "WORK": a.work}))
            todo = tasks(a.arms, a.encoder, a.keep, a.seeds)
            recipe = partial(recipe_for, a.net)
            run_all(todo, Plans(shards, work), data, test, results, recipe, at_once=a.at_once)
    print(markdown(json.loads(Path(a.out).read_text(encoding="utf-8"))["summary"]))


if __name__ == "__main__":
    main()
