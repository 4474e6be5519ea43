"""Scales rows to length 1."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def unit_rows(rows: NDArray[np.floating[Any]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Rows of length 1, and the lengths that they had, computed in float64.

    Args:
        rows: (n, D).

    Returns:
        (n, D) float64: zero rows stay zero, and rows that are not finite hold NaN; and (n,) float64.

    >>> unit, norm = unit_rows(np.array([[3.0, 4.0], [0.0, 0.0]]))
    >>> unit.tolist(), norm.tolist()
    ([[0.6, 0.8], [0.0, 0.0]], [5.0, 0.0])
    """
    h = rows.astype(np.float64)
    norm = np.sqrt(np.einsum("nd,nd->n", h, h))
    with np.errstate(invalid="ignore"):  # inf / inf is NaN
        unit = np.divide(h, norm[:, None], out=np.zeros_like(h), where=norm[:, None] != 0)
    return unit, norm
