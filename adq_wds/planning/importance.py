"""Adds up what each bin is worth, from the scores that the plan asks for."""

from __future__ import annotations

import logging
import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from adq_wds.core.scores import importance, rounded
from adq_wds.planning.options import Options
from adq_wds.score import bin_values
from adq_wds.tables.bins import Bins
from adq_wds.tables.features import Features
from adq_wds.tables.views import Views

Normalise = Literal["sum", "minmax"]
HEAD_SEED = 0  # not the plan's: bins and their scores are shared by plans of all seeds
logger = logging.getLogger("adq_wds")
_Scores = tuple[NDArray[np.float64], NDArray[np.float64]]


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
        value, spread = _diversity_behind(options.diversity_head, features, bins, options.progress)
        scores |= {"diversity": value, "diversity_spread": spread}
    value = importance([scores[name] for name in options.scores], normalise=options.normalise)
    return {**scores, "importance": value}


def _diversity_behind(head: str, features: Features, bins: Bins, progress: bool | None) -> _Scores:
    """Diversity of each bin behind a head, and its spread over the head's seeds: (K,) float64 each, NaN for an empty bin.

    Both are written into the header of `bins`, and taken from there while the views are the same.
    """
    from adq_wds.planning.diversity_head import DEFINITION, EPOCHS, N_SEEDS, head_diversity

    views = Views.of(features)
    made_from = {"views": views.hash, "definition": f"{DEFINITION}; first seed {HEAD_SEED}"}
    size = np.bincount(bins.bin[bins.bin >= 0], minlength=bins.n_bins)
    if (known := _known(bins, head, made_from, size)) is not None:
        return known
    position, z = views.rows(features)
    logger.info("diversity behind the %s head, from two views of %d images", head, len(z))
    quiet = None if progress is None else not progress
    with tqdm(total=N_SEEDS * EPOCHS, unit=" epochs", desc="head", disable=quiet) as bar:
        value, spread = head_diversity(
            z, bins.bin[position], bins.n_bins, size=size, seed=HEAD_SEED, progress=bar.update
        )
    others = bins.header.get("heads")
    entry = {**made_from, "images": len(z), "value": rounded(value), "spread": rounded(spread)}
    bins.header["heads"] = {**(others if isinstance(others, dict) else {}), head: entry}
    known = _known(
        bins, head, made_from, size
    )  # as the header has it, so that a later plan sees the same digits
    assert known is not None
    return known


def _known(bins: Bins, head: str, made_from: dict[str, str], size: NDArray[np.int64]) -> _Scores | None:
    """What the header of `bins` has of a head behind the same views, if it can be used."""
    try:
        entry = bins.header["heads"][head]
        if any(entry[name] != value for name, value in made_from.items()):
            return None
        columns = [entry["value"], entry["spread"]]
        usable = [
            type(v) is float and 0 <= v < math.inf if n else v is None
            for column in columns
            for v, n in zip(column, size, strict=True)
        ]
    except (KeyError, TypeError, ValueError):
        return None
    if not all(usable):
        return None
    value, spread = (np.array(column, dtype=np.float64) for column in columns)  # None becomes NaN
    return value, spread
