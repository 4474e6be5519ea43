"""Counts the samples that one pass of a stream brings of each shard, and lists the kept ones that never came.

Tar readers that read to the first bad header, such as WebDataset's, end there without an error.
"""

from __future__ import annotations

import lzma
import re
import tarfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from adq_wds.errors import ShardError, located, shorten

_DAMAGE = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError)
_DUPLICATE = "duplicate file name in tar file"
_FULL = 255  # a row's count stays here


class Lost(NamedTuple):
    """Kept samples of one shard that never came."""

    shard: str
    keys: list[str]
    n_kept: int


@dataclass
class Visit:
    """How often each row of one shard came, since all of them last had come equally often.

    A shard may be visited again before its first visit is complete, as by a pipeline that repeats and shuffles.

    Attributes:
        counts: one byte for each row, up to 255.
        n_zero: rows whose count is 0.
        first: whether no visit has been complete yet: then each row is due once, whatever came.
        epochs: those whose choice of kept rows was asked for.
    """

    counts: bytearray
    n_zero: int
    first: bool
    epochs: set[int | None] = field(default_factory=set)

    def came(self, row: int) -> bool:
        """Count a row; True when this completes a visit that no other overlaps, and nothing is due any more."""
        count = self.counts[row]
        if count == 0:
            self.counts[row] = 1
            self.n_zero -= 1
            return self.n_zero == 0 and self._complete()
        if count < _FULL:
            self.counts[row] = count + 1
        return False

    def _complete(self) -> bool:
        """Take one visit off."""
        counts = np.frombuffer(self.counts, dtype=np.uint8)
        counts -= 1
        self.n_zero = len(counts) - int(np.count_nonzero(counts))
        self.first = False
        return self.n_zero == len(counts)

    def missing(self, kept: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Kept rows that came less often than others.

        Only kept rows say how often: of the others, one that a foreign file between its members splits comes twice.
        """
        counts = np.frombuffer(self.counts, dtype=np.uint8)
        due = max(int(counts[kept].max(initial=0)), int(self.first))
        return np.flatnonzero(kept & (counts < due))


class Arrivals:
    """What came of each shard in one pass: a byte for each sample of the shards that are not complete."""

    def __init__(self) -> None:
        self._open: dict[str, Visit] = {}
        self._complete: set[str] = set()

    def visit(self, shard: str, n_rows: int, epoch: int | None) -> Visit:
        """The visit that a sample of `shard` belongs to.

        Args:
            shard: its name in the plan.
            n_rows: samples of the shard.
            epoch: the one whose choice is asked for.
        """
        visit = self._open.get(shard)
        if visit is None:
            visit = self._open[shard] = Visit(bytearray(n_rows), n_rows, shard not in self._complete)
        visit.epochs.add(epoch)
        return visit

    def complete(self, shard: str) -> None:
        """Drop a visit's counts: every row has come as often as every other."""
        del self._open[shard]
        self._complete.add(shard)

    def open_visits(self) -> Iterable[tuple[str, Visit]]:
        """Shards of which not every sample came, or not equally often."""
        return self._open.items()

    def begun(self) -> set[str]:
        """Shards of which at least one sample came."""
        return {*self._open, *self._complete}


def lost_text(lost: list[Lost]) -> str:
    """What to say of kept samples that never came; the place of the first stands in front of it."""
    first, *others = lost
    more = f", nor did {len(first.keys) - 1} more of its {first.n_kept} kept samples" * (len(first.keys) > 1)
    if others:
        n = sum(len(each.keys) for each in others)
        names = ", ".join(shorten(each.shard) for each in others[:3]) + ", ..." * (len(others) > 3)
        more += f", nor {n} kept samples of other shards ({names})"
    return (
        f"never came{more}: a tar reader such as WebDataset's ends without an error at a damaged header. `adq verify PLAN "
        "SHARDS` finds it; write or fetch the shard again. If a stage before this one leaves samples out on purpose, "
        "pass missing='warn'"
    )


def marked_url(error: Exception) -> str | None:
    """The URL that WebDataset's tar reader appends to its errors' arguments, or the file that could not be opened.

    What other stages' errors end with may look like one: then no shard of the plan has that name.
    """
    last = error.args[-1] if len(error.args) > 1 else None
    named = error.filename if isinstance(error, OSError) and error.filename is not None else last
    return named if isinstance(named, str) else None


def is_damage(error: Exception) -> bool:
    """Whether an error that names no shard comes of a damaged tar."""
    return isinstance(error, tarfile.TarError) or (isinstance(error, ValueError) and _DUPLICATE in str(error))


def reader_error(error: Exception, *, shard: str, after: str | None, sure: bool) -> ShardError:
    """A reader's error as ours.

    Args:
        error: what the reader raised; of its text only what holds no URL and no command is repeated.
        shard: the one it was read from, or the one of the last sample.
        after: the last sample's key.
        sure: whether it is this shard's: a reader that does not say which may have begun the next one.
    """
    place = "" if after is None else f" after key {shorten(after)}"
    if not sure:
        place += ", here or in the next shard"
    why = _reason(error)
    kind = type(error).__name__ + (f": {why}" if why else "")
    text = f"cannot be read{place} ({kind}); write or fetch the shard again, `adq verify` checks it"
    return located(ShardError(text), shard=shard)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        status = re.search(r"exit -?\d+", str(error))  # of a command, which may hold secrets
        return error.strerror or (status.group() if status else "")
    if isinstance(error, _DAMAGE) or _DUPLICATE in str(error):
        return shorten(str(error.args[0]).split(" @ <")[0], 200) if error.args else ""
    return ""
