"""Turns logits into soft labels over the likeliest classes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from adq_wds.core.margin import TOP


def top_probabilities(
    logits: NDArray[np.floating], temperature: float = 1.0
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """The likeliest classes of each sample, and the softmax of their logits.

    The classes outside the top get nothing: probabilities are renormalised over the top.

    Args:
        logits: (B, C) finite floats.
        temperature: > 0; the logits are divided by it.

    Returns:
        (B, T) int32 classes, T = min(8, C), the likeliest first, ties by class; and (B, T) float32 probabilities,
        each row sums to 1.

    >>> top, probability = top_probabilities(np.log([[0.2, 0.5, 0.3]]))
    >>> top.tolist(), probability.round(2).tolist()
    ([[1, 2, 0]], [[0.5, 0.30000001192092896, 0.20000000298023224]])
    """
    top = np.argsort(-logits, axis=1, kind="stable")[:, :TOP]
    z = np.take_along_axis(logits, top, axis=1).astype(np.float64) / temperature
    e = np.exp(z - z[:, :1])
    return top.astype(np.int32), (e / e.sum(axis=1, keepdims=True)).astype(np.float32)
