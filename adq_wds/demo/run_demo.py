"""Runs the main job in two minutes: shards, plans, streams, trainings and a table."""

from __future__ import annotations

import json
import logging
import os
import platform
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset as wds

import adq_wds
from adq_wds.checks import Count, Ratio, no_bar, positive
from adq_wds.demo.digits import load_digits, write_digits
from adq_wds.demo.table import findings, make_table, table_text
from adq_wds.demo.train import Images, Training, train_all
from adq_wds.errors import AdqError
from adq_wds.files import lock, make_folder, write_text
from adq_wds.jobs.run import run_job
from adq_wds.jobs.write_report import DEFAULT_OUT as REPORT
from adq_wds.jobs.write_report import write_report
from adq_wds.pipes.decode import Decode
from adq_wds.planning.build_plan import build_plan, find_bins
from adq_wds.planning.options import plan_options
from adq_wds.tables.bins import Bins

DEFAULT_OUT = "adq-demo"
HEADER = {"format": "adq_wds.demo", "version": 1}
PLANS = {"random": "uniform", "dq": "uniform", "adq": "adaptive"}  # allocations; random has one bin a class
ARMS = {  # name: kind of plan, None for all images; does every epoch draw anew?
    "full": (None, False), "random": ("random", False), "DQ": ("dq", False), "ADQ": ("adq", False),
    "fresh random": ("random", True), "fresh ADQ": ("adq", True),
}  # fmt: skip
logger = logging.getLogger("adq_wds")


def run_demo(
    out: str | os.PathLike[str] = DEFAULT_OUT,
    *,
    keep: Ratio = 0.1,
    seeds: Count = 10,
    epochs: Count = 60,
    encoder: str = "builtin",
    progress: bool | None = None,
) -> dict[str, Any]:
    """Compare full, random, DQ and ADQ subsets, and fresh draws, on scikit-learn's digits; nothing is fetched.

    Run again, it reuses the shards and features of the last time.

    Args:
        out: the demo's folder, new or of an earlier demo.
        keep: ratio of images kept, in (0, 1].
        seeds: trainings for each arm; each seed is that of the plan, of first weights and of order.
        epochs: epochs of each training.
        encoder: builtin, builtin-free, thumbnail, or any timm name.
        progress: show bars; only on a terminal by default.

    Returns:
        the content of ``demo.json``.

    Raises:
        ValueError: an argument is out of range.
        AdqError: scikit-learn is missing, or the folder holds something else.
    """
    options = {"bins": 10, "keep": keep, "seed": 0}
    plan_options(**options)
    positive("seeds", seeds)
    positive("epochs", epochs)
    load_digits()  # raises for a missing package before anything is written
    folder = make_folder(out)
    with lock(folder):
        file = folder / "demo.json"
        is_ours = file.is_file() and b'"adq_wds.demo"' in file.read_bytes()
        if not is_ours and any(not other.name.startswith(".") for other in folder.iterdir()):
            raise AdqError(
                f"{folder} is not empty and holds no demo.json of ours: give another folder with -o"
            )
        write_text(file, json.dumps(HEADER))  # from here on the folder is the demo's
        shards = write_digits(folder)
        test = stream_images(shards["test"])
        n, n_test = len(load_digits()[1]) - len(test.labels), len(test.labels)
        if not (n_kept := round(keep * n)):
            raise ValueError(f"keep={keep} keeps none of {n:,} images; give a larger one")
        logger.info("1/5 images: scikit-learn's digits, 8 × 8, grey; %d to train, %d to test", n, n_test)
        data, run = (shlex.quote(str(folder / name)) for name in ("train", "run"))
        logger.info("2/5 main job: adq run %s --encoder %s --keep %g -o %s", data, encoder, keep, run)
        made_by: dict[str, Any] = {"encoder": {"spec": encoder}, "embed": {}, "plan": options}
        run_job(shards["train"], folder / "run", progress=progress, **made_by)
        logger.info("3/5 plans: random, DQ and ADQ, %d of each, %d images in every one", seeds, n_kept)
        bins = Bins.load(folder / "run" / "bins.parquet")
        plans = make_plans(folder, bins, keep, seeds)
        logger.info("4/5 streams: %d WebDataset pipelines with .compose(adq.Subsample(plan))", len(plans))
        trainings = make_trainings(shards["train"], plans, seeds, epochs)
        logger.info("5/5 trainings: %d of a small network, %d epochs each", len(trainings), epochs)
        accuracies = train_all(trainings, test, no_bar(progress))
        both = [set(plans["adq", s].keys()) & set(plans["dq", s].keys()) for s in range(seeds)]
        cells, shared = len(bins.classes) * bins.n_bins, sum(map(len, both)) / (n_kept * seeds)
        versions = {"adq-wds": adq_wds.__version__, "python": platform.python_version()}
        result = {
            **HEADER,
            "arguments": {"keep": keep, "seeds": seeds, "epochs": epochs, "encoder": encoder},
            "versions": {**versions, "numpy": np.__version__, "torch": torch.__version__},
            "images": {"train": n, "test": n_test},
            **findings(make_table(trainings, accuracies), shared=shared, cells=cells),
        }
        (folder / REPORT).unlink(missing_ok=True)
        if find_spec("jinja2") is not None:
            write_report(folder / "run", shards["train"], folder / REPORT)
        write_text(file, json.dumps(result, indent=1) + "\n")
    return result


def make_plans(folder: Path, bins: Bins, keep: float, seeds: int) -> dict[tuple[str, int], adq_wds.Plan]:
    """A plan of each kind and seed, all of one size, saved as ``plans/<kind>-<seed>.parquet``."""
    out, features = make_folder(folder / "plans"), adq_wds.Features(folder / "run" / "features")
    one_bin = find_bins(features, bins=1, progress=False)  # a random balanced draw
    plans = {}
    for kind, allocation in PLANS.items():
        options: dict[str, Any] = {"bins": one_bin if kind == "random" else bins, "allocation": allocation}
        for seed in range(seeds):
            file = out / f"{kind}-{seed}.parquet"
            plans[kind, seed] = build_plan(features, keep=keep, seed=seed, out=file, **options)
    return plans


def stream_images(urls: list[str], plan: adq_wds.Plan | None = None) -> Images:
    """The images of shards; with a plan the kept ones, through a stock WebDataset pipeline."""
    stream: Any = adq_wds.ShardDataset(urls, rank=0, world=1)
    if plan is not None:
        stream = wds.WebDataset(urls, shardshuffle=False).compose(adq_wds.Subsample(plan))  # the one line
    samples = list(Decode(to="numpy")(stream))
    pixels = np.stack([sample["image"][:, :, 0] for sample in samples])  # grey: three equal channels
    labels = np.array([sample["label"] for sample in samples], dtype=np.int64)
    return Images(pixels, labels)


def make_trainings(
    urls: list[str], plans: dict[tuple[str, int], adq_wds.Plan], seeds: int, epochs: int
) -> list[Training]:
    """Every training of every arm: on all images, on what a plan keeps of them, or on other rows in each epoch."""
    trainings, everything = [], stream_images(urls)
    for arm, (kind, fresh) in ARMS.items():
        for seed in range(seeds):
            plan = None if kind is None else plans[kind, seed]
            images = everything if plan is None or fresh else stream_images(urls, plan)
            rows = [np.arange(len(images.labels))] * epochs
            if plan is not None and fresh:
                masks = [[plan.kept_in(name, epoch) for name in plan.shards] for epoch in range(epochs)]
                rows = [np.flatnonzero(np.concatenate(mask)) for mask in masks]
            trainings.append(Training(arm, seed, images, rows))
    return trainings


def demo_text(result: dict[str, Any], out: str | os.PathLike[str]) -> str:
    """The table, its conclusion, where the files are, and what to try next."""
    folder, encoder = shlex.quote(os.fspath(out)), result["arguments"]["encoder"]
    other = "builtin" if encoder == "thumbnail" else "thumbnail"
    flags = "" if encoder == "builtin" else f" --encoder {encoder}"
    flags += "" if folder == DEFAULT_OUT else f" -o {folder}"
    report = f"{folder}/{REPORT}: what ADQ's plan keeps and why, with pictures."
    if not (Path(out) / REPORT).exists():
        report = 'For a page with pictures of it: pip install "adq-wds[report]"; run it again.'
    return f"""
{table_text(result)}

Files in {folder}: train/ and test/ (tar shards), run/ (features, bins, plan of
ADQ, seed 0), plans/ (a plan for each kind and seed), demo.json (all numbers).
{report}

Next:
  adq show {folder}/run/plan.parquet
  adq demo --keep 0.2 --seeds 20{flags}
  adq demo --encoder {other} -o adq-demo-{other}
  adq run "your-shards-{{000000..000009}}.tar" --keep 0.2 -o run/"""
