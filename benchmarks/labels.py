"""How many wrong labels does `clean="auto"` leave out, and how many right ones, on sets whose truth is known?

The sets of `benchmarks.sets`, planned with `clean="auto"`, copies out before (copies of a wrong label vouch for each
other): of what is no copy, the share left out, how much of it is wrong (precision), how much of what is wrong it is
(recall), and the range over the classes; `more` has precision and recall of half as many again, the next lowest margins of
each class. Beside it a random choice of the same size, whose precision is the share of wrong labels and whose recall the
share left out. Then random parts of the clean set and of `noise20`, several draws of each size, out of the images at odd
positions: settings were chosen on those at even ones.

    python -m benchmarks.labels --data DATA --work WORK --out benchmarks/results/labels.json

WORK may be that of `benchmarks.accuracy`: its sets and features are used again.

Last measured: see docs/benchmarks.md.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

import adq_wds as adq
from adq_wds.core.rng import generator
from adq_wds.files import make_folder
from benchmarks.common import data_folder, parser, report
from benchmarks.sets import SETS, make_set

PARTS = ("clean", "noise20")  # sets whose samples stand in the order of the source
SIZES = (500, 2_000, 10_000)


def judged(
    truth: dict[str, list[Any]], features: adq.Features, exclude: Sequence[str] = ()
) -> dict[str, Any]:
    """What `clean="auto"` does to a set, or to what of it is not excluded, against the truth."""
    options: dict[str, Any] = {"bins": 1, "scores": ["texture"], "allocation": "uniform", "exclude": exclude}
    plan = adq.build_plan(features, keep=1.0, clean="auto", progress=False, **options)
    rows = plan.table()
    rows = rows.filter(pc.is_in(rows["reason"], value_set=pa.array(["kept", "label"])))
    label, margin = rows["label"].to_numpy(), rows["margin"].to_numpy()
    wrong = label != np.array([truth[key][0] for key in rows["key"].to_pylist()])
    out = np.array(rows["reason"].to_pylist()) == "label"
    more = np.zeros_like(out)
    for c in np.unique(label):
        members = np.flatnonzero(label == c)
        n_more = round(1.5 * out[members].sum())
        more[members[np.argsort(margin[members], kind="stable")[:n_more]]] = True
    by_class = [float(out[label == c].mean()) for c in np.unique(label)]
    return {
        "samples": len(label),
        "accuracy": plan.header["clean"]["accuracy"],
        "wrong": round(float(wrong.mean()), 4),  # and a random choice's precision
        "left_out": round(float(out.mean()), 4),  # and a random choice's recall
        "left_out_by_class": [round(min(by_class), 4), round(max(by_class), 4)],
        **_against(wrong, out),
        "more": _against(wrong, more),
    }


def _against(wrong: NDArray[np.bool_], out: NDArray[np.bool_]) -> dict[str, float | None]:
    return {
        "precision": round(float(wrong[out].mean()), 4) if out.any() else None,
        "recall": round(float(out[wrong].mean()), 4) if wrong.any() else None,
        "wrong_of_the_rest": round(float(wrong[~out].mean()), 4),
    }


def judged_parts(
    truth: dict[str, list[Any]], features: adq.Features, n: int, draws: int
) -> list[dict[str, Any]]:
    """The same for `draws` parts of n samples, out of those at odd positions."""
    keys = np.array(list(truth))
    parts = []
    for draw in range(draws):
        order = generator(draw, 0, "", str(n), purpose="part").permutation(len(keys) // 2)
        inside = np.zeros(len(keys), dtype=bool)
        inside[1 + 2 * order[:n]] = True
        parts.append(judged(truth, features, keys[~inside].tolist()))
    return parts


def main() -> None:
    """Judge each set."""
    arguments = parser(__doc__)
    arguments.add_argument("--data", default=os.environ.get("ADQ_DATA"))
    arguments.add_argument("--work", default="accuracy-work", help="folder for sets and features")
    arguments.add_argument("--sets", choices=list(SETS), nargs="+", default=list(SETS), metavar="SET")
    arguments.add_argument("--encoder", default="builtin-free")
    arguments.add_argument("--draws", type=int, default=3, help="random parts of each size")
    a = arguments.parse_args()
    source = sorted(data_folder("cifar10", a.data).glob("cifar10-train-*.tar"))
    work = make_folder(a.work)
    result: dict[str, Any] = {"encoder": a.encoder, "sets": {}, "parts": {}}
    for name in a.sets:
        paths = make_set(name, source, work / "sets")
        truth = json.loads((paths[0].parent / "truth.json").read_text(encoding="utf-8"))
        features = adq.embed_shards(
            paths, a.encoder, work / "features" / f"{name}-0" / a.encoder, progress=False
        )
        result["sets"][name] = judged(truth, features)
        print(name, result["sets"][name], flush=True)
        if name in PARTS:
            parts = {str(n): judged_parts(truth, features, n, a.draws) for n in SIZES}
            result["parts"][name] = parts
            print(name, parts, flush=True)
    report(result, a.out)


if __name__ == "__main__":
    main()
