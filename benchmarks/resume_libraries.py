"""Opens the ranks of each library for `benchmarks.resume`: a layout and a saved state in, batches of sample numbers out.

Each library is used as its documents say: what they call deterministic or elastic is switched on, what they ask to be kept
(lancedb's splits) is kept, and states of all ranks are merged where they ask for it. Ranks are played in this process.
"""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data._utils import worker as torch_worker

import adq_wds as adq
from adq_wds.stream.clock import Start
from adq_wds.stream.progress import Progress

READ_AHEAD = 2  # batches of each worker
SPLITS = 24  # of lancedb: divides among 1, 2, 3, 4, 6 and 8 ranks

Batches = Iterator[list[int]]


@dataclass(frozen=True)
class Layout:
    """What a change may change."""

    world: int
    workers: int
    batch: int  # of a rank; of all ranks together, where the library has that


@dataclass
class Opened:
    """All ranks of one run, from a state on."""

    ranks: list[Batches]
    save: Callable[[], Any]  # the state after the batches read
    close: Callable[[], None] = lambda: None
    over: Callable[[Any], bool] = lambda state: False  # whether a state is the next epoch's


Open = Callable[[Layout, Any, int], Opened]  # a layout, a state or None, the epoch


def numbers(samples: list[Any]) -> list[int]:
    """A batch of ours as numbers of samples."""
    return [int(key) for (key,) in samples]


def write_tars(folder: Path, n: int) -> tuple[list[str], adq.Plan]:
    """Three shards of n samples and, for every tenth, one that the plan leaves out."""
    import io
    import tarfile

    urls, kept = [], []
    for shard, part in enumerate(np.array_split(np.arange(n), 3)):
        path = folder / f"t-{shard}.tar"
        with tarfile.open(path, "w") as tar:
            for key in [f"{i:05d}" for i in part] + [f"x{i:05d}" for i in part[::10]]:
                member = tarfile.TarInfo(f"{key}.txt")
                member.size = len(key)
                tar.addfile(member, io.BytesIO(key.encode()))
                kept += [] if key[0] == "x" else [(path.name, key)]
        urls.append(str(path))
    adq.Plan.from_keys(urls, kept).save(folder / "plan.parquet")
    plan = adq.load_plan(folder / "plan.parquet")
    for name in plan.shards:
        plan.shard(name)  # read once, for all ranks of all runs
    return urls, plan


@contextmanager
def as_worker(worker: int, n_workers: int) -> Iterator[None]:
    """Let this process be taken for a DataLoader's worker."""
    before = torch_worker._worker_info
    torch_worker._worker_info = torch_worker.WorkerInfo(
        id=worker,
        num_workers=n_workers,
        seed=worker,
        dataset=None,  # type: ignore[arg-type]
    )
    try:
        yield
    finally:
        torch_worker._worker_info = before


def read_ahead(dataset: adq.ShardDataset, n_workers: int) -> Iterator[Any]:
    """What `adq.Loader`'s workers would give it, each some batches ahead."""
    streams = []
    for worker in range(n_workers):
        with as_worker(worker, n_workers):
            streams.append((deque[Any](), iter(dataset)))

    def merged() -> Iterator[Any]:
        while True:
            for queue, stream in streams:
                while len(queue) < READ_AHEAD and (item := next(stream, None)) is not None:
                    queue.append(item)
            for queue, _ in streams:
                if not queue:
                    return  # batches go round, so the first worker without one is past the last
                yield queue.popleft()

    return merged()


def adq_ranks(n: int, folder: Path, *, together: bool, processes: bool = False) -> Open:
    """Ours, by `batch_size` or by `global_batch`; workers are played, or are processes of an `adq.Loader`."""
    urls, plan = write_tars(folder, n)

    @functools.cache
    def made(rank: int, world: int, batch: int) -> adq.ShardDataset:
        size: dict[str, Any] = {"global_batch" if together else "batch_size": batch}
        return adq.ShardDataset(
            urls, plan=plan, shuffle=True, seed=7, uneven="ragged", rank=rank, world=world,
            fields=("__key__",), collate=list, **size,
        )  # fmt: skip

    def open_(layout: Layout, state: Any, epoch: int) -> Opened:
        progresses, loaders = [], []
        for rank in range(layout.world):
            dataset = made(rank, layout.world, layout.batch)
            dataset.start_from(dataset.state_at(Start(epoch), 0) if state is None else state)
            if dataset.epoch != epoch:  # the state was saved at the epoch's end
                return Opened([iter(())], lambda: state)
            if processes:
                loaders.append(adq.Loader(dataset, num_workers=layout.workers))
            else:
                read = (
                    partial(read_ahead, dataset, layout.workers)
                    if layout.workers
                    else partial(tagged, dataset)
                )
                progresses.append(Progress(dataset, read))
        if processes:
            return Opened([map(numbers, loader) for loader in loaders], loaders[0].state_dict)
        first = progresses[0]
        return Opened([map(numbers, each) for each in progresses], lambda: first.state_at(first.n_batches))

    return open_


def tagged(dataset: adq.ShardDataset) -> Iterator[Any]:
    """Its items, without workers."""
    return iter(dataset)


def litdata_ranks(n: int, folder: Path, *, processes: bool = False) -> Open:
    """litdata's StreamingDataset and StreamingDataLoader; state version 2, elastic. Rank 0's state is for all."""
    import litdata

    target = str(folder / "litdata")
    litdata.optimize(
        fn=as_number, inputs=list(range(n)), output_dir=target, chunk_size=-(-n // 3), num_workers=1,
        start_method="fork", verbose=False,
    )  # fmt: skip

    def open_(layout: Layout, state: Any, epoch: int) -> Opened:
        loaders = []
        for rank in range(layout.world):
            os.environ.update(WORLD_SIZE=str(layout.world), GLOBAL_RANK=str(rank))
            dataset = litdata.StreamingDataset(target, shuffle=True, drop_last=False, seed=7 + epoch)
            workers = layout.workers if processes else 0
            loader = litdata.StreamingDataLoader(dataset, batch_size=layout.batch, num_workers=workers)
            if state is not None:
                loader.load_state_dict(_copied(state))
            loaders.append(loader)

        def batches(rank: int) -> Batches:
            os.environ.update(WORLD_SIZE=str(layout.world), GLOBAL_RANK=str(rank))
            for batch in loaders[rank]:
                yield batch["i"].tolist()

        def save() -> Any:
            os.environ.update(WORLD_SIZE=str(layout.world), GLOBAL_RANK="0")
            return _copied(loaders[0].state_dict())

        def over(state: Any) -> bool:
            """As its load_state_dict takes it: with these, the next iteration is the next epoch's."""
            yielded, epoch = state["num_samples_yielded"], state["dataset"]["current_epoch"]
            return bool(epoch > 1 or yielded >= len(loaders[0].dataset))

        return Opened([batches(rank) for rank in range(layout.world)], save, over=over)

    return open_


def as_number(i: int) -> dict[str, int]:
    """A sample of a peer."""
    return {"i": i}


def mosaic_ranks(n: int, folder: Path) -> Open:
    """mosaicml-streaming: its planner and shuffle, for all ranks and workers, with the sum that its StreamingDataLoader
    saves. (Ranks of its StreamingDataset wait for each other, so they cannot be played in one process.)"""
    import streaming
    from streaming.base.batching import generate_work
    from streaming.base.world import World

    target = str(folder / "mosaic")
    with streaming.MDSWriter(out=target, columns={"i": "int"}, size_limit=n * 8) as out:
        for i in range(n):
            out.write({"i": i})
    dataset = streaming.StreamingDataset(
        local=target, shuffle=True, shuffle_seed=7, batch_size=1, num_canonical_nodes=1
    )
    dataset._set_shuffle_block_size(World(1, 1, 1, 0))

    def open_(layout: Layout, state: Any, epoch: int) -> Opened:
        dataset.batch_size = layout.batch
        offset = 0 if state is None else state["sample_in_epoch"]
        n_workers = max(1, layout.workers)
        world = World(num_nodes=1, ranks_per_node=layout.world, workers_per_rank=n_workers, worker=0)
        work = generate_work("random", dataset, world, epoch, offset)[0]  # (W, workers, batches, B)
        given = [0] * layout.world

        def batches(rank: int) -> Batches:
            for b in range(work.shape[2]):
                for worker in range(n_workers):
                    batch = [int(i) for i in work[rank, worker, b] if i >= 0]
                    if batch:
                        given[rank] += len(batch)
                        yield batch

        save = lambda: {"sample_in_epoch": offset + given[0] * layout.world}  # noqa: E731
        return Opened([batches(rank) for rank in range(layout.world)], save)

    return open_


def lancedb_ranks(n: int, folder: Path) -> Open:
    """lancedb's StreamingDataset, 24 splits, in its StreamingDataLoader; states of all ranks merged."""
    import lancedb
    from lancedb.streaming import StreamingDataLoader, StreamingDataset

    table = lancedb.connect(str(folder / "lance")).create_table("t", [{"i": i} for i in range(n)])

    def open_(layout: Layout, state: Any, epoch: int) -> Opened:
        datasets, ranks = [], []
        for rank in range(layout.world):
            dataset = StreamingDataset(
                table, num_splits=SPLITS, shuffle_seed=7, epoch=epoch, rank=rank, world_size=layout.world,
                transform_parallelism=1, io_queue_depth=1,
            )  # fmt: skip
            if state is not None:
                dataset.load_state_dict(state)
            datasets.append(dataset)
            if layout.batch % layout.world:
                raise ValueError("batch of all ranks does not divide")
            ranks.append(iter(StreamingDataLoader(dataset, batch_size=layout.batch // layout.world)))
        return Opened(
            [(batch["i"].tolist() for batch in each) for each in ranks],
            lambda: StreamingDataset.merge_state_dicts([dataset.state_dict() for dataset in datasets]),
            lambda: deque((each._shutdown_workers() for each in ranks), 0).clear(),
        )

    return open_


def torchdata_ranks(n: int, folder: Path, *, processes: bool = False) -> Open:
    """torchdata's StatefulDataLoader with its StatefulDistributedSampler; each rank loads its own state, or that of another where
    there were fewer ranks."""
    from torchdata.stateful_dataloader import StatefulDataLoader
    from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

    def open_(layout: Layout, state: Any, epoch: int) -> Opened:
        loaders = []
        for rank in range(layout.world):
            sampler = StatefulDistributedSampler(range(n), layout.world, rank, shuffle=True, seed=7)
            sampler.set_epoch(epoch)
            workers = layout.workers if processes else 0
            loader = StatefulDataLoader(
                range(n), batch_size=layout.batch, sampler=sampler, num_workers=workers, collate_fn=list
            )
            if state is not None:
                loader.load_state_dict(_copied(state[rank % len(state)]))
            loaders.append(loader)
        return Opened(
            [iter(loader) for loader in loaders], lambda: [_copied(loader.state_dict()) for loader in loaders]
        )

    return open_


def _copied(state: Any) -> Any:
    """As it is after a file."""
    import pickle

    return pickle.loads(pickle.dumps(state))  # noqa: S301 - our own bytes


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder for a library's files."""
    folder = Path(tempfile.mkdtemp(prefix="resume-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
