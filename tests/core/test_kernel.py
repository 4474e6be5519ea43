"""Are unit rows rounded as stated, and are their dot products exact?"""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from adq_wds.core import kernel
from adq_wds.core.kernel import ROW_STEP, unit_rows


def plain_rows(embedding: np.ndarray) -> list[list[float]]:
    """The definition, one entry at a time; Python's `round` goes half to even."""
    out = []
    for row in embedding.tolist():
        total = 0.0
        for x in row:
            total += x * x
        norm = math.sqrt(total)
        out.append([round(x / norm * 65536) / 65536 if norm else 0.0 for x in row])
    return out


@settings(max_examples=60)
@given(arrays(np.float16, (5, 7), elements=st.floats(-60000, 60000, width=16)))
def test_unit_rows_equal_the_plain_definition(embedding):
    assert unit_rows(embedding).tolist() == plain_rows(embedding)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_every_float_dtype_gives_rounded_rows_of_length_one(dtype):
    rows = unit_rows(np.random.default_rng(0).normal(size=(300, 64)).astype(dtype))
    assert rows.dtype == np.float64
    assert np.array_equal(rows, np.rint(rows / ROW_STEP) * ROW_STEP)
    assert np.abs(np.linalg.norm(rows, axis=1) - 1).max() <= 8 * 2.0**-17  # sqrt(D) half steps


def test_exact_halves_go_to_the_even_step():
    for odd in (1, 3, 5, 7, 101):
        half = odd * 0.5 * ROW_STEP
        row = np.array([[half, math.sqrt(1 - half * half)]])
        assert math.sqrt(half * half + row[0, 1] ** 2) == 1.0  # so the quotient is the half itself
        steps = unit_rows(row)[0, 0] / ROW_STEP
        assert steps % 2 == 0
        assert abs(steps - odd / 2) == 0.5


def test_squares_are_added_in_the_order_of_the_columns():
    # 1 + 2^-54 is 1 in float64, 64 times over; added among themselves first, the small squares would lengthen the
    # norm, and the half would be a little less than a half: one step, not two.
    half = 1.5 * ROW_STEP
    row = np.array([half, math.sqrt(1 - half * half), *[2.0**-27] * 64])
    lone = unit_rows(row[None])
    assert lone[0, 0] == 2 * ROW_STEP
    assert np.array_equal(unit_rows(np.tile(row, (9, 1))), np.tile(lone, (9, 1)))


def test_zero_rows_stay_zero():
    rows = unit_rows(np.array([[0.0, 0.0], [1.0, -1.0], [-0.0, 0.0]], dtype=np.float32))
    assert np.array_equal(rows[[0, 2]], np.zeros((2, 2)))


@pytest.mark.parametrize("scale", [1e-320, 1e-200, 1e-5, 1e5, 1e38, 1e200, 1e308])
def test_length_does_not_matter_even_where_squares_overflow(scale):
    row = np.array([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]]) * (scale if scale < 1e308 else 1e308)
    assert np.array_equal(unit_rows(row), unit_rows(np.array([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])))


def test_rows_do_not_depend_on_where_blocks_are_cut(monkeypatch):
    embedding = np.random.default_rng(1).normal(size=(1000, 33)).astype(np.float32)
    whole = unit_rows(embedding)
    monkeypatch.setattr(kernel, "_BLOCK_BYTES", 8 * 33 * 7)
    assert np.array_equal(unit_rows(embedding), whole)
    assert np.array_equal(np.concatenate([unit_rows(embedding[i : i + 1]) for i in range(50)]), whole[:50])


@pytest.mark.parametrize("signed", [False, True])
def test_dot_products_and_sums_are_exact_integers_in_any_order(signed):
    features = np.random.default_rng(3).normal(size=(200, 256))
    rows = unit_rows((features if signed else np.maximum(features, 0)).astype(np.float16))
    steps = np.rint(rows / ROW_STEP).astype(np.int64)
    product = steps @ steps.T  # whole numbers: no rounding at all
    assert np.array_equal(rows @ rows.T * 2.0**32, product.astype(np.float64))
    assert np.array_equal(rows[:, ::-1] @ rows[:, ::-1].T, rows @ rows.T)
    total = rows.sum(axis=0)
    assert np.array_equal(rows @ total, (rows @ rows.T).sum(axis=1))


@pytest.mark.parametrize(
    ("bad", "dtype", "block"),
    list(itertools.product([np.nan, np.inf, -np.inf], [np.float16, np.float32, np.float64], [1 << 25, 64])),
)
def test_the_first_row_with_nan_or_inf_is_named(bad, dtype, block, monkeypatch):
    monkeypatch.setattr(kernel, "_BLOCK_BYTES", block)
    embedding = np.ones((50, 4), dtype=dtype)
    embedding[37, 2] = embedding[41, 0] = bad
    with pytest.raises(ValueError, match="embedding row 37 holds NaN or Inf"):
        unit_rows(embedding)


def test_wrong_shape_and_dtype_are_refused_with_the_value():
    with pytest.raises(ValueError, match=r"shape \(3,\), expected two axes"):
        unit_rows(np.ones(3))
    with pytest.raises(ValueError, match="dtype int64, expected float16, float32 or float64"):
        unit_rows(np.ones((3, 2), dtype=np.int64))
