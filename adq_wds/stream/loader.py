"""How do workers read ahead while one small state says where the whole stream stands?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torchdata.stateful_dataloader import StatefulDataLoader

from adq_wds.errors import LoaderClosed
from adq_wds.stream.dataset import ShardDataset
from adq_wds.stream.iterator import Item

_OWN = ("batch_size", "shuffle", "sampler", "batch_sampler", "collate_fn", "drop_last")
_FIXED = ("in_order", "snapshot_every_n_steps")


class Loader(StatefulDataLoader[Any]):  # type: ignore[misc]
    """Reads a `ShardDataset`, with or without workers, in one order whatever their number.

    `state_dict()` may be asked for after any batch: under 400 bytes of JSON, it counts the batches given out, not
    those that workers have read ahead, and any number of workers and ranks may load it.

    An epoch is begun with its first batch given out: the next iteration reads the next epoch, whether this one is read to
    its end or broken off, as by Lightning's ``limit_train_batches``. A state names the epoch in progress, and the iteration
    that follows its loading goes on with that one. An epoch is over with its last batch (not all programs ask for one
    more): a state saved from there on is the next epoch's.

    Args:
        dataset: batches, order, ranks and pipes are its matter.
        num_workers: processes that read ahead.
        options: as torch's DataLoader takes them: pin_memory, prefetch_factor, persistent_workers, timeout,
            multiprocessing_context, worker_init_fn, generator, pin_memory_device.

    Raises:
        TypeError: `dataset` is no `ShardDataset`.
        ValueError: an option that the data set decides, or that would change the order.

    Raises (while iterating):
        LoaderClosed: `next` after an error, every time.
        RuntimeError: a worker died.
        and what the data set raises.
    """

    def __init__(self, dataset: ShardDataset, *, num_workers: int = 0, **options: Any) -> None:
        if not isinstance(dataset, ShardDataset):
            raise TypeError(f"adq.Loader reads a ShardDataset, got a {type(dataset).__name__}")
        for name in options:
            if name in _OWN:
                raise ValueError(f"{name}= is the data set's matter: give it to ShardDataset")
            if name in _FIXED:
                raise ValueError(f"{name}= cannot be chosen: the order and the state depend on it")
        self._place: _Place | None = None
        super().__init__(
            dataset,
            batch_size=None,
            num_workers=num_workers,
            collate_fn=_as_is,
            snapshot_every_n_steps=0,  # each batch brings its number along instead
            **options,
        )

    def __iter__(self) -> Iterator[Any]:
        place = _Place(self)
        with self.dataset.tagging():
            place.batches = super().__iter__()
        self._place = place
        return place

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, for `load_state_dict` of any Loader or `start_from` of any data set like this."""
        place = self._place
        if place is None or place.over:
            begin = self.dataset.begin
            n_batches, dropped = 0, False
        else:
            begin, n_batches, dropped = place.begin, place.n_batches, place.dropped
        state: dict[str, Any] = self.dataset.state_at(
            begin.epoch, n_batches, start=begin.start, lanes=begin.lanes, dropped=dropped
        )
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the next iteration go on where the state stands.

        Raises:
            StateError: damaged, or of another stream; names the field, the saved and the present value.
        """
        self.dataset.start_from(state_dict)
        self._place = None
        self._iterator = None


class _Place(Iterator[Any]):
    """One iteration: what it has given out, and whether it can go on."""

    def __init__(self, loader: Loader) -> None:
        self._dataset: ShardDataset = loader.dataset
        self.begin = self._dataset.begin
        self.batches: Any = None
        self.n_batches = 0
        self._n = self._dataset.n_batches_from(self.begin)
        self.over = False  # a state is the next epoch's
        self.dropped = self._ended = False
        self._first = True  # no batch was given out yet
        self._failed: str | None = None

    def __next__(self) -> Any:
        if self._failed is not None:
            raise LoaderClosed(f"the stream has ended with an error; make it anew: {self._failed}")
        if self._ended:
            raise StopIteration
        try:
            while (item := self._take()).empty:
                self.dropped = True
        except StopIteration:
            self._ended = self.over = True
            self._note_begun()  # an epoch without a batch
            raise
        except BaseException as error:
            self._failed = f"{type(error).__name__}: {error}"
            stop = getattr(self.batches, "_shutdown_workers", None)
            self.batches = None
            if stop is not None:
                stop()
            raise
        self._note_begun()
        return item.batch

    def _note_begun(self) -> None:
        if self._first:
            self._first = False
            self._dataset.begun(self.begin.epoch)

    def _take(self) -> Item:
        item: Item = next(self.batches)
        if item.error is not None:
            raise item.error
        self.n_batches = item.number + 1
        if self.n_batches == self._n and not self.dropped:
            self.over = True
        return item


def _as_is(item: Any) -> Any:
    return item
