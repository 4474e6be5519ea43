"""Do rows on demand give exactly the bins of the matrix, one row per pick and ever shorter ones?"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adq_wds.core.graphcut import graphcut_bins_gram
from adq_wds.core.graphcut_rows import graphcut_bins_rows
from tests.core.greedy import lists


class Table:
    """A similarity whose matrix is known, which notes what it was asked for."""

    def __init__(self, matrix: np.ndarray, asked: list[int] | None = None) -> None:
        self.matrix = matrix
        self.asked = [] if asked is None else asked  # lengths of the rows given, over all parts

    def __len__(self) -> int:
        return len(self.matrix)

    def sums(self) -> np.ndarray:
        return self.matrix.sum(axis=1)

    def row(self, u: int) -> np.ndarray:
        self.asked.append(len(self))
        return self.matrix[u].copy()

    def take(self, keep: np.ndarray) -> Table:
        assert (np.diff(keep) > 0).all()  # ties go to the lowest position
        return Table(self.matrix[np.ix_(keep, keep)], self.asked)


def table(n: int, seed: int = 0, values: int = 1000) -> Table:
    half = np.random.default_rng(seed).integers(-values, values + 1, size=(n, n))
    return Table((half + half.T) / 2.0**12)


@settings(max_examples=100)
@given(
    n=st.integers(0, 60),
    bins=st.integers(1, 15),
    values=st.sampled_from([0, 1, 2, 1000]),  # few values: many ties
    seed=st.integers(0, 2**32 - 1),
)
def test_any_symmetric_matrix_gives_the_bins_of_the_matrix(n, bins, values, seed):
    similarity = table(n, seed, values)
    assert lists(graphcut_bins_rows(similarity, bins)) == lists(graphcut_bins_gram(similarity.matrix, bins))


@pytest.mark.parametrize("bins", [1, 7, 300])
def test_each_pick_asks_for_one_ever_shorter_row(bins):
    similarity = table(300)
    before = similarity.matrix.copy()
    graphcut_bins_rows(similarity, bins)
    assert len(similarity.asked) == 300
    left = np.arange(300, 0, -1)
    assert (similarity.asked >= left).all()
    assert (np.array(similarity.asked) * 7 <= np.maximum(left * 8, 14)).all()
    assert np.array_equal(similarity.matrix, before)


def test_progress_comes_with_each_pick():
    steps: list[int] = []
    graphcut_bins_rows(table(120), 7, progress=steps.append)
    assert steps == [1] * 120
