"""Rows of length 1, against the sum of squares of each row in Python's own numbers."""

import math

import numpy as np
import pytest

from adq_wds.core.unit_rows import unit_rows


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_rows_are_divided_by_their_length(dtype: type[np.floating]) -> None:
    rows = np.random.default_rng(0).normal(size=(20, 7)).astype(dtype)
    rows[3] = 0
    before = rows.copy()
    unit, norm = unit_rows(rows)
    assert unit.dtype == norm.dtype == np.float64
    for row, made, length in zip(rows.tolist(), unit.tolist(), norm.tolist(), strict=True):
        expected = math.sqrt(math.fsum(value * value for value in row))
        assert length == pytest.approx(expected, rel=1e-14)
        assert made == pytest.approx([value / (expected or 1.0) for value in row], rel=1e-14)
    assert (rows == before).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_stays_so(value: float) -> None:
    unit, norm = unit_rows(np.array([[3.0, 4.0], [value, 1.0]], np.float32))
    assert not np.isfinite(unit[1]).all()
    assert not np.isfinite(norm[1])
    assert unit[0].tolist() == [0.6, 0.8]
