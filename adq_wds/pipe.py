"""What is a pipe? The law every pipe keeps, the call that makes it a stage anywhere, and what happens to bad samples."""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import ClassVar, Literal

from adq_wds.errors import AdqError, SampleError, located
from adq_wds.sample import Sample
from adq_wds.shards import base_name

OnError = Literal["raise", "skip"] | Callable[[AdqError], bool]
MAX_BAD_FRACTION = 0.1
MAX_BAD_IN_A_ROW = 100
_MIN_JUDGED = 100  # samples read before a fraction says anything

logger = logging.getLogger("adq_wds")


@dataclass
class Tally:
    """Counts of one pass, and the bounds on skipping: read = kept + dropped + bad, always.

    Attributes:
        on_error: "raise", "skip", or a function that gets the error and says whether to skip.
        max_bad_fraction: above it, after 100 samples, skipping ends in an error; so do 100 bad ones in a row.
    """

    name: str
    on_error: OnError = "raise"
    max_bad_fraction: float = MAX_BAD_FRACTION
    read: int = 0
    kept: int = 0
    bad: int = 0
    _in_a_row: int = 0

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
        """Count a bad sample, or raise: only a `SampleError` may be skipped, and not without end."""
        skip = isinstance(error, SampleError) and (
            self.on_error == "skip" or (callable(self.on_error) and bool(self.on_error(error)))
        )
        if not skip:
            raise error
        self.read += 1
        self.bad += 1
        self._in_a_row += 1
        logger.warning("%s", json.dumps({"skipped_by": self.name, "error": str(error)}))
        if self._in_a_row >= MAX_BAD_IN_A_ROW:
            raise SampleError(f"{self._in_a_row} bad samples in a row; the last: {error}") from error
        if self.read >= _MIN_JUDGED and self.bad > self.max_bad_fraction * self.read:
            raise SampleError(
                f"{self.bad} of {self.read} samples are bad, more than max_bad_fraction="
                f"{self.max_bad_fraction}; the last: {error}"
            ) from error

    def close(self) -> None:
        """Say what was skipped, once, at the end of a pass."""
        if self.bad:
            logger.warning(
                "%s: read %d = kept %d + dropped %d + bad %d",
                self.name,
                self.read,
                self.kept,
                self.dropped,
                self.bad,
            )


def check_on_error(on_error: OnError) -> None:
    """Raise `ValueError` unless it is "raise", "skip" or a function."""
    if on_error not in ("raise", "skip") and not callable(on_error):
        raise ValueError(f"on_error must be 'raise', 'skip' or a function, got {on_error!r}")


@dataclass(frozen=True, eq=False)
class Pipe(ABC):
    """A stage of a stream: samples in, at most as many samples out, in order.

    A subclass writes `apply`, which makes new dicts and leaves its inputs alone, and keeps the law

        apply(a + b) == apply(a) + apply(b)

    so how the stream is cut into chunks never changes the answer. Then one object is a WebDataset stage
    (``.compose(pipe)``), a torchdata ``Mapper`` between ``Batcher`` and ``Unbatcher`` (``pipe.apply``), and a plain
    generator (``pipe(stream)``). Composed outside, a pipe cannot say where the stream stands, so such a
    pipeline does not resume in mid-epoch.

    Args:
        on_error: "raise" (default), "skip", or a function of the error that says whether to skip. Only
            `SampleError` is ever skipped, never an error about the plan or a whole shard; each is logged as one
            JSON line on the logger ``adq_wds``; 100 in a row, or more than a tenth, is an error again.
    """

    on_error: OnError = field(default="raise", kw_only=True)
    chunk: ClassVar[int] = 16

    @abstractmethod
    def apply(self, samples: list[Sample]) -> list[Sample]:
        """The kept samples, changed or not, as new dicts in their order."""

    def __call__(self, stream: Iterable[Sample]) -> Iterator[Sample]:
        """Run over a stream; if a chunk raises, its samples are tried one by one to name the bad one."""
        check_on_error(self.on_error)
        tally = Tally(type(self).__name__, self.on_error)
        samples = iter(stream)
        while chunk := list(islice(samples, self.chunk)):
            try:
                out = self.apply(chunk)
            except Exception:  # each sample is tried again alone, and raises again
                yield from self._one_by_one(chunk, tally)
                continue
            tally.good(len(chunk), len(out))
            yield from out
        tally.close()

    def _one_by_one(self, chunk: list[Sample], tally: Tally) -> Iterator[Sample]:
        for sample in chunk:
            try:
                out = self.apply([sample])
            except AdqError as error:
                tally.failed(error)
            except Exception as error:
                tally.failed(self._wrapped(error, sample))
            else:
                tally.good(1, len(out))
                yield from out

    def _wrapped(self, error: Exception, sample: Sample) -> SampleError:
        text = f"{type(self).__name__}: {type(error).__name__}: {error}"
        place = located(
            SampleError(text), shard=base_name(str(sample.get("__url__", "?"))), key=sample.get("__key__")
        )
        place.__cause__ = error
        return place
