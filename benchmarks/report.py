"""How long does a report take, how large is its page, and what does a browser make of it?

Command:
    python -m benchmarks.report --data FOLDER --out benchmarks/results/report.json
Two sets: the 50,000 images of CIFAR-10 train, with their shards and thumbnails as embeddings, and 1,000,000
seeded samples of 1,000 classes without shards, width 64. Memory is the growth of the peak over a process that has
loaded the library. Pages are opened in headless Chromium, where there is one; seconds until the page is drawn.
axe-core, fetched by `npm pack` where there is npm, looks at the first page, light and dark, at two widths.

Last measured on two cores of an AMD EPYC: CIFAR-10 takes 2.5 s and 92 MiB, its page of 1.7 MB with 1,806 pictures opens in
0.6 s; the 1,000,000 samples take 15 s and 623 MiB, their page of 16.8 MB opens in 1.3 s. Neither logs or asks for anything,
and axe-core finds nothing.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import adq_wds as adq
from adq_wds.jobs.write_report import write_report
from adq_wds.tables.features_file import ShardFeatures
from adq_wds.tables.spans import Spans
from benchmarks.browser import CHROMIUM, visit
from benchmarks.common import data_folder, in_own_process, parser, peak_rss_bytes, report

SHARDS, PER_SHARD, CLASSES, WIDTH = 100, 10_000, 1000, 64
SIZES = [(width, dark) for width in (390, 1440) for dark in (False, True)]


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--data", help="parent of cifar10/")
    made.add_argument("--work", default="build/report", help="folder for features, plans and pages")
    made.add_argument("--only", choices=("cifar10", "synthetic"))
    made.add_argument("--measure", help="of the parent process: a folder with a plan, or two with shards")
    args = made.parse_args()
    if args.measure:
        print(_measured(*args.measure.split("::")))
        return
    work = Path(args.work)
    result: dict[str, Any] = {}
    if args.only != "synthetic":
        shards = data_folder("cifar10", args.data) / "cifar10-train-{000000..000009}.tar"
        features = adq.embed_shards(str(shards), "thumbnail", work / "cifar10" / "features")
        _plan(features, work / "cifar10", dedup="exact", clean=0.02)
        result["cifar10"] = _one(work / "cifar10", str(shards))
        result["axe"] = _axe(work / "cifar10" / "report.html")
    if args.only != "cifar10":
        _plan(_synthetic(work / "synthetic" / "features"), work / "synthetic", bins=4)
        result["synthetic"] = _one(work / "synthetic")
    report(result, args.out)


def _plan(features: adq.Features, folder: Path, **options: Any) -> None:
    if not (folder / "plan.parquet").exists():
        adq.build_plan(features, keep=0.1, out=folder / "plan.parquet", **options)


def _synthetic(folder: Path) -> adq.Features:
    """1,000,000 samples around the centres of their classes."""
    folder.mkdir(parents=True, exist_ok=True)
    centres = np.random.default_rng(0).normal(size=(CLASSES, WIDTH))
    header: Any = {
        "encoder": "synthetic",
        "revision": "1",
        "preprocessing_hash": "0",
        "image": "jpg",
        "label": "cls",
    }
    header |= {"complete": True, "source": {"bytes": 1, "mtime_ns": 1}}
    for i in range(SHARDS):
        path = folder / f"s-{i:06d}.parquet"
        if path.exists():
            continue
        rng = np.random.default_rng(1 + i)
        label = rng.integers(0, CLASSES, PER_SHARD).astype(np.int32)
        rows = centres[label] + rng.normal(size=(PER_SHARD, WIDTH))
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        spans = [
            (j, f"n{label[j]:08d}_{i * PER_SHARD + j}", j * 102_400, 102_400, j) for j in range(PER_SHARD)
        ]
        one = np.ones(PER_SHARD, dtype=np.float32)
        texture = rng.random(PER_SHARD).astype(np.float32)
        made = ShardFeatures(
            f"s-{i:06d}.tar", Spans.from_rows(spans), label, rows.astype(np.float16), one, texture, header
        )
        made.save(path)
    return adq.Features(folder)


def _one(folder: Path, shards: str | None = None) -> dict[str, Any]:
    """A report in a process of its own, and its page in a browser."""
    result = in_own_process(
        "benchmarks.report", "--measure", "::".join([str(folder), *([shards] if shards else [])])
    )
    if CHROMIUM is not None:
        seen = visit(folder / "report.html")
        asked = [url for url in seen.requests if not url.startswith(("data:", "file:"))]
        result |= {"opens_s": round(seen.seconds, 2), "opens_processor_s": round(seen.processor_seconds, 2)}
        result |= {"logged": seen.logged, "requests": asked}
    return result


def _measured(folder: str, shards: str | None = None) -> str:
    before, began, worked = peak_rss_bytes(), time.perf_counter(), time.process_time()
    where = Path(folder)
    made = write_report(where / "plan.parquet", shards, where / "report.html", features=where / "features")
    return json.dumps(
        {
            "samples": made.samples,
            "pictures": made.pictures,
            "page_mb": round(made.bytes / 1e6, 2),
            "wall_s": round(time.perf_counter() - began, 1),
            "processor_s": round(time.process_time() - worked, 1),
            "peak_mib": round((peak_rss_bytes() - before) / 2**20),
        }
    )


def _axe(page: Path) -> dict[str, Any] | None:
    """What axe-core finds, by width and scheme: rule, impact, and how many elements; None without npm or Chromium."""
    npm = shutil.which("npm")
    if npm is None or CHROMIUM is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [npm, "pack", "axe-core", "--silent"], cwd=folder, check=True, stdout=subprocess.DEVNULL
        )
        with tarfile.open(next(Path(folder).glob("*.tgz"))) as packed:
            member = packed.extractfile("package/axe.min.js")
            assert member is not None
            axe = member.read().decode()
    script = (
        "axe.run({resultTypes: ['violations']}).then(found => [axe.version, found.violations.map(v => "
        "({rule: v.id, impact: v.impact, elements: v.nodes.length, first: v.nodes[0].html.slice(0, 200)}))])"
    )
    found: dict[str, Any] = {}
    for width, dark in SIZES:
        _, (version, violations) = visit(page, f"{axe}; 0", script, width=width, dark=dark).answers
        found |= {"version": version, f"{width} {'dark' if dark else 'light'}": violations}
    return found


if __name__ == "__main__":
    main()
