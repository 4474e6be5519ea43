"""What does each arm of the demo train on? Its plans, the images a WebDataset pipeline gives, the rows of each epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import webdataset as wds
from numpy.typing import NDArray
from tqdm import tqdm

from adq_wds.demo.net import Images
from adq_wds.errors import AdqError, shorten
from adq_wds.files import make_folder
from adq_wds.pipes.decode import Decode
from adq_wds.pipes.subsample import Subsample
from adq_wds.planning.build_plan import build_plan, find_bins
from adq_wds.tables.bins import Bins
from adq_wds.tables.features import Features
from adq_wds.tables.plan import Plan


@dataclass(frozen=True)
class Arm:
    """One way to choose images.

    Attributes:
        name: as the table has it.
        plan: kind of plan, a key of `PLANS`; None for all images.
        fresh: does every epoch draw anew?
    """

    name: str
    plan: str | None
    fresh: bool = False


PLANS: dict[str, dict[str, Any]] = {
    "random": {"allocation": "uniform"},  # with one bin a class: a random balanced draw
    "dq": {"allocation": "uniform"},
    "adq": {},
}
ARMS = (
    Arm("full", None),
    Arm("random", "random"),
    Arm("DQ", "dq"),
    Arm("ADQ", "adq"),
    Arm("fresh random", "random", fresh=True),
    Arm("fresh ADQ", "adq", fresh=True),
)


@dataclass(frozen=True)
class Training:
    """One training to be done.

    Attributes:
        arm: name of its arm.
        seed: of the plan, of first weights and of order.
        images: those that the rows stand for.
        epochs: rows of `images`, (n,) int64 for each epoch.
    """

    arm: str
    seed: int
    images: Images
    epochs: Sequence[NDArray[np.int64]]

    @property
    def n_seen(self) -> int:
        """How many images it is trained on, epoch by epoch."""
        return sum(map(len, self.epochs))

    @property
    def n_different(self) -> int:
        """How many different images it sees."""
        return len(np.unique(np.concatenate(self.epochs)))


def make_plans(
    features: Features, bins: Bins, folder: Path, *, keep: float, seeds: int
) -> dict[tuple[str, int], Plan]:
    """A plan of each kind and seed, all of one size, saved as ``folder/<kind>-<seed>.parquet``."""
    make_folder(folder)
    one_bin = find_bins(features, bins=1, progress=False)
    plans = {}
    for kind, options in PLANS.items():
        for seed in range(seeds):
            chosen = one_bin if kind == "random" else bins
            out = folder / f"{kind}-{seed}.parquet"
            plans[kind, seed] = build_plan(features, bins=chosen, keep=keep, seed=seed, out=out, **options)
    return plans


def stream_images(urls: list[str], plan: Plan | None = None) -> tuple[list[str], Images]:
    """Keys and images of shards, read through a stock WebDataset pipeline; with a plan, the kept ones."""
    dataset = wds.WebDataset(urls, shardshuffle=False)
    if plan is not None:
        dataset = dataset.compose(Subsample(plan))  # the one line
    samples = list(dataset.compose(Decode(to="numpy")))
    pixels = np.stack([sample["image"][:, :, 0] for sample in samples])  # grey: three equal channels
    labels = np.array([sample["label"] for sample in samples], dtype=np.int64)
    return [sample["__key__"] for sample in samples], Images(pixels, labels)


def stream_kept(
    urls: list[str], plans: dict[tuple[str, int], Plan], *, progress: bool | None
) -> dict[tuple[str, int], Images]:
    """What each plan keeps, streamed; the keys are compared with the plan's.

    Raises:
        AdqError: a stream differs from its plan.
    """
    quiet = None if progress is None else not progress
    kept = {}
    for (kind, seed), plan in tqdm(plans.items(), desc="stream", unit=" plans", disable=quiet):
        found, kept[kind, seed] = stream_images(urls, plan)
        if found != plan.keys():
            odd = shorten(sorted(set(found) ^ set(plan.keys()))[:3])
            counts = f"{len(found)} samples streamed, the plan keeps {len(plan)}"
            raise AdqError(f"plan {kind}-{seed}: {counts}; first differences {odd}")
    return kept


def make_trainings(
    everything: Images,
    kept: dict[tuple[str, int], Images],
    plans: dict[tuple[str, int], Plan],
    *,
    seeds: int,
    epochs: int,
) -> list[Training]:
    """Every training of every arm, arm by arm: `everything` in the plans' order, and `kept` of each plan."""
    trainings = []
    for arm in ARMS:
        for seed in range(seeds):
            if arm.plan is None:
                images, rows = everything, [np.arange(len(everything.labels))] * epochs
            elif arm.fresh:
                plan = plans[arm.plan, seed]
                images, rows = everything, [fresh_rows(plan, epoch) for epoch in range(epochs)]
            else:
                images = kept[arm.plan, seed]
                rows = [np.arange(len(images.labels))] * epochs
            trainings.append(Training(arm.name, seed, images, rows))
    return trainings


def fresh_rows(plan: Plan, epoch: int) -> NDArray[np.int64]:
    """Rows (n,), among all samples in the plan's order, that this epoch keeps."""
    return np.flatnonzero(np.concatenate([plan.kept_in(name, epoch) for name in plan.shards]))
