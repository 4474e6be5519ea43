"""Doubts labels of samples that no fit has seen: margins by a ridge fit's coefficients, equal on every machine."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adq_wds.core.margin import MARGIN_STEP, RidgeFit, random_layer

F64 = NDArray[np.float64]

SOLUTION_STEP = 2.0**-20
_INPUT_STEP = 2.0**-12
_PROJECTION_STEP = 2.0**-20
_LARGEST_INPUT = 256.0  # standard deviations
_LARGEST = 16.0  # of the coefficients; those of a fit are below 13
_MAX_WIDTH = 1 << 14
_BLOCK_ROWS = 2048


@dataclass(frozen=True, eq=False)
class MarginRule:
    """Margins of labels that were not in a fit, and those below which a label of each class is doubted.

    A prediction is Z · solution, Z = [x, ReLU(xW + b), 1], x = (embedding − mean) · scale, as in `core.margin`. The
    random layer is drawn again from its seed. Entries of Z are rounded to multiples of 2^-12, W, b and the solution to
    2^-20, and x is cut off at 256 standard deviations. Then every sum has less than 53 bits and is exact in float64, in
    whatever order it is added.

    Attributes:
        mean, scale: (D,) float64, D at most 16,384.
        solution: (F, C) float32, F = D + H + 1, multiples of 2^-20 below 16.
        least: (C,) float64; a smaller margin is doubted, and none where it is -inf.

    Source: ours; see `core.margin.ridge_margins`.
    """

    mean: F64
    scale: F64
    solution: NDArray[np.float32]
    least: F64

    @classmethod
    def of(cls, fit: RidgeFit, least: F64) -> MarginRule:
        """The rule of a fit."""
        return cls(fit.mean, fit.scale, _rounded(fit.solution, SOLUTION_STEP).astype(np.float32), least)

    def faults(self) -> Iterator[str]:
        """What is wrong with arrays from a file, each check relying on earlier ones."""
        if (self.mean.ndim, self.least.ndim, self.solution.ndim) != (1, 1, 2):
            yield f"margins of shapes {self.mean.shape}, {self.least.shape}, {self.solution.shape}"
        width, n_classes, hidden = len(self.mean), len(self.least), len(self.solution) - len(self.mean) - 1
        if self.scale.shape != (width,) or self.solution.shape[1] != n_classes or hidden < 1:
            yield f"a solution of shape {self.solution.shape} for {width} numbers and {n_classes} classes"
        if width > _MAX_WIDTH or hidden > _MAX_WIDTH or n_classes < 2:
            yield f"margins of {width} numbers, {hidden} more at random and {n_classes} classes"
        if not (np.isfinite(self.mean).all() and np.isfinite(self.scale).all()):
            yield "a mean or scale of margins is not finite"
        small = bool((np.abs(self.solution) < _LARGEST).all())  # no NaN passes
        if not small or (_rounded(self.solution, SOLUTION_STEP) != self.solution).any():
            yield "a coefficient of margins is not a multiple of 2^-20 below 16"
        if not (self.least < np.inf).all():
            yield "a least margin is not a number below infinity"

    @cached_property
    def layer(self) -> tuple[F64, F64]:
        """(D, H) weights W and (H,) offsets b of the random layer, multiples of 2^-20."""
        hidden = len(self.solution) - len(self.mean) - 1
        weights, offset = random_layer(len(self.mean), hidden)
        return _rounded(weights, _PROJECTION_STEP), _rounded(offset, _PROJECTION_STEP)

    def layer_hash(self) -> str:
        """SHA-256 of the random layer, which another version of numpy may draw otherwise."""
        return hashlib.sha256(b"".join(part.astype("<f8").tobytes() for part in self.layer)).hexdigest()

    def margins(self, embedding: NDArray[np.float16], label: NDArray[np.integer]) -> NDArray[np.float32]:
        """Each label's prediction less the best other one; the answer for one does not depend on the others.

        Args:
            embedding: (N, D) float16, finite.
            label: (N,) integers, 0 … C−1, or -1 for a label that was not in the fit.

        Returns:
            (N,) float32, multiples of 2^-12; NaN where the label is -1.
        """
        margin = np.empty(len(embedding), dtype=np.float32)
        for start in range(0, len(embedding), _BLOCK_ROWS):
            here = slice(start, start + _BLOCK_ROWS)
            margin[here] = self._block(embedding[here], label[here])
        return margin

    def doubted(self, margin: NDArray[np.float32], label: NDArray[np.integer]) -> NDArray[np.bool_]:
        """(N,) bool: margins below the least one of their label; never where they are NaN."""
        below: NDArray[np.bool_] = margin < self.least[label]
        return below

    def _block(self, embedding: NDArray[np.float16], label: NDArray[np.integer]) -> F64:
        x = (embedding.astype(np.float64) - self.mean) * self.scale
        x = np.clip(_rounded(x, _INPUT_STEP), -_LARGEST_INPUT, _LARGEST_INPUT)
        weights, offset = self.layer
        hidden = _rounded(np.maximum(x @ weights + offset, 0.0), _INPUT_STEP)
        predicted = np.hstack([x, hidden, np.ones((len(x), 1))]) @ self._solution
        each = np.arange(len(x))
        of_label = predicted[each, label]
        predicted[each, label] = -np.inf
        margin: F64 = _rounded(of_label - predicted.max(axis=1), MARGIN_STEP)
        margin[label < 0] = np.nan
        return margin

    @cached_property
    def _solution(self) -> F64:
        return self.solution.astype(np.float64)


def _rounded(values: NDArray[Any], step: float) -> NDArray[Any]:
    rounded: NDArray[Any] = np.rint(values / step) * step
    return rounded


def least_margins(
    margin: NDArray[np.float32], label: NDArray[np.integer], doubted: NDArray[np.bool_], n_classes: int
) -> F64:
    """(C,) float64: the lowest margin of each class that is not doubted; -inf where no label of a class is.

    Args:
        margin: (N,) float32, of samples of the fit, as if each were left out.
        label: (N,) integers, 0 … C−1.
        doubted: (N,) bool, the lowest margins of each class.

    >>> margin = np.array([0.5, -0.25, 0.75, 0.125], np.float32)
    >>> least_margins(margin, np.array([0, 0, 0, 1]), margin < 0, 2).tolist()
    [0.5, -inf]
    """
    least = np.full(n_classes, -np.inf)
    for c in np.unique(label[doubted]).tolist():
        least[c] = margin[(label == c) & ~doubted].min()
    return least
