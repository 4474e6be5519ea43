"""Margins: exact leave-one-out of a class-weighted ridge fit, whatever the blocks."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from numpy.typing import NDArray

from adq_wds.core import margin as module
from adq_wds.core.margin import MARGIN_STEP, fit_ridge, ridge_margins

HIDDEN = 32


def noisy_set(
    seed: int = 0, *, n: int = 240, D: int = 12, C: int = 4, wrong: float = 0.0
) -> tuple[NDArray[np.float16], NDArray[np.int64], NDArray[np.bool_]]:
    """Clusters with a long tail of classes; labels, a share of them wrong, and which are."""
    rng = np.random.default_rng(seed)
    y = rng.choice(C, n, p=np.array([0.55, 0.25, 0.15, 0.05]))
    x = (2.0 * rng.normal(size=(C, D))[y] + rng.normal(size=(n, D))).astype(np.float16)
    bad = rng.random(n) < wrong
    return x, np.where(bad, (y + rng.integers(1, C, n)) % C, y), bad


def refitted(
    fit: module.RidgeFit, x: NDArray[np.float64], y: NDArray[np.int64], i: int
) -> NDArray[np.float64]:
    """Plain weighted ridge regression without sample i, λ and the rest as in the whole fit."""
    z, rest = fit.widen(x), np.arange(len(x)) != i
    omega = fit.weight[y]
    whole = z.T @ (omega[:, None] * z)
    ridge = fit.ridge * np.trace(whole) / z.shape[1] * np.eye(z.shape[1])
    target = np.eye(len(fit.weight))[y]
    left = z[rest].T @ (omega[rest, None] * z[rest]) + ridge
    without: NDArray[np.float64] = z[i] @ np.linalg.solve(
        left, z[rest].T @ (omega[rest, None] * target[rest])
    )
    return without


@pytest.mark.parametrize("n", [20, 240])
def test_left_out_predictions_equal_refits_without_the_sample(n: int) -> None:
    x, y, _ = noisy_set(n=n)
    fit = fit_ridge(lambda: [x], y, hidden=HIDDEN)
    rows = x.astype(np.float64)
    left_out = fit.left_out(rows, y)
    for i in range(0, n, 7):
        np.testing.assert_allclose(left_out[i], refitted(fit, rows, y, i), atol=1e-6, rtol=0)


def test_the_ridge_predicts_best_what_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, _ = noisy_set(wrong=0.2)
    chosen = fit_ridge(lambda: [x], y, hidden=HIDDEN)
    error = {}
    for ridge in module.RIDGES:
        monkeypatch.setattr(module, "RIDGES", (ridge,))
        fit = fit_ridge(lambda: [x], y, hidden=HIDDEN)
        each = np.square(fit.left_out(x.astype(np.float64), y) - np.eye(4)[y]).sum(axis=1)
        error[ridge] = np.average(each, weights=fit.weight[y])
    assert chosen.ridge == min(error, key=error.__getitem__)


def test_few_samples_need_a_larger_ridge_than_many() -> None:
    x, y, _ = noisy_set(n=4000, wrong=0.2)
    few, many = (fit_ridge(partial(np.split, x[:n], 1), y[:n], hidden=HIDDEN).ridge for n in (40, 4000))
    assert few > many


def test_margins_follow_from_the_left_out_predictions() -> None:
    x, y, _ = noisy_set()
    left_out = fit_ridge(lambda: [x], y, hidden=HIDDEN).left_out(x.astype(np.float64), y)
    margins = ridge_margins(lambda: [x], y, hidden=HIDDEN)
    expected = [f[c] - np.delete(f, c).max() for f, c in zip(left_out, y, strict=True)]
    np.testing.assert_allclose(margins.margin, expected, atol=MARGIN_STEP)
    assert np.array_equal(np.rint(margins.margin / MARGIN_STEP) * MARGIN_STEP, margins.margin)
    np.testing.assert_array_equal(np.sort(margins.top, axis=1), np.tile(np.arange(4), (len(y), 1)))
    assert (np.diff(margins.score, axis=1) <= 0).all()
    assert margins.accuracy == np.mean(margins.margin > 0)


@pytest.mark.parametrize("cut", [[1] * 50 + [190], [63, 64, 65, 48], [120, 0, 120]])
def test_margins_do_not_depend_on_how_rows_are_cut(cut: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK_ROWS", 64)
    x, y, _ = noisy_set()
    whole = ridge_margins(lambda: [x], y, hidden=HIDDEN)
    parts = ridge_margins(lambda: np.split(x, np.cumsum(cut)[:-1]), y, hidden=HIDDEN)
    assert whole.margin.tobytes() == parts.margin.tobytes()
    assert whole.score.tobytes() == parts.score.tobytes()
    assert whole.temperature == parts.temperature


def test_wrong_labels_have_the_low_margins() -> None:
    x, y, bad = noisy_set(n=600, wrong=0.1)
    margin = ridge_margins(lambda: [x], y, hidden=HIDDEN).margin
    worst = np.argsort(margin)[: bad.sum()]
    assert bad[worst].mean() > 0.8
    assert (margin[~bad] > 0).mean() > 0.9


def test_soft_labels_sum_to_one_and_prefer_the_likelier_class() -> None:
    x, y, _ = noisy_set()
    margins = ridge_margins(lambda: [x], y, hidden=HIDDEN)
    soft = margins.probability()
    np.testing.assert_allclose(soft.sum(axis=1), 1, rtol=1e-5)
    assert (np.diff(soft, axis=1) <= 0).all()
    assert np.mean(margins.top[:, 0] == y) > 0.9


def test_the_top_classes_are_at_most_eight() -> None:
    rng = np.random.default_rng(0)
    y = np.arange(200) % 20
    x = np.eye(20)[y] + 0.1 * rng.normal(size=(200, 20))
    margins = ridge_margins(lambda: [x], y, hidden=HIDDEN)
    assert margins.top.shape == (200, 8)
    assert np.mean(margins.top[:, 0] == y) > 0.95


def test_a_constant_column_and_a_class_of_one_sample_fit() -> None:
    x, y, _ = noisy_set()
    x[:, 3] = 0.1
    y[0] = 4
    margins = ridge_margins(lambda: [x], y, hidden=HIDDEN)
    assert np.isfinite(margins.margin).all()
    assert margins.margin[0] < 0  # without it nothing says what its class looks like


@pytest.mark.parametrize(
    ("rows", "label", "match"),
    [
        (np.zeros((3, 2)), [0, 0, 0], "two or more classes"),
        (np.zeros((3, 2)), [-1, -1, -1], "two or more classes"),
        (np.zeros((0, 2)), [], "two or more classes"),
        (np.zeros((3, 2)), [0, 1], "3 rows of embeddings for 2 labels"),
        (np.zeros((1, 2)), [0, 1], "1 rows of embeddings for 2 labels"),
        (np.array([[0.0], [np.nan]]), [0, 1], "row 1 holds NaN"),
    ],
)
def test_bad_input_is_named(rows: NDArray[np.float64], label: list[int], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ridge_margins(lambda: [rows], np.array(label, dtype=np.int64), hidden=HIDDEN)
