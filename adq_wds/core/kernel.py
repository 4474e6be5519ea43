"""Makes unit rows whose dot products every machine computes alike.

Unit rows are rounded to multiples of 2^-16. A product of two entries is then a multiple of 2^-32, and a dot
product of two rows, at most about 1, needs 33 of float64's 53 bits: no rounding happens, in whatever order a BLAS,
a thread or a device adds. Sums over up to 2^20 rows are exact for the same reason, so equal gains are equal.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

ROW_STEP = 2.0**-16
_BLOCK_BYTES = 32 << 20  # float64 scratch of one block of rows
_ONE_PRODUCT_BYTES = 1 << 30  # of a symmetric product; OpenBLAS 0.3.31 crashes above 2^31, with threads
_PRODUCT_ROWS = 4096


def unit_rows(embedding: NDArray[Any]) -> NDArray[np.float64]:
    """Rows of length 1, rounded half to even to multiples of 2^-16; zero rows stay zero.

    A rounded row is up to sqrt(D) * 2^-17 longer or shorter than 1. Squares are added in the order of the columns,
    one by one, so no bit of the result depends on the machine or on the rows around.

    Args:
        embedding: (N, D) float16, float32 or float64, finite; rows need not have length 1.

    Returns:
        (N, D) float64, C-contiguous.

    Raises:
        ValueError: not two axes, not a float dtype, or NaN or Inf in a row (the first such row is named).

    Source: ours; Zhou et al. 2023 (arXiv 2308.10524) use unrounded float32 rows.

    >>> unit_rows(np.array([[3.0, 4.0], [0.0, 0.0]], dtype=np.float16)) * 2**16
    array([[39322., 52429.],
           [    0.,     0.]])
    """
    if embedding.ndim != 2:
        raise ValueError(f"embedding has shape {embedding.shape}, expected two axes (N, D)")
    if embedding.dtype not in (np.float16, np.float32, np.float64):
        raise ValueError(f"embedding has dtype {embedding.dtype}, expected float16, float32 or float64")
    N, D = embedding.shape
    rows = np.empty((N, D), dtype=np.float64)
    if D == 0:
        return rows
    step = max(1, _BLOCK_BYTES // (8 * D))
    for start in range(0, N, step):
        block = rows[start : start + step]
        block[:] = embedding[start : start + step]
        peak = np.abs(block).max(axis=1)
        if not np.isfinite(peak).all():
            bad = start + int(np.argmin(np.isfinite(peak)))
            raise ValueError(
                f"embedding row {bad} holds NaN or Inf, expected finite numbers; drop or re-embed it"
            )
        if embedding.dtype == np.float64:  # squares of 1e200 or 1e-200 would overflow or vanish
            np.ldexp(block, -np.frexp(peak)[1][:, None], out=block)
        squares = np.square(block.T, order="C")  # (D, b)
        norm = np.sqrt(np.add.accumulate(squares, axis=0, out=squares)[-1])  # (b,), in the order of columns
        norm[norm == 0] = 1.0
        block /= norm[:, None]
        block /= ROW_STEP
        np.rint(block, out=block)
        block *= ROW_STEP
    return rows


def gram(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n, n) float64 dot products of the (n, D) rows of `unit_rows`, which are exact and so do not depend on the blocks.

    >>> gram(np.array([[1.0, 0.5], [0.0, 2.0]]))
    array([[1.25, 1.  ],
           [1.  , 4.  ]])
    """
    n = len(rows)
    if n * n * 8 <= _ONE_PRODUCT_BYTES:
        return rows @ rows.T
    product = np.empty((n, n))
    for start in range(0, n, _PRODUCT_ROWS):
        here = slice(start, start + _PRODUCT_ROWS)
        np.matmul(rows[here], rows.T, out=product[here])
    return product
