"""Sets of small tar shards and plans over them, and workers played in one process."""

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from torch.utils.data import DataLoader
from torch.utils.data._utils import worker as torch_worker
from torchdata.stateful_dataloader import StatefulDataLoader

import adq_wds as adq
from tests.conftest import write_tar

Options = dict[str, Any]
Names = list[tuple[str, str]]


@dataclass(frozen=True)
class TarSet:
    """Shards and a plan of some of their samples.

    Attributes:
        urls: the shards, sorted.
        plan: the plan's file.
        kept: (shard name, key) of the kept samples, in the plan's order.
        bytes: (shard name, key) → the fields of every sample.
    """

    urls: list[str]
    plan: str
    kept: Names
    bytes: dict[tuple[str, str], dict[str, bytes]]


def write_set(folder: Path, sizes: list[int], keep: Callable[[int], bool] = lambda i: i % 3 != 1) -> TarSet:
    """A shard per size; sample i of all, named `k<i>`, holds its own name and number, and is kept if `keep(i)`."""
    folder.mkdir(parents=True, exist_ok=True)
    urls, kept, every, first = [], [], {}, 0
    for number, size in enumerate(sizes):
        path, members = folder / f"t-{number:03d}.tar", []
        for i in range(first, first + size):
            key = f"k{i:05d}"
            fields = {"txt": f"text of {key} ".encode() * (1 + i % 90), "cls": str(i % 10).encode()}
            members += [(f"{key}.{name}", data) for name, data in fields.items()]
            every[path.name, key] = fields
            if keep(i):
                kept.append((path.name, key))
        first += size
        urls.append(str(write_tar(path, members)))
    adq.Plan.from_keys(urls, kept).save(folder / "plan.parquet")
    return TarSet(urls, str(folder / "plan.parquet"), kept, every)


def change_a_byte(url: str) -> None:
    """In the first payload."""
    data = bytearray(Path(url).read_bytes())
    data[512] ^= 1
    Path(url).write_bytes(data)


@pytest.fixture(scope="session")
def tar_sets(tmp_path_factory: pytest.TempPathFactory) -> dict[int, TarSet]:
    """Sets of 1, 7 and 24 shards, of unequal sizes, one of them empty-handed."""
    sizes = {1: [47], 7: [9, 1, 14, 3, 2, 8, 5], 24: [1 + (5 * i) % 7 for i in range(24)]}
    return {n: write_set(tmp_path_factory.mktemp(f"set{n}"), each) for n, each in sizes.items()}


@pytest.fixture
def tar_set(tar_sets: dict[int, TarSet]) -> TarSet:
    """The set of 7 shards: 42 samples, 28 kept."""
    return tar_sets[7]


def made(tar_set: TarSet, **options: Any) -> adq.ShardDataset:
    """Shuffled batches of 4 of the kept samples, unless `options` say otherwise."""
    defaults = {"plan": tar_set.plan, "shuffle": True, "seed": 3, "batch_size": 4}
    return adq.ShardDataset(tar_set.urls, **{**defaults, **options})


LOADERS: dict[str, Any] = {
    "torch": lambda dataset, **options: DataLoader(dataset, batch_size=None, **options),
    "torchdata": lambda dataset, **options: StatefulDataLoader(dataset, batch_size=None, **options),
    "adq": adq.Loader,
}


def slow(*values: Any) -> Any:
    """A parameter set that takes long."""
    return pytest.param(*values, marks=pytest.mark.slow)


def epochs_of(dataset: Any, n: int) -> list[Names]:
    """The samples of the next epochs."""
    return [ids(dataset) for _ in range(n)]


def ids(samples: Any) -> Names:
    """(shard name, key) of samples, or of all samples of batches."""
    flat = [s for each in samples for s in (each if isinstance(each, list) else [each])]
    return [(Path(s["__url__"]).name, s["__key__"]) for s in flat]


def contents(samples: Any) -> list[tuple[Any, ...]]:
    """Key and fields of samples, or of all samples of batches."""
    flat = [s for each in samples for s in (each if isinstance(each, list) else [each])]
    return [(s["__key__"], s["txt"], s["cls"]) for s in flat]


def counts(tally: Any) -> tuple[int, ...]:
    return tally.read, tally.kept, tally.dropped, tally.bad


@contextmanager
def as_worker(worker: int, n_workers: int) -> Iterator[None]:
    """Be taken for a DataLoader's worker."""
    before = torch_worker._worker_info
    torch_worker._worker_info = torch_worker.WorkerInfo(
        id=worker, num_workers=n_workers, seed=1000 + worker, dataset=None
    )
    try:
        yield
    finally:
        torch_worker._worker_info = before


def worker_streams(dataset: Any, n_workers: int) -> list[Any]:
    """The iterators of so many workers, each over its copy of the data set."""
    if n_workers == 0:
        return [iter(dataset)]
    streams = []
    for worker in range(n_workers):
        with as_worker(worker, n_workers):
            streams.append(iter(pickle.loads(pickle.dumps(dataset))))  # noqa: S301 - our own bytes
    return streams


def played(dataset: Any, n_workers: int) -> Iterator[Any]:
    """What a DataLoader with so many workers would give."""
    streams = worker_streams(dataset, n_workers)
    while streams:
        for stream in list(streams):
            try:
                yield next(stream)
            except StopIteration:
                streams.remove(stream)


def number(sample: dict[str, Any]) -> dict[str, Any]:
    return {"key": sample["__key__"], "label": int(sample["cls"]), **sample}


def noisy(sample: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    return {**sample, "u": float(rng.random())}


def boom(sample: dict[str, Any]) -> dict[str, Any]:
    if sample["__key__"] == "k00024":
        raise KeyError("boom")
    return sample


BOOM = "shard t-003.tar, key 'k00024': Map: KeyError: \"'boom'\""


@dataclass(frozen=True, eq=False)
class OnlyEven(adq.Pipe):
    """A pipe that drops good samples."""

    def apply(self, samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [dict(s) for s in samples if int(s["cls"]) % 2 == 0]


@dataclass(frozen=True, eq=False)
class Trips(adq.Pipe):
    """A pipe that calls some samples bad."""

    one_to_one: ClassVar[bool] = True
    over: tuple[str, ...] = ()

    def apply(self, samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for sample in samples:
            if sample["__key__"] in self.over:
                raise adq.SampleError(f"tripped over {sample['__key__']}")
        return [dict(s) for s in samples]
