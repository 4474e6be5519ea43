"""How fast does a codebook assign samples to bins, how often as the exact greedy would, and does it keep what is asked?

Speed: network-like features of width 512 (a seeded rank-64 mixture), ten bins of eight checkpoints, 10 and 1,000 classes,
against the same products in float64 alone; then the pipe `AssignBins` on samples in memory.
Agreement: every class of CIFAR-10 train, 5,000 images, is binned whole by exact GraphCut; rules fitted on 1,000 of them
(three draws, and larger and smaller pilots) bin the others. Against them, quantiles of the similarity to the pilot's
mean, the cheap rule that one would try first.
Kept part: a codebook fitted on eight of the ten training shards, on the two others and on the test shards, expected (mean
rate) and drawn, as a ratio to what was asked; with ADQ's rates, and with steep ones (weights 1 to 10 by bin), where it
matters how many samples fall into which bin.

    python -m benchmarks.codebook --data DATA --out benchmarks/results/codebook.json

Last measured (two cores of an AMD EPYC that other programs kept busy, load 3 to 5; Python 3.11, numpy 2.4; five runs): one
thread takes 2.0 us of a core for a sample, and assigned 207,000 a second (87,000 to 208,000; 366,000 and 190,000 in two runs
before), six times the products in float64 alone; with 1,000 classes 2.5 us and 251,000. Two BLAS threads on busy cores wait
for each other: 75,000 to 689,000, and 15,000 with 1,000 classes; there OPENBLAS_NUM_THREADS=1 is faster. The pipe takes 14
to 29 us, most of it Python. At pilot 1,000: the same bin as exact binning for 74.3 % (`builtin-free`; `thumbnail` 83.0 %),
within one bin 99.5 % (99.96 %), quantiles 48.1 % (68.3 %) and 87.8 % (98.6 %). The mean rate on shards left out is within
0.05 % of `keep`, within 1 % with steep rates; drawn at keep 0.3 from 10,000 samples, within 2.8 % over ten seeds.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import adq_wds as adq
from adq_wds.core.codebook import Checkpoints, bin_checkpoints
from adq_wds.core.graphcut import graphcut_bins
from adq_wds.core.kernel import unit_rows
from adq_wds.core.rng import draws
from benchmarks.common import data_folder, in_own_process, parser, report, seconds, spread

WIDTH, BINS, CHECKPOINTS, PILOT, RANK = 512, 10, 8, 1000, 64
N_SPEED = 200_000
ENCODERS = ("builtin-free", "thumbnail")
Half = NDArray[np.float16]


def mixture(n: int, c: int, seed: int) -> Half:
    """(n, 512) ReLU features of class c."""
    of_class, own = np.random.default_rng(c), np.random.default_rng([c, seed])
    basis = of_class.standard_normal((RANK, WIDTH), dtype=np.float32)
    centre = of_class.standard_normal(RANK, dtype=np.float32)
    hidden = centre + own.standard_normal((n, RANK), dtype=np.float32)
    h = np.maximum(hidden @ basis + own.standard_normal((n, WIDTH), dtype=np.float32), 0)
    unit: Half = (h / np.linalg.norm(h, axis=1, keepdims=True)).astype(np.float16)
    return unit


def rule(embedding: Half, checkpoints: int = CHECKPOINTS) -> tuple[Any, Any]:
    """Queries and thresholds of one class."""
    rows = unit_rows(embedding)
    return bin_checkpoints(rows, graphcut_bins(rows, BINS), checkpoints)


def speed(runs: int, n_classes: int) -> dict[str, Any]:
    """Samples a second, all classes mixed."""
    per_class = N_SPEED // n_classes
    made = [rule(mixture(PILOT if n_classes <= 10 else 200, c, 0)) for c in range(n_classes)]
    rules = Checkpoints(np.stack([q for q, _ in made]), np.stack([t for _, t in made]))
    x = np.concatenate([mixture(per_class, c, 1) for c in range(n_classes)])
    row = np.repeat(np.arange(n_classes), per_class)
    order = np.random.default_rng(0).permutation(len(x))
    x, row = x[order], row[order]
    by_class = np.argsort(row, kind="stable")
    sorted_x, sorted_row = x[by_class].astype(np.float32), row[by_class]
    found_exact = np.empty_like(row)

    def exact() -> None:
        for start in range(0, len(x), 8192):
            part = slice(start, start + 8192)
            found_exact[by_class[part]] = rules._exact(sorted_x[part], sorted_row[part])

    found = rules.assign(x, row)
    fast, slow, cpu = [], [], []
    for _ in range(runs):  # in turn, since other programs come and go
        start = time.process_time()
        fast += [len(x) / t for t in seconds(lambda: rules.assign(x, row), 1)]
        cpu.append((time.process_time() - start) / len(x) * 1e6)
        slow += [len(x) / t for t in seconds(exact, 1)]
    assert (found == found_exact).all()
    return {
        "samples_a_second": spread(fast),
        "in_float64_alone": spread(slow),
        "cpu_us_a_sample": spread(cpu),
    }


def pipe_speed(runs: int) -> dict[str, float]:
    """Microseconds a sample of `AssignBins`, one class after another at random, ten classes."""
    made = [rule(mixture(PILOT, c, 0)) for c in range(10)]
    query = np.stack([made[0][0], *(q for q, _ in made)])
    codebook = adq.Codebook(
        query,
        np.stack([made[0][1], *(t for _, t in made)]),
        np.arange(-1, 10, dtype=np.int32),
        np.ones((11, BINS), dtype=np.int64),
        np.ones((11, BINS)),
        {
            "encoder": "mixture", "revision": "", "preprocessing_hash": "", "label": "cls", "features": "",
            "classes": list(range(10)), "names": None, "settings": {}, "scores": {},
        },
    )  # fmt: skip
    x = np.concatenate([mixture(500, c, 1) for c in range(10)])
    label = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 500))
    samples = [
        {
            "__key__": str(i),
            "__url__": "a.tar",
            "cls": str(c).encode(),
            "emb.npy": v,
            "__adq_encoder__": codebook.encoder,
        }
        for i, (v, c) in enumerate(zip(x, label.tolist(), strict=True))
    ]
    pipe = adq.AssignBins(codebook)
    return spread([t / len(samples) * 1e6 for t in seconds(lambda: sum(1 for _ in pipe(samples)), runs)])


def agreement(features: adq.Features, pilots: list[tuple[int, int, int]]) -> dict[str, Any]:
    """Means over classes and draws, for (pilot, checkpoints, number of draws)."""
    label = np.concatenate([file.read_columns(["label"])["label"].to_numpy() for file in features])
    embedding = np.concatenate([file.embedding() for file in features])
    results: dict[str, list[list[float]]] = {}
    for c in np.unique(label).tolist():
        mine = embedding[label == c]
        rows = unit_rows(mine)
        full = graphcut_bins(rows, BINS).bin.astype(np.int64)
        for n, checkpoints, n_draws in pilots:
            for seed in range(n_draws):
                order = np.random.default_rng([seed, c]).permutation(len(mine))
                pilot, rest = np.sort(order[:n]), order[n:]
                query, threshold = rule(mine[pilot], checkpoints)
                found = Checkpoints(query[None], threshold[None]).assign(
                    mine[rest], np.zeros(len(rest), dtype=int)
                )
                mean = rows[pilot].sum(axis=0)
                edges = np.quantile(rows[pilot] @ mean, np.arange(BINS - 1, 0, -1) / BINS)
                central = (rows[rest] @ mean < edges[:, None]).sum(axis=0)
                name = f"pilot {n}, {checkpoints} checkpoints"
                results.setdefault(name, []).append(compared(found.astype(np.int64), full[rest]))
                results.setdefault(f"quantiles, pilot {n}", []).append(compared(central, full[rest]))
    names = ("same_bin", "within_one", "last_bin_times_its_share")
    means = {key: np.round(np.array(values).mean(axis=0), 4).tolist() for key, values in results.items()}
    return {key: dict(zip(names, values, strict=True)) for key, values in means.items()}


def compared(found: NDArray[np.int64], full: NDArray[np.int64]) -> list[float]:
    """Same bin, within one bin, and how much fuller the last bin is than its share."""
    off = np.abs(found - full)
    return [float((off == 0).mean()), float((off <= 1).mean()), float((found == BINS - 1).mean() * BINS)]


def kept(folder: Path, fitted: list[str], held: dict[str, list[str]]) -> dict[str, Any]:
    """Kept part over what was asked, of shards that the fit has not seen."""

    def steep(size: NDArray[np.int64], importance: NDArray[np.float64], keep: float) -> NDArray[np.float64]:
        return size * np.arange(1.0, len(size) + 1)

    results: dict[str, Any] = {}
    rules: dict[str, Any] = {"adaptive": "adaptive", "steep": steep}
    for name, allocation in rules.items():
        for pilot in (PILOT, 100):
            codebook = adq.fit_codebook(
                adq.Features(folder, shards=fitted),
                pilot=pilot,
                min_pilot=100,
                allocation=allocation,
                progress=False,
            )
            for where, shards in held.items():
                for keep in (0.3, 0.6):
                    expected, drawn = ratios(codebook, adq.Features(folder, shards=shards), keep)
                    entry = {"expected": round(expected, 4), "drawn": spread(drawn, 4)}
                    results[f"{name}, pilot {pilot}, {where}, keep {keep}"] = entry
            half = np.full((len(codebook.label), BINS), 1 / BINS)
            even = float((codebook.rates(0.3)[1:] * codebook.frequency()[1:]).sum(axis=1).mean())
            weight = codebook.weight / (codebook.weight * half).sum(axis=1, keepdims=True)
            naive = float((np.minimum(1, 0.3 * weight[1:]) * codebook.frequency()[1:]).sum(axis=1).mean())
            results[f"{name}, pilot {pilot}: rates for even bins would keep, of 0.3"] = round(naive / even, 4)
    return results


def ratios(codebook: adq.Codebook, features: adq.Features, keep: float) -> tuple[float, list[float]]:
    """Mean rate over `keep`, and kept over asked for ten seeds."""
    rates = codebook.rates(keep)
    per_sample, u = [], []
    for file in features:
        label = file.read_columns(["label"])["label"].to_numpy()
        row = np.array([codebook.row(c) or 0 for c in label.tolist()])
        per_sample.append(rates[row, codebook.checkpoints.assign(file.embedding(), row)])
        keys = file.read_columns(["key"])["key"].to_pylist()
        u.append([draws(seed, 0, file.shard, keys, purpose="keep") / 2.0**64 for seed in range(10)])
    rate = np.concatenate(per_sample)
    drawn = (np.concatenate(u, axis=1) < rate).mean(axis=1) / keep
    return float(rate.mean() / keep), drawn.tolist()


def main() -> None:
    """Measure."""
    arguments = parser(__doc__)
    arguments.set_defaults(runs=7)
    arguments.add_argument("--data", default=os.environ.get("ADQ_DATA"))
    arguments.add_argument(
        "--features", help="folder with a folder of features for each encoder; kept for other runs"
    )
    arguments.add_argument("--speed", type=int, help="only the speed with so many classes, in this process")
    a = arguments.parse_args()
    if a.speed is not None:
        load = {"load_average": round(os.getloadavg()[0], 1)}
        print(json.dumps({**speed(a.runs, a.speed), "pipe_us_a_sample": pipe_speed(a.runs), **load}))
        return
    data = data_folder("cifar10", a.data)
    train, test = (sorted(str(p) for p in data.glob(f"cifar10-{s}-*.tar")) for s in ("train", "test"))
    result: dict[str, Any] = {"settings": {"width": WIDTH, "bins": BINS, "checkpoints": CHECKPOINTS}}
    for n_classes, runs in ((10, a.runs), (1000, min(3, a.runs))):
        for threads in ("1", "2"):  # read by BLAS when it is loaded, so each in a process of its own
            os.environ.update(OMP_NUM_THREADS=threads, OPENBLAS_NUM_THREADS=threads)
            found = in_own_process("benchmarks.codebook", "--speed", str(n_classes), "--runs", str(runs))
            result[f"{n_classes} classes, {threads} thread{'s' * (threads != '1')}"] = found
    with tempfile.TemporaryDirectory() as scratch:
        for encoder in ENCODERS:
            folder = Path(a.features or scratch) / encoder
            adq.embed_shards([*train, *test], encoder, folder, progress=False)
            names = [Path(path).name for path in train]
            result[encoder] = {
                "agreement": agreement(
                    adq.Features(folder, shards=names),
                    [(PILOT, CHECKPOINTS, 3), (PILOT, 4, 3), (PILOT, 16, 3), (500, CHECKPOINTS, 1), (100, CHECKPOINTS, 1), (4000, CHECKPOINTS, 1)],
                ),
                "kept": kept(
                    folder, names[:8], {"train": names[8:], "test": [Path(path).name for path in test]}
                ),
            }  # fmt: skip
    report(result, a.out)


if __name__ == "__main__":
    main()
