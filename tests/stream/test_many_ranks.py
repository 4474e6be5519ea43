"""The simulation of many ranks in benchmarks: right on a small case, and able to fail."""

from __future__ import annotations

import numpy as np
import pytest

from adq_wds.core.order import rank_positions
from adq_wds.stream import epoch_order
from benchmarks.scale_ranks import Epoch, play

SIZES = np.array([9, 1, 14, 0, 23])


@pytest.mark.parametrize("batch", [{"batch_size": 2}, {"global_batch": 13}])
def test_a_small_epoch_by_changing_ranks_is_whole_and_in_order(batch: dict[str, int]) -> None:
    row = play(Epoch(SIZES, uneven="ragged", **batch), [6, 5, 7], 2, [1, 1])
    assert (row["missing"], row["repeated"], row["in_order"], row["states_agree"]) == (0, 0, True, True)
    assert row["samples_of_a_rank"][0] == ([2, 2] if "batch_size" in batch else [2, 3])


def test_a_broken_order_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(k: np.ndarray, **options: int) -> np.ndarray:
        return rank_positions(k, **options) // 2 * 2

    monkeypatch.setattr(epoch_order, "rank_positions", broken)
    row = play(Epoch(SIZES, uneven="ragged", batch_size=2), [6, 5], 2, [1])
    assert (row["missing"], row["repeated"], row["in_order"]) == (23, 23, False)


def test_ranks_that_restart_the_epoch_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    class Restarting(Epoch):
        def read(self, world: int, workers: int, state: object = None, steps: int | None = None) -> object:
            return super().read(world, workers, None, steps)

    row = play(Restarting(SIZES, uneven="ragged", batch_size=2), [6, 5], 2, [1])
    assert (row["missing"], row["repeated"], row["in_order"]) == (0, 12, False)
