"""Numbers what a plan keeps of some shards, cuts it into new shards beforehand, and reads any part of it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from adq_wds.engines.engine import Task
from adq_wds.remote.cache import Cache
from adq_wds.remote.url_path import AnyPath
from adq_wds.samples.fields import Sample
from adq_wds.shards.names import is_url
from adq_wds.stream.as_map import MapView
from adq_wds.stream.dataset import ShardDataset
from adq_wds.tables.plan import Plan, load_plan
from adq_wds.tables.spans import Spans
from adq_wds.writing.smaller import CELL_FIELD
from adq_wds.writing.tars import Cut, ShardPattern, stored

_READ = 256  # samples asked for at one time


@dataclass(frozen=True)
class Run:
    """Kept samples that follow each other, of one new shard.

    Attributes:
        path: the new shard.
        first, stop: numbers of the samples.
        payload_bytes: bytes of their members.
    """

    path: str
    first: int
    stop: int
    payload_bytes: int = 0


@dataclass(frozen=True)
class Kept:
    """The samples that a plan keeps of some shards, numbered in the plan's order.

    It pickles as paths, and opens in each process what that process reads.
    """

    paths: tuple[str, ...]
    plan: Plan
    root: str | None = None
    cache: Cache | str | os.PathLike[str] | None = None

    @cached_property
    def _view(self) -> MapView:
        options = {"root": self.root, "cache": self.cache}
        return ShardDataset(self.paths, plan=self.plan, rank=0, world=1, **options).as_map()  # type: ignore[arg-type]

    def check(self) -> None:
        """Raise, as `ShardDataset` does, unless the shards are those of the plan."""
        assert self._view is not None

    def samples(self, first: int, stop: int) -> Iterator[Sample]:
        """Samples by number."""
        for i in range(first, stop, _READ):
            yield from self._view.__getitems__(range(i, min(i + _READ, stop)))

    def with_cells(self, samples: Iterable[Sample], first: int, stop: int) -> Iterator[Sample]:
        """The samples of these numbers, each with the bytes that it takes in its source."""
        for sample, n_bytes in zip(samples, self._cells(first, stop), strict=True):
            yield {**sample, CELL_FIELD: n_bytes}

    def _cells(self, first: int, stop: int) -> Iterator[int]:
        names, kept = self.plan.shards, self.plan.shard_kept
        ends = np.cumsum(kept)
        begin, last = np.searchsorted(ends, [first, stop - 1], side="right").tolist()
        for i in range(begin, last + 1):
            shard, start = self.plan.shard(names[i], hold=False), int(ends[i] - kept[i])
            yield from shard.spans.n_bytes[shard.kept][max(first - start, 0) : stop - start].tolist()

    def spans(self) -> Iterator[tuple[str, Spans]]:
        """Each shard's name and the spans of its kept samples."""
        for name in self.plan.shards:
            shard = self.plan.shard(name, hold=False)
            yield name, shard.spans.take(np.flatnonzero(shard.kept))

    def on_disk(self, plan: AnyPath) -> Kept:
        """The same with absolute paths and the plan in a file, which is written unless it is there."""
        if not plan.exists():
            self.plan.save(plan)
        paths = (path if is_url(path) else os.path.abspath(path) for path in self.paths)
        return replace(self, paths=tuple(paths), plan=load_plan(plan))


def runs_of(kept: Kept, pattern: ShardPattern, *, max_samples: int, max_bytes: int) -> list[Task]:
    """The new shards of all kept samples, cut as `write_tars` cuts them, a task with a `Run` each.

    Payloads are as long as the plan's column `members` says; a sample without is read for it.
    """
    cut = Cut(max_samples, max_bytes)
    tasks: list[Task] = []
    first = number = total = 0

    def end() -> None:
        path = pattern.path(len(tasks))
        tasks.append(Task(path.name, Run(os.fspath(path.absolute()), first, number, total)))

    for _, spans in kept.spans():
        texts = [""] * len(spans) if spans.members is None else spans.members.to_pylist()
        for key, text in zip(spans.keys, texts, strict=True):
            n_bytes = _payload_bytes(text)
            if n_bytes is None:
                (sample,) = kept.samples(number, number + 1)
                n_bytes = sum(len(data) for _, data in stored(sample)[1])
            if cut.before(key, n_bytes):
                end()
                first, total = number, 0
            number, total = number + 1, total + n_bytes
    if number:
        end()
    return tasks


def _payload_bytes(members: str) -> int | None:
    """Bytes of the fields in a text of the column `members` that `write_tars` stores; None where it does not say.

    >>> _payload_bytes("jpg/__adq_x/cls/2345/7/1/3735928559")
    2346
    """
    parts = members.split("/")
    n = len(parts) // 2
    try:
        sizes = [int(size) for field, size in zip(parts[:n], parts[n:-1], strict=True) if field[:2] != "__"]
    except ValueError:
        return None
    return sum(sizes) if sizes else None
