"""Do rows on demand give exactly the bins of the matrix, one row per pick and ever shorter ones?"""

from __future__ import annotations

import logging
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adq_wds.core import graphcut_rows
from adq_wds.core.graphcut import bin_sizes, graphcut_bins_gram
from adq_wds.core.graphcut_rows import graphcut_bins_rows


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


@pytest.fixture
def untold(monkeypatch):
    """Without the trial that only serves the message."""
    monkeypatch.setattr(graphcut_rows, "_tell", lambda similarity: None)


@settings(max_examples=100, deadline=None)
@given(
    n=st.integers(0, 60),
    bins=st.integers(1, 15),
    values=st.sampled_from([0, 1, 2, 1000]),  # few values: many ties
    seed=st.integers(0, 2**32 - 1),
)
def test_any_symmetric_matrix_gives_the_bins_of_the_matrix(n, bins, values, seed):
    similarity = table(n, seed, values)
    got = graphcut_bins_rows(similarity, bins)
    expected = graphcut_bins_gram(similarity.matrix, bins)
    assert got.bin.tolist() == expected.bin.tolist()
    assert got.pick.tolist() == expected.pick.tolist()


@pytest.mark.parametrize("bins", [1, 7, 300])
def test_each_pick_asks_for_one_row_and_rows_shorten_as_samples_leave(bins, untold):
    similarity = table(300)
    before = similarity.matrix.copy()
    graphcut_bins_rows(similarity, bins)
    assert len(similarity.asked) == 300
    left = np.arange(300, 0, -1)
    assert (similarity.asked >= left).all()
    assert (np.array(similarity.asked) * 7 <= np.maximum(left * 8, 14)).all()
    assert np.array_equal(similarity.matrix, before)


def test_every_bin_holds_its_size_and_picks_count_up_from_zero():
    got = graphcut_bins_rows(table(203), 10)
    assert got.bin.dtype == np.int16
    assert got.pick.dtype == np.int32
    cells = Counter(zip(got.bin.tolist(), got.pick.tolist(), strict=True))
    assert cells == Counter((b, k) for b, size in enumerate(bin_sizes(203, 10).tolist()) for k in range(size))


def test_progress_comes_with_each_pick():
    steps: list[int] = []
    graphcut_bins_rows(table(120), 7, progress=steps.append)
    assert steps == [1] * 120


def test_what_takes_long_is_said_once_with_count_memory_and_time(caplog, monkeypatch):
    monkeypatch.setattr(graphcut_rows, "_seconds", lambda work: 0.25)
    monkeypatch.setattr(graphcut_rows, "_TRIAL_SUMS", 10)
    with caplog.at_level(logging.WARNING, logger="adq_wds"):
        graphcut_bins_rows(table(100), 4)  # 0.25 s for the sums of a hundredth, and 50 rows: 37.5 s
    assert len(caplog.messages) == 1
    assert "a matrix of 100 samples takes 0.0 GiB, more than the memory budget" in caplog.messages[0]
    assert "rows are taken on demand: about 38 s" in caplog.messages[0]


@pytest.mark.parametrize(("seconds", "said"), [(0.0138, 1), (0.0137, 0)])  # 10.05 and 9.97 s
def test_what_takes_less_than_ten_seconds_is_not_said(seconds, said, caplog, monkeypatch):
    monkeypatch.setattr(graphcut_rows, "_seconds", lambda work: seconds)
    monkeypatch.setattr(graphcut_rows, "_TRIAL_SUMS", 4)
    with caplog.at_level(logging.WARNING, logger="adq_wds"):
        graphcut_bins_rows(table(104), 4)  # 26^2 trials and 52 rows: 728 times
    assert len(caplog.messages) == said


@pytest.mark.parametrize("bins", [0, -1, 32768])
def test_bins_out_of_range_are_refused_with_the_value(bins):
    with pytest.raises(ValueError, match=f"bins is {bins}, expected 1 to 32767"):
        graphcut_bins_rows(table(5), bins)
