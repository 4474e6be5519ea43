"""What does all this look like at work? Shards, the main job, plans, streams, trainings and a table, in two minutes."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import shlex
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adq_wds.checks import Count, Ratio, positive
from adq_wds.demo.arms import make_plans, make_trainings, stream_images, stream_kept
from adq_wds.demo.digits import DigitShards, load_digits, write_digits
from adq_wds.demo.net import Images
from adq_wds.demo.table import findings, table_rows, table_text
from adq_wds.demo.train import train_all
from adq_wds.errors import AdqError
from adq_wds.files import lock, make_folder, write_text
from adq_wds.jobs.run import check_plan_options, run_job
from adq_wds.tables.bins import Bins
from adq_wds.tables.features import Features
from adq_wds.tables.plan import Plan

VERSION = 1
BINS = 10
DEFAULT_OUT = "adq-demo"
_PACKAGES = ("adq-wds", "numpy", "pillow", "scikit-learn", "torch", "webdataset")
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

    ``OUT/train/`` and ``OUT/test/`` hold the shards, ``OUT/run/`` what `adq run` makes of them, ``OUT/plans/`` a plan
    for each kind and seed, ``OUT/demo.json`` the result. Run again, it reuses shards, features and every training
    that was done before with equal images, rows and seed; a run that was interrupted goes on.

    Args:
        out: the demo's folder, new or of an earlier demo.
        keep: ratio of images kept, in (0, 1].
        seeds: trainings for each arm; each seed is that of the plan, of first weights and of order.
        epochs: epochs of each training.
        encoder: builtin, builtin-free, thumbnail, or any timm name.
        progress: show bars; only on a terminal by default.

    Returns:
        what ``demo.json`` holds, without its store of trainings.

    Raises:
        ValueError: an argument is out of range.
        AdqError: scikit-learn is missing, or the folder holds something else.
    """
    check_plan_options(_plan_options(keep))
    positive("seeds", seeds)
    positive("epochs", epochs)
    load_digits()  # says what is missing before anything is written
    folder = make_folder(out)
    with lock(folder):
        store = _Store(folder)
        shards = _digits(folder, keep)
        _, everything = stream_images(shards.train)
        features, bins, neighbours = _main_job(shards, everything, folder / "run", keep, encoder, progress)
        n_kept = round(keep * shards.n_train)
        _say(3, f"plans: random, DQ and ADQ, {seeds} of each, {n_kept:,} images in every one")
        plans = make_plans(features, bins, folder / "plans", keep=keep, seeds=seeds)
        _say(4, f"streams: {len(plans)} WebDataset pipelines with .compose(adq.Subsample(plan))")
        kept = stream_kept(shards.train, plans, progress=progress)
        logger.info("    in all of them the keys are those of plan.keys()")
        trainings = make_trainings(everything, kept, plans, seeds=seeds, epochs=epochs)
        _say(5, f"trainings: {len(trainings)} of a small network, {epochs} epochs each")
        _, test = stream_images(shards.test)
        accuracies = train_all(trainings, test, store.trainings, store.save, progress=progress)
        rows = table_rows(trainings, accuracies)
        result = {
            "arguments": {"keep": keep, "seeds": seeds, "epochs": epochs, "encoder": encoder},
            "versions": _versions(),
            "images": {"train": shards.n_train, "test": shards.n_test},
            "neighbours": neighbours,
            **findings(rows, shared=_shared(plans, seeds), cells=len(bins.classes) * bins.n_bins),
        }
        store.save(result)
    return result


def demo_text(result: dict[str, Any], out: str | os.PathLike[str]) -> str:
    """The table, what it says, where the files are, and what to try next."""
    folder = shlex.quote(os.fspath(out))
    other = "builtin" if result["arguments"]["encoder"] == "thumbnail" else "thumbnail"
    out_flag = "" if folder == DEFAULT_OUT else f" -o {folder}"
    if result["arguments"]["encoder"] != "builtin":
        out_flag = f" --encoder {result['arguments']['encoder']}{out_flag}"
    return f"""
{table_text(result)}

Files in {folder}: train/ and test/ (tar shards), run/ (features, bins, plan of
ADQ, seed 0), plans/ (a plan for each kind and seed), demo.json (all numbers).

Next:
  adq show {folder}/run/plan.parquet
  adq demo --keep 0.2 --seeds 20{out_flag}
  adq demo --encoder {other} -o adq-demo-{other}
  adq run "your-shards-{{000000..000009}}.tar" --keep 0.2 -o run/"""


def _plan_options(keep: float) -> dict[str, Any]:
    return {"bins": BINS, "keep": keep, "seed": 0}


def _digits(folder: Path, keep: float) -> DigitShards:
    shards = write_digits(folder)
    if not round(keep * shards.n_train):
        raise ValueError(f"keep={keep} keeps none of {shards.n_train:,} images; give a larger one")
    counts = f"{shards.n_train:,} to train, {shards.n_test:,} to test"
    _say(1, f"images: scikit-learn's digits, 8 × 8, grey; {counts}")
    return shards


def _main_job(
    shards: DigitShards, everything: Images, folder: Path, keep: float, encoder: str, progress: bool | None
) -> tuple[Features, Bins, dict[str, float]]:
    """`adq run`; its features and bins, and how often the nearest neighbour is of the same class."""
    data, out = (shlex.quote(str(path)) for path in (folder.parent / "train", folder))
    _say(2, f"main job, as by\n    adq run {data} --encoder {encoder} --keep {keep:g} -o {out}")
    options = _plan_options(keep)
    run_job(shards.train, folder, encoder={"spec": encoder}, embed={}, plan=options, progress=progress)
    features = Features(folder / "features")
    embedding = np.concatenate([part.embedding() for part in features]).astype(np.float32)
    pixels = everything.pixels.reshape(len(everything.labels), -1).astype(np.float32)
    by_embedding, by_pixels = (_same_class(rows, everything.labels) for rows in (embedding, pixels))
    said = f"{encoder} {100 * by_embedding:.1f} %, the bare pixels {100 * by_pixels:.1f} %"
    logger.info("    nearest image of the same class: %s", said)
    if by_embedding < by_pixels:
        logger.info("    so thumbnail, which takes the pixels, may bin these images better: try it too")
    return features, Bins.load(folder / "bins.parquet"), {"embedding": by_embedding, "pixels": by_pixels}


def _same_class(rows: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """Share of the N rows whose nearest other row, by cosine, has the same label."""
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -2)
    return float((labels[similarity.argmax(1)] == labels).mean())


def _shared(plans: dict[tuple[str, int], Plan], seeds: int) -> float:
    """Share of ADQ's images that DQ of the same seed keeps too."""
    both = [set(plans["adq", s].keys()) & set(plans["dq", s].keys()) for s in range(seeds)]
    return sum(map(len, both)) / sum(len(plans["adq", s]) for s in range(seeds))


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):  # installed under another name
            found[name] = version(name)
    return found


def _say(step: int, text: str) -> None:
    logger.info("%d/5 %s", step, text)


class _Store:
    """``demo.json``: the last result, and the accuracy of every training so far by its id.

    Raises:
        AdqError: the folder is not empty and holds no demo.json, or one that is not ours.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "demo.json"
        self._whole: dict[str, Any] = {"format": "adq_wds.demo", "version": VERSION, "trainings": {}}
        if self._path.exists():
            self._whole = self._read()
        elif any(not path.name.startswith(".") for path in folder.iterdir()):
            raise AdqError(f"{folder} is not empty and holds no demo.json: give another folder with -o")
        self.trainings: dict[str, float] = self._whole["trainings"]
        self.save()  # from here on the folder is the demo's

    def _read(self) -> dict[str, Any]:
        try:
            whole = json.loads(self._path.read_text(encoding="utf-8"))
            known = whole["trainings"].values()
            if whole["format"] != "adq_wds.demo" or whole["version"] != VERSION:
                raise ValueError(f"format {whole['format']!r}, version {whole['version']!r}")
            if not all(isinstance(accuracy, float) and 0 <= accuracy <= 1 for accuracy in known):
                raise ValueError("an accuracy is out of range")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            text = f"{self._path}: not a demo.json of this adq_wds ({error}); give another folder with -o"
            raise AdqError(text) from error
        return dict(whole)

    def save(self, result: dict[str, Any] | None = None) -> None:
        """Write what is known, and the result where there is one."""
        self._whole |= result or {}
        write_text(self._path, json.dumps(self._whole, indent=1) + "\n")
