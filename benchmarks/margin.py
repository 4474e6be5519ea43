"""How long do the margins of labels take, and how much memory: 50,000 samples, and ImageNet's size?

Command:
    python -m benchmarks.margin --out benchmarks/results/margin.json
Synthetic rows of width 512, made block by block by a seeded generator, so that no pass holds them all. The large set
(1,281,167 rows, 1,000 classes) is timed on --part of its rows, and what grows with the rows is scaled up: the three
passes. What does not (choosing λ: five matrices of 1,537 rows, each judged on 8,192 samples) is timed with 16,384 rows
and counted once.
Seconds of processor time are those of all threads; memory is the peak of a fresh process over its size before.

Last measured on two cores of an AMD EPYC that other programs kept busy (load about nine, so processor time tells more
than seconds; numpy 2.4.6, OpenBLAS): 50,000 rows 25 s of processor time (105 s on the clock), 378 MiB. ImageNet's size,
a tenth of it timed: 565 s of processor time (2,011 s on the clock), 546 MiB.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adq_wds.core.label_noise import wrong_shares
from adq_wds.core.margin import ridge_margins
from benchmarks.common import in_own_process, parser, peak_rss_bytes, report

D = 512
SETS = {"cifar": (50_000, 10), "imagenet": (1_281_167, 1_000)}
BLOCK = 8192
FIXED_ROWS = 16384


def main() -> None:
    args = _arguments()
    if args.n:
        print(json.dumps(_measure(args.n, args.classes)))
        return
    result: dict[str, Any] = {}
    for name, (n, classes) in SETS.items():
        part = n if name == "cifar" else int(n * args.part)
        fixed = in_own_process("benchmarks.margin", "--n", str(FIXED_ROWS), "--classes", str(classes))
        timed = in_own_process("benchmarks.margin", "--n", str(part), "--classes", str(classes))
        scale = (n - FIXED_ROWS) / (part - FIXED_ROWS)
        whole = {
            clock: round(fixed[clock] + scale * (timed[clock] - fixed[clock]), 1)
            for clock in ("wall_s", "processor_s")
        }
        peak = fixed["peak_mib"] + scale * (timed["peak_mib"] - fixed["peak_mib"])
        result[name] = {
            "rows": n, "classes": classes, "rows_timed": part, "timed": timed, "whole": whole, "peak_mib": round(peak)
        }  # fmt: skip
    report(result, args.out)


def _measure(n: int, classes: int) -> dict[str, float]:
    """Time and peak memory of one set of margins and the shares that follow from them."""
    label = np.random.default_rng(1).integers(0, classes, n)
    centre = np.random.default_rng(2).normal(size=(classes, D)).astype(np.float32)
    before, began, worked = peak_rss_bytes(), time.perf_counter(), time.process_time()
    margins = ridge_margins(lambda: _rows(label, centre), label)
    fitted = time.perf_counter()
    wrong_shares(margins, label)
    ended = time.perf_counter()
    return {
        "wall_s": round(ended - began, 2),
        "shares_wall_s": round(ended - fitted, 2),
        "processor_s": round(time.process_time() - worked, 2),
        "peak_mib": round((peak_rss_bytes() - before) / 2**20),
    }


def _rows(label: NDArray[np.int64], centre: NDArray[np.float32]) -> Iterator[NDArray[np.float16]]:
    rng = np.random.default_rng(3)
    for start in range(0, len(label), BLOCK):
        rows = centre[label[start : start + BLOCK]]
        rows += 6 * rng.standard_normal(rows.shape, dtype=np.float32)
        yield (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def _arguments() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--part", type=float, default=0.25, help="part of the large set's rows that is timed")
    made.add_argument("--n", type=int, help="measure this many rows here, and print it")
    made.add_argument("--classes", type=int, default=10)
    return made.parse_args()


if __name__ == "__main__":
    main()
