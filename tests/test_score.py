"""A score of a user: two hooks, and nothing wrong passes either."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

import adq_wds as adq
from adq_wds.score import RESERVED, Score, bin_values, check_score, sample_value

IMAGE = Image.new("RGB", (4, 4), (10, 20, 30))
H = np.zeros(3, np.float32)


class Given(Score):
    """Gives what it is told to give."""

    name = "given"

    def __init__(self, sample: Any = 1.0, per_bin: Any = None) -> None:
        self.sample, self.bins = sample, per_bin

    def per_sample(self, image: Image.Image, h: NDArray[np.float32]) -> float:
        if isinstance(self.sample, Exception):
            raise self.sample
        return self.sample  # type: ignore[no-any-return]

    def per_bin(self, values: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
        if isinstance(self.bins, Exception):
            raise self.bins
        return super().per_bin(values) if self.bins is None else self.bins


@pytest.mark.parametrize("given", [2, 2.0, np.float32(2), np.array(2.0), np.int64(2)])
def test_any_number_is_a_value(given: Any) -> None:
    assert sample_value(Given(given), IMAGE, H) == 2.0


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (float("nan"), "score 'given' gave nan, expected one finite number"),
        (float("inf"), "gave inf"),
        (-float("inf"), "gave -inf"),
        (1e39, r"gave 1e\+39, expected one finite number \(float32\)"),
        (np.ones(3), r"gave array\(\[1., 1., 1.\]\) of shape \(3,\)"),
        ([1.0], r"gave \[1.0\] of shape \(1,\)"),
        (None, "score 'given' fails on it: TypeError"),
        ("high", "score 'given' fails on it: ValueError: could not convert"),
        (RuntimeError("no\nedge"), "score 'given' fails on it: RuntimeError: no edge"),
    ],
)
def test_a_sample_without_one_finite_number_is_bad(given: Any, text: str) -> None:
    with pytest.raises(adq.SampleError, match=text):
        sample_value(Given(given), IMAGE, H)


def test_a_bin_is_worth_the_mean_of_its_samples() -> None:
    values = np.array([1, 2, 4, 9, 100], np.float32)
    bin = np.array([0, 2, 2, 0, -1], np.int16)
    found = bin_values(Given(), values, bin, 4)
    assert found.tolist()[::2] == [5.0, 3.0]
    assert np.isnan(found[[1, 3]]).all()


def test_the_second_hook_sees_each_bin_that_holds_samples() -> None:
    seen: list[list[float]] = []

    class Largest(Given):
        def per_bin(self, values: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
            seen.extend(part.tolist() for part in values)
            return np.array([part.max() for part in values])

    found = bin_values(Largest(), np.array([3, 1, 2], np.float32), np.array([2, 0, 2], np.int16), 3)
    assert seen == [[1.0], [3.0, 2.0]]
    assert found.tolist()[0] == 1.0
    assert found.tolist()[2] == 3.0


@pytest.mark.parametrize(
    ("score", "text"),
    [
        (Given(per_bin=np.ones(2)), r"must give \(3,\) numbers, one per bin .*, got float64 of shape \(2,\)"),
        (Given(per_bin=np.ones((3, 1))), r"got float64 of shape \(3, 1\)"),
        (Given(per_bin=7.0), r"got float64 of shape \(\)"),
        (Given(per_bin=["a", "b", "c"]), "got <U1 of shape"),
        (Given(per_bin=[1, np.nan, 1]), "a bin's value must be finite and >= 0, got .*nan"),
        (Given(per_bin=[1, np.inf, 1]), "a bin's value must be finite"),
        (Given(per_bin=[1, -1e-9, 1]), "a bin's value must be finite and >= 0"),
        (Given(per_bin=KeyError("x")), "per_bin fails: KeyError: 'x'"),
    ],
)
def test_bins_without_one_finite_number_each_are_refused(score: Score, text: str) -> None:
    with pytest.raises(ValueError, match=f"score 'given': .*{text}"):
        bin_values(score, np.ones(3, np.float32), np.arange(3, dtype=np.int16), 3)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("Sharp", "score name 'Sharp': expected lower-case"),
        ("a b", "expected lower-case"),
        ("", "expected lower-case"),
        ("x" * 41, "expected lower-case"),
        ("1st", "expected lower-case"),
        ("sharp\n", "expected lower-case"),
        (None, "score name None"),
        *((name, f"{name!r} is one of ours") for name in sorted(RESERVED)),
    ],
)
def test_a_name_that_cannot_be_a_column_is_refused(name: Any, text: str) -> None:
    score = Given()
    score.name = name
    with pytest.raises(ValueError, match=text):
        check_score(score)


def test_what_is_no_score_is_refused() -> None:
    with pytest.raises(TypeError, match=r"a score must be a name or derive from adq_wds\.Score, got 5"):
        check_score(5)
    score = Given()
    score.revision = 2  # type: ignore[assignment]
    with pytest.raises(ValueError, match="revision must be text, got 2"):
        check_score(score)
    with pytest.raises(TypeError, match="abstract"):
        Score()  # type: ignore[abstract]
