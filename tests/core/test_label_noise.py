"""The share of wrong labels is estimated inside each class, and next to nothing where all are right."""

from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray

from adq_wds.core.label_noise import wrong_shares
from adq_wds.core.margin import Margins, ridge_margins

I64 = NDArray[np.int64]


@cache
def clusters(counts: tuple[int, ...], seed: int = 0) -> tuple[NDArray[np.float64], I64]:
    """Overlapping clusters, some classes near another one: a fit without them is right three times in four."""
    rng = np.random.default_rng(seed)
    centre = rng.normal(size=(len(counts), 16))
    centre[1::2] = centre[::2][: len(centre[1::2])] + 0.6 * rng.normal(size=centre[1::2].shape)
    y = np.repeat(np.arange(len(counts)), counts)
    return 1.5 * centre[y] + rng.normal(size=(len(y), 16)), y


def shares(x: NDArray[np.float64], y: I64) -> tuple[NDArray[np.float64], Margins]:
    margins = ridge_margins(lambda: [x], y, hidden=128)
    return wrong_shares(margins, y), margins


EVEN = (1500,) * 6
TAIL = (2500, 1150, 520, 240, 110, 50)


@pytest.mark.parametrize("counts", [EVEN, TAIL])
@pytest.mark.parametrize("seed", [0, 1])
def test_right_labels_lose_at_most_a_twentieth_of_a_class(counts: tuple[int, ...], seed: int) -> None:
    share, margins = shares(*clusters(counts, seed))
    assert 0.6 < margins.accuracy < 0.95  # hard samples there are
    assert share.max() <= 0.05
    assert (share * counts).sum() / sum(counts) < 0.01


@pytest.mark.parametrize("wrong", [0.1, 0.2, 0.4])
def test_labels_wrong_at_random_are_counted(wrong: float) -> None:
    x, y = clusters(EVEN)
    rng = np.random.default_rng(5)
    bad = rng.random(len(y)) < wrong
    noisy = np.where(bad, (y + rng.integers(1, 6, len(y))) % 6, y)
    share, margins = shares(x, noisy)
    true = np.array([bad[noisy == c].mean() for c in range(6)])
    np.testing.assert_allclose(share, true, atol=0.06)
    assert abs(share.mean() - wrong) < 0.03
    out = margins.margin < np.quantile(margins.margin, wrong)
    assert bad[out].mean() > 0.65


def test_wrong_labels_from_one_class_are_counted_there_alone() -> None:
    x, y = clusters(EVEN)
    noisy = y.copy()
    bad = np.flatnonzero(y == 3)[:400]
    noisy[bad] = 0
    share, _ = shares(x, noisy)
    assert share[0] == pytest.approx(400 / 1900, abs=0.06)
    assert share[1:].max() <= 0.05


def test_a_class_of_no_or_one_sample_has_a_share_in_range() -> None:
    x, y = clusters((300, 300, 300))
    y = np.where(y == 1, 3, y)  # no sample of class 1
    y[0] = 4
    share, _ = shares(x, y)
    assert share[1] == 0
    assert ((share >= 0) & (share <= 0.9)).all()


def test_two_classes_are_enough() -> None:
    x, y = clusters((800, 800))
    flip = np.random.default_rng(0).random(1600) < 0.2
    clean, _ = shares(x, y)
    noisy, _ = shares(x, np.where(flip, 1 - y, y))
    assert clean.max() <= 0.05
    np.testing.assert_allclose(noisy, 0.2, atol=0.08)


def test_more_classes_than_top_ones() -> None:
    x, y = clusters((300,) * 20)
    rng = np.random.default_rng(1)
    bad = rng.random(len(y)) < 0.2
    share, margins = shares(x, np.where(bad, (y + rng.integers(1, 20, len(y))) % 20, y))
    assert margins.top.shape[1] == 8
    assert 0.1 < share.mean() < 0.25  # 300 samples say less, so less is left out
    assert shares(x, y)[0].mean() < 0.01
