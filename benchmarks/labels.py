"""How many wrong labels does `clean="auto"` leave out, and how many right ones, on sets whose truth is known?

The sets of `benchmarks.sets`, planned with `clean="auto"`, copies out before (copies of a wrong label vouch for each other):
of what is no copy, the share left out, how much of it is wrong
(precision), how much of what is wrong it is (recall), and the range over the classes. Beside it a random choice of the same
size, whose precision is the share of wrong labels and whose recall the share left out.

    python -m benchmarks.labels --data DATA --work WORK --out benchmarks/results/labels.json

WORK may be that of `benchmarks.accuracy`: its sets and features are used again.

Last measured: see docs/benchmarks.md.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

import adq_wds as adq
from adq_wds.files import make_folder
from benchmarks.common import data_folder, parser, report
from benchmarks.sets import SETS, make_set


def judged(paths: list[Path], features: Path, encoder: str) -> dict[str, Any]:
    """What `clean="auto"` does to a set, against its `truth.json`."""
    truth = json.loads((paths[0].parent / "truth.json").read_text(encoding="utf-8"))
    made = adq.embed_shards(paths, encoder, features, progress=False)
    options: dict[str, Any] = {"bins": 1, "scores": ["texture"], "allocation": "uniform"}
    rows = adq.build_plan(made, keep=1.0, clean="auto", progress=False, **options).table()
    rows = rows.filter(pc.not_equal(rows["reason"], "duplicate"))
    label = rows["label"].to_numpy()
    wrong = label != np.array([truth[key][0] for key in rows["key"].to_pylist()])
    out = np.array(rows["reason"].to_pylist()) == "label"
    by_class = [float(out[label == c].mean()) for c in np.unique(label)]
    return {
        "samples": len(label),
        "wrong": round(float(wrong.mean()), 4),  # and a random choice's precision
        "left_out": round(float(out.mean()), 4),  # and a random choice's recall
        "left_out_by_class": [round(min(by_class), 4), round(max(by_class), 4)],
        "precision": round(float(wrong[out].mean()), 4) if out.any() else None,
        "recall": round(float(out[wrong].mean()), 4) if wrong.any() else None,
        "wrong_of_the_rest": round(float(wrong[~out].mean()), 4),
    }


def main() -> None:
    """Judge each set."""
    arguments = parser(__doc__)
    arguments.add_argument("--data", default=os.environ.get("ADQ_DATA"))
    arguments.add_argument("--work", default="accuracy-work", help="folder for sets and features")
    arguments.add_argument("--sets", choices=list(SETS), nargs="+", default=list(SETS), metavar="SET")
    arguments.add_argument("--encoder", default="builtin-free")
    a = arguments.parse_args()
    source = sorted(data_folder("cifar10", a.data).glob("cifar10-train-*.tar"))
    work = make_folder(a.work)
    result: dict[str, Any] = {"encoder": a.encoder, "sets": {}}
    for name in a.sets:
        paths = make_set(name, source, work / "sets")
        result["sets"][name] = judged(paths, work / "features" / f"{name}-0" / a.encoder, a.encoder)
        print(name, result["sets"][name], flush=True)
    report(result, a.out)


if __name__ == "__main__":
    main()
