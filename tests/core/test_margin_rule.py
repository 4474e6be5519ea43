"""Margins of new samples are a ridge fit's predictions, exact in any batch, and doubted below what stayed in the fit."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from adq_wds.core.margin import MARGIN_STEP, fit_ridge, ridge_margins
from adq_wds.core.margin_rule import MarginRule, least_margins

C, D = 4, 6


def samples(n: int, seed: int) -> tuple[Any, Any]:
    """Unit rows around a centre for each of four classes, as float16, and their labels."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, C, n)
    h = np.eye(C, D)[label] + rng.normal(scale=0.3, size=(n, D))
    return (h / np.linalg.norm(h, axis=1, keepdims=True)).astype(np.float16), label


@pytest.fixture(scope="module")
def fit() -> Any:
    embedding, label = samples(300, 0)
    return fit_ridge(lambda: [embedding], label, hidden=40)


@pytest.fixture(scope="module")
def rule(fit: Any) -> MarginRule:
    return MarginRule.of(fit, np.array([0.0, -np.inf, 0.25, 9.0]))


def test_the_margin_of_a_new_sample_is_a_plain_ridge_prediction(fit: Any, rule: MarginRule) -> None:
    embedding, label = samples(500, 1)
    predicted = fit.widen(embedding.astype(np.float64)) @ fit.solution
    for row, c, margin in zip(predicted, label, rule.margins(embedding, label), strict=True):
        assert margin == pytest.approx(row[c] - np.delete(row, c).max(), abs=1e-3)


def test_every_sum_is_exact(rule: MarginRule) -> None:
    """Whole and wild rows, in fractions of whole numbers."""
    embedding, label = samples(6, 2)
    wild = np.array([[60000, -60000, 0, 1e-7, 3, -4], [0] * D], dtype=np.float16)
    weights, offset = rule.layer
    for h, c in zip(np.concatenate([embedding, wild]), [*label, 1, 0], strict=True):
        x = np.clip(np.rint((h.astype(float) - rule.mean) * rule.scale * 4096) / 4096, -256, 256)
        z = [Fraction(v) for v in x]
        for j in range(len(offset)):
            a = Fraction(offset[j]) + sum(v * Fraction(w) for v, w in zip(z[:D], weights[:, j], strict=True))
            z.append(Fraction(round(max(a, Fraction(0)) * 4096), 4096))
        z.append(Fraction(1))
        sums = [
            sum(v * Fraction(float(s)) for v, s in zip(z, rule.solution[:, k], strict=True)) for k in range(C)
        ]
        margin = sums[c] - max(s for k, s in enumerate(sums) if k != c)
        expected = float(Fraction(round(margin / Fraction(MARGIN_STEP))) * Fraction(MARGIN_STEP))
        assert rule.margins(h[None], np.array([c]))[0] == np.float32(expected)


def test_neighbours_and_order_change_nothing(rule: MarginRule) -> None:
    embedding, label = samples(3000, 3)  # more than one block
    whole = rule.margins(embedding, label)
    order = np.random.default_rng(0).permutation(3000)
    assert np.array_equal(rule.margins(embedding[order], label[order]), whole[order])
    alone = [rule.margins(embedding[i : i + 1], label[i : i + 1])[0] for i in range(0, 3000, 50)]
    assert np.array_equal(alone, whole[::50])


def test_labels_that_the_fit_has_not_seen_are_not_doubted(rule: MarginRule) -> None:
    embedding, label = samples(40, 4)
    label[::2] = -1
    margin = rule.margins(embedding, label)
    assert np.isnan(margin[::2]).all()
    assert np.isfinite(margin[1::2]).all()
    assert not rule.doubted(margin, label)[label < 0].any()
    assert rule.doubted(margin, label)[label == 3].all()  # below 9
    assert not rule.doubted(margin, label)[label == 1].any()


def test_the_least_margin_has_the_left_out_share_below_it() -> None:
    embedding, label = samples(4000, 5)
    margin = ridge_margins(lambda: [embedding], label, hidden=40).margin
    out = np.zeros(len(label), dtype=bool)
    for c, share in enumerate((0.0, 0.1, 0.3, 0.01)):
        mine = np.flatnonzero(label == c)
        out[mine[np.argsort(margin[mine], kind="stable")[: round(share * len(mine))]]] = True
    least = least_margins(margin, label, out, C)
    assert least[0] == -np.inf
    below = margin < least[label]
    assert not (below & ~out).any()
    assert out.sum() - below.sum() <= 20  # of equal margins at the border
