"""Shares of many budgets at once are those of each budget alone, to the last unit."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adq_wds.core.cells import Cells
from adq_wds.core.fresh import ONE


def some_cells(data: st.DataObject) -> Cells:
    """Up to five classes of up to four bins, some of them empty, without a weight or with must-includes."""
    n_classes, n_bins = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))

    def table(of: Any, shape: tuple[int, ...]) -> Any:
        n = int(np.prod(shape))
        return np.array(data.draw(st.lists(of, min_size=n, max_size=n))).reshape(shape)

    size = table(st.integers(0, 40), (n_classes, n_bins))
    weight = table(st.one_of(st.just(0.0), st.floats(1e-3, 1e3)), (n_classes, n_bins)) * (size > 0)
    n_must = table(st.integers(0, 2), (n_classes,))
    balance = data.draw(st.sampled_from(["class", "equal", "none", 0.5]))
    return Cells(size, n_must, weight, 0, balance, data.draw(st.integers(0, 9)))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_shares_of_many_budgets_are_those_of_each(data: st.DataObject) -> None:
    cells = some_cells(data)
    least, most = int(cells.n_must.sum()), int(cells.n_class.sum())
    budgets = np.array(data.draw(st.lists(st.integers(least, most), min_size=1, max_size=6)))
    shares = cells.shares(budgets)
    for budget, share in zip(budgets.tolist(), shares, strict=True):
        assert (share == replace(cells, budget=budget).share).all()
        assert share.sum() == (budget - least) * ONE


@pytest.mark.parametrize("scale", [10**6, 10**9])
def test_shares_of_large_sets_are_exact(scale: int) -> None:
    """Where products need more than 64 bits."""
    rng = np.random.default_rng(0)
    size = rng.integers(scale // 2, scale, (7, 5))
    cells = Cells(size, np.zeros(7, np.int64), rng.random((7, 5)) + 0.1, 0, "equal", 0)
    for budget in (1, int(size.sum()) // 3, int(size.sum()) - 5):
        assert (cells.shares(np.array([budget]))[0] == replace(cells, budget=budget).share).all()
