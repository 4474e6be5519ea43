"""How much faster is exact GraphCut than recomputing it, and what does a class of 100,000 samples cost?

Command:
    ADQ_DATA=DIR python -m benchmarks.graphcut --cache features.npy --out benchmarks/results/graphcut.json
DIR holds cifar10/cifar10-train-*.tar; without it the network features are left out. --cache keeps them between runs.

Compared in the same run, same threads, all float64, equal bins asserted (n = 5,000, D = 512, 10 bins, ReLU features
of a seeded rank-64 mixture):
- naive: one kernel, and at each pick the gain of every candidate as two sums over the kernel;
- released form (Zhou et al. 2023, arXiv 2308.10524): for every bin a new kernel over the samples left, its column
  sums cached, and at each pick the similarities of all candidates to all selected samples summed again;
- ours with a Gram matrix, and the selection alone (kernels built outside the timing on both sides).
Then n = 100,000, ours only: the 50,000 CIFAR-10 training images and their mirror images through timm's resnet18 with
seeded random weights at 32 x 32 (D = 512), signed features (rank-64 mixture around a mean) and isotropic Gaussian
ones, each in a fresh process. Memory is the growth of the peak over the process that holds the float16 features.

Last measured on two cores of an AMD EPYC (numpy 2.4.6, OpenBLAS, two threads; ours three runs, the others once): 105 times
faster than naive, 50 times than the released form, 348 times in the selection alone (18 ms). Network features: 13.5 s
(13.4 to 14.7), 794 MiB at the peak beyond the float16 features. Signed features: 8.5 s, 793 MiB. Gaussian features give
a pool nothing to hold on to (one pick a refresh), so rows are taken on demand, quadratic in n: 669 s at 100,000 in one
run while other programs kept the cores busy (`--n 0 --large gaussian`, results/graphcut_gaussian.json), 761 MiB.
"""

from __future__ import annotations

import io
import json
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adq_wds.core.graphcut import Binning, bin_sizes, graphcut_bins, graphcut_bins_gram
from adq_wds.core.kernel import unit_rows
from benchmarks.common import in_own_process, parser, peak_rss_bytes, report, spread

F64 = NDArray[np.float64]
KINDS = ["network", "signed", "gaussian"]


def mixture(
    n: int, *, relu: bool, offset: float, D: int = 512, rank: int = 64, seed: int = 0
) -> NDArray[np.float16]:
    """(n, D) float16 unit rows: 20 clusters in a `rank`-dimensional space, pushed through a random matrix."""
    rng = np.random.default_rng(seed)
    centre, lift = rng.normal(size=(20, rank)), rng.normal(size=(rank, D)) / np.sqrt(rank)
    shift = offset * rng.normal(size=D)
    out = np.empty((n, D), dtype=np.float16)
    for start in range(0, n, 10_000):
        m = min(10_000, n - start)
        x = (centre[rng.integers(0, 20, m)] + rng.normal(size=(m, rank))) @ lift + shift
        x = np.maximum(x, 0) if relu else x
        out[start : start + m] = x / np.linalg.norm(x, axis=1, keepdims=True)
    return out


def similarity(a: F64, b: F64) -> F64:
    """0.5 + 0.5 * cos of every row of one set with every row of another, exact."""
    product: F64 = a @ b.T
    product *= 0.5
    product += 0.5
    return product


def naive(rows: F64, bins: int) -> Binning:
    """Gains as sums over the kernel of what is left, at every pick."""
    kernel = similarity(rows, rows)
    bin_of, pick = np.empty(len(rows), dtype=np.int16), np.empty(len(rows), dtype=np.int32)
    left = np.arange(len(rows))
    for b, size in enumerate(bin_sizes(len(rows), bins).tolist()):
        part = kernel[np.ix_(left, left)]
        selected: list[int] = []
        for k in range(size):
            gain = part.sum(axis=0) - 2.0 * part[selected].sum(axis=0)
            gain[selected] = -np.inf
            u = int(gain.argmax())
            selected.append(u)
            bin_of[left[u]], pick[left[u]] = b, k
        left = np.delete(left, selected)
    return Binning(bin=bin_of, pick=pick)


def released_form(rows: F64, bins: int) -> tuple[Binning, float]:
    """The published program's steps in our words; also the seconds spent outside building kernels."""
    bin_of, pick = np.empty(len(rows), dtype=np.int16), np.empty(len(rows), dtype=np.int32)
    left, seconds = np.arange(len(rows)), 0.0
    for b, size in enumerate(bin_sizes(len(rows), bins).tolist()):
        kernel = similarity(rows[left], rows[left])
        began = time.perf_counter()
        column_sum = kernel.sum(axis=0)
        selected = np.zeros(len(left), dtype=bool)
        for k in range(size):
            gain = np.full(len(left), -np.inf)
            gain[~selected] = column_sum[~selected] - 2.0 * kernel[np.ix_(selected, ~selected)].sum(axis=0)
            u = int(gain.argmax())
            selected[u] = True
            bin_of[left[u]], pick[left[u]] = b, k
        left = left[~selected]
        seconds += time.perf_counter() - began
    return Binning(bin=bin_of, pick=pick), seconds


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = run()
    return time.perf_counter() - began, result


def same(a: Binning, b: Binning) -> bool:
    return np.array_equal(a.bin, b.bin) and np.array_equal(a.pick, b.pick)


def compare(n: int, bins: int, *, runs: int, slow_runs: int) -> dict[str, Any]:
    """Ours against both recomputing forms, runs taken in turn so that a noisy minute meets all of them."""
    rows = unit_rows(mixture(n, relu=True, offset=0.3))
    gram = rows @ rows.T
    times: dict[str, list[float]] = {
        name: [] for name in ("naive", "released", "released_selection", "ours", "ours_selection")
    }
    expected = graphcut_bins(rows, bins)
    for i in range(max(runs, slow_runs)):
        if i < slow_runs:
            seconds, got = timed(lambda: naive(rows, bins))
            assert same(got, expected)
            times["naive"].append(seconds)
            seconds, (got, selection) = timed(lambda: released_form(rows, bins))
            assert same(got, expected)
            times["released"].append(seconds)
            times["released_selection"].append(selection)
        if i < runs:
            times["ours"].append(timed(lambda: graphcut_bins(rows, bins))[0])
            times["ours_selection"].append(timed(lambda: graphcut_bins_gram(gram, bins))[0])
    middle = {name: statistics.median(seconds) for name, seconds in times.items()}
    return {
        "n": n,
        "D": rows.shape[1],
        "bins": bins,
        "bins_equal": True,
        **{f"{name}_s": spread(seconds) for name, seconds in times.items()},
        "times_faster_than_naive": round(middle["naive"] / middle["ours"], 1),
        "times_faster_than_released": round(middle["released"] / middle["ours"], 1),
        "selection_times_faster_than_released": round(
            middle["released_selection"] / middle["ours_selection"], 1
        ),
    }


def resident_bytes() -> int:
    """Resident memory of this process now (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def large(path: str, bins: int) -> dict[str, Any]:
    """One run over stored float16 features; called in a process of its own, so that its peak is its own."""
    embedding = np.load(path)
    before = resident_bytes()
    refreshes: list[int] = []
    rows_s, rows = timed(lambda: unit_rows(embedding))
    cpu = time.process_time()
    bins_s, _ = timed(lambda: graphcut_bins(rows, bins, progress=refreshes.append))
    cpu = time.process_time() - cpu
    assert sum(refreshes) == len(rows)
    return {
        "n": len(rows),
        "D": rows.shape[1],
        "unit_rows_s": round(rows_s, 2),
        "bins_s": round(bins_s, 2),
        "bins_cpu_s": round(cpu, 2),
        "picks_per_refresh": round(len(rows) / len(refreshes), 1),
        "peak_mib_beyond_features": round((peak_rss_bytes() - before) / 2**20),
    }


def network_features(data: Path) -> NDArray[np.float16]:
    """(2N, 512) float16: CIFAR-10 training images, then their mirror images, through a seeded resnet18."""
    import timm
    import torch
    from PIL import Image

    torch.manual_seed(0)
    net = timm.create_model("resnet18", pretrained=False, num_classes=0).eval()
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    images = []
    for path in sorted((data / "cifar10").glob("cifar10-train-*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".jpg"):
                    images.append(np.asarray(Image.open(io.BytesIO(tar.extractfile(member).read()))))  # type: ignore[union-attr]
    pixels = np.stack(images)  # (N, 32, 32, 3)
    out = []
    with torch.inference_mode():
        for view in (pixels, pixels[:, :, ::-1]):
            for start in range(0, len(view), 500):
                x = torch.from_numpy(view[start : start + 500].copy()).permute(0, 3, 1, 2).float() / 255
                h = net((x - mean) / std)
                out.append((h / h.norm(dim=1, keepdim=True)).half().numpy())
    return np.concatenate(out)


def stored(kind: str, n: int, folder: str, data: str | None, cache: Path | None) -> str | None:
    """Path of the (n, 512) float16 features of one kind, made if need be; None where there is no data for it."""
    path = str(Path(folder) / f"{kind}.npy")
    if kind == "network":
        if cache is not None and cache.exists():
            return str(cache)
        if data is None:
            return None
        path = str(cache or path)
        np.save(path, network_features(Path(data)))
    elif kind == "signed":
        np.save(path, mixture(n, relu=False, offset=1.0))
    else:
        x = np.random.default_rng(0).standard_normal((n, 512), dtype=np.float32)
        np.save(path, (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16))
    return path


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--n", type=int, default=5_000, help="samples in the comparison; 0 leaves it out")
    arguments.add_argument("--bins", type=int, default=10)
    arguments.add_argument("--slow-runs", type=int, default=3, help="runs of the forms compared with")
    arguments.add_argument(
        "--large-n", type=int, default=100_000, help="samples of the synthetic large cases"
    )
    arguments.add_argument("--large", nargs="*", default=KINDS, choices=KINDS, help="large cases to run")
    arguments.add_argument("--data", default=os.environ.get("ADQ_DATA"), help="folder that holds cifar10/")
    arguments.add_argument(
        "--cache", type=Path, help="npy file in which network features are kept between runs"
    )
    arguments.add_argument("--one", help="run one large case on this npy file, in this process")
    args = arguments.parse_args()
    if args.one:
        print(json.dumps(large(args.one, args.bins)))
        return
    # A shared machine shows here: more than the cores means that wall times are too long.
    result: dict[str, Any] = {
        "threads": os.environ.get("OPENBLAS_NUM_THREADS", "all"),
        "load_at_start": os.getloadavg()[0],
    }
    if args.n:
        result["compare"] = compare(args.n, args.bins, runs=args.runs, slow_runs=args.slow_runs)
    with tempfile.TemporaryDirectory() as folder:
        for kind in args.large:
            path = stored(kind, args.large_n, folder, args.data, args.cache)
            if path is None:
                print(f"{kind}: left out, give --data or --cache")
                continue
            repeats = args.runs if kind == "network" else 1  # only it has a target
            one = ("--one", path, "--bins", str(args.bins))
            runs = [in_own_process("benchmarks.graphcut", *one) for _ in range(repeats)]
            total = [run["bins_s"] + run["unit_rows_s"] for run in runs]
            result[kind] = {**runs[-1], "runs": repeats, "rows_and_bins_s": spread(total)}
            print(kind, result[kind], flush=True)
    result["load_at_end"] = os.getloadavg()[0]
    report(result, args.out)


if __name__ == "__main__":
    main()
