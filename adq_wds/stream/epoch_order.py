"""Maps the positions of an epoch to the places of samples, for all ranks and workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from adq_wds.core.order import (
    LANES,
    Uneven,
    in_shards,
    n_for_rank,
    n_in_step,
    on_line,
    rank_positions,
    row_order,
    shard_order,
)
from adq_wds.files import sha256_text
from adq_wds.pipes.base import OnError, Pipe
from adq_wds.reading.listing import Listing
from adq_wds.reading.places import Place, ShardPlaces, each_place
from adq_wds.remote.fetch import Fetch
from adq_wds.stream.state import State, read_state
from adq_wds.tables.codebook import Codebook
from adq_wds.tables.plan import CACHED_SHARDS, Plan


@dataclass(frozen=True)
class Recipe:
    """The options of a stream; see `ShardDataset`."""

    listing: Listing
    pipes: tuple[Pipe, ...]
    batch_size: int | None
    global_batch: int | None
    shuffle: bool
    seed: int
    fields: tuple[str, ...] | None
    collate: Callable[[list[Any]], Any]
    uneven: Uneven
    fresh: bool
    on_error: OnError
    verify: bool
    fetch: Fetch

    @property
    def drops(self) -> bool:
        """Whether a pipe may drop good samples."""
        return not all(pipe.one_to_one for pipe in self.pipes)

    @property
    def lanes(self) -> int:
        """L, the shuffle's lanes."""
        return LANES if self.shuffle else 1

    @property
    def hash(self) -> str:
        """Changes with all that the order depends on: the listing, and the plans and codebooks that pipes select by."""
        listed, drawn = self.listing.hash, _drawn_by(self.pipes)
        return sha256_text("\n".join((listed, *drawn))) if drawn else listed

    @property
    def single(self) -> bool:
        """Whether samples are given one by one, not in batches."""
        return self.batch_size is None and self.global_batch is None

    def step(self, world: int) -> int:
        """Positions that one batch of every rank takes."""
        return self.global_batch or (self.batch_size or 1) * world

    def size(self, rank: int, world: int) -> int:
        """Samples in a rank's batch; the last one may have fewer."""
        return n_in_step(self.step(world), rank=rank, world=world)

    def n_samples(self, rank: int, world: int, epoch: int, start: int = 0) -> int:
        """Samples that a rank reads of an epoch from position `start` on."""
        if self.global_batch is not None and self.global_batch < world:
            raise ValueError(
                f"global_batch={self.global_batch} leaves some of {world} ranks without a sample: take fewer ranks, or a "
                "larger batch, with which the epoch starts anew"
            )
        total = self.listing.n_total(epoch)
        return n_for_rank(
            total, start=start, rank=rank, world=world, uneven=self.uneven, step=self.global_batch
        )

    def n_batches(self, rank: int, world: int, epoch: int, start: int = 0) -> int:
        """Batches that a rank reads of an epoch from position `start` on; samples, if `single`."""
        return -(-self.n_samples(rank, world, epoch, start) // self.size(rank, world))

    def positions(
        self, k: NDArray[np.int64], n_total: int, start: int, rank: int, world: int
    ) -> NDArray[np.int64]:
        """The positions of a rank's `k`-th samples from position `start` on."""
        return rank_positions(k, n_total=n_total, start=start, rank=rank, world=world, step=self.global_batch)

    def state(self, epoch: int = 0, t: int = 0, lanes: int = 0) -> State:
        """The state of a stream that stands at `t`."""
        lanes, draws = lanes or self.lanes, self.listing.draws
        keep = None if draws is None else draws.record(epoch, begun=t > 0)
        state = (self.hash, self.seed, epoch, self.shuffle, self.fresh, lanes, self.batch_size, t)
        return State(*state, keep=keep, global_batch=self.global_batch)

    def resumed(self, saved: object, rank: int, world: int, *, ended: bool = False) -> State:
        """A saved state, checked; draws that depend on earlier epochs are restored from it.

        Raises:
            StateError: damaged, or of another stream than this one on this rank.
        """
        state = read_state(saved, replace(self.state(), rank=rank, world=world), self.listing)
        if self.listing.draws is not None and state.keep is not None:
            self.listing.draws.restore(state.keep, state.epoch, begun=ended or state.t > 0)
        return state


class Share(NamedTuple):
    """The rank and worker whose share of the epoch is read."""

    rank: int = 0
    world: int = 1
    worker: int = 0
    n_workers: int = 1


class EpochOrder:
    """The place of each position of an epoch. The order of shards is computed at once, of their rows when first needed.

    Attributes:
        n_total: T, positions in the epoch.
    """

    def __init__(self, recipe: Recipe, epoch: int, lanes: int = 0) -> None:
        self._recipe, counts = recipe, recipe.listing.counts(epoch)
        self._shards = np.arange(len(counts))
        if recipe.shuffle:
            self._shards = shard_order(len(counts), stream=recipe.listing.hash, seed=recipe.seed, epoch=epoch)
        self._ends = np.cumsum(counts[self._shards])
        self.n_total = int(counts.sum())
        self._lanes = lanes or recipe.lanes
        self.rows = lru_cache(CACHED_SHARDS)(partial(_rows, recipe, epoch))

    def places(self, t: NDArray[np.int64]) -> Iterator[Place]:
        """The place of the sample at each of some positions."""
        slot, row = in_shards(on_line(t, n_total=self.n_total, n_lanes=self._lanes), self._ends)
        by_shard = np.argsort(slot, kind="stable")
        slot, row = slot[by_shard], row[by_shard]
        starts = np.flatnonzero(np.diff(slot, prepend=-1)).tolist()
        parts = []
        for start, stop in pairwise([*starts, len(t)]):
            shard = int(self._shards[slot[start]])
            places, order = self.rows(shard)
            parts.append((shard, places, order[row[start:stop]]))
        position = np.empty(len(t), np.int64)
        position[by_shard] = np.arange(len(t))
        return each_place(parts, position, verify=self._recipe.verify)


def _drawn_by(pipes: tuple[Pipe, ...]) -> list[str]:
    """What each pipe selects by: its plan or codebook, ratio, seed and epoch.

    A pipe that drops nothing counts only if it is the first with its codebook and none selects by that.
    """
    tables = [{v.hash for v in vars(pipe).values() if isinstance(v, Plan | Codebook)} for pipe in pipes]
    known = set().union(*(own for pipe, own in zip(pipes, tables, strict=True) if not pipe.one_to_one))
    drawn = []
    for pipe, own in zip(pipes, tables, strict=True):
        settings = f"{getattr(pipe, 'keep', None)} {getattr(pipe, 'seed', None)}{_epoch_text(pipe)}"
        counted = own - known if pipe.one_to_one else own
        drawn += [f"{table} {settings}" for table in sorted(counted)]
        known |= own
    return drawn


def _epoch_text(pipe: Pipe) -> str:
    """How a pipe takes its epoch; nothing for None and for 0, which draws the same, as in states from before."""
    epoch = getattr(pipe, "epoch", None)
    if callable(epoch):
        return " function"
    return f" {epoch}" if epoch and isinstance(epoch, int | str | np.integer) else ""


def _rows(recipe: Recipe, epoch: int, shard: int) -> tuple[ShardPlaces, NDArray[np.int64]]:
    """The places of the kept samples of a shard, and their order on the line."""
    listing = recipe.listing
    places = listing.places(shard, epoch)
    if not recipe.shuffle:
        return places, np.arange(len(places.keys))
    stream, seed = listing.hash, recipe.seed
    order = row_order(places.numbers[1], shard=listing.names[shard], stream=stream, seed=seed, epoch=epoch)
    return places, order
