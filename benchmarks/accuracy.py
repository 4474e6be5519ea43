"""How well does a network trained from scratch on a selection do on images that it never saw?

CIFAR-10, and sets made of it that are as sets of people are (`benchmarks.sets`: wrong labels, long tails, copies, all
three): random selections, DQ, ADQ, k-centre and others at several keep ratios, each as one selection and as fresh
draws (the same number of images an epoch, others in each), over several seeds; a plan's seed is its training's seed.
At one ratio all arms get the same epochs and images a step, so equal compute; fresh draws get more data for it. `full`
trains on everything, so has far more compute. The test set is halved: results are the last epoch's accuracy on one
half, settings are chosen on the other, whose accuracy stands beside it as `choosing`.

    python -m benchmarks.accuracy --data DATA --work WORK --set all-three --net tiny --keep 0.1 --seeds 0 1 2 3 4 \\
        --arms full random dq adq fresh-random fresh-adq --at-once 2 --out benchmarks/results/accuracy/FILE.json

Every finished training is written to the result file at once, and the same command goes on where it was stopped; a
file made with other settings is refused. `--out FILE --table` prints the file's summary and, for `--against ARM`, each
arm's difference from that arm, paired by seed, with its 95 % interval. With an accelerator: `--net resnet18 --device cuda`.

Last measured: see docs/benchmarks.md.
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
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import adq_wds as adq
from adq_wds.core.rng import draw
from adq_wds.errors import AdqError
from adq_wds.files import canonical_json, lock, make_folder, sha256_text, write_text
from adq_wds.models.forward import pick_device
from adq_wds.tables.features import Features
from adq_wds.tables.plan import Plan
from benchmarks.common import data_folder, machine
from benchmarks.sets import SETS, make_set
from benchmarks.training import NETS, Images, Recipe, native_precision, read_images, recipe_for, train

# One bin, copies and all: a keyed draw. Embeddings play no part, so the cheapest encoder does.
ONE_BIN = {"bins": 1, "allocation": "uniform", "scores": ("texture",), "dedup": None}
RANDOM = {**ONE_BIN, "encoder": "thumbnail"}
EQUAL = {**RANDOM, "balance": "equal"}
DQ = {"allocation": "uniform", "dedup": None}
ADQ = {"dedup": None}
CHOSEN = {"dedup": "exact", "clean": "auto", "balance": "equal"}  # what `adq run` is asked for on dirty sets

ARMS: dict[str, tuple[dict[str, Any], bool]] = {
    "full": ({**RANDOM, "keep": 1.0}, False),
    "random": (RANDOM, False),  # each class in its proportion
    "equal": (EQUAL, False),  # as many of each class
    "k-centre": ({"pick": "k-centre"}, False),
    "dq": (DQ, False),
    "adq": (ADQ, False),  # as published
    "adq-minmax": ({**ADQ, "normalise": "minmax"}, False),
    "adq-contrastive": ({**ADQ, "diversity_head": "contrastive", "views": 20_000}, False),
    "adq-builtin": ({**ADQ, "encoder": "builtin"}, False),  # what adq-gradient is to be compared with
    "adq-gradient": ({**ADQ, "encoder": "builtin", "kernel": "gradient", "logit_grad": True}, False),
    "dedup": ({**RANDOM, "dedup": "exact"}, False),
    "clean": ({**ONE_BIN, "clean": "auto"}, False),
    "clean-20": ({**ONE_BIN, "clean": 0.2}, False),
    "clean-30": ({**ONE_BIN, "clean": 0.3}, False),
    "chosen-one-bin": ({**ONE_BIN, **CHOSEN}, False),
    "chosen": (CHOSEN, False),
    "fresh-random": (RANDOM, True),
    "fresh-equal": (EQUAL, True),
    "fresh-dq": (DQ, True),
    "fresh-adq": (ADQ, True),
    "fresh-clean": ({**ONE_BIN, "clean": "auto"}, True),
    "fresh-chosen-one-bin": ({**ONE_BIN, **CHOSEN}, True),
    "fresh-chosen": (CHOSEN, True),
    "full-chosen": (
        {**CHOSEN, "keep": 0.1, "times": 10},
        True,
    ),  # the compute of `full`, cleaned and balanced
}
"""Name → (options of `build_plan` and `embed_shards`, whether every epoch draws anew). `encoder` or `keep` among the
options is the arm's own, in place of what the command asks for; `pick` names a rule that is no plan's; `times`
multiplies the epochs."""

T_95 = (12.71, 4.30, 3.18, 2.78, 2.57)  # Student's t for 95 %, of 2 to 6 pairs

_PLAN = set(inspect.signature(adq.build_plan).parameters)
EMBED_OPTIONS = set(inspect.signature(adq.embed_shards).parameters) - _PLAN - {"urls", "encoder"}


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
    """The plans of some shards, made by the package: embedded once into a folder, planned for each seed."""

    def __init__(self, shards: Sequence[Path], work: Path) -> None:
        self._shards, self._work = shards, work
        self._features: dict[str, Features] = {}
        self._lock = threading.Lock()

    def features(self, task: Task) -> Features:
        """What an arm's plans are made from, embedded where it is not there yet."""
        options = {k: v for k, v in ARMS[task.arm][0].items() if k in EMBED_OPTIONS}
        name = "--".join([task.encoder, *(f"{k}={v}" for k, v in sorted(options.items()))])
        if name not in self._features:
            out = self._work / name.replace("/", "--").replace(":", "--")
            self._features[name] = adq.embed_shards(
                self._shards, task.encoder, out, progress=False, **options
            )
        return self._features[name]

    def plan(self, task: Task) -> Plan:
        """The plan that a training follows."""
        options = {"bins": 10, **ARMS[task.arm][0]}
        if options.pop("pick", None) == "k-centre":
            return self._k_centre(task)
        of_plan = {k: v for k, v in options.items() if k in _PLAN - {"keep"}}
        with self._lock:
            return adq.build_plan(
                self.features(task), keep=task.keep, seed=task.seed, progress=False, **of_plan
            )

    def _k_centre(self, task: Task) -> Plan:
        with self._lock:
            files = list(self.features(task))
        rows = np.concatenate([file.embedding() for file in files]).astype(np.float32)
        ids = [(file.shard, key) for file in files for key in file.spans().keys]
        first = draw(task.seed, 0, "", "", purpose="k-centre") % len(rows)
        chosen = k_centre(rows, round(task.keep * len(rows)), first)
        return Plan.from_keys([str(path) for path in self._shards], [ids[i] for i in chosen])


def k_centre(rows: NDArray[np.float32], n: int, first: int) -> NDArray[np.int64]:
    """`n` rows, each the farthest from those before it; ties go to the lowest.

    Args:
        rows: (N, D), of length 1.
        n: 1 to N.
        first: the row to begin with.

    Source: Sener and Savarese 2018 (arXiv 1708.00489), the greedy form.

    >>> k_centre(np.float32([[1, 0], [0.8, 0.6], [0, 1], [-1, 0]]), 3, 0).tolist()
    [0, 3, 2]
    """
    chosen, nearest = [first], rows @ rows[first]
    while len(chosen) < n:
        nearest[chosen[-1]] = np.inf
        chosen.append(int(nearest.argmin()))
        np.maximum(nearest, rows @ rows[chosen[-1]], out=nearest)
    return np.array(chosen)


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
    """SHA-256 of the keys that a plan keeps, by shard, in its first three epochs."""
    kept = [
        [
            [
                name,
                [
                    key
                    for key, keep in zip(plan.shard(name).spans.keys, plan.kept_in(name, epoch), strict=True)
                    if keep
                ],
            ]
            for name in plan.shards
        ]
        for epoch in range(3)
    ]
    return sha256_text(canonical_json(kept))


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
    fixed = {arm: "keep" in ARMS[arm][0] for arm, _, _ in values}
    rows = []
    for arm, encoder, keep in sorted(values, key=lambda v: (v[2], list(ARMS).index(v[0]))):
        for ratio, of_base in bases.items():
            of_arm = values[arm, encoder, keep]
            pairs = [of_arm[seed] - of_base[seed] for seed in sorted(of_arm.keys() & of_base.keys())]
            if arm == base or not pairs or not (ratio == keep or fixed[arm] or fixed[base]):
                continue
            half = None
            if len(pairs) > 1:
                half = round(T_95[min(len(pairs), 6) - 2] * statistics.stdev(pairs) / len(pairs) ** 0.5, 2)
            row = {"arm": arm, "encoder": encoder, "keep": ratio if fixed[arm] else keep, "n": len(pairs)}
            rows.append(row | {"mean": round(statistics.mean(pairs), 2), "half_width": half})
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
    _, last, choosing = outcome.curve[-1]
    return {
        **asdict(task),
        "plan": plan.hash,
        "selection": selection(plan),
        "kept": plan.n_kept,
        "seen": outcome.n_seen,
        "steps": outcome.n_steps,
        "last": last,
        "choosing": choosing,
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

    def of(task: Task) -> Recipe:
        of_keep, times = recipe(task.keep), ARMS[task.arm][0].get("times", 1)
        return replace(of_keep, epochs=times * of_keep.epochs)

    for task in todo:
        results.expect("recipes", f"{task.keep:g}, {of(task).epochs} epochs", asdict(of(task)))
        results.expect("encoders", task.encoder, plans.features(task).header["revision"])
    left = [task for task in todo if not results.done(task, lambda: plans.plan(task))]

    def work(task: Task) -> dict[str, Any]:
        record = trained(task, plans.plan(task), of(task), data, test)
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


def _print(path: Path, against: Sequence[str]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    print(markdown(content["summary"]))
    for base in against:
        print(f"\nagainst {base}, paired by seed:")
        for row in differences(content["runs"], base):
            spread = "" if row["half_width"] is None else f" ± {row['half_width']:.2f}"
            print(
                f"{row['arm']} ({row['encoder']}), keep {row['keep']:g}: {row['mean']:+.2f}{spread} ({row['n']})"
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
    made.add_argument(
        "--set", choices=list(SETS), default="clean", help="made once into WORK (benchmarks.sets)"
    )
    made.add_argument("--set-seed", type=int, default=0, metavar="SEED")
    made.add_argument("--net", choices=sorted(NETS), default="small")
    made.add_argument(
        "--precision",
        choices=["auto", "bfloat16", "float32"],
        default="auto",
        help="auto: what the processor has",
    )
    made.add_argument("--device", default="cpu", help="cpu, cuda, cuda:N or auto")
    made.add_argument("--keep", type=float, nargs="+", default=[0.05, 0.1, 0.2], metavar="RATIO")
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED")
    made.add_argument("--arms", choices=list(ARMS), nargs="+", default=list(ARMS), metavar="ARM")
    made.add_argument("--encoder", nargs="+", default=["builtin-free"], help="one or several, side by side")
    made.add_argument("--at-once", type=int, default=1, help="trainings side by side, each in a thread")
    made.add_argument("--work", default="accuracy-work", help="folder for features, used again when there")
    made.add_argument("--out", required=True, help="the result file; what it holds is not done again")
    made.add_argument("--table", action="store_true", help="print the table of the result file and end")
    made.add_argument(
        "--against", choices=list(ARMS), nargs="+", default=[], metavar="ARM", help="print differences"
    )
    return made.parse_args()


def main() -> None:
    """Train whatever the result file lacks, and print its table."""
    a = _arguments()
    if not a.table:
        folder, work = data_folder("cifar10", a.data), make_folder(a.work)
        make_folder(Path(a.out).absolute().parent)
        device = pick_device(a.device)
        precision = a.precision
        if precision == "auto":
            precision = native_precision() if device.type == "cpu" else "bfloat16"
        with lock(make_folder(work / f"{a.set}-{a.set_seed}")):
            shards = make_set(
                a.set, sorted(folder.glob("cifar10-train-*.tar")), work / "sets", seed=a.set_seed
            )
            data = read_images(shards, device)
            test = read_images(sorted(folder.glob("cifar10-test-*.tar")), device)
            settings = {
                "set": a.set,
                "set_seed": a.set_seed,
                "net": a.net,
                "device": device.type if device.type == "cpu" else torch.cuda.get_device_name(device),
                "torch": torch.__version__,
                "train": data.hash(),
                "test": test.hash(),
            }
            results = Results(Path(a.out), settings, _command({"DATA": a.data, "WORK": a.work}))
            todo = tasks(a.arms, a.encoder, a.keep, a.seeds)
            recipe = partial(recipe_for, a.net, precision=precision)
            plans = Plans(shards, work / "features" / f"{a.set}-{a.set_seed}")
            run_all(todo, plans, data, test, results, recipe, at_once=a.at_once)
    _print(Path(a.out), a.against)


if __name__ == "__main__":
    main()
