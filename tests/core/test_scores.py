"""Bin scores from running sums equal the means over samples and over pairs."""

import itertools
from typing import Any

import numpy as np
import pytest

from adq_wds.core.scores import BinSums, diversity, importance, representativeness

Rows = np.ndarray[Any, Any]


def unit(rows: Rows) -> Rows:
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.rint(np.divide(rows, norm, out=np.zeros_like(rows), where=norm > 0) * 2**16) / 2**16


def sums_of(bin: Rows, rows: Rows, texture: Rows, n_bins: int, parts: int = 1) -> BinSums:
    sums = BinSums.empty(n_bins, rows.shape[1])
    for part in np.array_split(np.arange(len(bin)), parts):
        sums.add(bin[part].astype(np.int16), rows[part], texture[part].astype(np.float32))
    return sums


def mean_over_pairs(rows: Rows) -> float:
    """The definition, pair by pair."""
    similar = [0.5 + 0.5 * float(a @ b) for a, b in itertools.combinations(rows, 2)]
    return sum(similar) / len(similar)


@pytest.mark.parametrize("kind", ["relu", "signed", "zero rows", "alike"])
def test_diversity_is_one_over_the_mean_over_pairs(kind: str) -> None:
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(120, 8))
    if kind == "relu":
        rows = np.maximum(rows, 0)
    if kind == "zero rows":
        rows[::7] = 0
    if kind == "alike":
        rows[:] = rows[0]
    rows = unit(rows)
    bin = rng.integers(0, 4, 120)
    found = diversity(sums_of(bin, rows, np.ones(120), 4))
    for k in range(4):
        assert found[k] == pytest.approx(1 / mean_over_pairs(rows[bin == k]), abs=1e-9)


def test_a_bin_of_one_image_takes_the_mean_of_the_others_and_an_empty_one_has_none() -> None:
    rng = np.random.default_rng(2)
    rows = unit(np.abs(rng.normal(size=(21, 5))))
    bin = np.array([0] * 10 + [1] * 10 + [2])
    found = diversity(sums_of(bin, rows, np.ones(21), 4))
    assert found[2] == pytest.approx((found[0] + found[1]) / 2)
    assert np.isnan(found[3])


def test_a_bin_of_opposite_images_takes_the_mean_of_the_others() -> None:
    """Two opposite vectors: mean similarity 0, so 1 over it is not defined."""
    rows = unit(np.array([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
    found = diversity(sums_of(np.array([0, 0, 1, 1]), rows, np.ones(4), 2))
    assert found.tolist() == [2.0, 2.0]


def test_without_a_single_pair_all_bins_are_alike() -> None:
    found = diversity(sums_of(np.array([0, 1]), unit(np.eye(2)), np.ones(2), 2))
    assert found.tolist() == [1.0, 1.0]


def test_sums_do_not_depend_on_how_classes_are_added() -> None:
    rng = np.random.default_rng(3)
    rows, bin, texture = unit(rng.normal(size=(200, 6))), rng.integers(0, 5, 200), rng.random(200)
    whole, parts = sums_of(bin, rows, texture, 5), sums_of(bin, rows, texture, 5, parts=7)
    assert (whole.embedding == parts.embedding).all()
    assert diversity(whole) == pytest.approx(diversity(parts), abs=1e-12)


def test_representativeness_is_the_mean_texture() -> None:
    sums = sums_of(np.array([0, 0, 2]), unit(np.ones((3, 2))), np.array([1.0, 2.0, 5.0]), 3)
    assert representativeness(sums)[[0, 2]].tolist() == [1.5, 5.0]
    assert np.isnan(representativeness(sums)[1])


def test_importance_adds_normalised_scores() -> None:
    found = importance([np.array([1.0, 3.0]), np.array([3.0, 1.0])])
    assert found.tolist() == [0.5, 0.5]
    found = importance([np.array([2.0, 4.0, 6.0])], normalise="minmax")
    assert found == pytest.approx(np.array([0.0, 0.5, 1.0]) / 1.5)


@pytest.mark.parametrize("normalise", ["sum", "minmax"])
def test_a_score_that_is_equal_in_all_bins_is_uniform_and_an_empty_bin_gets_nothing(normalise: str) -> None:
    found = importance([np.array([0.3, np.nan, 0.3]), np.array([7.0, np.nan, 7.0])], normalise=normalise)
    assert found.tolist() == [0.5, 0.0, 0.5]


def test_importance_forgets_the_last_bits() -> None:
    a = importance([np.array([1.0, 2.0, 4.0])])
    b = importance([np.array([1.0, 2.0, 4.0]) * (1 + 2e-16)])
    assert (a == b).all()


@pytest.mark.parametrize(
    ("scores", "normalise", "text"),
    [
        ([[1.0, -1.0]], "sum", "finite and >= 0"),
        ([[1.0, np.inf]], "sum", "finite and >= 0"),
        ([[1.0], [1.0, 2.0]], "sum", "one shape"),
        ([], "sum", "one or more"),
        ([[1.0]], "max", "normalise must be 'sum' or 'minmax', got 'max'"),
    ],
)
def test_impossible_scores_are_refused(scores: list[list[float]], normalise: str, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        importance([np.array(score) for score in scores], normalise=normalise)
