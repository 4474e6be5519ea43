"""How diverse are the bins behind a head? From the views beside the features; trained once, then kept with the bins."""

from __future__ import annotations

import logging
import math

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from adq_wds.core.scores import rounded
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
        head: "contrastive".
        progress: show a bar; only on a terminal by default.

    Returns:
        (K,) float64 each, NaN for an empty bin.

    Raises:
        FeaturesError: no views, damaged ones, or views of other features.
    """
    from adq_wds.planning.diversity_head import DEFINITION, EPOCHS, N_SEEDS, head_diversity

    views = Views.of(features)
    made_from = {"views": views.hash, "definition": f"{DEFINITION}; first seed {HEAD_SEED}"}
    size = np.bincount(bins.bin[bins.bin >= 0], minlength=bins.n_bins)
    known = _known(bins, head, made_from, size)
    if known is not None:
        return known
    position, z = views.rows(features)
    logger.info("diversity behind the %s head, from two views of %d images", head, len(z))
    with tqdm(
        total=N_SEEDS * EPOCHS,
        unit=" epochs",
        desc="head",
        disable=None if progress is None else not progress,
    ) as bar:
        value, spread = head_diversity(
            z, bins.bin[position], bins.n_bins, size=size, seed=HEAD_SEED, progress=bar.update
        )
    others = bins.header.get("heads")
    bins.header["heads"] = others if isinstance(others, dict) else {}
    bins.header["heads"][head] = {
        **made_from,
        "images": len(z),
        "value": rounded(value),
        "spread": rounded(spread),
    }
    found = _known(
        bins, head, made_from, size
    )  # as the header has it, so that a later plan sees the same digits
    assert found is not None
    return found


def _known(
    bins: Bins, head: str, made_from: dict[str, str], size: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """What the header of `bins` says of a head behind the same views, if it can be used."""
    try:
        entry = bins.header["heads"][head]
        columns = [entry[name] for name in ("value", "spread")]
        if any(entry[name] != value for name, value in made_from.items()):
            return None
    except (KeyError, TypeError):
        return None
    for column in columns:
        if not isinstance(column, list) or len(column) != bins.n_bins:
            return None
        fits = [
            type(v) is float and 0 <= v < math.inf if n else v is None
            for v, n in zip(column, size, strict=True)
        ]
        if not all(fits):
            return None
    value, spread = (np.array(column, dtype=np.float64) for column in columns)  # None becomes NaN
    return value, spread
