"""Estimates which share of each class is labelled wrongly, from the left-out predictions of all samples."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from adq_wds.core.margin import Margins

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

_NARROW = np.array([0.05, 0.10, 0.15, 0.20, 0.25, 0.30])  # where the line bends little
_WIDE = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])  # where it is steady
_TYPICAL = 0.2  # the quantile whose counts stand for an estimate's standard error
_CERTAIN = 3.0  # standard errors by which one source must exceed the pooled estimate, and
_BENT = 0.03  # so much more, since the line is none where two classes are much alike
_SPREAD = 0.05  # of the classes' shares around their mean, expected before looking
_LEAST = 0.02  # smaller estimates are not told from none


def wrong_shares(margins: Margins, label: NDArray[np.integer]) -> F64:
    """The share of each class's samples whose label is wrong.

    A wrongly labelled sample of class k looks like a sample of another class. So the margins of label k are
    compared with the margins that samples of other classes would have under label k. Below the lowest
    quantiles q of these lie only wrongly labelled samples of label k, a share η of them, and

        (share of label k below the q-quantile of the others) / q = η + slope · q,

    where the slope comes from hard samples with right labels. η is the line's value at q = 0, read from q = 5 to 30 %
    and from q = 10 to 80 %: the larger one, since a line that bends upwards hides wrong labels and few samples scatter
    the first. It is estimated twice: against all other classes, and against the class that k is most often taken for, by the difference
    of both predictions; the second counts where it clearly exceeds the first (wrong labels that come from one
    class). Estimates of small classes are shrunk towards the mean of all, shares below 2 % count as none, and no share
    is larger than that of negative margins: a label that the others predict is not doubted.

    Args:
        margins: from `ridge_margins`.
        label: (N,) integers, the classes that these were made with.

    Returns:
        (C,) float64 in [0, 0.9]; 0 for a class without samples.

    Source: ours: mixture proportion estimation (Blanchard, Lee, Scott 2010) on left-out predictions, in place of
    the thresholds of confident learning (Northcutt et al. 2021, JAIR 70), which take the hard samples of a weak
    encoder for wrong ones.
    """
    n_classes = margins.others.shape[1]
    n = np.bincount(label, minlength=n_classes)
    order = np.argsort(label, kind="stable")
    members = np.split(order, np.cumsum(n)[:-1])
    pooled, single, source = np.zeros(n_classes), np.zeros(n_classes), np.zeros(n_classes, dtype=np.int64)
    for k in np.flatnonzero(n).tolist():
        others = margins.others[:, k]
        pooled[k] = _share(margins.margin[members[k]], others[~np.isnan(others)])
        source[k] = _taken_for(margins, members[k], k)
        if source[k] != k:
            single[k] = _share(
                _difference(margins, members[k], k, int(source[k])),
                _difference(margins, members[source[k]], k, int(source[k])),
            )
    share, error = _combined(pooled, single, source, n)
    mean = (share * n).sum() / n.sum()
    trust = _SPREAD**2 / (_SPREAD**2 + error**2)
    negative = np.bincount(label, weights=margins.margin < 0, minlength=n_classes) / np.maximum(n, 1)
    share = np.clip(trust * share + (1 - trust) * mean, 0.0, np.minimum(negative, 0.9))
    return np.where((share >= _LEAST) & (n > 0), share, 0.0)


def _share(labelled: NDArray[np.floating], others: NDArray[np.floating]) -> float:
    """η of `labelled` against `others`, as `wrong_shares` says."""
    if not len(others):
        return 0.0
    ordered = np.sort(labelled)
    return max(_intercept(ordered, others, quantiles) for quantiles in (_NARROW, _WIDE))


def _intercept(labelled: NDArray[np.floating], others: NDArray[np.floating], quantiles: F64) -> float:
    """Of a weighted line through (q, share of `labelled`, ascending, below the others' q-quantile, over q)."""
    bound = np.quantile(others, quantiles)
    ratio = np.searchsorted(labelled, bound) / len(labelled) / quantiles
    q_mean, mean = np.average(quantiles, weights=quantiles), np.average(ratio, weights=quantiles)
    q = quantiles - q_mean
    slope = (quantiles * q * (ratio - mean)).sum() / (quantiles * q * q).sum()
    return float(max(mean - max(slope, 0.0) * q_mean, 0.0))


def _taken_for(margins: Margins, members: I64, k: int) -> int:
    """The class most often predicted for samples of label k in place of k; k where there is none."""
    best = margins.top[members, 0]
    wrong = best[best != k]
    return int(np.bincount(wrong).argmax()) if len(wrong) else k


def _difference(margins: Margins, rows: I64, k: int, j: int) -> F64:
    """Prediction k less prediction j of some rows, each of which is labelled k or j.

    Where the other one is not among a row's top classes, the lowest of these stands for it.
    """
    of: list[F64] = []
    for c in (k, j):
        is_c = margins.top[rows] == c
        known = is_c.any(axis=1)
        score = np.where(known, (margins.score[rows] * is_c).sum(axis=1), margins.score[rows, -1])
        of.append(score.astype(np.float64))
    return of[0] - of[1]


def _combined(pooled: F64, single: F64, source: I64, n: I64) -> tuple[F64, F64]:
    """(C,) shares and (C,) standard errors, each from one source where this is certainly more than from all."""
    count = np.maximum(_TYPICAL * n, 1e-9)
    pooled_error = np.sqrt((pooled + _LEAST) / count)
    single_error = np.sqrt((single + _LEAST) / count + single**2 / count[source])
    share, error = pooled, pooled_error
    for _ in range(5):  # the source's own wrong labels thin out what is compared with
        right = 1.0 - np.minimum(share[source], 0.5)
        certain = single * right - _CERTAIN * single_error > pooled + _BENT
        share = np.where(certain, single * right, pooled)
        error = np.where(certain, single_error, pooled_error)
    return share, error
