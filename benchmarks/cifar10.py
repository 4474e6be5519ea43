"""How long does `adq run` take on CIFAR-10, start to end, and what does the plan look like?

The ten training shards with `thumbnail` at keep 0.2, as a user calls it (a process of its own, imports included); then
the same folder at keep 0.1, which reuses features and bins; and how many of the kept samples a stock WebDataset loop
with `Subsample` reads. Then, untimed, the rates of the ten bins with each encoder that comes with the package.

    python -m benchmarks.cifar10 --data DATA --out benchmarks/results/cifar10.json

Last measured (two cores of an AMD EPYC, Python 3.11, numpy 2.4; three runs): 6.3 s (6.1 to 6.7), and 0.4 s for another
ratio; 10,000 of 50,000 samples, 1,000 of each class. At alpha = 0.65 the rates of the bins around 0.200 run from 0.182 to
0.212 with `thumbnail`, from 0.196 to 0.206 with `builtin-free`, and are 0.200 in every bin with `builtin`, whose bins,
pooled over ten classes that it tells apart, are all equally diverse and textured.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import webdataset as wds

import adq_wds as adq
from adq_wds.models import SHIPPED_ENCODERS
from benchmarks.common import data_folder, parser, report, seconds, spread


def main() -> None:
    """Run, run again, read."""
    arguments = parser(__doc__)
    arguments.add_argument("--data", default=os.environ.get("ADQ_DATA"))
    a = arguments.parse_args()
    shards = sorted(str(path) for path in data_folder("cifar10", a.data).glob("cifar10-train-*.tar"))
    first, again = [], []
    for _ in range(a.runs):
        with tempfile.TemporaryDirectory() as out:
            command = [
                sys.executable,
                "-m",
                "adq_wds",
                "run",
                *shards,
                "-o",
                out,
                "-q",
                "--encoder",
                "thumbnail",
                "--keep",
            ]
            quiet = {"check": True, "stdout": subprocess.DEVNULL}
            first += seconds(lambda: subprocess.run([*command, "0.2"], **quiet), 1)  # type: ignore[call-overload]
            plan = adq.load_plan(Path(out) / "plan.parquet")
            read = [
                s["__key__"] for s in wds.WebDataset(shards, shardshuffle=False).compose(adq.Subsample(plan))
            ]
            assert read == plan.keys()
            again += seconds(lambda: subprocess.run([*command, "0.1"], **quiet), 1)  # type: ignore[call-overload]
    rates = {}
    for name in SHIPPED_ENCODERS:
        with tempfile.TemporaryDirectory() as out:
            features = adq.embed_shards(shards, name, out, progress=False)
            made = adq.build_plan(features, bins=10, keep=0.2, progress=False)
            rates[name] = [row["rate"] for row in made.header["bins"]]
    result = {
        "samples": plan.n_samples,
        "kept": plan.n_kept,
        "kept_per_class": sorted({entry["kept"] for entry in plan.header["classes"]}),
        "run_s": spread(first),
        "run_again_at_another_keep_s": spread(again),
        "rates_of_the_bins": rates,
        "texture_all_kept": [plan.header["texture"]["all"], plan.header["texture"]["kept"]],
        "read_by_webdataset": len(read),
    }
    report(result, a.out)


if __name__ == "__main__":
    main()
