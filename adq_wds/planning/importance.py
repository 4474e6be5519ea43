"""Adds the scores that a plan names up to the importance of each bin."""

from __future__ import annotations

import hashlib
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from adq_wds.core.scores import importance
from adq_wds.planning.diversity import diversity_behind
from adq_wds.planning.options import Options
from adq_wds.planning.samples import Samples
from adq_wds.score import Score, bin_values
from adq_wds.tables.bins import Bins
from adq_wds.tables.column import Column
from adq_wds.tables.features import Features

Normalise = Literal["sum", "minmax"]


def score_bins(samples: Samples, bins: Bins, options: Options) -> dict[str, NDArray[np.float64]]:
    """All scores of each bin, with the importance last.

    Args:
        samples: the binned set; its `settings` record the hashes of columns.
        bins: its bins; their header caches the scores of a diversity head.
        options: `scores`, `normalise`, `diversity_head` and `progress`: a bar while a head is trained.

    Returns:
        (K,) float64 of each score, NaN for an empty bin, and of "importance", the sum of the scores in
        `options`.

    Raises:
        ValueError: a user's score has another revision than the features hold, or gives values that cannot be used.
        FeaturesError: the features lack a score, or the views that a head needs; a column does not fit.
    """
    features, scores = samples.features, bins.scores()
    if "difficulty" in options.scores:
        scores["difficulty"] = _difficulty(samples, bins)
    for score in options.user_scores:
        if isinstance(score, Column):
            numbers = score.values(features)
            columns = samples.settings.setdefault("columns", {})
            columns[score.name] = hashlib.sha256(numbers.astype("<f4").tobytes()).hexdigest()
            numbers = numbers - min(0.0, float(numbers.min()))
        else:
            numbers = _measured(score, features)
        scores[score.name] = bin_values(score, numbers, bins.bin, bins.n_bins)
    if options.diversity_head != "none":
        value, spread = diversity_behind(features, bins, options.diversity_head, progress=options.progress)
        scores |= {"diversity": value, "diversity_spread": spread}
    value = importance([scores[name] for name in options.scores], normalise=options.normalise)
    return {**scores, "importance": value}


def _difficulty(samples: Samples, bins: Bins) -> NDArray[np.float64]:
    """(K,) how badly the labels of each bin's samples fit: the mean of 1 − margin, at least 0; NaN for an empty bin."""
    assert samples.margin is not None
    binned = bins.bin >= 0
    n = np.bincount(bins.bin[binned], minlength=bins.n_bins)
    value = np.maximum(1.0 - samples.margin[binned].astype(np.float64), 0.0)
    total = np.bincount(bins.bin[binned], weights=value, minlength=bins.n_bins)
    mean: NDArray[np.float64] = np.divide(total, n, out=np.full(bins.n_bins, np.nan), where=n > 0)
    return mean


def _measured(score: Score, features: Features) -> NDArray[np.float32]:
    """(N,) values of a score, measured while the samples were embedded."""
    made_with = features.files[0].scores.get(score.name)
    numbers = features.score(score.name)
    if made_with != score.revision:
        raise ValueError(
            f"score {score.name!r} has revision {score.revision!r}, the features hold {made_with!r}; embed again"
        )
    return numbers
