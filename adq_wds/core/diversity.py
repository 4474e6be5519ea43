"""How diverse is a bin, seen through two views of each image? From running sums, without a pair in memory."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def diversity_of_views(
    z: NDArray[np.float64], bin: NDArray[np.integer], n_bins: int, *, size: NDArray[np.int64] | None = None
) -> NDArray[np.float64]:
    """Diversity of each bin: 1 over the mean similarity 0.5 + 0.5·cos of its pairs of views of different images.

    With M = 2 · images rows in a bin, the sum of cos over ordered pairs, without a row and itself and without the two
    views of one image, is ‖Σz‖² − Σ‖z‖² − 2·Σᵢ⟨zᵢ₁, zᵢ₂⟩, and there are M·(M − 2) of them. A zero row has similarity
    0.5 with everything. A bin with one image or none in the sample, or whose mean similarity is not positive, has no
    value of its own and takes the mean of the others.

    Args:
        z: (M, 2, E) float64, two unit rows (or zero rows) for each of M images.
        bin: (M,) integer, the bin of each image; -1 for an image that is in none.
        n_bins: K.
        size: (K,) int64, all samples in each bin, viewed or not; a bin is empty when it has none. By default the
            images given are all there are.

    Returns:
        (K,) float64, about 1 (all alike) to 2 (orthogonal), NaN where a bin is empty; all 1 when no bin has a value of
        its own.

    Raises:
        ValueError: shapes that do not fit, or a bin out of range.

    Source: Li et al. 2024 (arXiv 2412.16895), diversity; the bounded form, without pairs of an image with itself, is
    ours.

    >>> z = np.array([[[1.0, 0.0], [1.0, 0.0]], [[0.0, 1.0], [0.0, 1.0]]])
    >>> diversity_of_views(z, np.array([0, 0]), 1)
    array([2.])
    """
    value = np.full(n_bins, np.nan)
    for k, rows in _views_by_bin(z, bin, n_bins):
        n_rows = 2 * len(rows)
        if len(rows) < 2:
            continue
        total = rows.sum(axis=(0, 1))  # (E,)
        alike = np.einsum("mve,mve->", rows, rows) + 2 * np.einsum("me,me->", rows[:, 0], rows[:, 1])
        mean_similarity = 0.5 + 0.5 * (total @ total - alike) / (n_rows * (n_rows - 2))
        if mean_similarity > 0:
            value[k] = 1.0 / mean_similarity
    return _without_gaps(value, _holds(bin, n_bins, size))


def _views_by_bin(
    z: NDArray[np.float64], bin: NDArray[np.integer], n_bins: int
) -> list[tuple[int, NDArray[np.float64]]]:
    """(k, (m, 2, E) rows) of each bin, checked."""
    if z.ndim != 3 or z.shape[1] != 2 or bin.shape != z.shape[:1]:
        raise ValueError(
            f"views of shape {z.shape} and bins of shape {bin.shape}, expected (M, 2, E) and (M,)"
        )
    if len(bin) and not -1 <= bin.min() <= bin.max() < n_bins:
        raise ValueError(f"bins must lie in -1 … {n_bins - 1}, got {bin.min()} … {bin.max()}")
    order = np.argsort(bin, kind="stable")
    ends = np.searchsorted(bin[order], np.arange(n_bins + 1))
    return [(k, z[order[ends[k] : ends[k + 1]]]) for k in range(n_bins)]


def _holds(bin: NDArray[np.integer], n_bins: int, size: NDArray[np.int64] | None) -> NDArray[np.bool_]:
    """(K,) bool: is there a sample in the bin?"""
    if size is None:
        return np.bincount(bin[bin >= 0], minlength=n_bins) > 0
    if size.shape != (n_bins,):
        raise ValueError(f"sizes of shape {size.shape} for {n_bins} bins, expected ({n_bins},)")
    holds: NDArray[np.bool_] = size > 0
    return holds


def _without_gaps(value: NDArray[np.float64], holds: NDArray[np.bool_]) -> NDArray[np.float64]:
    """NaN becomes the mean of the others, and what is in an empty bin becomes NaN."""
    own = np.isfinite(value)
    filled = np.where(own, value, value[own].mean() if own.any() else 1.0)
    whole: NDArray[np.float64] = np.where(holds, filled, np.nan)
    return whole
