"""Write the golden files of the current format versions; run once per version, never to make a test pass.

python tests/golden/make.py tests/golden/v1
"""

import json
import sys
from pathlib import Path

import numpy as np

from adq_wds.binning import bin_features
from adq_wds.core.rng import draws
from adq_wds.planner import PlanSettings, plan_bins
from adq_wds.registry import allocation
from adq_wds.tables.features import Features, ShardFeatures, file_name
from adq_wds.tables.spans import Spans, save_index

SHARDS = {"a-000000.tar": 9, "b/a-000001.tar": 6}


def spans(shard: str, n: int) -> Spans:
    """Spans and keys, one of them not ASCII."""
    keys = [f"dir/é{i}" if i == 2 else f"k{i:03d}" for i in range(n)]
    offset = np.arange(n, dtype=np.int64) * 2048
    crc32 = (draws(0, 0, shard, keys) % 2**32).astype(np.uint32)
    return Spans(np.arange(n, dtype=np.int32), keys, offset, np.full(n, 2048, dtype=np.int64), crc32)


def main(folder: Path) -> None:
    """Two shards, two classes with names, one bad sample; features, bins, plan and index of them."""
    (folder / "features").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for shard, n in SHARDS.items():
        every = spans(shard, n)
        good, bad = np.arange(n - 1), np.array([n - 1])
        h = np.maximum(rng.standard_normal((n - 1, 4)), 0)
        norm = np.maximum(np.linalg.norm(h, axis=1), 1e-9)
        settings = {
            "encoder": "golden",
            "revision": "1",
            "preprocessing_hash": "",
            "image": "jpg",
            "label": "txt",
        }
        ShardFeatures(
            shard=shard,
            spans=every.take(good),
            label=(good % 2).astype(np.int32),
            embedding=(h / norm[:, None]).astype(np.float16),
            norm=norm.astype(np.float32),
            texture=rng.random(n - 1).astype(np.float32),
            header={**settings, "complete": True, "source": {"bytes": n * 2048, "mtime_ns": 0}},
            names=["cat", "dog"] if shard.startswith("a") else ["dog", "emu"],
            bad=every.take(bad),
            bad_reasons=["not an image"],
        ).save(folder / "features" / file_name(shard))
    features = Features(folder / "features")
    bins = bin_features(features, bins=2)
    bins.save(folder / "bins.parquet")
    settings_ = PlanSettings(keep=0.5, seed=3)
    plan = plan_bins(
        features, bins, settings_, allocation("adaptive"), must_include=[("a-000000.tar", "k001")]
    )
    plan.save(folder / "plan.parquet")
    save_index(folder / "index.parquet", [(shard, spans(shard, n)) for shard, n in SHARDS.items()])
    rows = [[f.shard, f.spans().keys, f.texture().tolist(), f.embedding().tolist(), f.bad] for f in features]
    expected = {
        "plan_hash": plan.hash,
        "features_hash": features.hash,
        "plan": plan.table().to_pydict(),
        "features": rows,
        "bins": [bins.label.tolist(), bins.bin.tolist(), bins.pick.tolist()],
        "index": {shard: [list(row) for row in spans(shard, n).rows()] for shard, n in SHARDS.items()},
    }
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
