"""Reads one worker's batches of an epoch from any batch on: positions, places, samples, pipes, batches."""

from __future__ import annotations

import logging
import operator
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice
from typing import Any, NamedTuple, TypeVar

import numpy as np
from torch.utils.data import get_worker_info

from adq_wds.errors import AdqError, LoaderClosed, SampleError, names_place, placed, retold, shorten
from adq_wds.pipes.base import OnError, Pipe, Tally, replayed
from adq_wds.reading.open_shards import Readers
from adq_wds.reading.places import Place
from adq_wds.samples.fields import EPOCH_FIELD, Sample, place_error
from adq_wds.stream.clock import Clock, Start
from adq_wds.stream.epoch_order import EpochOrder, Recipe, Share
from adq_wds.stream.state import check_share, sealed, split_iterator_state

_BLOCK = 1024  # positions looked up together
_EMPTY = object()  # stands for a batch that lost all its samples

T = TypeVar("T")
R = TypeVar("R")

logger = logging.getLogger("adq_wds")


class Item(NamedTuple):
    """A batch with its number in its rank, or the error in its place."""

    number: int
    batch: Any
    empty: bool = False
    error: AdqError | None = None


class Stream(Iterator[Any]):
    """The iterator of one worker: yields batches, or samples, and gives its state.

    Args:
        recipe: options of the stream.
        clock: advanced to the next epoch by the first batch, if `advance`.
        start: the epoch and position at which all ranks started.
        share: whose batches are read.
        dropped_before: whether samples were dropped before that, so that the position is this rank's alone.
    """

    def __init__(
        self, recipe: Recipe, clock: Clock, start: Start, share: Share, *, advance: bool, dropped_before: bool
    ) -> None:
        self._recipe, self._clock, self._share, self._advance = recipe, clock, share, advance
        self._seek(start, share.worker)
        self._left_out = dropped_before
        self._warn_of_little()

    def _seek(self, start: Start, next_batch: int) -> None:
        """Go to the start of a batch of an epoch."""
        recipe, share = self._recipe, self._share
        self._start, self._after_served = start, next_batch
        self._order = EpochOrder(recipe, start.epoch, start.lanes)
        self._stages = Stages(recipe, start.epoch)
        self._n = recipe.n_samples(share.rank, share.world, start.epoch, start.position)
        self._size = recipe.size(share.rank, share.world)
        self._n_batches = -(-self._n // self._size)
        self._whole = share[1:] == (1, 0, 1) and start.position == next_batch == 0
        self._batches = self._batches_of(range(next_batch, self._n_batches, share.n_workers))
        self._served: Iterator[Any] = iter(())  # samples that went through the pipes with the one given last
        self._ended = self._left_out = False
        self._advanced = not self._advance

    def _warn_of_little(self) -> None:
        """Warn before the first sample that a rank or a worker has nothing to read."""
        share, total = self._share, self._order.n_total
        if share.worker == 0 and self._n_batches < share.n_workers:
            text = f"rank {share.rank} of {share.world} has {self._n} of {total} samples"
            if total == 0:
                text = "no sample is kept, so the stream is empty"
            elif self._n:
                workers = f"some of its {share.n_workers} workers have nothing"
                text += f" in {self._n_batches} batches, so {workers}"
            logger.warning("ShardDataset: %s", text)

    @property
    def tally(self) -> Tally:
        """Samples read, kept, dropped and bad so far."""
        return self._stages.tally

    def __next__(self) -> Any:
        for sample in self._served:  # mostly there is one, and nothing below is needed
            return sample
        while (batch := self._take()) is _EMPTY:
            pass
        self._advance_clock()
        return batch

    @property
    def _next_batch(self) -> int:
        """The number of the batch that comes next."""
        return self._after_served - operator.length_hint(self._served) * self._share.n_workers

    def next_item(self) -> Item:
        """The next batch with its number, even if it lost all its samples, so that workers stay in step."""
        batch = next(self._served, _EMPTY) if operator.length_hint(self._served) else self._take()
        number = self._next_batch - self._share.n_workers
        return Item(number, None, empty=True) if batch is _EMPTY else Item(number, batch)

    def _take(self) -> Any:
        try:
            return next(self._batches)
        except BaseException as error:
            raise self._end(error)  # noqa: B904 - mostly the same error

    def _end(self, error: BaseException) -> BaseException:
        """The error to raise after `error` ended reading; later calls end, or raise `LoaderClosed`."""
        if isinstance(error, StopIteration) and not self._ended:
            self._ended = True
            self._advance_clock()  # past an epoch without a batch
            try:
                self._stages.finish(whole=self._whole)
            except AdqError as verdict:
                error = verdict
        if not isinstance(error, StopIteration | LoaderClosed):
            self._stages.readers.close()
            self._batches = Closed(error)
        return error

    def _advance_clock(self) -> None:
        if not self._advanced:
            self._advanced = True
            self._clock.advance_past(self._start.epoch)

    def _batches_of(self, numbers: range) -> Iterator[Any]:
        """The batches of these numbers; `_after_served` is counted up just before each."""
        step = max(1, _BLOCK // self._size)
        blocks = (numbers[i : i + step] for i in range(0, len(numbers), step))
        places = self._stages.readers.each(map(self._places, blocks))
        read = self._read_singles if self._recipe.single else self._read_batches
        return read(numbers, places)

    def _places(self, numbers: range) -> Iterator[Place]:
        """The places of the samples of some batches."""
        k = (
            np.arange(numbers.start, numbers.stop, numbers.step)[:, None] * self._size + np.arange(self._size)
        ).ravel()
        rank, world, *_ = self._share
        total, start = self._order.n_total, self._start.position
        return self._order.places(self._recipe.positions(k[k < self._n], total, start, rank, world))

    def _read_batches(self, numbers: range, places: Iterator[Place]) -> Iterator[Any]:
        for number in numbers:
            in_batch = list(islice(places, min(self._size, self._n - number * self._size)))
            out = self._stages.run(in_batch)
            batch: Any = _EMPTY
            if out:
                try:
                    batch = self._recipe.collate(out)
                except AdqError as error:
                    raise self._placed(error, in_batch) from error
            else:
                logger.warning("ShardDataset: a batch of %d is left out: all were dropped", len(in_batch))
                self._left_out = True
            self._after_served = number + self._share.n_workers
            yield batch

    def _placed(self, error: AdqError, places: list[Place]) -> AdqError:
        """An error of the user's `collate`, with the place of the batch's first sample added."""
        names = [self._recipe.listing.names[place.shard] for place in places]
        if any(names_place(error, name) for name in names):
            return error
        text = f"in the batch of {len(places)} that begins here: {error}"
        return placed(retold(error, text), shard=names[0], key=places[0].key)

    def _read_singles(self, numbers: range, places: Iterator[Place]) -> Iterator[Any]:
        """Sample after sample; chunks of them go through the pipes together where none is dropped or bad."""
        chunk = 1 if self._recipe.drops else Pipe.chunk
        for i in range(0, len(numbers), chunk):
            some = list(islice(places, len(numbers[i : i + chunk])))
            together = self._stages.run_one_to_one(some)
            if together is not None:
                self._after_served = numbers[i] + len(some) * self._share.n_workers
                self._served = iter(together)
                yield next(self._served)
                continue
            for number, place in zip(numbers[i : i + chunk], some, strict=True):
                out = self._stages.run([place])
                self._left_out |= not out
                self._after_served = number + self._share.n_workers
                yield out[0] if out else _EMPTY

    def state_dict(self) -> dict[str, Any]:
        """The state of this iterator, for one of the same worker and layout; an only worker's also suits
        `start_from`."""
        start, share = self._start, self._share
        t = start.position + self._next_batch * self._recipe.step(share.world)
        state = self._recipe.state(start.epoch, min(t, self._order.n_total), start.lanes)
        if self._recipe.drops or self._left_out:
            state = replace(state, rank=share.rank, world=share.world)
        of_worker: dict[str, Any] = {
            "start": start.position,
            "next_batch": self._next_batch,
            "ended": self._ended,
        }
        of_worker["layout"] = list(share)
        return sealed({**state.plain(), "iterator": of_worker})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume at the state of an iterator of the same worker and layout; else `StateError`."""
        of_stream, of_worker = split_iterator_state(state)
        share = self._share
        check_share(of_worker["layout"], share)
        saved = self._recipe.resumed(of_stream, share.rank, share.world, ended=of_worker["ended"])
        self._seek(Start(saved.epoch, of_worker["start"], saved.lanes), of_worker["next_batch"])
        self._left_out = saved.rank is not None
        self._clock.resume_at(self._start)
        over = self._next_batch >= self._n_batches
        if over:  # the verdict on skips was given then; given later, it would fall into another epoch
            self._ended, self._batches = True, iter(())
        if share.worker == max(0, self._n_batches - 1) % share.n_workers:  # whose end is the epoch's
            self._clock.epoch = saved.epoch + over


class TaggedStream(Iterator[Item]):
    """A stream that yields each batch with its number; in a worker also errors, so that their texts stay unchanged."""

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
    """A stream after an error: raises `LoaderClosed` every time instead of ending."""

    def __init__(self, error: BaseException) -> None:
        self._text = f"{type(error).__name__}: {error}"

    def __next__(self) -> Any:
        raise LoaderClosed(f"the stream has ended with an error; make it anew: {self._text}")


class Stages:
    """Reads samples at their places, runs them through the pipes, and counts them, for one pass over an epoch.

    Attributes:
        readers: the open shards.
        tally: samples read, kept, dropped and bad so far.
    """

    def __init__(self, recipe: Recipe, epoch: int) -> None:
        self._recipe, self._epoch = recipe, epoch
        self.readers = Readers(recipe.listing, recipe.fetch, epoch)
        self.tally = Tally("ShardDataset", recipe.on_error)
        self._tallies = [Tally(type(p).__name__, _either(p.on_error, recipe.on_error)) for p in recipe.pipes]

    def run(self, places: list[Place]) -> list[Any]:
        """The outputs for some samples, in order; bad ones are skipped or raised, by the policies."""
        n_bad, n_bad_in_pipes = self.tally.bad, sum(tally.bad for tally in self._tallies)
        samples = self._each_alone_if_bad(places, self._read_samples)
        for pipe, tally in zip(self._recipe.pipes, self._tallies, strict=True):
            samples = list(pipe.run(samples, tally))
        out = self._each_alone_if_bad(samples, self._choose_fields)
        n_read = len(places) - (self.tally.bad - n_bad)  # bad ones are counted as read already
        self.tally.bad += sum(tally.bad for tally in self._tallies) - n_bad_in_pipes
        self.tally.good(n_read, len(out))
        return out

    def run_one_to_one(self, places: list[Place]) -> list[Any] | None:
        """The outputs for some samples, one each; None where one was dropped or bad, which `run` then identifies."""
        try:
            samples = self._read_samples(places)
            for pipe in self._recipe.pipes:
                samples = pipe.apply(samples)
            out = self._choose_fields(samples)
        except Exception:  # met again, one by one
            return None
        if len(out) != len(places):
            return None
        for tally in (*self._tallies, self.tally):
            tally.good(len(out), len(out))
        return out

    def finish(self, *, whole: bool) -> None:
        """Log the skipped samples; raise `SampleError` if they are too many."""
        self.readers.close()
        for tally in (*self._tallies, self.tally):
            tally.close(whole=whole)

    def _each_alone_if_bad(self, items: list[T], work: Callable[[list[T]], list[R]]) -> list[R]:
        """The results of `work`; bad samples are skipped or raised, all other errors raised."""

        def failed(_: T, error: Exception) -> None:
            if not isinstance(error, AdqError):
                raise error
            self.tally.failed(error)

        def is_of_sample(error: Exception) -> bool:
            return isinstance(error, SampleError)

        return list(chain.from_iterable(replayed(items, work, failed, may_replay=is_of_sample)))

    def _read_samples(self, places: Sequence[Place]) -> list[Sample]:
        samples = self.readers.read_samples(places)
        if self._recipe.pipes:
            for sample in samples:
                sample[EPOCH_FIELD] = self._epoch
        return samples

    def _choose_fields(self, samples: list[Sample]) -> list[Any]:
        """Tuples of the chosen fields, or whole samples."""
        fields = self._recipe.fields
        if fields is None:
            if self._recipe.pipes:
                for sample in samples:
                    sample.pop(EPOCH_FIELD, None)
            return samples
        for sample in samples:
            for field in fields:
                if field not in sample:
                    has = sorted(name for name in sample if name[:2] != "__")
                    text = f"no field {shorten(field)} (fields=); the sample has {shorten(has)}"
                    raise place_error(SampleError(text), sample)
        return [tuple([sample[field] for field in fields]) for sample in samples]


def _either(first: OnError, second: OnError) -> OnError:
    """The policy that skips an error if one of two does."""
    if "skip" in (first, second):
        return "skip"
    functions = [policy for policy in (first, second) if callable(policy)]
    return (lambda error: any(policy(error) for policy in functions)) if functions else "raise"
