"""Lists, plans, opens and reads 100,000 real shards of 10 small samples, each step in a process of its own.

The tars, their features and the plan are made by the package, or read by it, as a user's would be; the embeddings are random, in
1,000 classes of 1,000 samples, D = 64.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tarfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

import adq_wds as adq
from adq_wds.shards.names import expand_urls, shard_names
from benchmarks.common import peak_rss_bytes
from benchmarks.scale_plan import n_bytes_read

MODULES = (
    "adq_wds.planning.build_plan",
    "adq_wds.stream.dataset",
)  # else they would be imported in the first call
PER_SHARD, CLASSES, WIDTH, RANKS, BATCH = 10, 1_000, 64, 64, 64
Numbers = dict[str, float]


def shards_row(work: Path, n: int) -> dict[str, Any]:
    """What each step takes with `n` shards; the tars and all made of them are removed."""
    folder = work / f"shards-{n}"
    shutil.rmtree(folder, ignore_errors=True)
    steps = (_tars, _list, _features, _open_features, _plan, _open_plan, _read_rank, _read_all)
    try:
        row: dict[str, Any] = {"shards": n, "samples": PER_SHARD * n}
        for step in steps:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                row[step.__name__[1:]] = pool.apply(_measured, (step, folder, n))
        return row
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _measured(step: Callable[[Path, int], Numbers], folder: Path, n: int) -> Numbers:
    """What a step gives, and seconds, peak memory (imports alone beside it), and bytes read."""
    for module in MODULES:
        import_module(module)
    before, began, base = n_bytes_read(), time.perf_counter(), peak_rss_bytes()
    processor = time.process_time()
    more = step(folder, n)
    return {
        "seconds": round(time.perf_counter() - began, 3),
        "processor_seconds": round(time.process_time() - processor, 3),
        "peak_mib": round(peak_rss_bytes() / 2**20),
        "imports_mib": round(base / 2**20),
        "read_bytes": n_bytes_read() - before,
        **more,
    }


def _urls(folder: Path, n: int) -> str:
    return str(folder / "tars" / f"train-{{000000..{n - 1:06d}}}.tar")


def _tars(folder: Path, n: int) -> Numbers:
    """Write `n` tars of 10 samples of one field."""
    (folder / "tars").mkdir(parents=True)
    for shard in range(n):
        parts = []
        for i in range(PER_SHARD):
            member = tarfile.TarInfo(f"{shard * PER_SHARD + i:08d}.txt")
            member.size = len(text := f"sample {i} of shard {shard}".encode())
            parts += [member.tobuf(), text.ljust(512, b"\0")]
        (folder / "tars" / f"train-{shard:06d}.tar").write_bytes(b"".join(parts) + bytes(1024))
    return {}


def _list(folder: Path, n: int) -> Numbers:
    """Expand the pattern, and name the shards."""
    paths = expand_urls(_urls(folder, n))
    return {"shards": len(shard_names(paths))}


def _features(folder: Path, n: int) -> Numbers:
    """Read all tars once, and write a file of features for each, without waiting for the disk."""
    os.fsync = lambda fd: None  # 100,000 times two would be an hour of a slow disk
    rng = np.random.default_rng(0)
    keys = [f"{i:08d}" for i in range(PER_SHARD * n)]
    rows = rng.standard_normal((len(keys), WIDTH), dtype=np.float32)
    labels = (rng.permutation(len(keys)) % CLASSES).tolist()
    features = adq.Features.from_arrays(_urls(folder, n), keys, rows, labels, out=folder / "features")
    return {"bytes": sum(file.path.stat().st_size for file in features)}


def _open_features(folder: Path, n: int) -> Numbers:
    return {"samples": len(adq.Features(folder / "features"))}


def _plan(folder: Path, n: int) -> Numbers:
    plan = adq.build_plan(folder / "features", keep=0.1, out=folder / "plan" / "plan.parquet", progress=False)
    sizes = [path.stat().st_size for path in (folder / "plan").rglob("*.parquet")]
    return {"kept": plan.n_kept, "bytes": sum(sizes), "files": len(sizes)}


def _open_plan(folder: Path, n: int) -> Numbers:
    """Open the plan, then the rows of one shard."""
    plan = adq.load_plan(folder / "plan" / "plan.parquet")
    opened = n_bytes_read()
    began = time.perf_counter()
    plan.shard(plan.shards[n // 2])
    return {
        "listing_bytes": os.path.getsize(folder / "plan" / "plan.parquet"),
        "first_shard_seconds": round(time.perf_counter() - began, 3),
        "first_shard_bytes": n_bytes_read() - opened,
    }


def _read_rank(folder: Path, n: int) -> Numbers:
    """One rank of 64: what it reads, shuffled, without workers."""
    return _read(folder, n, rank=5, world=RANKS)


def _read_all(folder: Path, n: int) -> Numbers:
    return _read(folder, n, rank=0, world=1)


def _read(folder: Path, n: int, *, rank: int, world: int) -> Numbers:
    began = time.perf_counter()
    dataset = adq.ShardDataset(
        _urls(folder, n), plan=folder / "plan" / "plan.parquet", batch_size=BATCH, shuffle=True, collate=list,
        rank=rank, world=world, uneven="ragged",
    )  # fmt: skip
    opened = time.perf_counter()
    batches = iter(dataset)
    keys = [sample["__key__"] for sample in next(batches)]
    first = time.perf_counter()
    keys += [sample["__key__"] for batch in batches for sample in batch]
    return {
        "opened_seconds": round(opened - began, 3),
        "first_batch_seconds": round(first - opened, 3),
        "samples": len(keys),
        "distinct": len(set(keys)),
    }
