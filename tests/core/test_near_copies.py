"""Near copies: the blocked answer is the double loop's."""

import numpy as np
import pytest
from numpy.typing import NDArray

from adq_wds.core import near_copies as module
from adq_wds.core.kernel import unit_rows
from adq_wds.core.near_copies import near_copies


def double_loop(rows: NDArray[np.float64], threshold: float) -> list[int]:
    first: list[int] = []
    for i, row in enumerate(rows):
        for j, other in enumerate(rows[:i]):
            dot, lengths = float(row @ other), float(np.sqrt((row @ row) * (other @ other)))
            if first[j] == j and dot > 0 and dot >= threshold * lengths:
                first.append(j)
                break
        else:
            first.append(i)
    return first


def clusters(seed: int, *, n: int = 300, D: int = 24) -> NDArray[np.float64]:
    """Rows in chains of near copies, exact copies, opposites and zero rows, shuffled."""
    rng = np.random.default_rng(seed)
    centre = rng.normal(size=(12, D))
    walk = np.cumsum(0.03 * rng.normal(size=(n // 12, 12, D)), axis=0)  # chains: ends are not near
    rows = (centre + walk).reshape(-1, D)
    rows = np.concatenate([rows, rows[:40], -rows[:10], 3.0 * rows[40:60], np.zeros((3, D))])
    return unit_rows(rng.permutation(rows).astype(np.float16))


@pytest.mark.parametrize("threshold", [0.5, 0.99, 0.995, 0.9999, 1.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_near_copies_equal_the_double_loop(
    seed: int, threshold: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BLOCK_ROWS", 64)
    monkeypatch.setattr(module, "_BLOCK_COLUMNS", 48)
    rows = clusters(seed)
    first = near_copies(rows, threshold)
    assert first.tolist() == double_loop(rows, threshold)
    assert 0 < (first != np.arange(len(rows))).sum() < len(rows)


def test_a_cosine_at_the_threshold_is_near_and_none_below() -> None:
    pair = unit_rows(np.array([[1.0, 2.0, 3.0], [2.0, 1.0, 3.0]]))
    cosine = float(pair[0] @ pair[1] / np.sqrt((pair[0] @ pair[0]) * (pair[1] @ pair[1])))
    assert near_copies(pair, cosine * (1 - 1e-15)).tolist() == [0, 0]
    assert near_copies(pair, cosine + 1e-12).tolist() == [0, 1]


def test_equal_rows_are_near_at_one_at_any_rounded_length() -> None:
    rows = unit_rows(np.repeat(np.random.default_rng(0).normal(size=(50, 7)), 3, axis=0))
    assert near_copies(rows, 1.0).tolist() == np.repeat(np.arange(0, 150, 3), 3).tolist()


def test_a_chain_breaks_where_its_links_were_left_out() -> None:
    angles = np.deg2rad([0.0, 4.0, 8.0, 12.0])
    rows = unit_rows(np.column_stack([np.cos(angles), np.sin(angles)]))
    assert near_copies(rows, float(np.cos(np.deg2rad(5.0)))).tolist() == [0, 0, 2, 2]


@pytest.mark.parametrize("threshold", [0.0, -1.0, 1.5, float("nan")])
def test_a_threshold_out_of_range_is_an_error(threshold: float) -> None:
    with pytest.raises(ValueError, match="threshold"):
        near_copies(np.eye(3), threshold)


def test_progress_sums_to_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK_ROWS", 7)
    done: list[int] = []
    near_copies(clusters(0), 0.99, progress=done.append)
    assert sum(done) == len(clusters(0))
    assert near_copies(np.zeros((0, 4)), 0.9).tolist() == []
