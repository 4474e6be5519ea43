"""Sets of small tar shards and plans over them, and workers played in one process."""

import io
import pickle
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from torch.utils.data._utils import worker as torch_worker

import adq_wds as adq


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
    kept: list[tuple[str, str]]
    bytes: dict[tuple[str, str], dict[str, bytes]]


def write_set(folder: Path, sizes: list[int], keep: Callable[[int], bool] = lambda i: i % 3 != 1) -> TarSet:
    """A shard per size; sample i of all, named `k<i>`, holds its own name and number, and is kept if `keep(i)`."""
    folder.mkdir(parents=True, exist_ok=True)
    urls, kept, every, i = [], [], {}, 0
    for number, size in enumerate(sizes):
        path = folder / f"t-{number:03d}.tar"
        with tarfile.open(path, "w") as tar:
            for _ in range(size):
                key = f"k{i:05d}"
                fields = {"txt": f"text of {key} ".encode() * (1 + i % 90), "cls": str(i % 10).encode()}
                for name, data in fields.items():
                    member = tarfile.TarInfo(f"{key}.{name}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
                every[path.name, key] = fields
                if keep(i):
                    kept.append((path.name, key))
                i += 1
        urls.append(str(path))
    adq.Plan.from_keys(urls, kept).save(folder / "plan.parquet")
    return TarSet(urls, str(folder / "plan.parquet"), kept, every)


@pytest.fixture(scope="session")
def tar_sets(tmp_path_factory: pytest.TempPathFactory) -> dict[int, TarSet]:
    """Sets of 1, 7 and 24 shards, of unequal sizes, one of them empty-handed."""
    sizes = {1: [47], 7: [9, 1, 14, 3, 2, 8, 5], 24: [1 + (5 * i) % 7 for i in range(24)]}
    return {n: write_set(tmp_path_factory.mktemp(f"set{n}"), each) for n, each in sizes.items()}


@pytest.fixture
def tar_set(tar_sets: dict[int, TarSet]) -> TarSet:
    """The set of 7 shards: 42 samples, 28 kept."""
    return tar_sets[7]


def ids(samples: Any) -> list[tuple[str, str]]:
    """(shard name, key) of samples, or of all samples of batches."""
    flat = [s for each in samples for s in (each if isinstance(each, list) else [each])]
    return [(Path(s["__url__"]).name, s["__key__"]) for s in flat]


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


def played(dataset: Any, n_workers: int) -> Iterator[Any]:
    """What a DataLoader with so many workers would give: copies of the data set, asked in turn."""
    if n_workers == 0:
        yield from dataset
        return
    streams = []
    for worker in range(n_workers):
        with as_worker(worker, n_workers):
            streams.append(iter(pickle.loads(pickle.dumps(dataset))))  # noqa: S301 - our own bytes
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
