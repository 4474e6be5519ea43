"""Adds up what each bin is worth, from the scores that the plan asks for."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from adq_wds.core.scores import importance
from adq_wds.planning.diversity import diversity_behind
from adq_wds.planning.options import Options
from adq_wds.score import bin_values
from adq_wds.tables.bins import Bins
from adq_wds.tables.features import Features

Normalise = Literal["sum", "minmax"]


def score_bins(features: Features, bins: Bins, options: Options) -> dict[str, NDArray[np.float64]]:
    """All that is known of each bin, its importance last.

    Args:
        features: the set that was binned.
        bins: its bins; what a diversity head gives is noted in their header.
        options: `scores`, `normalise`, `diversity_head` and `progress`: a bar while a head is trained.

    Returns:
        (K,) float64 of each score, NaN for an empty bin, and of "importance", which the scores that the options name
        add up to.

    Raises:
        ValueError: a user's score has another revision than the features hold, or gives values that cannot be used.
        FeaturesError: the features lack a score, or the views that a head needs.
    """
    scores = bins.scores()
    for score in options.own_scores:
        made_with = features.files[0].scores.get(score.name)
        numbers = features.score(score.name)
        if made_with != score.revision:
            raise ValueError(
                f"score {score.name!r} has revision {score.revision!r}, the features hold {made_with!r}; embed again"
            )
        scores[score.name] = bin_values(score, numbers, bins.bin, bins.n_bins)
    if options.diversity_head != "none":
        value, spread = diversity_behind(features, bins, options.diversity_head, progress=options.progress)
        scores |= {"diversity": value, "diversity_spread": spread}
    value = importance([scores[name] for name in options.scores], normalise=options.normalise)
    return {**scores, "importance": value}
