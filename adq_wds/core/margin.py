"""Measures how well a label fits its embedding: exact leave-one-out predictions of a ridge fit, in three passes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adq_wds.core.rng import generator

F64 = NDArray[np.float64]
Rows = Callable[[], Iterable[NDArray[np.floating]]]

MARGIN_STEP = 2.0**-12
TOP = 8
_HIDDEN = 1024
RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # times the mean of the Gram matrix's diagonal
_JUDGES = 8192  # rows that choose among them, at most about
_BLOCK_ROWS = (
    2048  # sums are taken over these, however the caller cuts the rows, so that no bit depends on the cut
)
_COLUMN_BLOCKS = 4  # of a triangular product, of which numpy has none: 5/8 of the square one
_OTHERS = 1 << 23  # numbers in `Margins.others`, at most about
_TEMPERATURES = np.geomspace(0.01, 1.0, 41)


@dataclass(frozen=True)
class RidgeFit:
    """A class-weighted ridge regression of one-hot labels on Z = [x, ReLU(xW + b), 1], x standardised.

    Attributes:
        mean, scale: (D,) float64; x = (embedding − mean) · scale, 0 for a constant column.
        projection: (D, H) float64, W.
        offset: (H,) float64, b.
        root: (F, F) float64, lower triangular, F = D + H + 1; rootᵀ root is the inverse of ZᵀΩZ + λ.
        solution: (F, C) float64, the coefficients.
        weight: (C,) float64, Ω: the weight of a sample of each class, N / (C · n_c).
        ridge: λ, over the mean of the diagonal of ZᵀΩZ.
    """

    mean: F64
    scale: F64
    projection: F64
    offset: F64
    root: F64
    solution: F64
    weight: F64
    ridge: float

    def widen(self, embedding: F64) -> F64:
        """(B, F) float64 rows of Z from (B, D) embeddings."""
        return _widen(embedding, self.mean, self.scale, self.projection, self.offset)

    def left_out(self, embedding: F64, label: NDArray[np.int64]) -> F64:
        """Predictions for samples of the fit, each as if it had been left out.

        Equal to fitting again without the sample while standardisation, λ and class weights stay as they are:
        with the weighted hat matrix, (f − h·y) / (1 − h).

        Args:
            embedding: (B, D) float64 rows of the fit.
            label: (B,) int64, their classes.

        Returns:
            (B, C) float64.
        """
        z = self.widen(embedding)
        hat = self.weight[label] * self._lengths(z)
        predicted: F64 = z @ self.solution
        predicted[np.arange(len(z)), label] -= hat
        predicted /= (1.0 - hat)[:, None]
        return predicted

    def left_out_error(self, embedding: F64, label: NDArray[np.int64]) -> float:
        """Weighted mean over samples of the squared errors of `left_out`; arguments as there."""
        error = self.left_out(embedding, label)
        error[np.arange(len(label)), label] -= 1.0
        return float(np.average(np.einsum("bc,bc->b", error, error), weights=self.weight[label]))

    def _lengths(self, z: F64) -> F64:
        """(B,) float64: zᵀ (rootᵀ root) z of each row."""
        total = np.zeros(len(z))
        edges = np.linspace(0, len(self.root), _COLUMN_BLOCKS + 1).astype(int)
        for begin, end in itertools.pairwise(edges.tolist()):
            part = z[:, :end] @ self.root[begin:end, :end].T
            total += np.einsum("bf,bf->b", part, part)
        return total


@dataclass(frozen=True)
class Margins:
    """Leave-one-out predictions for each of N samples.

    Attributes:
        margin: (N,) float32, the label's prediction less the best other one, a multiple of 2^-12; below 0 another
            class fits better.
        label_score: (N,) float32, the label's prediction.
        top: (N, T) int32, the T = min(8, C) classes of the highest predictions, highest first.
        score: (N, T) float32, their predictions.
        others: (R, C) float32, of R samples evenly spread, the margin that each would have under every label; their
            own label's is NaN.
        temperature: at which the softmax of the predictions is likeliest.
        accuracy: share of samples whose label has the highest prediction.
    """

    margin: NDArray[np.float32]
    label_score: NDArray[np.float32]
    top: NDArray[np.int32]
    score: NDArray[np.float32]
    others: NDArray[np.float32]
    temperature: float
    accuracy: float

    def probability(self) -> NDArray[np.float32]:
        """(N, T) float32: soft labels over the top classes of each sample; every row sums to 1."""
        return _softmax(self.score.astype(np.float64) / self.temperature).astype(np.float32)


def ridge_margins(
    rows: Rows,
    label: NDArray[np.integer],
    *,
    hidden: int = _HIDDEN,
    seed: int = 0,
    fit: RidgeFit | None = None,
) -> Margins:
    """Leave-one-out margins of labelled embeddings, blocked: memory does not grow with N beyond the answer.

    Takes 2·N·F² + 4·N·D·H + 2·N·F·C operations, F = D + H + 1, and three passes over the rows; choosing λ takes five
    factorisations of F rows, and the predictions of 8,192 samples by each.

    Args:
        rows: called once a pass; gives the (n, D) embeddings in order, in blocks of any sizes.
        label: (N,) integers, classes 0 … C−1; a class without samples predicts 0.
        hidden: H, width of the random layer, N where that is less.
        seed: of its weights.
        fit: what `fit_ridge` gives for these arguments, where it is known already.

    Returns:
        the margins; equal for equal rows, however they are cut into blocks.

    Raises:
        ValueError: fewer than two classes, a label below 0, or not N finite rows of one width.

    Source: ours: leave-one-out of a linear smoother (Allen 1974, PRESS) on random features (Huang et al. 2006).

    >>> x = np.array([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0], [0.0, 0.9]])
    >>> margins = ridge_margins(lambda: [x], np.array([0, 0, 1, 1, 0]), hidden=8)  # the last label is wrong
    >>> (margins.margin > 0).tolist()
    [True, True, True, True, False]
    """
    fit = fit or fit_ridge(rows, label, hidden=hidden, seed=seed)
    n, n_classes = len(label), len(fit.weight)
    n_top = min(TOP, n_classes)
    spread = -(-n * n_classes // _OTHERS)
    margin, label_score = np.empty(n, dtype=np.float32), np.empty(n, dtype=np.float32)
    others = np.empty((-(-n // spread), n_classes), dtype=np.float32)
    top, score = np.empty((n, n_top), dtype=np.int32), np.empty((n, n_top), dtype=np.float32)
    for here, block in _blocks(rows, n):
        y = label[here].astype(np.int64)
        left_out = np.rint(fit.left_out(block, y) / MARGIN_STEP) * MARGIN_STEP
        best = np.argpartition(left_out, n_classes - n_top, axis=1)[:, n_classes - n_top :]
        order = np.lexsort((best, -np.take_along_axis(left_out, best, axis=1)), axis=1)
        top[here] = np.take_along_axis(best, order, axis=1)
        score[here] = np.take_along_axis(left_out, top[here].astype(np.int64), axis=1)
        each = np.arange(len(y))
        label_score[here] = left_out[each, y]
        as_if = _as_if(left_out)
        margin[here] = as_if[each, y]
        as_if[each, y] = np.nan
        chosen = slice(-here.start % spread, None, spread)
        others[-(-here.start // spread) : -(-here.stop // spread)] = as_if[chosen]
    temperature = _temperature(label_score, top, score, label)
    return Margins(margin, label_score, top, score, others, temperature, float(np.mean(margin > 0)))


def fit_ridge(rows: Rows, label: NDArray[np.integer], *, hidden: int = _HIDDEN, seed: int = 0) -> RidgeFit:
    """Fit one-hot labels; samples weigh one over their class's size. Two passes; arguments as in `ridge_margins`.

    The random layer is no wider than there are samples. λ is the one of a fixed grid whose left-out predictions of at
    most 8,192 samples, evenly spread, have the least squared error: few samples need a larger one than many.
    """
    n = len(label)
    n_class = np.bincount(label) if n and label.min() >= 0 else np.zeros(0, dtype=np.int64)
    if np.count_nonzero(n_class) < 2:
        raise ValueError("margins need labels of two or more classes, numbered from 0")
    weight = n / (len(n_class) * np.maximum(n_class, 1).astype(np.float64))
    mean, scale = _standard(rows, n)
    projection, offset = random_layer(len(mean), min(hidden, n), seed)
    width = len(mean) + len(offset) + 1
    gram, class_sums = np.zeros((width, width)), np.zeros((len(n_class), width))
    spread = -(-n // _JUDGES)
    judges: list[F64] = []
    for here, block in _blocks(rows, n):
        judges.append(block[-here.start % spread :: spread].copy())
        z = _widen(block, mean, scale, projection, offset)
        y = label[here]
        z *= np.sqrt(weight[y])[:, None]
        gram += z.T @ z
        z *= np.sqrt(weight[y])[:, None]
        order = np.argsort(y, kind="stable")
        present, starts = np.unique(y[order], return_index=True)
        class_sums[present] += np.add.reduceat(z[order], starts, axis=0)
    judge, judge_label = np.concatenate(judges), label[::spread].astype(np.int64)
    fits = (
        RidgeFit(mean, scale, projection, offset, *_solve(gram, class_sums, ridge), weight, ridge)
        for ridge in RIDGES
    )
    return min(fits, key=lambda fit: fit.left_out_error(judge, judge_label))


def _solve(gram: F64, class_sums: F64, ridge: float) -> tuple[F64, F64]:
    """`RidgeFit.root` and `.solution`."""
    lifted = gram.copy()
    lifted[np.diag_indices_from(gram)] += ridge * np.trace(gram) / len(gram)
    root = np.tril(np.linalg.inv(np.linalg.cholesky(lifted)))
    return root, root.T @ (root @ class_sums.T)


def random_layer(width: int, hidden: int, seed: int = 0) -> tuple[F64, F64]:
    """(D, H) weights and (H,) offsets of the random layer, normal draws; those of a weight have variance 1/D."""
    rng = generator(seed, 0, "", "", purpose="ridge")
    weights = rng.standard_normal((width, hidden)) / np.sqrt(width)
    return weights, rng.standard_normal(hidden)


def _as_if(predicted: F64) -> F64:
    """(B, C): the margin of each row under each label."""
    if predicted.shape[1] == 2:
        return predicted - predicted[:, ::-1]
    two = np.partition(predicted, -2, axis=1)[:, -2:]
    return predicted - np.where(predicted == two[:, 1:], two[:, :1], two[:, 1:])


def _standard(rows: Rows, n: int) -> tuple[F64, F64]:
    """(D,) mean and (D,) one over the standard deviation, 0 for a constant column."""
    total = squares = np.zeros(0)
    for here, block in _blocks(rows, n):
        if here.start == 0:
            total = squares = np.zeros(block.shape[1])
        total = total + block.sum(axis=0)
        squares = squares + np.square(block).sum(axis=0)
    mean, rms = total / n, np.sqrt(squares / n)
    std = np.sqrt(np.maximum(squares / n - mean**2, 0))
    scale = np.divide(1.0, std, out=np.zeros_like(std), where=std > 1e-6 * rms)
    return mean, scale


def _widen(embedding: F64, mean: F64, scale: F64, projection: F64, offset: F64) -> F64:
    D, width = len(mean), len(mean) + len(offset) + 1
    z = np.empty((len(embedding), width))
    x = (embedding - mean) * scale
    z[:, :D] = x
    z[:, D:-1] = x @ projection
    z[:, D:-1] += offset
    np.maximum(z[:, D:-1], 0, out=z[:, D:-1])
    z[:, -1] = 1.0
    return z


def _blocks(rows: Rows, n: int) -> Iterator[tuple[slice, F64]]:
    """The N rows in float64 blocks of a fixed size, and where each stands."""
    parts: list[NDArray[np.floating]] = []
    n_rows = start = 0
    for chunk in rows():
        first = 0
        while first < len(chunk):
            part = chunk[first : first + _BLOCK_ROWS - n_rows]
            parts.append(part)
            first, n_rows = first + len(part), n_rows + len(part)
            if n_rows == _BLOCK_ROWS:
                yield slice(start, start + n_rows), _joined(parts, start)
                parts, start, n_rows = [], start + n_rows, 0
    if n_rows:
        yield slice(start, start + n_rows), _joined(parts, start)
    if start + n_rows != n:
        raise ValueError(f"{start + n_rows} rows of embeddings for {n} labels")


def _joined(parts: list[NDArray[np.floating]], start: int) -> F64:
    block = np.concatenate(parts).astype(np.float64)
    finite = np.isfinite(block).all(axis=1)
    if not finite.all():
        raise ValueError(f"embedding row {start + int(np.argmin(finite))} holds NaN or Inf")
    return block


def _temperature(
    label_score: NDArray[np.float32],
    top: NDArray[np.int32],
    score: NDArray[np.float32],
    label: NDArray[np.integer],
) -> float:
    """The temperature at which the labels are likeliest, among the top classes and the label itself.

    On at most 20,000 samples, evenly spread.
    """
    some = slice(None, None, -(-len(label) // 20_000))
    label_score_f64 = label_score[some].astype(np.float64)
    others = np.where(top[some] == label[some, None], -np.inf, score[some].astype(np.float64))
    both = np.column_stack([label_score_f64, others])
    likelihood = [np.log(_softmax(both / t)[:, 0] + 1e-300).mean() for t in _TEMPERATURES]
    return float(_TEMPERATURES[int(np.argmax(likelihood))])


def _softmax(logits: F64) -> F64:
    e: F64 = np.exp(logits - logits.max(axis=1, keepdims=True))
    e /= e.sum(axis=1, keepdims=True)
    return e
