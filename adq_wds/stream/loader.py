"""Defines `Loader`: reads a data set with workers that read ahead, and gives one small state for the whole stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torchdata.stateful_dataloader import StatefulDataLoader

from adq_wds.errors import LoaderClosed
from adq_wds.remote.with_obstore import read_through_obstore
from adq_wds.stream.dataset import ShardDataset
from adq_wds.stream.iterator import Closed
from adq_wds.stream.progress import Progress

_OWN = ("batch_size", "shuffle", "sampler", "batch_sampler", "collate_fn", "drop_last")
_FIXED = ("in_order", "snapshot_every_n_steps")


class Loader(StatefulDataLoader[Any]):  # type: ignore[misc]
    """Reads a `ShardDataset`, with or without workers, in one order whatever their number.

    `state_dict()` may be called after any batch. It is under 400 bytes of JSON (more with `ClassRates`), counts the
    batches given out, not those that workers have read ahead, and may be loaded with any number of workers and ranks.

    An epoch starts with its first batch: the next iteration then reads the next epoch, whether this one is read to
    its end or broken off, as by Lightning's ``limit_train_batches``. A state names the epoch in progress, and the
    iteration after loading it continues that epoch. An epoch ends with its last batch (not all programs request one
    more): a state saved from there on is the next epoch's.

    Args:
        dataset: decides batches, order, ranks and pipes.
        num_workers: processes that read ahead.
        options: as torch's DataLoader takes them: pin_memory, prefetch_factor, persistent_workers, timeout,
            multiprocessing_context (once this process has read a URL, "forkserver" by default), worker_init_fn,
            generator, pin_memory_device.

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
        if num_workers and read_through_obstore():  # which no forked worker could use
            options.setdefault("multiprocessing_context", "forkserver")
        self._iteration: _Iteration | None = None
        super().__init__(
            dataset,
            batch_size=None,
            num_workers=num_workers,
            collate_fn=_as_is,
            snapshot_every_n_steps=0,  # each batch has its number instead
            **options,
        )

    def __iter__(self) -> Iterator[Any]:
        self._IterableDataset_len_called = (
            None  # the length of an epoch before, with which torch would compare
        )
        self._iteration = _Iteration(self.dataset, super().__iter__)
        return self._iteration

    def state_dict(self) -> dict[str, Any]:
        """The position of the stream, for `load_state_dict` of any Loader or `start_from` of any data set like this."""
        if self._iteration is None or self._iteration.over:
            state: dict[str, Any] = self.dataset.state_at(self.dataset.next_start, 0)
            return state
        return self._iteration.state_at(self._iteration.n_batches)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Make the next iteration resume at the state.

        Raises:
            StateError: damaged, or of another stream; names the field, the saved and the present value.
        """
        self.dataset.start_from(state_dict)
        self._iteration = None
        self._iterator = None


class _Iteration(Progress):
    """One iteration, which never goes on after an error or its end.

    Attributes:
        over: whether a state is the next epoch's.
    """

    def __init__(self, dataset: ShardDataset, read: Callable[[], Iterator[Any]]) -> None:
        super().__init__(dataset, read)
        self._n_batches = dataset.n_batches_from(self.start)
        self.over = False

    def __next__(self) -> Any:
        before = self.n_batches, self.dropped, self.over
        try:
            batch = super().__next__()
            self.over = self.over or (self.n_batches == self._n_batches and not self.dropped)
            self.advance()
            return batch
        except StopIteration:
            self.over = True
            self._items = iter(())
            self.advance()  # past an epoch without a batch
            raise
        except LoaderClosed:
            raise
        except (
            BaseException
        ) as error:  # torch raises at any line where a worker died: a batch may be counted, not given
            self.n_batches, self.dropped, self.over = before
            stop_workers = getattr(self._items, "_shutdown_workers", None)
            self._items = Closed(error)
            if stop_workers is not None:
                stop_workers()
            raise


def _as_is(item: Any) -> Any:
    return item
