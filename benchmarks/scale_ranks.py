"""Plays an epoch of many ranks and workers with the package's own order, streams and states; only the bytes are not read.

Each worker's stream gives the places of its samples in place of the samples. Where all ranks stand at the same batch, the run is
killed, the state is loaded on another number of ranks, and the rest is read there.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

import adq_wds as adq
from adq_wds.reading.places import Place
from adq_wds.stream import iterator as streams
from adq_wds.stream.epoch_order import EpochOrder, Recipe
from adq_wds.stream.progress import Progress
from adq_wds.tables.plan_header import header_without_bins
from adq_wds.tables.plan_rows import PlanShard
from benchmarks.common import peak_rss_bytes
from benchmarks.resume_libraries import read_ahead
from benchmarks.scale_plan import SAMPLE_BYTES, make_features, make_spans, n_bytes_read, shard_name

HOST = "http://127.0.0.1/"  # never asked


class Unread:
    """Stands for `Stages`: the places of samples pass in place of the samples."""

    def __init__(self, recipe: Recipe, epoch: int) -> None:
        self.readers = self

    def each(self, blocks: Iterator[Iterator[Place]]) -> Iterator[Place]:
        """See `Readers.each`."""
        return chain.from_iterable(blocks)

    def run(self, places: list[Place]) -> list[Place]:
        """See `Stages.run`."""
        return places

    def close(self) -> None:
        """See `Readers.close`."""

    def finish(self, *, whole: bool) -> None:
        """See `Stages.finish`."""


@contextmanager
def nothing_read() -> Iterator[None]:
    """In this block streams give places; the order of an epoch, which is the same for all ranks, is computed once."""
    orders: dict[Any, EpochOrder] = {}

    def order(recipe: Recipe, epoch: int, lanes: int = 0) -> EpochOrder:
        known = recipe.hash, recipe.seed, epoch, lanes or recipe.lanes
        if known not in orders:
            orders[known] = EpochOrder(recipe, epoch, lanes)
            orders[known].rows = cache(orders[known].rows)
        return orders[known]

    with patch.object(streams, "Stages", Unread), patch.object(streams, "EpochOrder", order):
        yield


@dataclass(frozen=True)
class Part:
    """What was read between two changes of the layout.

    Attributes:
        ranks: of each rank its batches, each the numbers of its samples.
        states: of each rank, after them.
        workers: of each rank; batches go round.
    """

    ranks: list[list[list[int]]]
    states: list[dict[str, Any]]
    workers: int

    @property
    def steps(self) -> list[list[int]]:
        """The samples of each global step, in the order of the epoch: the first of each rank, the second of each, …"""
        n_steps = max(map(len, self.ranks))
        batches = [[rank[i] if i < len(rank) else [] for rank in self.ranks] for i in range(n_steps)]
        return [[k for row in zip_longest(*step) for k in row if k is not None] for step in batches]

    def counts(self) -> tuple[list[int], list[int]]:
        """Samples of each rank, and of each worker."""
        of_worker = [
            sum(map(len, rank[w :: self.workers])) for rank in self.ranks for w in range(self.workers)
        ]
        return [sum(map(len, rank)) for rank in self.ranks], of_worker


class Epoch:
    """An epoch of a plan that keeps all samples of its shards.

    Args:
        sizes: (S,) int64, samples of each shard; N together.
        options: of `ShardDataset`: `batch_size` or `global_batch`, and `uneven`.
    """

    def __init__(self, sizes: NDArray[np.int64], **options: Any) -> None:
        self.urls = [HOST + shard_name(i) for i in range(len(sizes))]
        self.n, self._first = int(sizes.sum()), np.cumsum(sizes) - sizes
        shards = [
            PlanShard.chosen(shard_name(i), make_spans(i, n), np.ones(n, dtype=bool))
            for i, n in enumerate(sizes.tolist())
        ]
        self.plan = adq.Plan.from_shards(shards, header_without_bins({"source": "keys"}))
        self._options = options

    def read(
        self, world: int, workers: int, state: dict[str, Any] | None = None, steps: int | None = None
    ) -> Part:
        """Some steps of all ranks from a state on; without `steps` all that are left."""
        part = Part([], [], workers)
        for rank in range(world):
            dataset = adq.ShardDataset(
                self.urls, plan=self.plan, shuffle=True, rank=rank, world=world, collate=list, **self._options
            )
            if state is not None:
                dataset.start_from(state)
            progress = Progress(dataset, partial(read_ahead, dataset, workers))
            part.ranks.append([self._numbers(batch) for batch in islice(progress, steps)])
            part.states.append(progress.state_at(progress.n_batches))
        return part

    def order(self) -> list[int]:
        """The sample at each position of the epoch."""
        dataset = adq.ShardDataset(self.urls, plan=self.plan, shuffle=True, rank=0, world=1, **self._options)
        order, positions = EpochOrder(dataset._recipe, 0), np.arange(self.n)
        blocks = (positions[i : i + 4096] for i in range(0, self.n, 4096))
        return [number for block in blocks for number in self._numbers(order.places(block))]

    def _numbers(self, places: Iterable[Place]) -> list[int]:
        """Places as numbers of samples, 0 to N - 1."""
        return [int(self._first[place.shard]) + place.byte_offset // SAMPLE_BYTES for place in places]


def play(epoch: Epoch, worlds: Sequence[int], workers: int, steps: Sequence[int]) -> dict[str, Any]:
    """Read an epoch by some numbers of ranks, one after another, and compare with the order of the epoch's positions.

    Args:
        epoch: what is read.
        worlds: ranks at first, and after each change.
        workers: of each rank.
        steps: global steps before each change.

    Returns:
        samples that were missing and repeated, whether all came in the order of positions, whether all ranks saved one
        state at each change, and the least and most samples of a rank and of a worker in each part.
    """
    start, state = time.perf_counter(), None
    read: list[int] = []
    agree, of_rank, of_worker = True, list[list[int]](), list[list[int]]()
    with nothing_read():
        for i, world in enumerate(worlds):
            part = epoch.read(world, workers, state, steps[i] if i < len(steps) else None)
            read += chain.from_iterable(part.steps)
            per_rank, per_worker = part.counts()
            of_rank.append([min(per_rank), max(per_rank)])
            of_worker.append([min(per_worker), max(per_worker)])
            state = part.states[0]
            agree = agree and (i == len(steps) or all(other == state for other in part.states))
        in_order = read == epoch.order()
    seen = np.bincount(read, minlength=epoch.n)
    return {
        "samples": epoch.n,
        "shards": len(epoch.urls),
        "ranks": list(worlds),
        "workers": workers,
        "steps_before_change": list(steps),
        "missing": int((seen == 0).sum()),
        "repeated": int(np.maximum(seen - 1, 0).sum()),
        "in_order": in_order,
        "states_agree": agree,
        "samples_of_a_rank": of_rank,
        "samples_of_a_worker": of_worker,
        "seconds": round(time.perf_counter() - start, 1),
        "peak_mib": round(peak_rss_bytes() / 2**20),
    }


def ranks_row(work: Path, worlds: Sequence[int], steps: Sequence[int], **options: Any) -> dict[str, Any]:
    """Play 1,000 shards of unequal sizes, about 1.2 million samples, with 8 workers a rank."""
    sizes = np.random.default_rng(0).integers(400, 2_001, 1_000)
    return {**options, **play(Epoch(sizes, uneven="ragged", **options), worlds, 8, steps)}


def order_row(work: Path) -> dict[str, Any]:
    """What a worker pays for the rows of each shard that it reads a sample of: 40 shards of 10,000, a tenth kept."""
    n, n_shards, folder = 400_000, 40, work / "order"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        make_features(folder / "features", n, per_class=1_000)
        adq.build_plan(folder / "features", keep=0.1, out=folder / "plan" / "plan.parquet", progress=False)
        dataset = adq.ShardDataset(
            [HOST + shard_name(i) for i in range(n_shards)], plan=folder / "plan" / "plan.parquet",
            batch_size=1, shuffle=True, rank=0, world=1,
        )  # fmt: skip
        order = EpochOrder(dataset._recipe, 0)
        began, processor, before = time.perf_counter(), time.process_time(), n_bytes_read()
        kept = sum(len(order.rows(shard)[1]) for shard in range(n_shards))
        return {
            "samples": n,
            "shards": n_shards,
            "kept": kept,
            "seconds_a_shard": round((time.perf_counter() - began) / n_shards, 5),
            "processor_seconds_a_shard": round((time.process_time() - processor) / n_shards, 5),
            "bytes_a_shard": (n_bytes_read() - before) // n_shards,
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)
