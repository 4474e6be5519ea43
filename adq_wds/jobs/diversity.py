"""How diverse are the bins behind a head? From the views beside the features; trained once, then kept with the bins."""

from __future__ import annotations

import logging

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from adq_wds.binning import rounded
from adq_wds.tables.bins import Bins
from adq_wds.tables.features import Features
from adq_wds.tables.views import Views

HEAD_SEED = 0  # bins and their scores hang on no plan's seed, so that plans of all seeds share them
logger = logging.getLogger("adq_wds")


def diversity_behind(
    features: Features, bins: Bins, head: str, *, progress: bool | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Diversity of each bin behind a head, and its spread over the head's seeds.

    What was found is written into the header of `bins`, and taken from there while the views are the same.

    Args:
        features: the set that was binned, with views beside it.
        bins: its bins.
        head: "contrastive" or "paper".
        progress: show a bar; only on a terminal by default.

    Returns:
        (K,) float64 each, NaN for an empty bin.

    Raises:
        FeaturesError: no views, damaged ones, or views of other features.
    """
    views = Views.of(features)
    known = _known(bins, head, views)
    if known is not None:
        return known
    from adq_wds.models.heads import EPOCHS, N_SEEDS, head_diversity

    position, z = views.rows(features)
    logger.info("diversity behind the %s head, from two views of %d images", head, len(z))
    size = np.bincount(bins.bin[bins.bin >= 0], minlength=bins.n_bins)
    with tqdm(
        total=N_SEEDS * EPOCHS,
        unit=" epochs",
        desc="head",
        disable=None if progress is None else not progress,
    ) as bar:
        value, spread = head_diversity(
            head, z, bins.bin[position], bins.n_bins, size=size, seed=HEAD_SEED, progress=bar.update
        )
    others = bins.header.get("heads")
    bins.header["heads"] = others if isinstance(others, dict) else {}
    bins.header["heads"][head] = {
        "views": views.hash,
        "images": len(z),
        "value": rounded(value),
        "spread": rounded(spread),
    }
    return value, spread


def _known(bins: Bins, head: str, views: Views) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """What the header of `bins` says of a head behind these views, if it can be used."""
    try:
        entry = bins.header["heads"][head]
        value, spread = (np.array(entry[name], dtype=np.float64) for name in ("value", "spread"))
        fits = entry["views"] == views.hash and value.shape == spread.shape == (bins.n_bins,)
    except (KeyError, TypeError, ValueError):
        return None
    return (value, spread) if fits else None
