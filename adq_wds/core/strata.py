"""Cuts a class into bins by how well each sample's label fits, in place of GraphCut."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from adq_wds.core.graphcut import Binning, bin_sizes, binning_of_order


def margin_strata(margin: NDArray[np.floating], bins: int) -> Binning:
    """Strata of equal size by margin, the largest (easiest) first; ties stay in their order.

    Args:
        margin: (n,) numbers of one class, none of them NaN.
        bins: K; sizes are those of `bin_sizes`.

    Returns:
        the stratum of each sample, and its place in it.

    Source: ours.

    >>> cut = margin_strata(np.array([0.1, 0.9, 0.1, -0.4, 0.5]), 2)
    >>> cut.bin.tolist(), cut.pick.tolist()
    ([0, 0, 1, 1, 0], [2, 0, 0, 1, 1])
    """
    return binning_of_order(np.argsort(-margin, kind="stable"), bin_sizes(len(margin), bins))
