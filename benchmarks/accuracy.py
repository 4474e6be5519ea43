"""How well does a network trained from scratch on a selection do on images that it never saw?

CIFAR-10, and sets made of it that are as sets of people are (`benchmarks.sets`: wrong labels, long tails,
copies, all three): random selections, DQ, ADQ, k-centre and others (`benchmarks.arms`) at several keep
ratios, as one selection and as fresh draws (the same number of images an epoch, others in each), over
several seeds; a plan's seed is its training's seed. At one ratio all arms get the same epochs and images a
step, so equal compute; fresh draws get more data for it. `full` trains on everything, so has far more
compute. The test set is halved: results are the last epoch's accuracy on one half, settings are chosen on
the other, whose accuracy stands beside it as `choosing`.

    python -m benchmarks.accuracy --data DATA --work WORK --set all-three --net tiny --keep 0.1 --seeds 0 1 2 3 4 \\
        --arms full random dq adq fresh-random fresh-adq --at-once 2 --out benchmarks/results/accuracy/FILE.json

Every finished training is written to the result file at once, and the same command goes on where it was
stopped; a file made with other settings is refused. `--out FILE --table` prints the file's summary and, for
`--against ARM`, each arm's difference from that arm, paired by seed, with its 95 % interval. With an
accelerator: `--net resnet18 --device cuda`.

Last measured: see docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from adq_wds.files import lock, make_folder
from adq_wds.models.forward import pick_device
from adq_wds.stream.class_rates import ClassRates
from adq_wds.tables.plan import Plan
from benchmarks.altered import altered
from benchmarks.arms import ARMS
from benchmarks.common import data_folder
from benchmarks.nets import NETS
from benchmarks.plans import Plans, Task, draws_of, every_row, rows_of, selection, tasks
from benchmarks.records import Results, differences, markdown
from benchmarks.sets import SETS, make_set
from benchmarks.soft import soft_targets
from benchmarks.training import Images, Recipe, native_precision, read_images, recipe_for, train


def trained(
    task: Task, plan: Plan, recipe: Recipe, data: Images, test: Images, plans: Plans
) -> dict[str, Any]:
    """The record of one training."""
    if data.pixels.device.type == "cpu":
        torch.set_num_threads(1)  # of this thread: the trainings side by side share the cores
    arm = ARMS[task.arm]
    more: dict[str, Any] = {}
    draws = draws_of(arm, plan, plans.shards, task.keep, recipe.epochs)
    rows = rows_of(plan, data.keys, fresh=arm.fresh, draws=draws)
    if arm.images is not None:
        data, more = altered(arm.images, plans.shards, plan, data, seed=task.seed)
        rows = every_row(len(data.label))
    targets = None
    if arm.soft is not None:
        features, precision = plans.features(task), recipe.precision
        targets = soft_targets(
            arm.soft, features, plans.shards, data, rows(0), seed=task.seed, precision=precision
        )
    start, busy = time.perf_counter(), time.thread_time()
    outcome = train(
        recipe,
        data,
        test,
        rows,
        seed=task.seed,
        targets=targets,
        n_rows=None if draws is None else draws.n_total,
        after=draws.update if isinstance(draws, ClassRates) else None,
    )
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
        **more,
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
        of_keep = recipe(task.keep)
        return replace(of_keep, epochs=ARMS[task.arm].times * of_keep.epochs)

    for task in todo:
        results.expect("recipes", f"{task.keep:g}, {of(task).epochs} epochs", asdict(of(task)))
        results.expect("encoders", task.encoder, plans.features(task).header["revision"])
    left = [task for task in todo if not results.done(task, lambda: plans.plan(task))]

    def work(task: Task) -> dict[str, Any]:
        record = trained(task, plans.plan(task), of(task), data, test, plans)
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
