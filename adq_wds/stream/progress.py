"""Counts the batches that an iteration over a data set has handed on, and gives its state after any of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from adq_wds.stream.dataset import ShardDataset
from adq_wds.stream.iterator import Item


class Progress(Iterator[Any]):
    """One iteration: its batches and its progress; `read` starts it, or is None where nothing is left."""

    def __init__(self, dataset: ShardDataset, read: Callable[[], Iterator[Item]] | None) -> None:
        self._dataset, self.start = dataset, dataset.next_start
        self.n_batches, self.dropped = 0, False  # handed on, dropped ones included; whether one was left out
        self._advanced = False
        self._items: Iterator[Item] = iter(())
        if read is not None:
            with dataset.tagging():
                self._items = read()

    def __next__(self) -> Any:
        while True:
            item = next(self._items)
            if item.error is not None:
                raise item.error
            self.n_batches = item.number + 1
            if not item.empty:
                return item.batch
            self.dropped = True

    def advance(self) -> None:
        """Make the next iteration read the next epoch; later calls do nothing."""
        if not self._advanced:
            self._advanced = True
            self._dataset.advance_past(self.start.epoch)

    def state_at(self, n_batches: int, *, dropped: bool = False) -> dict[str, Any]:
        """The state after some batches; `dropped` if another rank may be elsewhere after as many."""
        return self._dataset.state_at(self.start, n_batches, dropped=dropped or self.dropped)
