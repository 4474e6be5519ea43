"""Does a codebook leave out wrong labels, and balance classes, of shards that its fit never saw, as a plan of them would?

Sets of `benchmarks.sets`, embedded; a codebook is fitted on every second shard, and judged on the others, the stream.

- Sets with wrong labels, `clean="auto"`: the share of the stream that is doubted, how much of it is wrong (precision), how
  much of what is wrong it is (recall), against `truth.json`; beside it what a plan of the stream itself leaves out, and a
  random choice of as many, whose precision is the share of wrong labels and whose recall the share left out. Also the
  shards of the fit, as if they were streamed: there the fit knows each sample's own label. Time: of the margins alone.
- Long tails, `balance="equal"` and `"class"`: expected samples kept of each class of the stream, their sum over keep · N,
  and, beside them, the seats that a plan of the stream gives.

    python -m benchmarks.one_pass --data DATA --work WORK --out benchmarks/results/one_pass.json

WORK may be that of `benchmarks.accuracy`: its sets and features are used again.

Last measured: see docs/codebook.md.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import adq_wds as adq
from adq_wds.core.cells import Balance
from adq_wds.files import make_folder
from benchmarks.common import data_folder, parser, report
from benchmarks.sets import SETS, make_set

KEEPS = (0.1, 0.3)
PLAN: dict[str, Any] = {"bins": 1, "scores": ["texture"], "allocation": "uniform", "progress": False}


def columns(features: adq.Features) -> tuple[NDArray[np.float16], NDArray[np.int64], list[str]]:
    """Embeddings, labels and keys."""
    tables = [file.read_columns(["label", "key"]) for file in features]
    label = np.concatenate([table["label"].to_numpy() for table in tables]).astype(np.int64)
    keys = [key for table in tables for key in table["key"].to_pylist()]
    return np.concatenate([file.embedding() for file in features]), label, keys


def against_truth(out: NDArray[np.bool_], wrong: NDArray[np.bool_]) -> dict[str, float]:
    """Share left out, precision and recall."""
    return {
        "left_out": round(float(out.mean()), 4),
        "precision": round(float(wrong[out].mean()), 4),
        "recall": round(float(out[wrong].mean()), 4),
    }


def cleaned(folder: Path, fitted: list[str], stream: list[str], truth: dict[str, Any]) -> dict[str, Any]:
    """Doubted labels of a codebook on a stream and on its fit's own shards, and those of a plan of the stream."""
    codebook = adq.fit_codebook(adq.Features(folder, shards=fitted), clean="auto", progress=False)
    assert codebook.margins is not None
    result: dict[str, Any] = {}
    for name, shards in (("stream", stream), ("shards_of_the_fit", fitted)):
        embedding, label, keys = columns(adq.Features(folder, shards=shards))
        wrong = label != np.array([truth[key][0] for key in keys])
        start = time.process_time()
        margin = codebook.margins.margins(embedding, label)
        micros = round((time.process_time() - start) / len(label) * 1e6, 1)
        out = codebook.margins.doubted(margin, label)
        result[name] = {
            "cpu_us_a_sample": micros,
            "samples": len(label),
            "wrong": round(float(wrong.mean()), 4),
        } | against_truth(out, wrong)
    rows = adq.build_plan(adq.Features(folder, shards=stream), keep=1.0, clean="auto", **PLAN).table()
    wrong = rows["label"].to_numpy() != np.array([truth[key][0] for key in rows["key"].to_pylist()])
    out = np.array(rows["reason"].to_pylist()) == "label"
    result["plan_of_the_stream"] = against_truth(out, wrong)
    result["accuracy_of_the_fit"] = codebook.header["clean"]["accuracy"]
    return result


def balanced(folder: Path, fitted: list[str], stream: list[str], balance: Balance) -> dict[str, Any]:
    """Expected samples kept of each class of a stream, by a codebook, and a plan's seats."""
    codebook = adq.fit_codebook(adq.Features(folder, shards=fitted), balance=balance, progress=False)
    features = adq.Features(folder, shards=stream)
    embedding, label, _ = columns(features)
    number = np.array([codebook.class_number(c) or 0 for c in label.tolist()])
    bins = codebook.checkpoints.assign(embedding, codebook.rows[number])
    result: dict[str, Any] = {"classes_of_the_stream": np.bincount(label).tolist()}
    for keep in KEEPS:
        rate = codebook.class_rates(keep)[number, bins]
        plan = adq.build_plan(features, keep=keep, balance=balance, dedup=None, **PLAN)
        result[f"keep {keep}"] = {
            "expected": np.bincount(label, rate).round(1).tolist(),
            "over_keep_n": round(float(rate.sum() / keep / len(rate)), 4),
            "plan": [c["kept"] for c in plan.header["classes"]],
        }
    return result


def main() -> None:
    """Judge each set."""
    arguments = parser(__doc__)
    arguments.add_argument("--data", default=os.environ.get("ADQ_DATA"))
    arguments.add_argument("--work", default="accuracy-work", help="folder for sets and features")
    arguments.add_argument(
        "--clean", choices=list(SETS), nargs="*", default=["noise20", "noise40"], metavar="SET"
    )
    arguments.add_argument("--balance", choices=list(SETS), nargs="*", default=["tail50"], metavar="SET")
    arguments.add_argument("--encoder", default="builtin-free")
    a = arguments.parse_args()
    source = sorted(data_folder("cifar10", a.data).glob("cifar10-train-*.tar"))
    work = make_folder(a.work)
    result: dict[str, Any] = {"encoder": a.encoder}
    for name in dict.fromkeys([*a.clean, *a.balance]):
        paths = make_set(name, source, work / "sets")
        truth = json.loads((paths[0].parent / "truth.json").read_text(encoding="utf-8"))
        folder = work / "features" / f"{name}-0" / a.encoder
        adq.embed_shards(paths, a.encoder, folder, progress=False)
        names = [path.name for path in paths]
        fitted, stream = names[::2], names[1::2]
        result[name] = {}
        if name in a.clean:
            result[name]["clean"] = cleaned(folder, fitted, stream, truth)
        if name in a.balance:
            result[name]["equal"] = balanced(folder, fitted, stream, "equal")
            result[name]["class"] = balanced(folder, fitted, stream, "class")
        print(name, result[name], flush=True)
    report(result, a.out)


if __name__ == "__main__":
    main()
