"""What does the one added line cost a WebDataset pipeline, and how fast does a plan open?

`Subsample` in µs a sample when it keeps everything, alone over samples that are in memory, with and without checksums,
against a stage that only passes samples on; and as a share of stock WebDataset reading the same shard. Opening a plan
of 20,000 rows, its header and one shard's rows, in ms.

    python -m benchmarks.pipes --data DATA --out benchmarks/results/pipes.json

Last measured (two cores of an AMD EPYC, Python 3.11, numpy 2.4; nine runs): 1.7 us a sample, 0.6 without checksums; a stage that only copies the dict takes
0.2, and WebDataset itself 36 to read the sample. A plan of 20,000 rows opens in 0.7 ms, with one shard's rows in 3.3 ms.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import webdataset as wds

import adq_wds as adq
from benchmarks.common import data_folder, parser, report, seconds, spread


def passing(stream: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The cheapest stage: a new dict for every sample."""
    for sample in stream:
        yield dict(sample)


def drain(stream: Iterable[Any]) -> None:
    """Use a stream up."""
    for _ in stream:
        pass


def main() -> None:
    """Measure."""
    arguments = parser(__doc__)
    arguments.set_defaults(runs=9)
    arguments.add_argument("--data", default=os.environ.get("ADQ_DATA"))
    a = arguments.parse_args()
    shards = [str(path) for path in sorted(data_folder("cifar10", a.data).glob("*train*.tar"))[:4]]
    samples = list(wds.WebDataset(shards, shardshuffle=False))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.parquet"
        adq.Plan.from_keys(shards, [s["__key__"] for s in samples]).save(path)
        plan = adq.load_plan(path)
        drain(adq.Subsample(plan)(samples))  # rows read, caches warm
        n = len(samples)
        found: dict[str, list[float]] = {}
        for _ in range(a.runs):
            stages: dict[str, Callable[[Any], Iterator[Any]]] = {
                "subsample": adq.Subsample(plan),
                "subsample_without_checksums": adq.Subsample(plan, verify=False),
                "passing_on": passing,
            }
            for name, stage in stages.items():
                taken = seconds(lambda: drain(stage(samples)), 1)
                found.setdefault(f"{name}_us", []).extend(t / n * 1e6 for t in taken)
            read = seconds(lambda: drain(wds.WebDataset(shards[:1], shardshuffle=False)), 1)
            found.setdefault("webdataset_reads_us", []).extend(t / 5000 * 1e6 for t in read)
            found.setdefault("open_plan_ms", []).extend(
                t * 1e3 for t in seconds(lambda: adq.load_plan(path), 1)
            )
            first = Path(shards[0]).name
            rows = seconds(lambda: adq.load_plan(path).shard(first).by_key, 1)
            found.setdefault("open_plan_and_one_shard_ms", []).extend(t * 1e3 for t in rows)
    report({"samples": n, **{name: spread(values) for name, values in found.items()}}, a.out)


if __name__ == "__main__":
    main()
