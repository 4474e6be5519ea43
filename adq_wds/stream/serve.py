"""Reads samples at their places, runs them through the pipes, and counts them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from adq_wds.errors import AdqError, SampleError, shorten
from adq_wds.pipes.base import OnError, Tally, replayed
from adq_wds.reading.open_shards import Readers
from adq_wds.reading.places import Place, Places
from adq_wds.samples.fields import EPOCH_FIELD, Sample, place_error
from adq_wds.stream.epoch_order import Recipe

T = TypeVar("T")
R = TypeVar("R")


class Server:
    """Serves one pass of one epoch.

    Attributes:
        tally: samples read, kept, dropped and bad so far.
    """

    def __init__(self, recipe: Recipe, epoch: int) -> None:
        self._recipe, self._epoch = recipe, epoch
        self._readers = Readers(recipe.listing, recipe.fetch, recipe.layouts, epoch, verify=recipe.verify)
        self.tally = Tally("ShardDataset", recipe.on_error)
        self._tallies = [Tally(type(p).__name__, _either(p.on_error, recipe.on_error)) for p in recipe.pipes]

    def one_each(self, places: Sequence[Place]) -> list[Any] | None:
        """What becomes of some samples, one of each; None when `serve` must find out which was dropped or bad."""
        try:
            samples = self._read(places)
            for pipe in self._recipe.pipes:
                samples = pipe.apply(samples)
            out = self._chosen(samples)
        except Exception:  # met again, one by one
            return None
        n = len(places)
        if len(out) != n:
            return None
        for tally in (*self._tallies, self.tally):
            tally.good(n, n)
        return out

    def serve(self, places: list[Place]) -> list[Any]:
        """What becomes of some samples, in order; bad ones are skipped or raised, as the policies say."""
        n_bad, n_bad_in_pipes = self.tally.bad, self._n_bad_in_pipes()
        samples = self._replayed(places, self._read)
        for pipe, tally in zip(self._recipe.pipes, self._tallies, strict=True):
            samples = list(pipe.run(samples, tally))
        out = self._replayed(samples, self._chosen)
        n_read = len(places) - (self.tally.bad - n_bad)  # bad ones are counted as read already
        self.tally.bad += self._n_bad_in_pipes() - n_bad_in_pipes
        self.tally.good(n_read, len(out))
        return out

    def _replayed(self, items: list[T], work: Callable[[list[T]], list[R]]) -> list[R]:
        """What `work` gives; bad samples are skipped or raised, all other errors raised."""

        def failed(_: T, error: Exception) -> None:
            if not isinstance(error, AdqError):
                raise error
            self.tally.failed(error)

        out: list[R] = []
        for results in replayed(items, work, failed, may_replay=_is_of_sample):
            out += results
        return out

    def _n_bad_in_pipes(self) -> int:
        return sum(tally.bad for tally in self._tallies)

    def each(self, blocks: Iterator[Places]) -> Iterator[Place]:
        """Each sample there, what is remote being fetched some time before it is asked for."""
        return self._readers.each(blocks)

    def close(self) -> None:
        """Give the shards back."""
        self._readers.close()

    def finish(self, *, whole: bool) -> None:
        """Say what was skipped; raise `SampleError` if it was too much."""
        self.close()
        for tally in (*self._tallies, self.tally):
            tally.close(whole=whole)

    def _read(self, places: Sequence[Place]) -> list[Sample]:
        samples = self._readers.read(places)
        if self._recipe.pipes:
            for sample in samples:
                sample[EPOCH_FIELD] = self._epoch
        return samples

    def _chosen(self, samples: list[Sample]) -> list[Any]:
        """The fields asked for, as tuples; or whole samples."""
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


def _is_of_sample(error: Exception) -> bool:
    return isinstance(error, SampleError)


def _either(first: OnError, second: OnError) -> OnError:
    """The policy that skips what one of two skips."""
    if "skip" in (first, second):
        return "skip"
    asked = [policy for policy in (first, second) if callable(policy)]
    return (lambda error: any(policy(error) for policy in asked)) if asked else "raise"
