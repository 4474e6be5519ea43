"""The naive greedy that GraphCut's evaluators must equal, and what their tests share."""

import os
import subprocess
import sys

import numpy as np

from adq_wds.core.graphcut import Binning

GRAM = 1 << 30  # memory that any test's matrix fits in
_BLAS_THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


def naive_bins(cos: np.ndarray, sizes: list[int]) -> tuple[list[int], list[int]]:
    """Every gain recomputed from the similarities at every pick, in whole numbers: the definition."""
    s = 2**32 + np.rint(cos * 2.0**32).astype(np.int64)  # 2^33 times 0.5 + 0.5 cos
    bins, pick = [-1] * len(cos), [-1] * len(cos)
    left = list(range(len(cos)))
    for b, size in enumerate(sizes):
        V, S = list(left), []
        for k in range(size):
            candidates = [x for x in V if x not in S]
            gain = s[np.ix_(V, candidates)].sum(axis=0) - 2 * s[np.ix_(S, candidates)].sum(axis=0)
            u = candidates[int(np.argmax(gain))]  # candidates ascend: ties to the lowest position
            S.append(u)
            bins[u], pick[u] = b, k
        left = [x for x in left if x not in S]
    return bins, pick


def lists(binning: Binning) -> tuple[list[int], list[int]]:
    assert (binning.bin.dtype, binning.pick.dtype) == (np.int16, np.int32)
    return binning.bin.tolist(), binning.pick.tolist()


def printed_with(threads: int, code: str) -> list[str]:
    """What a program prints, word by word, with so many threads in the BLAS."""
    env = os.environ | dict.fromkeys(_BLAS_THREADS, str(threads))
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    return done.stdout.split()
