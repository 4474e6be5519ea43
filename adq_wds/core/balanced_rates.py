"""Solves for the rate of every class and bin, so that a stream keeps a given part, its classes balanced as asked."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from adq_wds.core.allocation import weigh_classes
from adq_wds.core.codebook import solve_rates

F64 = NDArray[np.float64]


def balanced_rates(
    n: NDArray[np.int64],
    n_left_out: int,
    frequency: F64,
    weight: F64,
    keep: float,
    balance: str | float,
) -> F64:
    """Rates of C classes of K bins that keep a part of a whole stream, shared over the classes as a plan shares seats.

    The classes share `keep` in proportion to n to the power of `balance`, each at most whole (water-filling); the bins
    of a class share its part by their weights. With "none" all cells share at once.

    Args:
        n: (C,) int64, samples of each class that may be kept.
        n_left_out: samples that may not; they count in what `keep` is a ratio of.
        frequency: (C, K) float64, part of each class that falls into each bin; rows sum to 1.
        weight: (C, K) float64, relative weight of a sample of each bin.
        keep: ratio kept, in [0, 1].
        balance: as in `build_plan`.

    Returns:
        (C, K) float64 in [0, 1]; all 1 where `keep` is more than may be kept.

    Source: ours.

    >>> one = np.ones((2, 1))
    >>> balanced_rates(np.array([90, 10]), 0, one, one, 0.1, "equal").ravel().round(3).tolist()
    [0.056, 0.5]
    """
    part = n / (n.sum() + n_left_out)  # (C,) of the stream
    if balance == "none":
        cells = (part[:, None] * frequency).ravel()
        return solve_rates(cells, weight.ravel(), keep).reshape(weight.shape)
    some = np.maximum(n, 1)  # a class of which nothing was left has a rate, as if it were the smallest
    of_class = solve_rates(part, weigh_classes(some, balance) / some, keep)
    return np.stack([solve_rates(*cells) for cells in zip(frequency, weight, of_class.tolist(), strict=True)])
