"""How long does planning an ImageNet-sized set take, and how much memory?

Features of 1,000 classes × 1,281 samples, D = 768, lie in 100 mixed shard files on the disk (float16 ReLU features of a
seeded rank-64 mixture, made outside the timing). Timed, in a process of its own: opening them, sorting by class, exact
bins, scores, quotas, ranks and writing plan.parquet.

    python -m benchmarks.planning make --folder /tmp/imagenet-features
    python -m benchmarks.planning time --folder /tmp/imagenet-features --out benchmarks/results/planning.json

With `--kernel gradient` in both commands (and another folder, 4.6 GB), the features also hold logit gradients of a random
linear head of 1,000 classes, and the bins are those of the gradient kernel (results/planning_gradient.json).

Last measured (two cores of an AMD EPYC, Python 3.11, numpy 2.4; three runs, each in a process of its own): 1,281,000 samples planned in 33 s (33 to 34), 0.43 GiB
at the peak; by the gradient kernel in 94 s (87 to 96), 0.43 GiB. Nothing is compared in the same run: no other program plans from files on the disk. The greedy itself is
raced in `benchmarks.graphcut`.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np

import adq_wds as adq
from adq_wds.core.gradient import logit_gradients
from adq_wds.registry import Kernel
from adq_wds.tables.features import file_name
from adq_wds.tables.features_file import FeaturesSource, ShardFeatures
from adq_wds.tables.spans import Spans
from benchmarks.common import in_own_process, parser, peak_rss_bytes, report, spread

CLASSES, PER_CLASS, WIDTH, SHARDS, RANK = 1000, 1281, 768, 100, 64


def make(folder: Path, classes: int, per_class: int, *, kernel: str) -> None:
    """Write the features: every shard holds samples of all classes, mixed."""
    rng = np.random.default_rng(0)
    label = np.repeat(np.arange(classes, dtype=np.int32), per_class)
    rng.shuffle(label)
    basis = rng.standard_normal((RANK, WIDTH), dtype=np.float32)
    centre = rng.standard_normal((classes, RANK), dtype=np.float32)
    head = rng.standard_normal((WIDTH, classes), dtype=np.float32) / 32
    folder.mkdir(parents=True, exist_ok=True)
    for i, mine in enumerate(np.array_split(label, SHARDS)):
        n = len(mine)
        mixture = (centre[mine] + rng.standard_normal((n, RANK), dtype=np.float32)) @ basis
        features = np.maximum(mixture + rng.standard_normal((n, WIDTH), dtype=np.float32), 0)
        norm = np.linalg.norm(features, axis=1)
        logit_grad = None
        if kernel == "gradient":
            logits = features @ head
            logits[np.arange(n), mine] += 8
            logit_grad = logit_gradients(logits, mine).astype(np.float16)
        name = f"train-{i:06d}.tar"
        spans = Spans(
            np.arange(n, dtype=np.int32),
            [f"{i:03d}_{j:05d}" for j in range(n)],
            np.arange(n, dtype=np.int64) * 110_592,
            np.full(n, 110_592, dtype=np.int64),
            rng.integers(0, 2**32, n, dtype=np.uint32),
        )
        header: FeaturesSource = {
            "encoder": "mixture",
            "revision": "0",
            "preprocessing_hash": "",
            "image": "jpg",
            "label": "cls",
            "complete": True,
            "source": {"bytes": 0, "mtime_ns": 0},
        }
        if logit_grad is not None:
            header |= {"logit_grad": "softmax", "head_right": n // 2}
        ShardFeatures(
            shard=name,
            spans=spans,
            label=mine,
            embedding=(features / norm[:, None]).astype(np.float16),
            norm=norm,
            texture=rng.random(n, dtype=np.float32),
            logit_grad=logit_grad,
            header=header,
        ).save(folder / file_name(name))


def plan_once(folder: Path, kernel: Kernel) -> None:
    """Plan, and print seconds and peak memory."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as out:
        start = time.perf_counter()
        plan = adq.build_plan(folder, bins=10, keep=0.3, kernel=kernel, out=Path(out) / "plan.parquet")
        taken = time.perf_counter() - start
        size = os.path.getsize(Path(out) / "plan.parquet")
    print(
        json.dumps(
            {
                "seconds": taken,
                "peak_bytes": peak_rss_bytes(),
                "kept": plan.n_kept,
                "of": plan.n_samples,
                "plan_bytes": size,
            }
        )
    )


def main() -> None:
    """Make features, or time planning them."""
    arguments = parser(__doc__)
    arguments.add_argument("what", choices=("make", "time", "once"))
    arguments.add_argument("--folder", type=Path, required=True, help="where the features are (2 GB)")
    arguments.add_argument("--classes", type=int, default=CLASSES)
    arguments.add_argument("--per-class", type=int, default=PER_CLASS)
    arguments.add_argument("--kernel", choices=("features", "gradient"), default="features")
    a: argparse.Namespace = arguments.parse_args()
    if a.what == "make":
        make(a.folder, a.classes, a.per_class, kernel=a.kernel)
    elif a.what == "once":
        plan_once(a.folder, a.kernel)
    else:
        once = ["once", "--folder", str(a.folder), "--kernel", a.kernel]
        found = [in_own_process("benchmarks.planning", *once) for _ in range(a.runs)]
        result = {
            "kernel": a.kernel,
            "samples": found[0]["of"],
            "kept": found[0]["kept"],
            "seconds": spread([run["seconds"] for run in found]),
            "peak_gib": spread([run["peak_bytes"] / 2**30 for run in found]),
            "plan_mb": round(found[0]["plan_bytes"] / 1e6, 1),
        }
        report(result, a.out)


if __name__ == "__main__":
    main()
