"""Scores bins: representativeness, diversity, and their sum, the importance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]

Normalise = str  # "sum" | "minmax"
EXACT_SUMS = ("n", "embedding", "squares")  # of `BinSums`: equal in whatever order they are added
DECIMALS = 12  # importances are rounded to it, so that a last bit of a machine's sums cannot move a pick


@dataclass
class BinSums:
    """Running sums over the samples of each of K bins; whole classes are added one after another.

    The embedding sums are exact (rounded unit rows), so their order never matters.
    """

    n: NDArray[np.int64]  # (K,)
    texture: F64 | None  # (K,); None where no image was looked at
    embedding: F64  # (K, D) Σz
    squares: F64  # (K,) Σ‖z‖²

    @classmethod
    def empty(cls, n_bins: int, width: int, *, texture: bool = True) -> BinSums:
        """Sums over no samples; with a texture sum where there are images."""
        levels = np.zeros(n_bins) if texture else None
        return cls(np.zeros(n_bins, np.int64), levels, np.zeros((n_bins, width)), np.zeros(n_bins))

    def add(self, bin: NDArray[np.int16], rows: F64, texture: NDArray[np.float32] | None) -> None:
        """Add samples.

        Args:
            bin: (n,) int16, each sample's bin.
            rows: (n, D) float64, their rounded unit embeddings.
            texture: (n,) float32, their texture levels; None where these are no images.
        """
        self.add_rows(bin, rows)
        if texture is not None:
            self.add_texture(bin, texture)

    def add_rows(self, bin: NDArray[np.int16], rows: F64) -> None:
        """Add samples without their texture; equal sums, however a class is cut into parts."""
        n_bins = len(self.n)
        self.n += np.bincount(bin, minlength=n_bins)
        squares = np.einsum("nd,nd->n", rows, rows)
        self.squares += np.bincount(bin, weights=squares, minlength=n_bins)
        for k, part in enumerate(rows_by_bin(bin, n_bins)):
            self.embedding[k] += rows[part].sum(axis=0)

    def add_texture(self, bin: NDArray[np.int16], texture: NDArray[np.float32]) -> None:
        """Add the texture of a class's samples, if there is one to add to: one class after another, whole."""
        if self.texture is not None:
            weights = texture.astype(np.float64)
            self.texture += np.bincount(bin, weights=weights, minlength=len(self.n))

    def add_sums(self, others: Mapping[str, NDArray[Any]]) -> None:
        """Add the sums over other samples, by name; not of texture, whose order would matter."""
        for name in EXACT_SUMS:
            getattr(self, name)[:] += others[name]


def rows_by_bin(bin: NDArray[np.integer], n_bins: int) -> list[NDArray[np.int64]]:
    """The positions of each bin's samples, ascending; -1 is no bin."""
    order = np.argsort(bin, kind="stable")
    return np.split(order, np.searchsorted(bin[order], np.arange(n_bins + 1)))[1:-1]


def bin_scores(sums: BinSums) -> dict[str, F64]:
    """(K,) float64 of each score that every set has: "diversity", and "texture" where there are images."""
    texture = {} if sums.texture is None else {"texture": representativeness(sums)}
    return {**texture, "diversity": diversity(sums)}


def representativeness(sums: BinSums) -> F64:
    """Mean texture level of each bin: (K,) float64, NaN where a bin is empty; of images only.

    Source: Li et al. 2024 (arXiv 2412.16895).
    """
    assert sums.texture is not None
    with np.errstate(invalid="ignore"):
        return sums.texture / sums.n


def diversity(sums: BinSums) -> F64:
    """Diversity of each bin: 1 over the mean similarity 0.5 + 0.5·cos of its pairs of distinct samples.

    About 1 (all alike) to 2 (orthogonal). From running sums, Σ over pairs of cos = (‖Σz‖² − Σ‖z‖²) / 2, in O(M·D)
    instead of O(M²·D). A bin with one sample, or with a mean similarity that is not positive, takes the mean
    of the others.

    Returns:
        (K,) float64, NaN where a bin is empty; all 1 when no bin has a value of its own.

    Source: Li et al. 2024 (arXiv 2412.16895), diversity; this bounded form without pairs of an image with
    itself is ours.
    """
    pairs = sums.n.astype(np.float64) * (sums.n - 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean_cos = (np.einsum("kd,kd->k", sums.embedding, sums.embedding) - sums.squares) / pairs
        value = 1.0 / (0.5 + 0.5 * mean_cos)
    return _without_gaps(np.where(value > 0, value, np.nan), sums.n > 0)


def diversity_of_views(
    z: F64, bin: NDArray[np.integer], n_bins: int, *, size: NDArray[np.int64] | None = None
) -> F64:
    """Diversity of each bin from views: 1 over the mean similarity 0.5 + 0.5·cos of views of different images.

    With M = 2 · images rows in a bin, the sum of cos over ordered pairs, without a row and itself and without the two
    views of one image, is ‖Σz‖² − Σ‖z‖² − 2·Σᵢ⟨zᵢ₁, zᵢ₂⟩, and there are M·(M − 2) of them. A zero row has similarity
    0.5 with everything. A bin with fewer than two images in the sample, or with a mean similarity that is not
    positive, takes the mean of the others.

    Args:
        z: (M, 2, E) float64, two unit rows (or zero rows) for each of M images.
        bin: (M,) integer, the bin of each image; -1 for an image that is in none.
        n_bins: K.
        size: (K,) int64, all samples in each bin, viewed or not; a bin is empty when it has none. By default the
            images given are all there are.

    Returns:
        (K,) float64, about 1 (all alike) to 2 (orthogonal), NaN where a bin is empty; all 1 when no bin has a value of
        its own.

    Source: Li et al. 2024 (arXiv 2412.16895), diversity; the bounded form, without pairs of an image with itself, is
    ours.

    >>> z = np.array([[[1.0, 0.0], [1.0, 0.0]], [[0.0, 1.0], [0.0, 1.0]]])
    >>> diversity_of_views(z, np.array([0, 0]), 1)
    array([2.])
    """
    value = np.full(n_bins, np.nan)
    for k, part in enumerate(rows_by_bin(bin, n_bins)):
        rows, n_rows = z[part], 2 * len(part)
        if len(part) < 2:
            continue
        total = rows.sum(axis=(0, 1))  # (E,)
        alike = np.einsum("mve,mve->", rows, rows) + 2 * np.einsum("me,me->", rows[:, 0], rows[:, 1])
        mean_similarity = 0.5 + 0.5 * (total @ total - alike) / (n_rows * (n_rows - 2))
        if mean_similarity > 0:
            value[k] = 1.0 / mean_similarity
    size = np.bincount(bin[bin >= 0], minlength=n_bins) if size is None else size
    return _without_gaps(value, size > 0)


def _without_gaps(value: F64, holds: NDArray[np.bool_]) -> F64:
    """(K,): where there is no finite value the mean of the others; NaN for a bin that holds no sample."""
    finite = np.isfinite(value)
    filled = np.where(finite, value, value[finite].mean() if finite.any() else 1.0)
    whole: F64 = np.where(holds, filled, np.nan)
    return whole


def importance(scores: list[F64], *, normalise: Normalise = "sum") -> F64:
    """Importance of each bin: the scores, normalised over the bins, added, and scaled to sum 1.

    Args:
        scores: each (K,) float64, >= 0, NaN for an empty bin.
        normalise: "sum" (each score's values sum to 1) or "minmax" (its least is 0, its largest 1). A score
            that is the same in all bins counts the same for all.

    Returns:
        (K,) float64, sums to 1 up to the rounding to 12 decimals; 0 for an empty bin.

    Source: Li et al. 2024 (arXiv 2412.16895), Î = R̂ep + D̂iv; the paper says only "normalised", sum is ours.

    >>> importance([np.array([1.0, 3.0]), np.array([2.0, 2.0])])
    array([0.375, 0.625])
    """
    total = np.zeros_like(scores[0], dtype=np.float64)
    for score in scores:
        filled = ~np.isnan(score)
        total += _normalised(np.where(filled, score, 0.0), filled, normalise)
    value: F64 = np.round(total / total.sum(), DECIMALS)
    return value


def _normalised(value: F64, filled: NDArray[np.bool_], normalise: Normalise) -> F64:
    """One score over the bins that hold samples; uniform where it does not tell them apart."""
    share: F64 = np.zeros_like(value)
    low, high = value[filled].min(), value[filled].max()
    if high == low:
        share[filled] = 1.0 / filled.sum()
    elif normalise == "minmax":
        share[filled] = (value[filled] - low) / (high - low)
    else:
        share[filled] = value[filled] / value[filled].sum()
    return share


def rounded(score: F64) -> list[float | None]:
    """Values rounded for a header, so that equal features give equal headers on any machine; None for NaN."""
    return [None if np.isnan(v) else round(float(v), DECIMALS) for v in score]
