"""Fresh draws take exactly their shares in every epoch, each sample of a cell once before any twice, and reach all."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adq_wds.core import fresh
from adq_wds.core.allocation import exact_shares
from adq_wds.core.fresh import ONE, FreshDraws

TURN = 2**64


def replayed(size: Any, quota: Any, share: Any, start: int, n_epochs: int) -> list[list[list[int]]]:
    """The ranks that each epoch takes of each cell: epoch after epoch, whole number after whole number."""
    borders = [sum(share[:i]) for i in range(len(share) + 1)]
    place, taken = [0] * len(size), []
    for epoch in range(n_epochs):
        u = (start + epoch * 0x9E3779B97F4A7C15) % TURN
        row = []
        for cell, n in enumerate(size):
            # k + u on the cell's stretch, all in units of 2⁻⁶⁴/ONE
            a, b = (borders[cell + i] * TURN for i in (0, 1))
            count = sum(a <= (k * TURN + u) * ONE < b for k in range(-1, borders[-1] // ONE + 1))
            count = quota[cell] if epoch == 0 else count
            row.append([(place[cell] + i) % n for i in range(count)])
            place[cell] += count
        taken.append(row)
    return taken


def some_cells(data: st.DataObject) -> tuple[Any, Any, Any]:
    size = np.array(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=6)))
    weight = np.array(data.draw(st.lists(st.floats(0.1, 3), min_size=len(size), max_size=len(size))))
    total = data.draw(st.integers(0, int(size.sum())))
    share = exact_shares(size * ONE, weight, total * ONE)
    quota = np.floor(share / ONE).astype(np.int64)
    for cell in range(len(size)):  # some plan of that total
        quota[cell] += min(size[cell] - quota[cell], total - quota.sum())
    return size, quota, share


@settings(max_examples=100)
@given(st.data(), st.integers(0, TURN - 1))
def test_draws_are_those_of_the_slow_replay_and_keep_every_law(data: st.DataObject, start: int) -> None:
    size, quota, share = some_cells(data)
    draws, n_epochs = FreshDraws(size, quota, share, start), 25
    expected = replayed(size.tolist(), quota.tolist(), share.tolist(), start, n_epochs)
    seen: list[list[int]] = [[] for _ in size]
    for epoch, cells in enumerate(expected):
        first, n = draws.seats(epoch)
        got = [[(int(a) + i) % s for i in range(k)] for a, k, s in zip(first, n, size.tolist(), strict=True)]
        assert got == cells
        assert n.sum() == quota.sum()
        if epoch:
            assert ((n == share // ONE) | (n == -(-share // ONE))).all()
        for cell, ranks in enumerate(got):
            assert len(set(ranks)) == len(ranks)
            seen[cell] += ranks
    for cell, ranks in enumerate(seen):  # each once before any twice
        times = np.bincount(ranks, minlength=size[cell])
        assert times.max() - times.min() <= 1


@pytest.mark.parametrize("epoch", [1, 2, 977])
def test_far_epochs_are_counted_without_a_list(epoch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    size = np.array([1, 7, 0, 30, 2])
    draws = FreshDraws(size, np.array([0, 2, 0, 6, 1]), exact_shares(size * ONE, size * 1.0, 9 * ONE), 12345)
    sorted_ones = draws.seats(epoch)
    monkeypatch.setattr(fresh, "_SORTED", 0)
    for a, b in zip(sorted_ones, draws.seats(epoch), strict=True):
        assert (a == b).all()
    assert draws.seats(2**62)[1].sum() == 9  # at once, not after 2**62 steps


@pytest.mark.parametrize("keep", [0.05, 0.2, 0.31])
def test_every_sample_is_reached_within_two_rounds(keep: float) -> None:
    """100 classes of twelve in ten bins; 200 classes of one."""
    for size in (np.tile([2, 2] + [1] * 8, 100), np.ones(200, dtype=np.int64)):
        total = round(keep * int(size.sum()))
        share = exact_shares(size * ONE, size * 1.0, total * ONE)
        for start in range(0, TURN, TURN // 7):
            draws = FreshDraws(size, np.zeros_like(size), share, start)
            seen = sum(draws.seats(epoch)[1] for epoch in range(1, 2 * int(np.ceil(1 / keep))))
            assert (seen >= size).all()


def test_a_negative_epoch_is_refused() -> None:
    one = np.ones(1, dtype=np.int64)
    with pytest.raises(ValueError, match="epoch must be >= 0, got -1"):
        FreshDraws(one, one, one * ONE, 0).seats(-1)
