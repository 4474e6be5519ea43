"""Write the golden files of the current format versions; run once per version, never to make a test pass.

python tests/golden/make.py tests/golden/v4

v1, v2 and v3 were made by the same script before later versions added columns.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from adq_wds.core.gradient import logit_gradients
from adq_wds.core.rng import draws
from adq_wds.planning.build_plan import build_plan, find_bins
from adq_wds.planning.fit_codebook import fit_codebook
from adq_wds.planning.samples import global_labels
from adq_wds.planning.soften_labels import soften_labels
from adq_wds.tables.features import Features, file_name
from adq_wds.tables.features_file import ShardFeatures
from adq_wds.tables.index import save_index
from adq_wds.tables.soft_labels import SoftTable
from adq_wds.tables.spans import Spans

SHARDS = {"a-000000.tar": 9, "b/a-000001.tar": 6}


def spans(shard: str, n: int) -> Spans:
    """Spans, keys and members, one of the keys not ASCII, and of one sample the members not listed."""
    keys = [f"dir/é{i}" if i == 2 else f"k{i:03d}" for i in range(n)]
    offset = np.arange(n, dtype=np.int64) * 2048
    crc32 = (draws(0, 0, shard, keys) % 2**32).astype(np.uint32)
    members = pa.array(["" if i == 1 else f"jpg/txt/{100 * i}/3/{1000 + i}" for i in range(n)])
    return Spans(np.arange(n, dtype=np.int32), keys, offset, np.full(n, 2048, dtype=np.int64), crc32, members)


def digests(shard: str, n: int) -> NDArray[np.uint8]:
    """Digests of which two are copies: the seventh of the first shard, the first of the second one."""
    original = {("a-000000.tar", 6): ("a-000000.tar", 4), ("b/a-000001.tar", 0): ("a-000000.tar", 3)}
    rows = [original.get((shard, i), (shard, i)) for i in range(n)]
    halves = [draws(0, 0, name, [f"{i} a", f"{i} b"]) for name, i in rows]
    return np.stack(halves).view(np.uint8)


def main(folder: Path) -> None:
    """Two shards, three classes with names, a bad sample and a copy each; features, bins, plan and index of them."""
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
            "logit_grad": "softmax",
            "head_right": 5,
            "scores": {"sharp": "1"},
        }
        logits = rng.standard_normal((n - 1, 3)).astype(np.float32)
        # cat, dog, emu over the whole set: the labels of the second shard are one higher than in its file
        classes = good % 2 + (0 if shard.startswith("a") else 1)
        ShardFeatures(
            shard=shard,
            spans=every.take(good),
            label=(good % 2).astype(np.int32),
            embedding=(h / norm[:, None]).astype(np.float16),
            norm=norm.astype(np.float32),
            texture=rng.random(n - 1).astype(np.float32),
            logit_grad=logit_gradients(logits, classes).astype(np.float16),
            scores={"sharp": rng.random(n - 1).astype(np.float32)},
            digest=digests(shard, n - 1),
            header={**settings, "complete": True, "source": {"bytes": n * 2048, "mtime_ns": 0}},
            names=["cat", "dog"] if shard.startswith("a") else ["dog", "emu"],
            bad=every.take(bad),
            bad_reasons=["not an image"],
        ).save(folder / "features" / file_name(shard))
    features = Features(folder / "features")
    bins = find_bins(features, bins=2, kernel="gradient")
    bins.save(folder / "bins.parquet")
    must = [("a-000000.tar", "k001")]
    plan = build_plan(features, bins=bins, kernel="gradient", keep=0.5, seed=3, must_include=must)
    plan.save(folder / "plan.parquet")
    save_index(folder / "index.parquet", [(shard, spans(shard, n)) for shard, n in SHARDS.items()])
    rows = [
        [f.shard, f.spans().keys, f.texture().tolist(), f.embedding().tolist(), f.bad,
         f.logit_grad().tolist(), f.score("sharp").tolist(), f.digest().tolist()]
        for f in features
    ]  # fmt: skip
    expected = {
        "plan_hash": plan.hash,
        "features_hash": features.hash,
        "plan": plan.table().to_pydict(),
        "share": plan.header["cells"]["share"],
        "epochs": [
            [plan.kept_in(name, epoch).tolist() for name in plan.shards]
            for epoch in (0, 1, 2, 3, 1000, 10**9)
        ],
        "features": rows,
        "bins": [bins.label.tolist(), bins.bin.tolist(), bins.pick.tolist()],
        "index": {shard: [list(row) for row in spans(shard, n).rows()] for shard, n in SHARDS.items()},
        "members": {shard: spans(shard, n).members.to_pylist() for shard, n in SHARDS.items()},
    }
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n", encoding="utf-8")
    codebook(folder)
    cleaned(folder)
    soft(folder)
    cleaned_codebook(folder)


def cleaned(folder: Path) -> None:
    """A plan and bins with margins, of the features in `folder`, and the plan's hash and rows."""
    features = Features(folder / "features")
    asked: dict[str, Any] = {"clean": 0.2, "dedup": 0.99, "exclude": [("a-000000.tar", "k001")]}
    bins = find_bins(features, bins=2, **asked)
    bins.save(folder / "cleaned_bins.parquet")
    plan = build_plan(
        features, bins=bins, keep=0.5, seed=3, balance=0.5, out=folder / "cleaned.parquet", **asked
    )
    rows = plan.table().to_pydict()
    rows["margin"] = [None if margin != margin else margin for margin in rows["margin"]]  # NaN is no JSON
    values = {"hash": plan.hash, "clean": plan.header["clean"], "plan": rows}
    (folder / "cleaned.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def soft(folder: Path) -> None:
    """Soft labels of the features in `folder`, and their values; alone, as there was none before."""
    soften_labels(folder / "features", out=folder / "soft.parquet")
    table = SoftTable(folder / "soft.parquet")
    shards = [table.shard(shard) for shard in SHARDS]
    rows = [[s.shard, s.keys, s.top.tolist(), s.probability.tolist()] for s in shards]
    values = {"hash": table.hash, "shards": rows}
    (folder / "soft.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def codebook(folder: Path) -> None:
    """A codebook of the features in `folder`, and its values; alone, for a version that only codebooks have."""
    made = fit_codebook(folder / "features", bins=2, min_pilot=2, out=folder / "codebook.safetensors")
    arrays = {
        name: getattr(made, name).tolist() for name in ("query", "threshold", "label", "held_out", "weight")
    }
    values = {"hash": made.hash, "header": made.header, "rates": made.rates(0.3).tolist(), **arrays}
    (folder / "codebook.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def cleaned_codebook(folder: Path) -> None:
    """A codebook that cleans and balances, of the features in `folder`, and its answers on them."""
    asked: dict[str, Any] = {"clean": 0.2, "dedup": "exact", "balance": "equal"}
    made = fit_codebook(
        folder / "features", bins=2, min_pilot=2, **asked, out=folder / "cleaned_codebook.safetensors"
    )
    assert made.margins is not None
    assert made.copies is not None
    label, embedding = labels_and_embeddings(folder)
    values = {
        "hash": made.hash,
        "header": made.header,
        "rates": made.class_rates(0.3).tolist(),
        "margins": made.margins.margins(embedding, label).tolist(),
        "least": [None if np.isinf(least) else least for least in made.margins.least.tolist()],
        "digest": made.copies.digest.tolist(),
        "stays": made.copies.stays.tolist(),
    }
    text = json.dumps(values, indent=1)
    (folder / "cleaned_codebook.json").write_text(text + "\n", encoding="utf-8")


def labels_and_embeddings(folder: Path) -> tuple[NDArray[np.int32], NDArray[np.float16]]:
    """Of all samples of the features in `folder`."""
    features = Features(folder / "features")
    return global_labels(features)[0], np.concatenate([file.embedding() for file in features])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
