"""Bin scores from running sums equal the means over samples and over pairs, of samples and of their views."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from adq_wds.core.scores import (
    BinSums,
    bin_scores,
    diversity,
    diversity_of_views,
    importance,
    representativeness,
)

Rows = np.ndarray[Any, Any]


def unit(z: Rows) -> Rows:
    norm = np.linalg.norm(z, axis=-1, keepdims=True)
    return np.divide(z, norm, out=np.zeros_like(z), where=norm > 0)


def rounded_unit(rows: Rows) -> Rows:
    return np.rint(unit(rows) * 2**16) / 2**16


def sums_of(bin: Rows, rows: Rows, texture: Rows, n_bins: int, parts: int = 1) -> BinSums:
    sums = BinSums.empty(n_bins, rows.shape[1])
    for part in np.array_split(np.arange(len(bin)), parts):
        sums.add(bin[part].astype(np.int16), rows[part], texture[part].astype(np.float32))
    return sums


def of_samples(z: Rows, bin: Rows, n_bins: int) -> Rows:
    """From one view of each image."""
    return diversity(sums_of(bin, rounded_unit(z[:, 0]), np.ones(len(z)), n_bins))


def of_views(z: Rows, bin: Rows, n_bins: int) -> Rows:
    return diversity_of_views(unit(z), bin, n_bins)


def mean_over_pairs(z: Rows, n_views: int) -> float:
    """The definition: every pair of views, but no view with itself and no two views of one image."""
    views = [(i, row) for i, both in enumerate(z) for row in both[:n_views]]
    similar = [0.5 + 0.5 * float(a @ b) for (i, a), (j, b) in itertools.combinations(views, 2) if i != j]
    return sum(similar) / len(similar)


Score = Callable[[Rows, Rows, int], Rows]
both = pytest.mark.parametrize(
    ("score", "n_views"), [(of_samples, 1), (of_views, 2)], ids=["samples", "views"]
)


@both
@pytest.mark.parametrize("kind", ["relu", "signed", "zero rows", "a zero view", "alike"])
def test_diversity_is_one_over_the_mean_over_pairs(kind: str, score: Score, n_views: int) -> None:
    rng = np.random.default_rng(1)
    z = rng.normal(size=(120, 1, 8)) + 0.5 * rng.normal(size=(120, 2, 8))
    if kind == "relu":
        z = np.maximum(z, 0)
    if kind == "zero rows":
        z[::5] = 0
    if kind == "a zero view":
        z[::5, 1] = 0
    if kind == "alike":
        z[:] = z[0, 0]
    bin = rng.integers(0, 4, 120)
    found = score(z, bin, 4)
    for k in range(4):
        rows = rounded_unit(z) if n_views == 1 else unit(z)
        assert found[k] == pytest.approx(1 / mean_over_pairs(rows[bin == k], n_views), abs=1e-9)


@both
def test_a_bin_without_a_value_takes_the_mean_of_the_others(score: Score, n_views: int) -> None:
    """Of one image, or of opposite ones: their mean similarity is 0, so 1 over it is not defined."""
    z = np.abs(np.random.default_rng(2).normal(size=(23, 2, 5)))
    z[21:] = np.eye(5)[0]
    z[22] *= -1
    found = score(z, np.array([0] * 10 + [1] * 10 + [2, 4, 4]), 5)
    assert found[2] == found[4] == pytest.approx((found[0] + found[1]) / 2)
    assert np.isnan(found).tolist() == [False, False, False, True, False]


@both
def test_without_a_single_value_all_bins_are_alike(score: Score, n_views: int) -> None:
    z = np.stack([np.eye(2)] * 2, axis=1)
    assert score(z, np.array([0, 1]), 2).tolist() == [1.0, 1.0]


def test_the_order_of_images_and_of_their_views_plays_no_part() -> None:
    rng = np.random.default_rng(3)
    z, bin = rng.normal(size=(50, 2, 6)) + 0.3, rng.integers(0, 3, 50)
    order = rng.permutation(50)
    expected = of_views(z, bin, 3)
    assert of_views(z[order][:, ::-1], bin[order], 3) == pytest.approx(expected, rel=1e-12)


def test_how_alike_the_two_views_of_an_image_are_plays_no_part() -> None:
    """Four orthogonal images: whether an image's views are equal or opposite, other images are at cos 0."""
    rows = np.eye(4)[:, None, :]
    for second in (rows, -rows):
        z = np.concatenate([rows, second], axis=1)
        assert of_views(z, np.zeros(4, dtype=np.int16), 1).tolist() == [2.0]


def test_bins_that_hold_unviewed_samples_or_none_are_told_apart() -> None:
    z = unit(np.abs(np.random.default_rng(5).normal(size=(30, 2, 5))))
    bin = np.repeat([0, 3, -1], 10)  # images in no bin count nowhere
    found = diversity_of_views(z, bin, 5, size=np.array([100, 7, 0, 100, 1]))
    assert found[1] == found[4] == pytest.approx((found[0] + found[3]) / 2)
    assert np.isnan(found).tolist() == [False, False, True, False, False]
    assert found[0] == diversity_of_views(z[:10], bin[:10], 1)[0]


def test_sums_do_not_depend_on_how_classes_are_added() -> None:
    rng = np.random.default_rng(3)
    rows, bin, texture = rounded_unit(rng.normal(size=(200, 6))), rng.integers(0, 5, 200), rng.random(200)
    whole, parts = sums_of(bin, rows, texture, 5), sums_of(bin, rows, texture, 5, parts=7)
    assert (whole.embedding == parts.embedding).all()
    assert diversity(whole) == pytest.approx(diversity(parts), abs=1e-12)


def test_representativeness_is_the_mean_texture() -> None:
    sums = sums_of(np.array([0, 0, 2]), np.ones((3, 2)), np.array([1.0, 2.0, 5.0]), 3)
    assert representativeness(sums)[[0, 2]].tolist() == [1.5, 5.0]
    assert np.isnan(representativeness(sums)[1])
    assert list(bin_scores(sums)) == ["texture", "diversity"]
    assert list(bin_scores(BinSums.empty(3, 2, texture=False))) == ["diversity"]


def test_importance_adds_normalised_scores() -> None:
    found = importance([np.array([1.0, 3.0]), np.array([3.0, 1.0])])
    assert found.tolist() == [0.5, 0.5]
    found = importance([np.array([2.0, 4.0, 6.0])], normalise="minmax")
    assert found == pytest.approx(np.array([0.0, 0.5, 1.0]) / 1.5)


@pytest.mark.parametrize("normalise", ["sum", "minmax"])
def test_an_equal_score_is_uniform_over_filled_bins(normalise: str) -> None:
    found = importance([np.array([0.3, np.nan, 0.3]), np.array([7.0, np.nan, 7.0])], normalise=normalise)
    assert found.tolist() == [0.5, 0.0, 0.5]


def test_importance_forgets_the_last_bits() -> None:
    scores = np.array([1.0, 2.0, 4.0])
    assert (importance([scores]) == importance([scores * (1 + 2e-16)])).all()
