"""Which bytes of a mapped shard are the fields of the samples that are read next? Found for a thousand at a time.

`SpanReader.parse` finds them header by header. Here the headers of many samples are verified as it verifies them, in a
few array operations, and the sizes they give are kept: in later epochs the fields are cut out at once, and only their
crc32 is looked at. Laid out are samples of the usual kind: plain headers of plain files, 8 KiB or less. All others
are left to `parse`, and so is every sample whose payloads then have not the crc32 they must have: no error is made here.

What was found holds for the file it was found in, as its device, number, size and date say when it is opened; found in
another, it is forgotten. A shard changed in place while it is open, or so that these stay as they are, is noticed by its
payloads' crc32; a header changed alone, the payloads being right, is not before the shard is opened anew.
"""

from __future__ import annotations

import mmap
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from adq_wds.io.headers import Part, endings_at, payload_sizes
from adq_wds.tar_headers import BLOCK

_MAX_BYTES = 8192  # larger ones gain little, and their headers would be fetched before the rest
_MAX_FIELDS = 8
_MAX_ROWS = 4_000_000  # of 17 bytes
_MAX_SHAPES = 200
_TRIES = 4  # shapes looked for among samples that are met together
_MANY = 16  # of another shape than the last, for another try
_ODD, _UNKNOWN = 0, 255

FileStamp = tuple[int, int, int, int]
"""Device, number, size and date of a file."""


class Group(NamedTuple):
    """Samples that lie in one shard.

    Attributes:
        shard: its number.
        n_rows: samples listed in it.
        data: the mapped file.
        stamp: the file's; None when it is not known.
        start: the first of them among all samples asked for.
        stop: behind the last.
    """

    shard: int
    n_rows: int
    data: mmap.mmap
    stamp: FileStamp | None
    start: int
    stop: int


class Samples(NamedTuple):
    """n samples, group by group.

    Attributes:
        groups: whose they are; those of none are not laid out.
        row: (n,) int64, the place of each in its shard's list.
        offset: (n,) int64, of its first byte.
        n_bytes: (n,) int64, headers and padding included.
        keys: (n,) str, the key it must have.
    """

    groups: Sequence[Group]
    row: NDArray[np.int64]
    offset: NDArray[np.int64]
    n_bytes: NDArray[np.int64]
    keys: NDArray[np.object_]


class Laid(NamedTuple):
    """Where the payloads of n samples lie.

    Attributes:
        fields: (n,) object, a tuple of names in tar order; None for a sample that `parse` must read.
        cuts: (2F, n) int64, start and stop of each field's payload, F the most fields of any.
    """

    fields: NDArray[np.object_]
    cuts: NDArray[np.int64]


class _Known(NamedTuple):
    """What is known of a shard's samples: 17 bytes each."""

    stamp: FileStamp
    shape: NDArray[np.uint8]  # (n_rows,), which of `Layouts._shapes`
    size: NDArray[np.uint16]  # (_MAX_FIELDS, n_rows), of each payload


class Layouts:
    """Finds payloads, and remembers where, of the last four million samples. Pickled, it forgets."""

    def __init__(self) -> None:
        self._shapes: list[tuple[str, ...]] = [()]  # what follows the key in the names of a sample's members
        self._fields = np.full(_MAX_SHAPES, None, dtype=object)  # the names of a shape's fields
        self._last = 0  # the shape met last
        self._width = 0  # most fields of a shape
        self._known: OrderedDict[int, _Known] = OrderedDict()
        self._n_rows = 0

    def __reduce__(self) -> tuple[type[Layouts], tuple[()]]:
        return Layouts, ()

    def find(self, samples: Samples) -> Laid | None:
        """Where the payloads of some samples lie; None when that is not known of any."""
        n = len(samples.keys)
        shape, size = np.full(n, _ODD, np.uint8), np.zeros((_MAX_FIELDS, n), np.uint16)
        width = self._width
        for group in samples.groups:
            known = self._of(group)
            if known is not None:
                row, here = samples.row[group.start : group.stop], slice(group.start, group.stop)
                shape[here], size[:width, here] = known.shape[row], known.size[:width, row]
        new = np.flatnonzero(shape == _UNKNOWN)
        if len(new):
            shape[new] = _ODD
            new = new[_usual(samples.offset[new], samples.n_bytes[new], samples.keys[new])]
            shape[new], size[:, new] = self._look(samples, new)
            self._remember(samples, shape, size)
        if not shape.any():
            return None
        return Laid(self._fields[shape], _cuts(samples.offset, size[: self._width]))

    def _of(self, group: Group) -> _Known | None:
        """What is known of the group's shard, as its file is now."""
        if group.stamp is None:
            return None
        known = self._known.get(group.shard)
        if known is None or known.stamp != group.stamp:
            if known is None:
                self._n_rows += group.n_rows
            shape = np.full(group.n_rows, _UNKNOWN, np.uint8)
            known = _Known(group.stamp, shape, np.zeros((_MAX_FIELDS, group.n_rows), np.uint16))
            self._known[group.shard] = known
            while self._n_rows > _MAX_ROWS and len(self._known) > 1:
                self._n_rows -= len(self._known.popitem(last=False)[1].shape)
        return known

    def _remember(self, samples: Samples, shape: NDArray[np.uint8], size: NDArray[np.uint16]) -> None:
        for group in samples.groups:
            known = self._known.get(group.shard)
            if known is not None and known.stamp == group.stamp:
                row, here = samples.row[group.start : group.stop], slice(group.start, group.stop)
                known.size[:, row] = size[:, here]
                known.shape[row] = shape[here]  # last: another thread may look

    def _look(self, samples: Samples, new: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.uint16]]:
        """Shapes (m,) and sizes (_MAX_FIELDS, m) of some samples met for the first time."""
        columns = samples.offset[new], samples.n_bytes[new], samples.keys[new]
        parts: list[Part] = []
        whole = np.zeros(len(new), np.bool_)
        for group in samples.groups:
            start, stop = np.searchsorted(new, [group.start, group.stop]).tolist()
            if stop > start and len(group.data) >= BLOCK:
                parts.append((group.data, start, stop))
                whole[start:stop] = columns[0][start:stop] + columns[1][start:stop] <= len(group.data)
        shape, size = np.full(len(new), _ODD, np.uint8), np.zeros((_MAX_FIELDS, len(new)), np.uint16)
        left, guess = np.flatnonzero(whole), self._last
        for i in range(_TRIES):
            if len(left) < (_MANY if i else 1):
                break
            if i or not guess:
                guess = self._shape_at(parts, *columns, int(left[i * len(left) // _TRIES]))
            if guess:
                found, fits = payload_sizes(parts, *columns, self._shapes[guess])
                here, left = left[fits[left]], left[~fits[left]]
                shape[here], size[: len(found), here] = guess, found[:, here]
                self._last = guess if len(here) else self._last
        return shape, size

    def _shape_at(
        self,
        parts: list[Part],
        offset: NDArray[np.int64],
        n_bytes: NDArray[np.int64],
        keys: NDArray[np.object_],
        i: int,
    ) -> int:
        """The number of the shape that sample i seems to have."""
        data = next(data for data, start, stop in parts if start <= i < stop)
        endings = endings_at(data, int(offset[i]), int(n_bytes[i]), keys[i], most=_MAX_FIELDS)
        if endings not in self._shapes:
            if len(self._shapes) == _MAX_SHAPES:
                return _ODD
            self._fields[len(self._shapes)] = tuple(ending[1:].lower() for ending in endings)
            self._shapes.append(endings)
            self._width = max(self._width, len(endings))
        return self._shapes.index(endings)


def _usual(
    offset: NDArray[np.int64], n_bytes: NDArray[np.int64], keys: NDArray[np.object_]
) -> NDArray[np.bool_]:
    """Which of n samples are small, begin at a block, and have a key such that `key.field` can mean nothing else.

    That is by the rules of `adq_wds.tar.split_name`: no dot in the key, a name after the last slash, and no `__` in front.
    """
    usual: NDArray[np.bool_] = (n_bytes <= _MAX_BYTES) & (offset >= 0) & (offset % BLOCK == 0)
    for i in np.flatnonzero(usual).tolist():
        key = keys[i]
        usual[i] = (
            key.isascii()
            and key.isprintable()
            and "." not in key
            and key[-1:] not in ("", "/")
            and key[:2] != "__"
        )
    return usual


def _cuts(offset: NDArray[np.int64], size: NDArray[np.uint16]) -> NDArray[np.int64]:
    """See `Laid`; sizes as (F, n)."""
    cuts = np.empty((2 * len(size), len(offset)), np.int64)
    at = offset
    for i, n_bytes in enumerate(size.astype(np.int64)):
        cuts[2 * i] = start = at + BLOCK
        cuts[2 * i + 1] = stop = start + n_bytes
        at = stop + -stop % BLOCK
    return cuts
