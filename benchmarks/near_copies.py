"""How long does it take to find near copies among 100,000 samples of one class, and how much memory?

Command:
    python -m benchmarks.near_copies --out benchmarks/results/near_copies.json
Seeded rows of width 512, a tenth of them near copies of earlier ones; cosine 0.995. Memory is the growth of the peak
over the process that holds the float16 features, the float64 rows among it.

Last measured on two cores of an AMD EPYC that other programs kept busy (load about ten): 74 s of processor time (252 s on
the clock), 616 MiB.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from adq_wds.core.kernel import unit_rows
from adq_wds.core.near_copies import near_copies
from benchmarks.common import parser, peak_rss_bytes, report
from benchmarks.graphcut import mixture


def main() -> None:
    args = _arguments()
    features = mixture(args.n, relu=True, offset=0.0)
    rng = np.random.default_rng(4)
    copy = rng.choice(np.arange(args.n // 2, args.n), args.n // 10, replace=False)
    noise = (0.02 / np.sqrt(features.shape[1])) * rng.normal(size=(len(copy), features.shape[1]))
    features[copy] = features[rng.integers(0, args.n // 2, len(copy))] + noise
    before, began, worked = peak_rss_bytes(), time.perf_counter(), time.process_time()
    first = near_copies(unit_rows(features), args.threshold)
    result = {
        "rows": args.n,
        "threshold": args.threshold,
        "copies_made": len(copy),
        "copies_found": int((first != np.arange(args.n)).sum()),
        "wall_s": round(time.perf_counter() - began, 1),
        "processor_s": round(time.process_time() - worked, 1),
        "peak_mib": round((peak_rss_bytes() - before) / 2**20),
    }
    report(result, args.out)


def _arguments() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--n", type=int, default=100_000)
    made.add_argument("--threshold", type=float, default=0.995)
    return made.parse_args()


if __name__ == "__main__":
    main()
