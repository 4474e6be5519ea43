"""Plans N samples, mostly in classes of 10,000: features that the package wrote, and time and memory of each stage.

The embeddings are float16 unit rows of one Gaussian cluster a class, D = 256; every shard of 10,000 samples holds samples of all
classes, mixed. Rows have all columns of features of images: spans, members, texture and digests.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

import adq_wds as adq
from adq_wds.planning.buckets import Buckets
from adq_wds.planning.table import PlanTable
from adq_wds.tables.features import file_name
from adq_wds.tables.features_file import FeaturesSource, ShardFeatures
from adq_wds.tables.spans import Spans
from benchmarks.common import peak_rss_bytes

PER_CLASS, PER_SHARD, WIDTH = 10_000, 10_000, 256
SAMPLE_BYTES = 102_400  # of a sample in its tar
STAGES = {  # of `make_plan`, by the name that it calls
    "read_samples": "read labels",
    "leave_out": "leave out",
    "_bins": "sort and bin",
    "score_bins": "score",
    "make_cells": "share",
    "take_seats": "draw",
    "make_table": "header",
}


def make_features(folder: Path, n: int, per_class: int) -> None:
    """Write the features of `n` samples in shards of 10,000, mixed over classes of `per_class`."""
    rng = np.random.default_rng(0)
    label = np.arange(n, dtype=np.int32) // per_class
    rng.shuffle(label)
    centre = rng.standard_normal((-(-n // per_class), WIDTH), dtype=np.float32)
    folder.mkdir(parents=True)
    for first in range(0, n, PER_SHARD):
        mine = label[first : first + PER_SHARD]
        rows = rng.standard_normal((len(mine), WIDTH), dtype=np.float32) + centre[mine]
        shard_features(first // PER_SHARD, mine, rows).save(
            folder / file_name(shard_name(first // PER_SHARD))
        )


def shard_name(i: int) -> str:
    """The name of shard `i`."""
    return f"train-{i:06d}.tar"


def make_spans(i: int, n: int) -> Spans:
    """The offsets of `n` samples of shard `i`."""
    crc32 = np.random.default_rng(i).integers(0, 2**32, n, dtype=np.uint32)
    return Spans(
        index=np.arange(n, dtype=np.int32),
        keys=[f"{i:06d}_{j:06d}" for j in range(n)],
        byte_offset=np.arange(n, dtype=np.int64) * SAMPLE_BYTES,
        n_bytes=np.full(n, SAMPLE_BYTES, dtype=np.int64),
        crc32=crc32,
        members=pa.array([f"jpg/cls/{SAMPLE_BYTES - 2048}/3/{c}" for c in crc32.tolist()]),
    )


def shard_features(i: int, label: NDArray[np.int32], rows: NDArray[np.float32]) -> ShardFeatures:
    """Features of shard `i`: n labels, and (n, D) embeddings of any length."""
    n = len(label)
    norm = np.linalg.norm(rows, axis=1).astype(np.float32)
    digest = b"".join(hashlib.sha256(f"{i}/{j}".encode()).digest()[:16] for j in range(n))
    header: FeaturesSource = {
        "encoder": "clusters",
        "revision": "0",
        "preprocessing_hash": "",
        "image": "jpg",
        "label": "cls",
        "complete": True,
        "source": {"bytes": n * SAMPLE_BYTES + 1024, "mtime_ns": 0},
    }
    return ShardFeatures(
        shard=shard_name(i),
        spans=make_spans(i, n),
        label=label,
        embedding=(rows / norm[:, None]).astype(np.float16),
        norm=norm,
        texture=np.random.default_rng([1, i]).random(n, dtype=np.float32),
        digest=np.frombuffer(digest, dtype=np.uint8).reshape(n, 16),
        header=header,
    )


class Meter:
    """Seconds of the clock and of processors, and peak memory, of each stage that it is put around."""

    def __init__(self) -> None:
        self.stages: dict[str, dict[str, float]] = {}
        self._peaks: list[int] = []  # of the stages that run now, the outermost first

    def put_around(self, owner: Any, name: str, stage: str) -> None:
        """Measure each call of the function that `owner` has by this name."""
        work: Callable[..., Any] = getattr(owner, name)

        def measured(*arguments: Any, **options: Any) -> Any:
            return self.run(stage, lambda: work(*arguments, **options))

        setattr(owner, name, measured)

    def run(self, stage: str, work: Callable[[], Any]) -> Any:
        """Do the work, and note what it took; the peak is that of the whole process meanwhile."""
        self._note_peak()
        self._peaks.append(0)
        clock, processor = time.perf_counter(), time.process_time()
        try:
            return work()
        finally:
            seconds, of_processor = time.perf_counter() - clock, time.process_time() - processor
            self._note_peak()
            self.stages[stage] = {
                "seconds": round(seconds, 2),
                "processor_seconds": round(of_processor, 2),
                "peak_mib": round(self._peaks.pop() / 2**20),
            }

    def _note_peak(self) -> None:
        """Note the peak so far, and begin a new one (Linux)."""
        peak = peak_rss_bytes()
        self._peaks = [max(peak, earlier) for earlier in self._peaks]
        Path("/proc/self/clear_refs").write_text("5")


def n_bytes_read() -> int:
    """Bytes that this process has read so far (Linux)."""
    return int(Path("/proc/self/io").read_text().split()[1])


def plan_once(work: Path, n: int, *, per_class: int = PER_CLASS, **options: Any) -> dict[str, Any]:
    """Make features in a process of its own, plan them in this one, and remove all; see `STAGES`."""
    folder = work / f"features-{n}"
    shutil.rmtree(folder, ignore_errors=True)
    maker = multiprocessing.get_context("spawn").Process(target=make_features, args=(folder, n, per_class))
    maker.start()
    maker.join()
    try:
        if maker.exitcode:
            raise SystemExit("the features could not be made")
        return _planned(folder, work / f"plan-{n}" / "plan.parquet", **options)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(work / f"plan-{n}", ignore_errors=True)


def _planned(folder: Path, out: Path, **options: Any) -> dict[str, Any]:
    meter = Meter()
    planner = import_module("adq_wds.planning.build_plan")
    for name, stage in STAGES.items():
        meter.put_around(planner, name, stage)
    meter.put_around(Buckets, "write", "sort by class")
    meter.put_around(PlanTable, "save", "write the plan")
    features = meter.run("open features", lambda: adq.Features(folder))
    plan = meter.run("whole", lambda: planner.build_plan(features, out=out, progress=False, **options))
    size = {path.name: path.stat().st_size for path in folder.iterdir()}
    return {
        "samples": plan.n_samples,
        "classes": len(plan.header["classes"]),
        "shards": len(plan.shards),
        "kept": plan.n_kept,
        "features_bytes": sum(size.values()),
        "plan_bytes": os.path.getsize(out),
        **meter.stages.pop("whole"),
        "stages": meter.stages,
    }
