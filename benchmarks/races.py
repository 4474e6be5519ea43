"""Do other libraries pick in the same order as our exact GraphCut, and what do the same picks cost in each of them?

Command, the peers in the same environment (`pip install -e ".[bench]"`; one that is missing is left out, with the reason):
    ADQ_DATA=DIR python -m benchmarks.races --features FOLDER --out benchmarks/results/races.json
DIR holds cifar10/cifar10-train-*.tar: the rows are `builtin-free` embeddings of the first n images of class 0, kept in
FOLDER between runs (a seeded mixture without the data). `--limit 1000 --n 5000` also waits for the slow ones.

Compared in the same run, each contestant in a process of its own, on the same rows and threads. All are handed the
kernel 0.5 + 0.5 cos in float64, but for `ours` and `ours-pool`, which start at the rows and include what they need:
- ours: `graphcut_bins`, with a Gram matrix inside; ours-gram: `graphcut_bins_gram`, handed the kernel; ours-pool: no
  matrix at all (`memory_bytes=0`).
- submodlib (`submodlib-py`, GraphCutFunction, dense, lambdaVal=1): gain(x) = sum over V of s(v, x) - 2 sum over S of
  s(u, x) - s(x, x). The kernel is turned into Python lists, then into two float32 copies; sums and gains are float64.
  Each gain copies the set of picks so far, so a full order is cubic. It never gives the last pick (budget < n); that one
  is forced. Ties go by the order of a C++ hash set.
- apricot (`apricot-select`, GraphCutSelection, precomputed, alpha=1): the same gain, all in float64. The naive form sorts
  all gains at every pick; its ties go to the lowest position, as ours do, those of lazy and two-stage by a queue. As it
  comes, each call compiles a function that only its streaming form uses: numba is switched off for the times here, and
  `call_s`, a call on 16 rows before that, is what each bin costs on top.
Both take s(x, x) away, so the sample itself does not count; with it the gains of unit rows differ by a constant, and of
rows rounded to 2^-16 by about 1e-5. One bin (K = 1) is an order of all n; for ten bins the peers are called anew on what
is left, and their last bin is ordered too, as ours is.

How orders are compared: positions that agree with ours; the first that does not; and by replaying a peer's own picks with
exact gains, how far each of them is below the best candidate at that moment, against the float32 spacing at the size of
the sums (`float32`): below it the pick is a near-tie. `on_their_terms` repeats this with our greedy on exactly what the
peer works on: the diagonal set to 1, and for submodlib the kernel rounded to float32.

Memory is the growth of the peak over the process that holds the libraries and the rows; the kernel is in it. A run that
would take longer than `--limit`, by the cube of n, is left out, and repeats stop there.

Last measured on two cores of an AMD EPYC (numpy 2.4.6, submodlib-py 0.0.3, apricot-select 0.6.1, D = 256, medians of up to
three runs). On their terms every peer that ran gives our order, position by position, at every n and K. On the kernel as it
is the diagonal moves one pick of 1,000 and three of 5,000 (K = 1; none for K = 10) by at most 4e-5, below float32's spacing;
at least 99.8 % of the positions agree. Ten bins of 5,000, kernel included: ours 0.15 s and 203 MiB (the kernel is 191), the
fastest peer, apricot-naive, 1.6 s and 357 MiB (and ten calls' compiling, 0.6 s each, on top); of 2,000: ours 0.05 s,
apricot-naive 0.22 s, submodlib-lazy 3.0 s and 236 MiB. The selection alone at 5,000: ours 0.029 s, apricot-naive 1.4 s. One
bin of 1,000: ours 0.013 s, apricot-naive 0.038 s, submodlib-lazy 3.7 s. ours-pool takes 0.28 s and 17 MiB at 5,000.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import adq_wds as adq
from adq_wds.core.graphcut import Binning, bin_sizes, graphcut_bins, graphcut_bins_gram
from adq_wds.core.kernel import unit_rows
from benchmarks.common import data_folder, in_own_process, parser, peak_rss_bytes, report, spread
from benchmarks.graphcut import mixture, resident_bytes, similarity, timed

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
Picker = Callable[[F64, int], list[int]]  # kernel, picks wanted -> positions in the order picked

OURS = ("ours", "ours-gram", "ours-pool")
OPTIMIZERS = {
    "submodlib-naive": "NaiveGreedy",
    "submodlib-lazy": "LazyGreedy",
    "apricot-naive": "naive",
    "apricot-lazy": "lazy",
    "apricot-two-stage": "two-stage",
}
CONTESTANTS = (*OURS, *OPTIMIZERS)
PACKAGES = ("submodlib-py", "apricot-select", "numba")


def picker(name: str) -> Picker:
    """How a peer picks from a kernel; ImportError where it is not installed."""
    if name.startswith("submodlib"):
        graph_cut = importlib.import_module("submodlib").GraphCutFunction

        def pick(kernel: F64, k: int) -> list[int]:
            n = len(kernel)
            function = graph_cut(n=n, mode="dense", lambdaVal=1.0, separate_rep=False, ggsijs=kernel)
            made = function.maximize(min(k, n - 1), optimizer=OPTIMIZERS[name], show_progress=False)
            order = [position for position, _gain in made]
            return order if k < n else [*order, *(set(range(n)) - set(order))]
    else:
        selection = importlib.import_module("apricot").GraphCutSelection

        def pick(kernel: F64, k: int) -> list[int]:
            made = selection(k, metric="precomputed", alpha=1, optimizer=OPTIMIZERS[name]).fit(kernel)
            order: list[int] = made.ranking.tolist()
            return order

    return pick


def peer_order(pick: Picker, kernel: F64, bins: int) -> I64:
    """(n,) positions in the order picked: the peer called anew on what is left for each bin."""
    left, order = np.arange(len(kernel)), []
    for size in bin_sizes(len(kernel), bins).tolist():
        picked = pick(kernel if len(left) == len(kernel) else kernel[np.ix_(left, left)], size)
        order.append(left[picked])
        left = np.delete(left, picked)
    return np.concatenate(order)


def our_order(binning: Binning) -> I64:
    """(n,) positions in the order picked, bin by bin."""
    return np.lexsort((binning.pick, binning.bin))


def selector(name: str) -> Callable[[F64, int], I64]:
    """The timed part of a contestant: rows (`ours`, `ours-pool`) or kernel, and K -> order."""
    if name == "ours":
        return lambda rows, bins: our_order(graphcut_bins(rows, bins))
    if name == "ours-pool":
        return lambda rows, bins: our_order(graphcut_bins(rows, bins, memory_bytes=0))
    if name == "ours-gram":
        return lambda kernel, bins: our_order(graphcut_bins_gram(kernel, bins))
    pick = picker(name)
    return lambda kernel, bins: peer_order(pick, kernel, bins)


def one(name: str, path: str, bins: int, *, runs: int, limit: float) -> dict[str, Any]:
    """One contestant on stored rows; called in a process of its own, so that its peak is its own.

    Runs stop early where another one would end after `limit` seconds. The order is written beside the rows.
    """
    try:
        select = selector(name)
    except ImportError as error:
        return {"skipped": f'{error}; pip install -e ".[bench]"'}
    rows: F64 = np.load(path)
    from_rows = name in ("ours", "ours-pool")
    few = rows[:16] if from_rows else similarity(rows[:16], rows[:16])
    call_s = [timed(lambda: select(few, 1))[0] for _ in range(4)][1:]  # the first one loads libraries
    if name.startswith("apricot"):
        importlib.import_module("numba").config.DISABLE_JIT = True
    before = resident_bytes()
    kernel_s: list[float] = []
    selection_s: list[float] = []
    peak = 0
    while len(selection_s) < runs:
        seconds, given = (0.0, rows) if from_rows else timed(lambda: similarity(rows, rows))
        kernel_s.append(seconds)
        seconds, order = timed(lambda: select(given, bins))
        selection_s.append(seconds)
        del given
        peak = peak or peak_rss_bytes()  # of the first run: later ones may find fragments
        if sum(kernel_s + selection_s) * (1 + 1 / len(kernel_s)) > limit:
            break
    np.save(order_path(path, name), order)
    total = [a + b for a, b in zip(kernel_s, selection_s, strict=True)]
    return {
        "runs": len(total),
        "total_s": spread(total),
        **({} if from_rows else {"kernel_s": spread(kernel_s), "selection_s": spread(selection_s)}),
        "call_s": spread(call_s)["median"],
        "peak_mib": round((peak - before) / 2**20),
    }


def order_path(rows_path: str, name: str) -> Path:
    """Where a contestant's order is written: beside the rows."""
    return Path(rows_path).with_suffix(f".{name}.npy")


def shortfalls(kernel: F64, order: I64, sizes: list[int]) -> tuple[F64, F64]:
    """How far each pick is below the best at its moment, and the float32 spacing of that bin's largest sum.

    Args:
        kernel: (n, n) float64, exact to add up (multiples of 2^-33).
        order: (n,) int64, positions in the order picked, bin by bin.
        sizes: of the bins, summing to n.

    Returns:
        two (n,) float64; a shortfall of 0 is a best pick, or one tied with it.

    >>> shortfalls(np.array([[1.0, 0.5, 0.0], [0.5, 1.0, 0.5], [0.0, 0.5, 1.0]]), np.array([0, 1, 2]), [3])[0]
    array([0.5, 0.5, 0. ])
    """
    short, spacing = np.empty(len(order)), np.empty(len(order))
    total = kernel.sum(axis=0)  # over V
    done = 0
    for size in sizes:
        gain = total.copy()
        gain[order[:done]] = -np.inf
        spacing[done : done + size] = np.spacing(np.float32(gain.max()))
        for i in range(done, done + size):
            u = order[i]
            short[i] = gain.max() - gain[u]
            gain -= 2.0 * kernel[u]
            gain[u] = -np.inf
            total -= kernel[u]  # of the next V
        done += size
    return short, spacing


def compared(order: I64, ours: I64, kernel: F64, sizes: list[int]) -> dict[str, Any]:
    """A peer's order beside ours, with exact gains on this kernel; equal orders need no more words."""
    if np.array_equal(order, ours):
        return {"equal_positions": 1.0}
    short, spacing = shortfalls(kernel, order, sizes)
    bin_of = np.repeat(np.arange(len(sizes)), sizes)
    first = int(np.flatnonzero(order != ours)[0])
    return {
        "equal_positions": round(float((order == ours).mean()), 4),
        "same_bin": round(float((bin_of[np.argsort(order)] == bin_of[np.argsort(ours)]).mean()), 4),
        "first_difference": first,
        "shortfall_there": float(short[first]),
        "picks_below_best": int((short > 0).sum()),
        "picks_below_best_by_float32": int((short > spacing).sum()),
        "largest_shortfall": float(short.max()),
        "float32": float(spacing[first]),
    }


def orders(name: str, order: I64, ours: I64, kernel: F64, bins: int) -> dict[str, Any]:
    """A peer's order beside ours on the kernel as given, and on exactly what the peer works on."""
    sizes = bin_sizes(len(kernel), bins).tolist()
    theirs = kernel.copy()
    if name.startswith("submodlib"):
        theirs = theirs.astype(np.float32).astype(np.float64)
    np.fill_diagonal(theirs, 1.0)  # the diagonal cancels in their gain; equal ones leave ours the same too
    on_theirs = our_order(graphcut_bins_gram(theirs, bins))
    return {
        "on_the_kernel": compared(order, ours, kernel, sizes),
        "on_their_terms": compared(order, on_theirs, theirs, sizes),
    }


def race(rows: F64, bins: int, foreseen: dict[str, float], args: argparse.Namespace) -> dict[str, Any]:
    """All contestants on the same rows, one after the other."""
    kernel = similarity(rows, rows)
    ours = our_order(graphcut_bins(rows, bins))
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "rows.npy")
        np.save(path, rows)
        for name in args.contestants:
            if foreseen.get(name, 0.0) > args.limit:
                result[name] = {
                    "skipped": f"up to {foreseen[name]:.0f} s foreseen, --limit is {args.limit:g}"
                }
            else:
                numbers = ("--bins", str(bins), "--runs", str(args.runs), "--limit", str(args.limit))
                result[name] = in_own_process("benchmarks.races", "--one", name, "--rows", path, *numbers)
                if "skipped" not in result[name]:
                    order = np.load(order_path(path, name))
                    if name in OURS:
                        assert np.array_equal(order, ours)
                    else:
                        result[name].update(orders(name, order, ours, kernel, bins))
            print(len(rows), bins, name, json.dumps(result[name]), flush=True)
    return {"n": len(rows), "bins": bins, "kernel_mib": round(kernel.nbytes / 2**20), "contestants": result}


def times_ours(contestants: dict[str, Any]) -> None:
    """Write beside each peer how many times as long as ours it takes, with and without building the kernel."""
    for name, entry in contestants.items():
        for key, base in (("total_s", "ours"), ("selection_s", "ours-gram")):
            if name in OPTIMIZERS and key in entry and base in contestants:
                ratio = entry[key]["median"] / contestants[base][key]["median"]
                entry[f"{key.removesuffix('_s')}_times_ours"] = round(ratio, 1)


def rows_of_one_class(n: int, data: str | None, features: str | None) -> tuple[str, F64]:
    """What the rows are, and at most n of them: images of CIFAR-10's class 0, or a mixture without the data."""
    if data is None:
        return "seeded mixture of 20 clusters, ReLU", unit_rows(mixture(n, relu=True, offset=0.3))
    shards = sorted(data_folder("cifar10", data).glob("cifar10-train-*.tar"))
    with tempfile.TemporaryDirectory() as folder:
        files = adq.embed_shards(shards, "builtin-free", features or folder, progress=False)
        rows = np.concatenate([file.embedding() for file in files])
        label = np.concatenate([file.read_columns(["label"])["label"].to_numpy() for file in files])
    return "CIFAR-10 train, class 0, builtin-free", unit_rows(rows[label == 0][:n])


def versions() -> dict[str, str | None]:
    """Of the peers that are installed."""
    known = {d.name.lower(): d.version for d in importlib.metadata.distributions()}
    return {name: known.get(name) for name in PACKAGES}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--n", type=int, nargs="*", default=[1_000, 2_000, 5_000])
    arguments.add_argument("--bins", type=int, nargs="*", default=[1, 10])
    arguments.add_argument("--contestants", nargs="*", default=CONTESTANTS, choices=CONTESTANTS)
    arguments.add_argument(
        "--limit", type=float, default=30, help="seconds for one contestant at one n and K"
    )
    arguments.add_argument("--data", default=os.environ.get("ADQ_DATA"), help="folder that holds cifar10/")
    arguments.add_argument("--features", help="folder in which the embeddings are kept between runs")
    arguments.add_argument("--one", choices=CONTESTANTS, help="run one contestant on --rows, in this process")
    arguments.add_argument("--rows", help="npy file of unit rows")
    args = arguments.parse_args()
    if args.one:
        print(json.dumps(one(args.one, args.rows, args.bins[0], runs=args.runs, limit=args.limit)))
        return
    load = os.getloadavg()[0]  # more than the cores means that wall times are too long
    kind, rows = rows_of_one_class(max(args.n), args.data, args.features)
    races = []
    for bins in args.bins:
        foreseen: dict[str, float] = {}
        for i, n in enumerate(args.n):
            races.append(race(rows[:n], bins, foreseen, args))
            contestants = races[-1]["contestants"]
            times_ours(contestants)
            for name, entry in contestants.items():
                if i + 1 < len(args.n):
                    last = entry["total_s"]["median"] if "total_s" in entry else foreseen.get(name, 0.0)
                    foreseen[name] = last * (args.n[i + 1] / n) ** 3
    result = {
        "threads": os.environ.get("OPENBLAS_NUM_THREADS", "all"),
        "load": [load, os.getloadavg()[0]],
        "peers": versions(),
        "rows": kind,
        "D": rows.shape[1],
        "races": races,
    }
    report(result, args.out)


if __name__ == "__main__":
    main()
