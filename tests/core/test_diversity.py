"""Diversity over two views equals the mean over pairs of views of different images, pair by pair."""

import itertools
from typing import Any

import numpy as np
import pytest

from adq_wds.core.scores import diversity_of_views

Rows = np.ndarray[Any, Any]


def unit(z: Rows) -> Rows:
    norm = np.linalg.norm(z, axis=-1, keepdims=True)
    return np.divide(z, norm, out=np.zeros_like(z), where=norm > 0)


def mean_over_pairs(z: Rows) -> float:
    """The definition: every pair of views, but no view with itself and no two views of one image."""
    views = [(i, row) for i, both in enumerate(z) for row in both]
    similar = [0.5 + 0.5 * float(a @ b) for (i, a), (j, b) in itertools.combinations(views, 2) if i != j]
    return sum(similar) / len(similar)


@pytest.mark.parametrize("kind", ["relu", "signed", "zero rows", "a zero view", "alike"])
def test_diversity_is_one_over_the_mean_over_pairs(kind: str) -> None:
    rng = np.random.default_rng(1)
    z = rng.normal(size=(60, 1, 8)) + 0.5 * rng.normal(size=(60, 2, 8))
    if kind == "relu":
        z = np.maximum(z, 0)
    if kind == "zero rows":
        z[::5] = 0
    if kind == "a zero view":
        z[::5, 1] = 0
    if kind == "alike":
        z[:] = z[0, 0]
    z, bin = unit(z), rng.integers(-1, 4, 60)
    found = diversity_of_views(z, bin, 4)
    for k in range(4):
        assert found[k] == pytest.approx(1 / mean_over_pairs(z[bin == k]), abs=1e-12)


def test_the_order_of_images_and_of_their_views_plays_no_part() -> None:
    rng = np.random.default_rng(3)
    z, bin = unit(rng.normal(size=(50, 2, 6)) + 0.3), rng.integers(0, 3, 50)
    order = rng.permutation(50)
    assert diversity_of_views(z[order][:, ::-1], bin[order], 3) == pytest.approx(
        diversity_of_views(z, bin, 3), rel=1e-12
    )


def test_how_alike_the_two_views_of_an_image_are_plays_no_part() -> None:
    """Four orthogonal images: whether an image's views are equal or opposite, other images are at cos 0."""
    rows = np.eye(4)[:, None, :]
    equal, opposite = np.concatenate([rows, rows], axis=1), np.concatenate([rows, -rows], axis=1)
    bin = np.zeros(4, dtype=np.int16)
    assert diversity_of_views(equal, bin, 1).tolist() == [2.0]
    assert diversity_of_views(opposite, bin, 1).tolist() == [2.0]


def test_a_bin_of_one_image_takes_the_mean_of_the_others_and_an_empty_one_has_none() -> None:
    rng = np.random.default_rng(4)
    z = unit(np.abs(rng.normal(size=(21, 2, 5))))
    bin = np.array([0] * 10 + [1] * 10 + [2])
    found = diversity_of_views(z, bin, 4)
    assert found[2] == pytest.approx((found[0] + found[1]) / 2)
    assert np.isnan(found).tolist() == [False, False, False, True]


def test_a_bin_whose_samples_were_not_viewed_takes_the_mean_of_the_others() -> None:
    rng = np.random.default_rng(5)
    z, bin = unit(np.abs(rng.normal(size=(20, 2, 5)))), np.repeat([0, 3], 10)
    found = diversity_of_views(z, bin, 5, size=np.array([100, 7, 0, 100, 1]))
    assert found[1] == found[4] == pytest.approx((found[0] + found[3]) / 2)
    assert np.isnan(found).tolist() == [False, False, True, False, False]


def test_images_in_no_bin_count_nowhere() -> None:
    rng = np.random.default_rng(6)
    z, bin = unit(np.abs(rng.normal(size=(20, 2, 5)))), np.repeat([0, -1], 10)
    found = diversity_of_views(z, bin, 2)
    assert found[0] == diversity_of_views(z[:10], bin[:10], 2)[0]
    assert np.isnan(found[1])


def test_a_bin_of_opposite_images_takes_the_mean_of_the_others() -> None:
    """Mean similarity 0, so 1 over it is not defined."""
    a, b = [1.0, 0.0], [0.0, 1.0]
    z = np.array([[a, a], [np.negative(a), np.negative(a)], [a, a], [b, b]])
    bin = np.array([0, 0, 1, 1])
    assert diversity_of_views(z, bin, 2).tolist() == [2.0, 2.0]


@pytest.mark.parametrize("images", [0, 2])
def test_without_a_single_value_all_bins_are_alike(images: int) -> None:
    z, bin = np.zeros((images, 2, 3)), np.arange(images)
    found = diversity_of_views(z, bin, 3, size=np.array([1, 1, 0]))
    assert found[:2].tolist() == [1.0, 1.0]
    assert np.isnan(found[2])
