"""Which bytes of the samples that are read next are their fields? Found for a thousand at a time.

`SpanReader.parse` finds them header by header. Here the headers of many samples are verified as it verifies them, in a
few array operations, and the sizes they give are kept: in later epochs the fields are cut out at once, and only their
crc32 is looked at. Laid out are samples of the usual kind: plain headers of plain files, `MAX_BYTES` or less. All others
are left to `parse`, and so is every sample whose payloads then have not the crc32 they must have: no error is made here.

What was found holds for the file it was found in, as its device, number, size and date say when it is opened; found in
another, it is forgotten. A shard changed in place while it is open, or so that these stay as they are, is noticed by its
payloads' crc32; a header changed alone, the payloads being right, is not before the shard is opened anew.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from adq_wds.reading.tar_columns import endings_at, payload_sizes
from adq_wds.samples.fields import Sample
from adq_wds.shards.tar_headers import BLOCK

MAX_BYTES = 8192
"""Larger samples gain little, and a thousand of them would be held."""

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
        stamp: its file's; None when it is not known.
        start: the first of them among all samples asked for.
        stop: behind the last.
    """

    shard: int
    n_rows: int
    stamp: FileStamp | None
    start: int
    stop: int


class Samples(NamedTuple):
    """n samples, group by group.

    Attributes:
        groups: whose they are; those of none are not laid out.
        row: (n,) int64, the place of each in its shard's list.
        n_bytes: (n,) int64, headers and padding included.
        keys: (n,) str, the key it must have.
        data: (n,) object, the bytes of each; None for a sample that is not laid out.
    """

    groups: Sequence[Group]
    row: NDArray[np.int64]
    n_bytes: NDArray[np.int64]
    keys: NDArray[np.object_]
    data: NDArray[np.object_]


class Laid(NamedTuple):
    """Where the payloads of n samples lie.

    Attributes:
        fields: (n,) object, a tuple of names in tar order; None for a sample that `parse` must read.
        cuts: (2F, n) int64, start and stop of each field's payload in the sample's bytes, F the most fields of any.
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
            new = new[_usual(samples.n_bytes[new], samples.keys[new], samples.data[new])]
            shape[new], size[:, new] = self._look(samples, new)
            self._remember(samples, shape, size)
        shape[samples.data == None] = _ODD  # noqa: E711 - of each
        if not shape.any():
            return None
        return Laid(self._fields[shape], _cuts(size[: self._width]))

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
        n_bytes, keys, data = samples.n_bytes[new], samples.keys[new], samples.data[new].tolist()
        shape, size = np.full(len(new), _ODD, np.uint8), np.zeros((_MAX_FIELDS, len(new)), np.uint16)
        left, guess = np.arange(len(new)), self._last
        for i in range(_TRIES):
            if len(left) < (_MANY if i else 1):
                break
            if i or not guess:
                one = int(left[i * len(left) // _TRIES])
                guess = self._shape_of(data[one], keys[one])
            if guess:
                found, fits = payload_sizes(data, n_bytes, keys, self._shapes[guess])
                here, left = left[fits[left]], left[~fits[left]]
                shape[here], size[: len(found), here] = guess, found[:, here]
                self._last = guess if len(here) else self._last
        return shape, size

    def _shape_of(self, data: bytes, key: str) -> int:
        """The number of the shape that a sample seems to have."""
        endings = endings_at(data, key, most=_MAX_FIELDS)
        if endings not in self._shapes:
            if len(self._shapes) == _MAX_SHAPES:
                return _ODD
            self._fields[len(self._shapes)] = tuple(ending[1:].lower() for ending in endings)
            self._shapes.append(endings)
            self._width = max(self._width, len(endings))
        return self._shapes.index(endings)


def _usual(
    n_bytes: NDArray[np.int64], keys: NDArray[np.object_], data: NDArray[np.object_]
) -> NDArray[np.bool_]:
    """Which of n samples were read, are whole blocks, and have a key such that `key.field` can mean nothing else.

    That is by the rules of `adq_wds.shards.samples_in_tar.split_name`: no dot in the key, a name after the last slash, and no `__` in front.
    """
    usual: NDArray[np.bool_] = (n_bytes >= BLOCK) & (n_bytes % BLOCK == 0) & (data != None)  # noqa: E711
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


def _cuts(size: NDArray[np.uint16]) -> NDArray[np.int64]:
    """See `Laid`; sizes as (F, n)."""
    cuts = np.empty((2 * len(size), size.shape[1]), np.int64)
    at = np.zeros(size.shape[1], np.int64)
    for i, n_bytes in enumerate(size.astype(np.int64)):
        cuts[2 * i] = start = at + BLOCK
        cuts[2 * i + 1] = stop = start + n_bytes
        at = stop + -stop % BLOCK
    return cuts


def cut(
    data: bytes, url: str, key: str, crc: int | None, fields: tuple[str, ...], cuts: tuple[int, ...]
) -> Sample | None:
    """The sample that was laid out; None unless its payloads have the crc32.

    Args:
        data: its bytes.
        url: its shard's, as the user wrote it.
        key: its key.
        crc: over its payloads; never None where it was laid out.
        fields: their names.
        cuts: start and stop of each; there may be more, which mean nothing.
    """
    if len(fields) == 2:  # an image and its label: in a loop it would take a quarter longer
        first, second = data[cuts[0] : cuts[1]], data[cuts[2] : cuts[3]]
        if crc32(second, crc32(first)) != crc:
            return None
        return {"__key__": key, "__url__": url, fields[0]: first, fields[1]: second}
    sample: Sample = {"__key__": key, "__url__": url}
    found, bounds = 0, iter(cuts)
    for field, start, stop in zip(fields, bounds, bounds, strict=False):
        sample[field] = payload = data[start:stop]
        found = crc32(payload, found)
    return sample if found == crc else None
