"""Defines `Pipe`, the base class of stages: its law, its use as a stage anywhere, and the handling of bad samples."""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, ClassVar, Literal, TypeVar, overload

from adq_wds.errors import AdqError, SampleError, located, placed, retold, shorten
from adq_wds.pipes.batches import Batch, batch_of, is_batch, samples_of
from adq_wds.samples.fields import Sample, SpecError
from adq_wds.shards.names import base_name

OnError = Literal["raise", "skip"] | Callable[[AdqError], bool]
MAX_BAD_FRACTION = 0.1
MAX_BAD_IN_A_ROW = 100
_MIN_JUDGED = 100  # samples read before a fraction says anything

T = TypeVar("T")
R = TypeVar("R")

logger = logging.getLogger("adq_wds")


@dataclass
class Tally:
    """Counts of one pass, and the bounds on skipping: read = kept + dropped + bad, always.

    Skipping ends in a `SampleError` when 100 samples in a row are bad, or more than `max_bad_fraction` of those
    read: judged at each bad sample once 100 are read, and at the end of a pass of any length. At the end a single bad
        sample is always allowed: one of five is no evidence of more than a tenth, two of five are.

    Attributes:
        on_error: "raise", "skip", or a function that gets the error and says whether to skip.
        max_bad_fraction: the largest part of the samples that may be skipped.
        reasons: dropped samples by why, where a pipe says so.
    """

    name: str
    on_error: OnError = "raise"
    max_bad_fraction: float = MAX_BAD_FRACTION
    read: int = 0
    kept: int = 0
    bad: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    _in_a_row: int = 0
    _last: str = ""  # text of the last bad sample's error; the error itself would keep its sample alive

    @property
    def dropped(self) -> int:
        """Samples that were fine and not wanted."""
        return self.read - self.kept - self.bad

    def good(self, n_read: int, n_kept: int) -> None:
        """Count samples that went through without an error."""
        self.read += n_read
        self.kept += n_kept
        if n_read:
            self._in_a_row = 0

    def failed(self, error: AdqError) -> None:
        """Count a bad sample, or raise: only a `SampleError` may be skipped, and only so many."""
        if not (isinstance(error, SampleError) and self._skips(error)):
            raise error
        self.read += 1
        self.bad += 1
        self._in_a_row += 1
        self._last = str(error)
        logger.warning("%s", json.dumps({"skipped_by": self.name, "error": str(error)}))
        if self._in_a_row >= MAX_BAD_IN_A_ROW:
            raise SampleError(f"{self._in_a_row} bad samples in a row; the last: {error}") from error
        if self.read >= _MIN_JUDGED and self._too_many():
            raise self._verdict() from error

    def _skips(self, error: SampleError) -> bool:
        if not callable(self.on_error):
            return self.on_error == "skip"
        try:
            return bool(self.on_error(error))
        except AdqError as theirs:
            if str(error) in str(theirs):
                raise
            raise retold(theirs, f"{error}; on_error raised {type(theirs).__name__}: {theirs}") from theirs

    def close(self, *, whole: bool = True) -> None:
        """Log the skipped samples, and dropped ones that have a reason, once, at the end of a pass; raise `SampleError` if they are too many.

        Fewer than 100 samples of a worker's or resumed stream, which is only a part, are not judged.
        """
        if self.bad or self.reasons:
            counts = (self.read, self.kept, self.dropped, self.bad)
            reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(self.reasons.items()))
            why = reasons and f"; of the dropped {reasons}"
            level = logging.WARNING if self.bad else logging.INFO
            logger.log(level, "%s: read %d = kept %d + dropped %d + bad %d%s", self.name, *counts, why)
        if self.bad > 1 and (whole or self.read >= _MIN_JUDGED) and self._too_many():
            raise self._verdict()

    def _too_many(self) -> bool:
        return self.bad > self.max_bad_fraction * self.read

    def _verdict(self) -> SampleError:
        return SampleError(
            f"{self.bad} of {self.read} samples are bad, more than max_bad_fraction={self.max_bad_fraction}; "
            f"the last: {self._last}"
        )


def check_on_error(on_error: OnError, max_bad_fraction: float = MAX_BAD_FRACTION) -> None:
    """Raise `ValueError` unless it is "raise", "skip" or a function, and the fraction lies in [0, 1]."""
    if on_error not in ("raise", "skip") and not callable(on_error):
        raise ValueError(f"on_error must be 'raise', 'skip' or a function, got {on_error!r}")
    if not 0.0 <= max_bad_fraction <= 1.0:  # NaN fails too
        raise ValueError(f"max_bad_fraction must lie in [0, 1], got {max_bad_fraction!r}")


def replayed(
    chunk: list[T],
    work: Callable[[list[T]], list[R]],
    failed: Callable[[T, Exception], None],
    *,
    good: Callable[[int, int], None] = lambda n_read, n_kept: None,
    may_replay: Callable[[Exception], bool] = lambda error: True,
) -> Iterable[list[R]]:
    """Run `work` over a chunk; if it raises, run it over each item alone, to find the bad ones.

    Alone they run lazily: results of good items are yielded before `failed` is called for a later bad one.

    Args:
        chunk: the items.
        work: gives the results of some items.
        failed: called with each item that fails alone, and its error; raises, or returns to skip the item.
        good: called with the numbers of items and results of each success, such as `Tally.good`.
        may_replay: whether an error of the whole chunk may be one item's; others are raised as they are.

    Returns:
        The results of the whole chunk, or of one good item after another.

    >>> list(replayed(["1", "x", "3"], lambda texts: [int(text) for text in texts], lambda text, error: print(text)))
    x
    [[1], [3]]
    """
    try:
        results = work(chunk)
    except Exception as error:
        if not may_replay(error):
            raise
        return _each_alone(chunk, work, failed, good)
    good(len(chunk), len(results))
    return [results]


def _each_alone(
    chunk: list[T],
    work: Callable[[list[T]], list[R]],
    failed: Callable[[T, Exception], None],
    good: Callable[[int, int], None],
) -> Iterator[list[R]]:
    for item in chunk:
        try:
            results = work([item])
        except Exception as error:
            failed(item, error)
        else:
            good(1, len(results))
            yield results


def before_error(stream: Iterator[T]) -> tuple[list[T], Exception | None]:
    """All items of an iterator, and the error that ended it, if any, to be raised after they are processed."""
    items: list[T] = []
    try:
        for item in stream:
            items.append(item)
    except Exception as error:
        return items, error
    return items, None


def in_batches(
    work: Callable[[list[Sample]], list[Sample]], samples: list[Sample], batch_size: int
) -> list[Sample]:
    """The results of `work` over batches of at most `batch_size` samples, in order."""
    starts = range(0, len(samples), batch_size)
    return [made for start in starts for made in work(samples[start : start + batch_size])]


@dataclass(frozen=True, eq=False)
class Pipe(ABC):
    """A stage of a stream: samples in, at most as many samples out, in order.

    A subclass writes `apply`, which makes new dicts and leaves its inputs alone, and keeps the law

        apply(a + b) == apply(a) + apply(b)

    so how the stream is cut into chunks never changes the answer. Then one object is a WebDataset stage
    (``.compose(pipe)``), a torchdata ``Mapper`` between ``Batcher`` and ``Unbatcher`` (``pipe.apply``), and a plain
    generator (``pipe(stream)``). Composed outside, a pipe does not know the stream's position, so such a pipeline
    does not resume in mid-epoch. A subclass with a `__post_init__` of its own calls this one's.

    Args:
        on_error: "raise" (default), "skip", or a function of the error that says whether to skip. Only
            `SampleError` is ever skipped, never an error about the plan, a whole shard or a field spec; each is
            logged as one JSON line on the logger ``adq_wds``. 100 in a row are an error again, and so is more than
            a tenth: of what was read, from 100 samples on, or of a whole stream, when that is two or more. Each
            worker's stream is counted alone, each epoch anew.

    Raises (while streaming):
        SampleError: a sample is bad, or too many are; any other error of `apply` becomes one, with its place.
        TypeError: the input is not a sample, or not a stream of samples, so the stage is in the wrong place.
    """

    on_error: OnError = field(default="raise", kw_only=True)
    chunk: ClassVar[int] = 16
    one_to_one: ClassVar[bool] = False  # True: one sample out for each in, so that a source knows its length

    @abstractmethod
    def apply(self, samples: list[Sample]) -> list[Sample]:
        """The kept samples, changed or not, as new dicts in their order."""

    def __post_init__(self) -> None:
        check_on_error(self.on_error)

    @overload
    def __call__(self, stream: Batch) -> Batch: ...
    @overload
    def __call__(self, stream: Iterable[Sample]) -> Iterator[Sample]: ...
    def __call__(self, stream: Any) -> Any:
        """Run over a stream; if a chunk raises, its samples are run one by one to name the bad one.

        Or over one batch of columns, as Ray Data gives it to the classes of ``map_batches``. A batch knows of no other, so
        only `on_error` holds between them, and what only a whole pass can show is not checked.

        Raises:
            TypeError: at once, given one sample, as `.map` and `.select` do; they would take the generator for a true
                value.
        """
        if is_batch(stream):
            tally = Tally(type(self).__name__, self.on_error)
            made = list(self.run(samples_of(stream), tally))
            tally.close(whole=False)
            return batch_of(made) if made else {name: column[:0] for name, column in stream.items()}
        if isinstance(stream, dict) or (
            isinstance(stream, tuple) and not all(isinstance(sample, dict) for sample in stream)
        ):
            raise TypeError(
                f"a pipe takes a stream of samples, got one sample (a {type(stream).__name__}): "
                f"use .compose({type(self).__name__}(...)), not .map or .select"
            )
        return self._stream(stream)

    def run(self, chunk: list[Sample], tally: Tally) -> Iterator[Sample]:
        """`apply`, counted; if it raises, the samples are tried one by one, and the bad ones given to `tally`."""

        def failed(sample: Sample, error: Exception) -> None:
            tally.failed(self._located(error, sample))

        return chain.from_iterable(replayed(chunk, self.apply, failed, good=tally.good))

    def counted(self, stream: Iterable[Sample]) -> Iterable[Sample]:
        """The stream, checked for what only a whole pass can show; by default the stream itself."""
        return stream

    def _stream(self, stream: Iterable[Sample]) -> Iterator[Sample]:
        tally = Tally(type(self).__name__, self.on_error)
        samples = iter(self.counted(stream))
        error: Exception | None = None
        while error is None:
            chunk, error = before_error(islice(samples, self.chunk))
            if not chunk:
                break
            yield from self.run(chunk, tally)
        if error is not None:
            raise error
        tally.close()

    def _located(self, error: Exception, sample: Sample) -> AdqError:
        """The error of `apply` for one sample, with its place.

        Raises:
            SpecError: `error` itself: the field spec is wrong, not the sample.
            TypeError: the input is not a sample.
        """
        if isinstance(error, SpecError):
            raise error
        self._check_sample(sample, error)
        shard, key = base_name(sample["__url__"]), sample["__key__"]
        if isinstance(error, AdqError):  # a user's own function may raise one that names no place
            return placed(error, shard=shard, key=key)
        text = f"{type(self).__name__}: {type(error).__name__}: {shorten(str(error), 200)}"
        place = located(SampleError(text), shard=shard, key=key)
        place.__cause__ = error
        return place

    def _check_sample(self, sample: object, error: Exception) -> None:
        """Raise `TypeError` if `error` was caused by an input that is no sample."""
        what = f"a {type(sample).__name__}"
        if isinstance(sample, dict):
            if all(isinstance(sample.get(name), str) for name in ("__key__", "__url__")):
                return
            what += f" with {shorten(list(sample))}"
        raise TypeError(
            f"{type(self).__name__} got {what}, expected a sample: a dict with text in '__key__' and '__url__'; "
            "put this stage before to_tuple/batched"
        ) from error
