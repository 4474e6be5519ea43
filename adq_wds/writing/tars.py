"""Writes samples to tar shards: bytes untouched, equal input to equal files, final names only when complete."""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

from adq_wds.errors import PlanError, SampleError, shorten
from adq_wds.remote.outputs import atomic_path
from adq_wds.remote.url_path import AnyPath, as_path
from adq_wds.samples.fields import Sample, place_error
from adq_wds.shards.names import check_shard_name
from adq_wds.shards.samples_in_tar import split_name

_NUMBER = re.compile(r"%(?:0\d{1,2})?d")
Stored = tuple[str, list[tuple[str, bytes]]]
"""A sample as it is stored: its key, and each field with its bytes."""


@dataclass(frozen=True)
class WrittenShard:
    """One finished shard.

    Attributes:
        path: its file.
        n: samples in it.
        payload_bytes: bytes of its members, without headers and padding.
    """

    path: AnyPath
    n: int
    payload_bytes: int

    @property
    def n_bytes(self) -> int:
        """Bytes on the disk, container included."""
        return self.path.stat().st_size


class ShardPattern:
    """A pattern such as ``DIR/small-%06d.tar``: one number, in the file's name.

    Raises:
        ValueError: no number, several, or one in the folder's name; names that no index may hold.
    """

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.folder = as_path(pattern).parent
        self._name = as_path(pattern).name
        one_number = _NUMBER.search(self._name) is not None and self._name.count("%") == 1
        if not one_number or _NUMBER.search(str(self.folder)):
            raise ValueError(
                f"pattern {pattern!r} must hold one number in its file name, such as small-%06d.tar"
            )
        if not self._name.endswith(".tar"):
            raise ValueError(f"pattern {pattern!r} must end in .tar")
        try:
            check_shard_name(self._name % 0)
        except PlanError as error:
            raise ValueError(f"pattern {pattern!r}: {error}") from None

    def path(self, i: int) -> AnyPath:
        """The `i`-th shard's path."""
        return self.folder / (self._name % i)

    def existing(self) -> list[AnyPath]:
        """Existing files that match the pattern, sorted."""
        same = re.compile(r"\d+".join(map(re.escape, _NUMBER.split(self._name))))
        return sorted(path for path in self.folder.glob("*.tar") if same.fullmatch(path.name))


class Cut:
    """Cuts samples, one after another, into shards.

    A shard ends before it would exceed `max_samples` or `max_bytes` of payload, and before a key that it holds
    already (the same key in two source shards is normal): keys are never changed.
    """

    def __init__(self, max_samples: int, max_bytes: int) -> None:
        self._max_samples, self._max_bytes = max_samples, max_bytes
        self._keys: set[str] = set()
        self._total = 0

    def before(self, key: str, n_bytes: int) -> bool:
        """Whether a shard ends before the next sample, which has this key and payload."""
        full = len(self._keys) == self._max_samples or self._total + n_bytes > self._max_bytes
        ends = bool(self._keys) and (full or key in self._keys)
        if ends:
            self._keys.clear()
            self._total = 0
        self._keys.add(key)
        self._total += n_bytes
        return ends


def write_tars(
    samples: Iterable[Sample], pattern: ShardPattern, *, max_samples: int, max_bytes: int, first: int = 0
) -> Iterator[WrittenShard]:
    """Write samples to one shard after another, as `Cut` says; yields each shard once it has its final name.

    Numbers of shards start at `first`.

    Raises:
        SampleError: a sample has no key, holds a value that is not bytes, or would be read back differently.
        AdqError: the disk is full or the folder read-only.
    """
    numbered = _numbered(samples, Cut(max_samples, max_bytes))
    for i, shard in groupby(numbered, key=itemgetter(0)):
        yield _write(pattern.path(first + i), (each for _, each in shard))


def write_tar(path: AnyPath, samples: Iterable[Sample]) -> WrittenShard:
    """Write samples to one shard, whole or not at all; raises as `write_tars`."""
    return _write(path, map(stored, samples))


def _numbered(samples: Iterable[Sample], cut: Cut) -> Iterator[tuple[int, Stored]]:
    """The key and members of each sample, with the number of its shard."""
    stream, i = iter(samples), 0
    while (sample := _next(stream)) is not None:
        key, members = stored(sample)
        i += cut.before(key, sum(len(data) for _, data in members))
        yield i, (key, members)


def _write(path: AnyPath, samples: Iterable[Stored]) -> WrittenShard:
    n = total = 0
    with atomic_path(path) as partial, tarfile.open(partial, "w", format=tarfile.PAX_FORMAT) as tar:
        for key, members in samples:
            n += 1
            for name, data in members:
                tar.addfile(_header(key, name, len(data)), io.BytesIO(data))
                total += len(data)
    return WrittenShard(path, n, total)


def _next(stream: Iterator[Sample]) -> Sample | None:
    """The next sample; marks an `OSError` of the stream, to distinguish it from one of writing."""
    try:
        return next(stream, None)
    except OSError as error:
        raise SampleError(f"the stream to be written failed: {type(error).__name__}: {error}") from error


def stored(sample: Sample) -> Stored:
    """A sample's key and its own fields, in their order.

    Raises:
        SampleError: it would be read back differently.
    """
    key = sample.get("__key__")
    if not isinstance(key, str):
        raise place_error(SampleError(f"no key to store it under, __key__ is {shorten(key)}"), sample)
    members = [(name, data) for name, data in sample.items() if name[:2] != "__"]
    for name, data in members:
        if not isinstance(data, bytes):
            kind = type(data).__name__
            raise place_error(
                SampleError(f"holds {kind}, only bytes can be stored; encode it first"), sample, name
            )
        if split_name(f"{key}.{name}") != (key, name):
            text = "would not be read back under this key and field (dots, capitals or '__' in the name); rename it"
            raise place_error(SampleError(text), sample, name)
    if not members:
        raise place_error(SampleError("nothing to store: it has no fields"), sample)
    return key, members


def _header(key: str, name: str, n_bytes: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(f"{key}.{name}")
    member.size = n_bytes
    member.mode = 0o444
    return member


def member_bytes(key: str, name: str, n_bytes: int) -> int:
    """Bytes that a field of `n_bytes` takes in a shard: its headers, more of them for a long name, and padding.

    >>> member_bytes("a", "jpg", 674), member_bytes("a" * 100, "jpg", 674)
    (1536, 2560)
    """
    return len(_header(key, name, n_bytes).tobuf(tarfile.PAX_FORMAT)) + n_bytes + -n_bytes % tarfile.BLOCKSIZE
