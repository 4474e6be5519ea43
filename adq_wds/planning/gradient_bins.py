"""Bins each class by the gradients of a classifier head's loss, in place of its embeddings."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adq_wds.core.gradient import GradientKernel, gradient_bins
from adq_wds.core.graphcut import Binning
from adq_wds.core.kernel import unit_rows
from adq_wds.errors import FeaturesError
from adq_wds.planning.buckets import Column
from adq_wds.tables.features import Features

logger = logging.getLogger("adq_wds")


def gradient_columns(features: Features, label: NDArray[np.int32]) -> list[Column]:
    """The columns that kernel "gradient" needs beside embeddings: logit gradients (n, C) and norms (n, 1).

    Args:
        features: made with logit gradients.
        label: (N,) int32, class of each row over the whole set.

    Raises:
        FeaturesError: no logit gradients, or a head whose classes are not the labels.
    """
    _check_head(features, label)
    return [
        Column("logit_grad", lambda file, _: file.logit_grad(), np.dtype(np.float16), features.n_classes),
        Column("norm", lambda file, _: file.norm(), np.dtype(np.float32)),
    ]


def cut_by_gradients(
    unit: NDArray[np.float64], logit_grad: NDArray[Any], norm: NDArray[Any], bins: int, **how: Any
) -> Binning:
    """The bins of a class by its unit rows (n, D) and those columns; `how` as in `core.gradient.gradient_bins`."""
    return gradient_bins(GradientKernel.from_rows(unit_rows(logit_grad), norm.ravel(), unit), bins, **how)


def _check_head(features: Features, label: NDArray[np.int32]) -> None:
    """Raise `FeaturesError` unless the classes of the head are the labels: 0 … C − 1, each present."""
    C = features.n_classes
    n = sum(file.header["shards"][0]["n"] for file in features)
    right = sum(int(file.header["head_right"]) for file in features) / max(1, n)
    logger.info("the encoder's head is right about %.1f %% of the samples", 100 * right)
    if right < 1 / C + 0.1 * (1 - 1 / C):
        logger.warning(
            "the encoder's head is right about %.1f %% of the samples, chance about %.1f %%: was it trained on these "
            "labels, in this order? Gradients of a head that knows nothing of them tell nothing", 100 * right, 100 / C
        )  # fmt: skip
    present = np.unique(label)
    if len(present) == C and present[0] == 0 and present[-1] == C - 1:
        return
    partial = features.limit is not None or not all(file.header["complete"] for file in features)
    if partial and present[0] >= 0 and present[-1] < C:
        logger.warning(
            "the head has %d classes, the first samples only %d of them; a plan of all samples is refused unless all "
            "classes are among their labels", C, len(present)
        )  # fmt: skip
        return
    raise FeaturesError(
        f"{features.folder}: the encoder's head has {C} classes, the data {len(present)} labels ({present[0]} … "
        f"{present[-1]}): kernel 'gradient' needs a head trained on these labels; take one, or kernel='features'"
    )
