"""Measures how diverse a set of images is, and how far from another, in the features of a network."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def mean_cosine(features: NDArray[np.float64]) -> float:
    """The mean cosine of the pairs of (N, D) rows; the smaller, the more diverse.

    >>> mean_cosine(np.array([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]]))
    0.3333333333333333
    """
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    n = len(unit)
    return float((np.square(unit.sum(0)).sum() - n) / (n * (n - 1)))


def frechet_distance(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½) of (N, D) and (M, D) rows.

    The trace of the root is the sum of the singular values of A Bᵀ, of the centred rows over the roots of their numbers.

    Source: Heusel et al. 2017 (arXiv 1706.08500), here of any features.
    """
    centred = [(rows - rows.mean(0)) / np.sqrt(len(rows)) for rows in (a, b)]
    roots = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    variances = sum(np.square(rows).sum() for rows in centred)
    return float(np.square(a.mean(0) - b.mean(0)).sum() + variances - 2 * roots)
