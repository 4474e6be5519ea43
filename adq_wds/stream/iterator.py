"""What does one worker of one rank read in one epoch? Its batches, in order, from any of them on."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import get_worker_info

from adq_wds.core.order import n_for_rank, rank_positions
from adq_wds.errors import AdqError, LoaderClosed, names_place, placed, retold
from adq_wds.pipes.base import Pipe, Tally
from adq_wds.reading.places import Place, Places
from adq_wds.stream.clock import Begin, Clock
from adq_wds.stream.epoch_order import EpochOrder, Recipe, Share
from adq_wds.stream.serve import Server
from adq_wds.stream.state import check_layout, own_part, read_state, sealed

_BLOCK = 1024  # positions looked up together
_EMPTY = object()  # stands for a batch that lost all its samples

logger = logging.getLogger("adq_wds")


class Item(NamedTuple):
    """A batch with its number among its rank's, or the error met there."""

    number: int
    batch: Any
    empty: bool = False
    error: AdqError | None = None


class Stream(Iterator[Any]):
    """The iterator of one worker: batch after batch (samples, without `batch_size`), and where it stands.

    Args:
        recipe: what is read.
        clock: told of the epoch's end.
        begin: the epoch, and where in it all ranks began.
        layout: whose share this is.
        advance: whether its first batch makes the next epoch the one that the next iteration reads.
        own: whether `begin` is this rank's own place, since samples were dropped before it.
    """

    def __init__(
        self,
        recipe: Recipe,
        clock: Clock,
        begin: Begin,
        layout: Share,
        *,
        advance: bool = True,
        own: bool = False,
    ) -> None:
        self._recipe, self._clock, self._layout, self._advance = recipe, clock, layout, advance
        self._start(begin, layout.worker)
        self._left_out = own
        self._announce()

    def _start(self, begin: Begin, next_batch: int) -> None:
        recipe, layout = self._recipe, self._layout
        self._begin, self._next_batch = begin, next_batch
        self._order = EpochOrder(recipe, begin.epoch, begin.lanes)
        self._server = Server(recipe, begin.epoch)
        self._n = n_for_rank(
            self._order.n_total, start=begin.start, rank=layout.rank, world=layout.world, uneven=recipe.uneven
        )
        self._size = recipe.batch_size or 1
        self._n_batches = -(-self._n // self._size)
        self._whole = layout[1:] == (1, 0, 1) and begin.start == next_batch == 0
        self._batches = self._read_on()
        self._ended = self._left_out = self._begun = False

    def _announce(self) -> None:
        """Say what may surprise, before the first sample."""
        layout, total = self._layout, self._order.n_total
        if layout.worker == 0 and self._n_batches < layout.n_workers:
            said = f"rank {layout.rank} of {layout.world} has {self._n} of {total} samples"
            if total == 0:
                said = "no sample is kept, so the stream is empty"
            elif self._n:
                said += (
                    f" in {self._n_batches} batches, so some of its {layout.n_workers} workers have nothing"
                )
            logger.warning("ShardDataset: %s", said)

    @property
    def tally(self) -> Tally:
        """Samples read, kept, dropped and bad so far."""
        return self._server.tally

    def __next__(self) -> Any:
        try:
            for batch in self._batches:
                if batch is not _EMPTY:
                    self._note_begun()
                    return batch
            raise StopIteration
        except BaseException as error:
            raise self._over(error)  # noqa: B904 - mostly the same error

    def next_item(self) -> Item:
        """The next batch with its number; one that lost all its samples too, so that workers stay in step."""
        try:
            batch = next(self._batches)
        except BaseException as error:
            raise self._over(error)  # noqa: B904
        number = self._next_batch - self._layout.n_workers
        return Item(number, None, empty=True) if batch is _EMPTY else Item(number, batch)

    def _note_begun(self) -> None:
        if self._advance and not self._begun:
            self._begun = True
            self._clock.begun(self._begin.epoch)

    def _over(self, error: BaseException) -> BaseException:
        """What to raise when reading ended with `error`; from now on the end, or `LoaderClosed`."""
        if isinstance(error, StopIteration) and not self._ended:
            self._ended = True
            self._note_begun()  # an epoch without a batch
            try:
                self._server.finish(whole=self._whole)
            except AdqError as verdict:
                error = verdict
        if not isinstance(error, StopIteration | LoaderClosed):
            self._server.close()
            self._batches = Closed(error)
        return error

    def _read_on(self) -> Iterator[Any]:
        """Every batch from `next_batch` on, which is counted up just before each."""
        numbers = range(self._next_batch, self._n_batches, self._layout.n_workers)
        places = self._server.each(map(self._places, _blocks(numbers, max(1, _BLOCK // self._size))))
        return (self._singles if self._recipe.batch_size is None else self._grouped)(numbers, places)

    def _places(self, numbers: range) -> Places:
        """Where the samples of some batches lie."""
        k = (np.array(numbers)[:, None] * self._size + np.arange(self._size)).ravel()
        layout, begin = self._layout, self._begin
        t = rank_positions(
            k[k < self._n],
            n_total=self._order.n_total,
            start=begin.start,
            rank=layout.rank,
            world=layout.world,
        )
        return self._order.find(t)

    def _grouped(self, numbers: range, places: Iterator[Place]) -> Iterator[Any]:
        size, collate = self._size, self._recipe.collate
        for number in numbers:
            here = list(islice(places, min(size, self._n - number * size)))
            out = self._server.serve(here)
            batch: Any = _EMPTY
            if out:
                try:
                    batch = collate(out)
                except AdqError as error:
                    raise self._of_batch(error, here) from error
            else:
                logger.warning("ShardDataset: a batch of %d is left out: all were dropped", len(here))
                self._left_out = True
            self._next_batch = number + self._layout.n_workers
            yield batch

    def _of_batch(self, error: AdqError, places: list[Place]) -> AdqError:
        """An error of the user's `collate`, which is given no places, with the place of the batch's first sample."""
        names = [self._recipe.listing.names[place.shard] for place in places]
        if any(names_place(error, name) for name in names):
            return error
        text = f"in the batch of {len(places)} that begins here: {error}"
        return placed(retold(error, text), shard=names[0], key=places[0].key)

    def _singles(self, numbers: range, places: Iterator[Place]) -> Iterator[Any]:
        server, n_workers = self._server, self._layout.n_workers
        chunk = 1 if self._recipe.drops else Pipe.chunk
        todo = iter(numbers)
        while some := list(islice(todo, chunk)):
            here = list(islice(places, len(some)))
            together = server.one_each(here)
            if together is not None:
                for number, out in zip(some, together, strict=True):
                    self._next_batch = number + n_workers
                    yield out
                continue
            for number, place in zip(some, here, strict=True):
                served = server.serve([place])
                self._left_out |= not served
                self._next_batch = number + n_workers
                yield served[0] if served else _EMPTY

    def at(self, t: NDArray[np.int64]) -> list[Any]:
        """What becomes of the samples at some positions of the epoch."""
        return self._server.serve(list(self._server.each(iter([self._order.find(t)]))))

    def state_dict(self) -> dict[str, Any]:
        """Where this iterator stands: the stream's `State`, and what this worker's place adds to it.

        It is for an iterator at the same place of the same layout. With one worker `ShardDataset.start_from` takes
        it too, for any layout.
        """
        recipe, begin, layout = self._recipe, self._begin, self._layout
        t = begin.start + self._next_batch * self._size * layout.world
        state = recipe.state(begin.epoch, min(t, self._order.n_total), begin.lanes)
        if recipe.drops or self._left_out:
            state = replace(state, rank=layout.rank, world=layout.world)
        own = {
            "start": begin.start,
            "next_batch": self._next_batch,
            "ended": self._ended,
            "layout": list(layout),
        }
        return sealed({**asdict(state), "iterator": own})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where another iterator, at the same place of the same layout, stood.

        Raises:
            StateError: damaged, of another stream, or of another place.
        """
        small, own = own_part(state)
        layout = self._layout
        now = replace(self._recipe.state(0, 0), rank=layout.rank, world=layout.world)
        saved = read_state(small, now, self._order.n_total)
        check_layout(own["layout"], layout)
        begin = Begin(saved.epoch, own["start"], saved.lanes)
        self._start(begin, own["next_batch"])
        self._left_out = saved.rank is not None
        self._clock.resume(begin)
        over = self._next_batch >= self._n_batches
        if over:  # said now: it may never be asked again, and a later word would fall into another epoch
            self._ended, self._batches = True, iter(())
        if layout.worker == max(0, self._n_batches - 1) % layout.n_workers:  # whose end is the epoch's
            self._clock.epoch = begin.epoch + over


class TaggedStream(Iterator[Item]):
    """A stream that gives each batch with its number; in a worker an error too, so that its text stays as it is."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def __next__(self) -> Item:
        try:
            return self._stream.next_item()
        except AdqError as error:
            if get_worker_info() is None:
                raise
            error.add_note("".join(traceback.format_exception(error)))
            return Item(-1, None, error=error)


class Closed(Iterator[Any]):
    """What is left of a stream after an error: it never just ends."""

    def __init__(self, error: BaseException) -> None:
        self._text = f"{type(error).__name__}: {error}"

    def __next__(self) -> Any:
        raise LoaderClosed(f"the stream has ended with an error; make it anew: {self._text}")


def _blocks(numbers: range, size: int) -> Iterator[range]:
    return (numbers[i : i + size] for i in range(0, len(numbers), size))
