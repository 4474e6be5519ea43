"""How much faster are bins by gradients when the gradients are never built?

Command:
    python -m benchmarks.gradient --slow-runs 1 --out benchmarks/results/gradient.json

Compared in the same run, same threads, all float64, one class of n = 5,000, C = 10, D = 512, 10 bins (ReLU features of a
seeded rank-64 mixture in 20 clusters, norms around 12, logits of a random linear head that prefers the class):
- released form (Zhou et al. 2023, arXiv 2308.10524): for every bin the gradients of the samples left, each C * (D + 1)
  = 5,130 wide, and a new kernel of them; then its column sums cached, and at each pick the similarities of all
  candidates to all selected samples summed again. Its kernel is rounded to multiples of 2^-33 as ours is (cosines to
  2^-32), so that bins may be compared; entries of the first kernel and samples that differ are counted. The symmetric
  form is the same with one gather, so that the BLAS computes half of each kernel: kinder than what was released;
- ours: from the stored float16 arrays to bins.
The selection alone is timed on both sides too. Then ten such classes one after another (CIFAR-10), and one class of
12,000 whose matrix is over the memory budget, so that rows are taken on demand, each in a fresh process. Memory is the
growth of the peak over the process that holds the float16 arrays. On a machine that others use, set
OPENBLAS_NUM_THREADS=1 and read CPU seconds: threads wait for one another.

Last measured on two cores of an AMD EPYC (numpy 2.4.6, OpenBLAS, two threads; the released forms once, ours three times):
same bins and order, 12 of 25 million kernel entries one step apart; 0.31 s (0.29 to 0.53), 56 times faster than the
released form (17.4 s), 44 times faster than its symmetric form, the selection alone 353 times. Ten classes: 2.9 s (2.9 to
3.2), 233 MiB at the peak beyond the float16 arrays. 12,000 samples by rows on demand: 6.2 s, 131 MiB.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adq_wds.core.gradient import GradientKernel, gradient_bins, logit_gradients
from adq_wds.core.graphcut import Binning, bin_sizes, graphcut_bins_gram
from adq_wds.core.kernel import unit_rows
from benchmarks.common import in_own_process, parser, peak_rss_bytes, report, spread
from benchmarks.graphcut import mixture, resident_bytes, same, timed

F64 = NDArray[np.float64]
Stored = tuple[NDArray[np.float16], NDArray[np.float32], NDArray[np.float16]]
C, D = 10, 512


def stored(n: int, label: int) -> Stored:
    """One class as features files hold it: logit gradients (n, C), norms (n,), embeddings (n, D)."""
    embedding = mixture(n, relu=True, offset=0.3, D=D, seed=label)
    rng = np.random.default_rng([label, 1])
    norm = rng.lognormal(np.log(12.0), 0.2, size=n).astype(np.float32)
    head = 0.5 * np.random.default_rng(2).normal(size=(D, C))
    logits = (embedding.astype(np.float64) * norm[:, None]) @ head
    logits -= logits.mean(axis=0)
    logits[:, label] += 10.0
    return logit_gradients(logits, np.full(n, label)).astype(np.float16), norm, embedding


def kernel_of(
    logit_grad: NDArray[np.float16], norm: NDArray[np.float32], embedding: NDArray[np.float16]
) -> GradientKernel:
    """The kernel of what features files hold."""
    return GradientKernel.from_rows(unit_rows(logit_grad), norm, unit_rows(embedding))


def gradients(kernel: GradientKernel, left: NDArray[np.int64]) -> F64:
    """(samples left, C * (D + 1)) last-layer gradients, of length 1 up to the rounding of the factors."""
    last_layer = np.column_stack([kernel.a[left], kernel.c[left, None] * kernel.h[left]])
    e: F64 = kernel.b[left][:, :, None] * last_layer[:, None, :]
    return e.reshape(len(left), -1)


def similarities(e: F64, *, symmetric: bool) -> F64:
    """(n, n) 0.5 + 0.5 * cos, rounded as ours is."""
    cos: F64 = e @ (e.T if symmetric else e.copy().T)  # two gathers, as released: the BLAS sees two matrices
    cos *= 2.0**32
    np.rint(cos, out=cos)
    cos *= 2.0**-33
    cos += 0.5
    return cos


def released_form(kernel: GradientKernel, bins: int, *, symmetric: bool) -> tuple[Binning, float]:
    """The published program's steps in our words; also the seconds spent outside building gradients and kernels."""
    n = len(kernel)
    bin_of, pick = np.empty(n, dtype=np.int16), np.empty(n, dtype=np.int32)
    left, seconds = np.arange(n), 0.0
    for b, size in enumerate(bin_sizes(n, bins).tolist()):
        similarity = similarities(gradients(kernel, left), symmetric=symmetric)
        began = time.perf_counter()
        column_sum = similarity.sum(axis=0)
        selected = np.zeros(len(left), dtype=bool)
        for k in range(size):
            gain = np.full(len(left), -np.inf)
            gain[~selected] = column_sum[~selected] - 2.0 * similarity[np.ix_(selected, ~selected)].sum(
                axis=0
            )
            u = int(gain.argmax())
            selected[u] = True
            bin_of[left[u]], pick[left[u]] = b, k
        left = left[~selected]
        seconds += time.perf_counter() - began
    return Binning(bin=bin_of, pick=pick), seconds


def clocked(run: Callable[[], Any]) -> tuple[float, float, Any]:
    """Wall seconds, CPU seconds over all threads, result."""
    cpu = time.process_time()
    seconds, result = timed(run)
    return seconds, time.process_time() - cpu, result


def compare(n: int, bins: int, *, runs: int, slow_runs: int) -> dict[str, Any]:
    """Ours against the released form, runs taken in turn so that a noisy minute meets all of them."""
    arrays = stored(n, 0)
    kernel = kernel_of(*arrays)
    matrix = kernel.matrix()
    explicit = similarities(gradients(kernel, np.arange(n)), symmetric=True)
    differ = int(np.count_nonzero(explicit != 0.5 + 0.5 * matrix))
    del explicit
    work: dict[str, Callable[[], Any]] = {
        "released": lambda: released_form(kernel, bins, symmetric=False),
        "symmetric": lambda: released_form(kernel, bins, symmetric=True),
        "ours": lambda: gradient_bins(kernel_of(*arrays), bins),
        "ours_matrix": kernel.matrix,
        "ours_selection": lambda: graphcut_bins_gram(matrix, bins),
    }
    times: dict[str, list[float]] = {f"{name}{clock}": [] for name in work for clock in ("", "_cpu")}
    times["released_selection"] = []
    expected = gradient_bins(kernel, bins)
    other_bin, equal = 0, True
    for i in range(max(runs, slow_runs)):
        for name, run in work.items():
            slow = name in ("released", "symmetric")
            if i >= (slow_runs if slow else runs):
                continue
            seconds, cpu, result = clocked(run)
            times[name].append(seconds)
            times[f"{name}_cpu"].append(cpu)
            if slow:
                got, selection = result
                times["released_selection"].append(selection)
                other_bin = max(other_bin, int(np.count_nonzero(got.bin != expected.bin)))
                equal = equal and same(got, expected)
    middle = {name: statistics.median(seconds) for name, seconds in times.items()}
    return {
        "n": n,
        "C": C,
        "D": D,
        "bins": bins,
        "kernel_entries_that_differ": differ,
        "samples_in_another_bin": other_bin,
        "bins_and_order_equal": equal,
        **{f"{name}_s": spread(seconds) for name, seconds in times.items()},
        "times_faster_than_released": round(middle["released"] / middle["ours"], 1),
        "times_faster_than_symmetric": round(middle["symmetric"] / middle["ours"], 1),
        "times_less_cpu_than_released": round(middle["released_cpu"] / middle["ours_cpu"], 1),
        "times_less_cpu_than_symmetric": round(middle["symmetric_cpu"] / middle["ours_cpu"], 1),
        "selection_times_faster": round(middle["released_selection"] / middle["ours_selection"], 1),
    }


def classes(n: int, n_classes: int, bins: int) -> dict[str, Any]:
    """Ours on classes one after another; called in a process of its own, so that its peak is its own."""
    data = [stored(n, label) for label in range(n_classes)]
    before = resident_bytes()
    seconds, cpu, _ = clocked(lambda: [gradient_bins(kernel_of(*one), bins) for one in data])
    return {
        "n": n,
        "classes": n_classes,
        "seconds": round(seconds, 2),
        "cpu_s": round(cpu, 2),
        "peak_mib_beyond_features": round((peak_rss_bytes() - before) / 2**20),
    }


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--n", type=int, default=5_000, help="samples in a class")
    arguments.add_argument("--bins", type=int, default=10)
    arguments.add_argument(
        "--slow-runs", type=int, default=3, help="runs of the forms compared with; 0 leaves them out"
    )
    arguments.add_argument(
        "--large-n", type=int, default=12_000, help="samples of the large class; 0 leaves it out"
    )
    arguments.add_argument("--one", type=int, help="bin so many classes of --n samples, in this process")
    args = arguments.parse_args()
    if args.one:
        print(json.dumps(classes(args.n, args.one, args.bins)))
        return
    # A shared machine shows here: more than the cores means that wall times are too long.
    result: dict[str, Any] = {
        "threads": os.environ.get("OPENBLAS_NUM_THREADS", "all"),
        "load_at_start": os.getloadavg()[0],
    }
    if args.slow_runs:
        result["compare"] = compare(args.n, args.bins, runs=args.runs, slow_runs=args.slow_runs)
        print(result["compare"], flush=True)
    for name, n, count, repeats in (("ten_classes", args.n, 10, args.runs), ("large", args.large_n, 1, 1)):
        if n:
            one = ("--n", str(n), "--one", str(count), "--bins", str(args.bins))
            runs = [in_own_process("benchmarks.gradient", *one) for _ in range(repeats)]
            result[name] = {**runs[-1], "runs": repeats, "seconds": spread([run["seconds"] for run in runs])}
            print(name, result[name], flush=True)
    result["load_at_end"] = os.getloadavg()[0]
    report(result, args.out)


if __name__ == "__main__":
    main()
