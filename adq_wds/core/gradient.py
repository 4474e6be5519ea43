"""Compares samples by the loss's gradients in a classifier's last layer, without building the gradients.

The loss's gradient in the last layer's weights and biases is e = b ⊗ [1, h]: b = dLoss/dlogits, h the features before
that layer. It is C * (D + 1) wide, 5,130 numbers for ten classes and D = 512. With unit vectors,

    cos(e_i, e_j)  =  cos(b_i, b_j) * (a_i a_j  +  c_i c_j cos(h_i, h_j)),   a = 1 / sqrt(1 + |h|^2),  c = |h| a.

Both cosines are exact (`core.kernel`), the rest is element by element in a fixed order, and the result is rounded to
multiples of 2^-32. So every entry is the same in a matrix, a block or a row, and sums of up to 2^20 entries are exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adq_wds.core.graphcut import Binning, graphcut_bins_gram, warn_above_exact_rows
from adq_wds.core.graphcut_rows import graphcut_bins_rows
from adq_wds.core.kernel import gram

F64 = NDArray[np.float64]

# Numbers next to it are 2^-32 apart, so adding it and taking it away rounds half to even to multiples of 2^-32.
_TO_STEPS = 1.5 * 2.0**20
_BLOCK_ROWS, _BLOCK_COLUMNS = 256, 8192  # two products of 16 MiB at most
_TILE_COLUMNS = 128  # what the element-wise steps work on: three tiles of 256 KiB stay in the cache


def logit_gradients(logits: NDArray[Any], labels: NDArray[Any]) -> NDArray[np.float32]:
    """Directions of the cross-entropy's gradient in the logits, exact however confident the network is.

    With p = softmax(z), b = p - onehot(y). Only the direction is kept, so everything is taken relative to the largest
    other class: p_c becomes exp(z_c - max of the others), and b_y = -(sum of the others), where p_y - 1 would cancel.

    Args:
        logits: (n, C) float16, float32 or float64, finite, C >= 2.
        labels: (n,) integers in 0 ... C-1.

    Returns:
        (n, C) float32 rows of length 1; no row is zero.

    Raises:
        ValueError: one class, or not a label of them for each row.

    Source: Zhou et al. 2023 (arXiv 2308.10524), whose released code takes the softmax twice; the form without
    underflow is ours.

    >>> logit_gradients(np.array([[0.0, 0.0], [9e4, 0.0]]), np.array([1, 0]))
    array([[ 0.70710677, -0.70710677],
           [-0.70710677,  0.70710677]], dtype=float32)
    """
    n, C = logits.shape
    if C < 2 or labels.shape != (n,) or (labels < 0).any() or (labels >= C).any():
        raise ValueError(f"{n} rows of logits need as many labels from 0 to {C - 1}, and 2 classes or more")
    z = logits.astype(np.float64)
    row = np.arange(len(z))
    z[row, labels] = -np.inf
    with np.errstate(over="ignore", under="ignore"):  # differences and tiny shares out of range: -inf and 0
        b: F64 = np.exp(z - z.max(axis=1, keepdims=True))
    b[row, labels] = -b.sum(axis=1)
    b /= np.sqrt(np.square(b).sum(axis=1, keepdims=True))
    return b.astype(np.float32)


@dataclass(frozen=True, eq=False)
class GradientKernel:
    """Cosines between the last-layer gradients of n samples, in factors.

    All entries are cosines; similarity is 0.5 + 0.5 * cos, and gives the same bins. A sample whose b is zero has cosine
    0, similarity 0.5, with everything, itself included.

    Attributes:
        b: (n, C) float64 unit rows, gradients in the logits.
        h: (n, D) float64 unit rows, features.
        a: (n,) float64, 1 / sqrt(1 + |h|^2), the bias's share.
        c: (n,) float64, |h| * a, the features' share.
    """

    b: F64
    h: F64
    a: F64
    c: F64

    @classmethod
    def from_rows(cls, b: F64, norm: NDArray[np.float32], h: F64) -> GradientKernel:
        """The kernel of samples as features files hold them.

        Args:
            b: (n, C) float64, `unit_rows` of `logit_gradients`.
            norm: (n,) float32, lengths of the features, finite, >= 0.
            h: (n, D) float64, `unit_rows` of the features.

        Source: Zhou et al. 2023 (arXiv 2308.10524), released code, has the gradients; factors and rounding are ours.

        >>> from adq_wds.core.kernel import unit_rows
        >>> b, h = unit_rows(np.array([[1.0, -1.0], [-1.0, 1.0]])), np.ones((2, 1))
        >>> GradientKernel.from_rows(b, np.array([0, 3], dtype=np.float32), h).matrix().round(4)
        array([[ 1.    , -0.3162],
               [-0.3162,  1.    ]])
        """
        length = norm.astype(np.float64)  # the square of float32's largest fits
        a = 1.0 / np.sqrt(1.0 + length * length)
        return cls(b, h, a, length * a)

    def __len__(self) -> int:
        return len(self.a)

    def row(self, u: int) -> F64:
        """(n,) cosines of sample u with all."""
        cos: F64 = self.h @ self.h[u]
        _combine(cos, self.b @ self.b[u], self.a[u], self.c[u], self.a, self.c)
        return cos

    def matrix(self) -> F64:
        """(n, n) cosines, symmetric; no other array of that size is made."""
        n = len(self)
        cos: F64 = gram(self.h)
        for top in range(0, n, _BLOCK_ROWS):
            rows, beyond = slice(top, min(n, top + _BLOCK_ROWS)), slice(min(n, top + _BLOCK_ROWS), n)
            self._complete(cos[rows, top:], rows, slice(top, n))
            cos[beyond, rows] = cos[rows, beyond].T
        return cos

    def sums(self) -> F64:
        """(n,) the sum of each row of the matrix, exact, from blocks of its upper half."""
        n, out = len(self), np.zeros(len(self))
        for top in range(0, n, _BLOCK_ROWS):
            rows = slice(top, min(n, top + _BLOCK_ROWS))
            for left in range(top, n, _BLOCK_COLUMNS):
                columns = slice(left, min(n, left + _BLOCK_COLUMNS))
                cos: F64 = self.h[rows] @ self.h[columns].T
                self._complete(cos, rows, columns)
                out[rows] += cos.sum(axis=1)
                diagonal = max(0, rows.stop - left)  # this part of the block holds its own mirror image
                out[columns][diagonal:] += cos[:, diagonal:].sum(axis=0)
        return out

    def take(self, keep: NDArray[np.int64]) -> GradientKernel:
        """The kernel of some of the samples, in the order given."""
        return GradientKernel(self.b[keep], self.h[keep], self.a[keep], self.c[keep])

    def _complete(self, cos_h: F64, rows: slice, columns: slice) -> None:
        """Turn a block of cosines of features into cosines of gradients, in place."""
        cos_b: F64 = self.b[rows] @ self.b[columns].T
        a_i, c_i, a_j, c_j = self.a[rows, None], self.c[rows, None], self.a[columns], self.c[columns]
        for start in range(0, len(a_j), _TILE_COLUMNS):
            part = slice(start, start + _TILE_COLUMNS)
            _combine(cos_h[:, part], cos_b[:, part], a_i, c_i, a_j[part], c_j[part])


def _combine(cos_h: F64, cos_b: F64, a_i: Any, c_i: Any, a_j: F64, c_j: F64) -> None:
    """Turn cos_h into the cosines of the gradients, in place.

    Each step is one IEEE operation on each entry, and i and j meet only in commutative ones: symmetric bit for bit.
    """
    pair = c_i * c_j
    cos_h *= pair
    np.multiply(a_i, a_j, out=pair)
    cos_h += pair
    cos_h *= cos_b
    cos_h += _TO_STEPS
    cos_h -= _TO_STEPS


def gradient_bins(
    kernel: GradientKernel,
    bins: int,
    *,
    memory_bytes: int = 1 << 30,
    progress: Callable[[int], object] | None = None,
) -> Binning:
    """Split samples into non-overlapping GraphCut bins by their gradients, exactly.

    Args:
        kernel: of n samples, in the order that breaks ties (lowest position first).
        bins: K, 1 to 32,767.
        memory_bytes: a matrix is used when its n * n * 8 bytes fit in here, else rows on demand, which need
            at most two copies of the kernel beside it. The answer is the same bit for bit.
        progress: called with the number of picks made since its last call; they sum to n.

    Returns:
        The bin and the pick order of every sample.

    Warns:
        UserWarning: above 1,000,000 samples sums may round, so near-ties may depend on the machine.

    Source: Zhou et al. 2023 (arXiv 2308.10524), eq. 3 with gradients; exact sums, ties and evaluators are ours.

    >>> from adq_wds.core.kernel import unit_rows
    >>> grad = np.array([[1.0, -1.0], [1.0, -1.0], [-1.0, 1.0]], dtype=np.float16)
    >>> kernel = GradientKernel.from_rows(unit_rows(grad), np.ones(3, dtype=np.float32), np.ones((3, 1)))
    >>> gradient_bins(kernel, 3).bin
    array([0, 1, 2], dtype=int16)
    """
    n = len(kernel)
    warn_above_exact_rows(n)
    if n * n * 8 <= memory_bytes:
        return graphcut_bins_gram(kernel.matrix(), bins, progress=progress)
    return graphcut_bins_rows(kernel, bins, progress=progress)
