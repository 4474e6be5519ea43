"""Makes the plans that trainings follow, and says which rows of the images each keeps."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray

import adq_wds as adq
from adq_wds.core.rng import draw
from adq_wds.errors import AdqError
from adq_wds.files import canonical_json, sha256_text
from adq_wds.models.builtin import SmallNet, normalised, resized
from adq_wds.protocols import Encoder
from adq_wds.reading.schedule import Schedule, StreamDraws
from adq_wds.tables.features import Features
from adq_wds.tables.plan import Plan
from benchmarks.arms import ARMS, Arm, keep_in

CACHED_PLANS = 16
RANDOM_WEIGHTS = "random-weights"
OF_PLAN = set(inspect.signature(adq.build_plan).parameters)
OF_EMBEDDING = set(inspect.signature(adq.embed_shards).parameters) - OF_PLAN - {"urls", "encoder"}


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
        Task(arm, ARMS[arm].encoder or encoder, ARMS[arm].keep or keep, seed)
        for seed in seeds
        for keep in sorted(keeps, reverse=True)  # the longest first, so that no core waits for the last
        for arm in arms
        for encoder in encoders
    ]
    return list(dict.fromkeys(found))


class Plans:
    """The plans of some shards, made by the package: embedded once into a folder, planned for each seed."""

    def __init__(self, shards: Sequence[Path], work: Path) -> None:
        self.shards, self._work = shards, work
        self._features: dict[str, Features] = {}
        self._plans: dict[Hashable, Plan] = {}
        self._lock = threading.Lock()

    def features(self, task: Task) -> Features:
        """What an arm's plans are made from, embedded where it is not there yet."""
        options = {k: v for k, v in ARMS[task.arm].options.items() if k in OF_EMBEDDING}
        name = "--".join([task.encoder, *(f"{k}={v}" for k, v in sorted(options.items()))])
        if name not in self._features:
            out = self._work / name.replace("/", "--").replace(":", "--")
            encoder = random_weights() if task.encoder == RANDOM_WEIGHTS else task.encoder
            self._features[name] = adq.embed_shards(self.shards, encoder, out, progress=False, **options)
        return self._features[name]

    def plan(self, task: Task) -> Plan:
        """The plan that a training follows; arms that differ in fresh draws alone share it."""
        arm = ARMS[task.arm]
        options = {k: v for k, v in arm.options.items() if k in OF_PLAN}
        key = (arm.k_centre, frozenset(options.items()), replace(task, arm=""))
        with self._lock:
            if key not in self._plans:
                while len(self._plans) >= CACHED_PLANS:
                    del self._plans[next(iter(self._plans))]
                self._plans[key] = self._k_centre(task) if arm.k_centre else self._planned(task, options)
            return self._plans[key]

    def _planned(self, task: Task, options: dict[str, Any]) -> Plan:
        return adq.build_plan(self.features(task), keep=task.keep, seed=task.seed, progress=False, **options)

    def _k_centre(self, task: Task) -> Plan:
        files = list(self.features(task))
        rows = np.concatenate([file.embedding() for file in files]).astype(np.float32)
        ids = [(file.shard, key) for file in files for key in file.spans().keys]
        first = draw(task.seed, 0, "", "", purpose="k-centre") % len(rows)
        chosen = k_centre(rows, round(task.keep * len(rows)), first)
        return Plan.from_keys([str(path) for path in self.shards], [ids[i] for i in chosen])


def random_weights() -> Encoder:
    """The network of `builtin-free` with weights by chance, always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        network = SmallNet().eval()

    def embedded(images: Sequence[PIL.Image.Image]) -> torch.Tensor:
        with torch.inference_mode():
            h: torch.Tensor = network(normalised(resized(images)))[0]
        return h

    return adq.encoder(embedded, name=RANDOM_WEIGHTS)


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


def rows_of(
    plan: Plan, keys: dict[str, list[str]], *, fresh: bool, draws: StreamDraws | None = None
) -> Callable[[int], NDArray[np.int64]]:
    """Epoch → the rows that a plan keeps of images in the order of `keys`, by shard; with `draws`, their own.

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
        if draws is not None:
            draws.begin(epoch)
        return np.flatnonzero(np.concatenate([plan.kept_in(name, epoch, draws) for name in plan.shards]))

    return rows


def draws_of(arm: Arm, plan: Plan, shards: Sequence[Path], keep: float, epochs: int) -> StreamDraws | None:
    """What an arm draws in place of its plan's fresh draws, if anything."""
    if arm.schedule is not None:
        schedule = arm.schedule
        return Schedule(plan, lambda epoch: keep_in(epoch, epochs, keep, schedule))
    if arm.rates:
        rates = adq.ClassRates(plan)
        adq.ShardDataset(
            shards, plan=plan, fresh=True, keep=rates
        )  # rates are a data set's, though none is read
        return rates
    return None


def every_row(n: int) -> Callable[[int], NDArray[np.int64]]:
    """Epoch → all of n rows."""
    return lambda epoch: np.arange(n)


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
