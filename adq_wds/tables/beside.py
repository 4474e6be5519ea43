"""Takes where samples lie from an index that another library wrote beside a shard, after a check against the shard."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from adq_wds.core.rng import draws
from adq_wds.errors import ShardError, shorten
from adq_wds.remote.backend import NoRanges, Range
from adq_wds.remote.fetch import Fetch, comes_whole
from adq_wds.shards.names import is_url
from adq_wds.shards.samples_in_tar import Ignored, Span, group_entries, split_name
from adq_wds.shards.shard_file import ShardFile
from adq_wds.shards.tar_headers import BLOCK, DEFAULT_LIMITS, Entry, iter_entries
from adq_wds.tables import energon, webshart
from adq_wds.tables.bounds import MAX_HEADER_BYTES

logger = logging.getLogger("adq_wds")

N_DRAWN = 8
"""Members whose headers are compared beside the first, the last, and the first at each distance from its forerunner."""
MAX_DATABASE_BYTES = 1 << 30
"""Of a database at a URL, which is fetched whole."""
_MAX_HEADERS, _MAX_DISTANCES = 1 << 20, 64  # bytes between two payloads, and how many such numbers


@dataclass(frozen=True)
class _File:
    """A file, local or at a URL.

    Attributes:
        n_bytes: its size.
        mtime_ns: its date; 0 at a URL, where dates say when a file was copied.
        read: the bytes of some ranges.
    """

    n_bytes: int
    mtime_ns: int
    read: Callable[[list[Range]], list[bytes]]


class IndexesBeside:
    """The indexes that Megatron-Energon and webshart wrote beside shards; closed by `with`.

    Args:
        fetch: how files at URLs are read.
    """

    def __init__(self, fetch: Fetch | None = None) -> None:
        self._fetch = fetch or Fetch()
        self._numbers: dict[str, dict[str, tuple[int, int]]] = {}  # of the shards in each data set
        self._databases: dict[str, Path] = {}
        self._close = ExitStack()
        self._warned = False

    def __enter__(self) -> IndexesBeside:
        return self

    def __exit__(self, *error: object) -> None:
        self._close.close()

    def spans(self, path: str, *, shard: str) -> list[Span] | None:
        """The samples of a shard as `iter_spans` gives them; None without an index, or with one that is not the shard's.

        An index is taken if it is not older than the shard (local files), its members fill the file to its end, and
        some headers in the shard have the name and the size that it lists. Why one is not taken is logged.

        Args:
            path: a tar, local or at a URL.
            shard: its name, for messages.
        """
        if comes_whole(path) or (is_url(path) and set(path) & set("?#")):  # a signature holds for one file
            return None
        try:
            with self._opened(path, shard) as tar:
                for name, read in (("Energon", self._of_energon), ("webshart", self._of_webshart)):
                    try:
                        if members := read(path, shard, tar):
                            return _checked_spans(*members, tar, shard)
                    except (ValueError, ShardError) as error:
                        why = str(error).removeprefix(f"shard {shard}").lstrip(":, ")
                        self._warn(f"shard {shard}: {name}'s index is not used: {why}")
        except (OSError, ShardError, NoRanges):
            pass  # whoever reads the shard says why it cannot be read
        return None

    def _warn(self, text: str) -> None:
        """Log why an index is not used; the first one as a warning."""
        logger.log(logging.INFO if self._warned else logging.WARNING, text)
        self._warned = True

    def _of_webshart(self, path: str, shard: str, tar: _File) -> tuple[list[Entry], int] | None:
        raw = self._small_file(f"{path.removesuffix('.tar')}.json", shard, tar)
        return None if raw is None else webshart.read_members(raw, tar.n_bytes)

    def _of_energon(self, path: str, shard: str, tar: _File) -> tuple[list[Entry], int] | None:
        folder, _, below = (path if is_url(path) else os.path.abspath(path)).rpartition("/")
        for _ in range(2):  # the shard's folder, and the one above
            if folder not in self._numbers:
                self._numbers[folder] = {}  # also where it is damaged: that is said once
                if (info := self._small_file(f"{folder}/{energon.INFO}", shard)) is not None:
                    self._numbers[folder] = energon.read_numbers(info)
            if below in self._numbers[folder]:
                database = self._database(f"{folder}/{energon.DATABASE}", shard, tar)
                return energon.read_members(database, *self._numbers[folder][below], tar.n_bytes)
            folder, _, last = folder.rpartition("/")
            if folder.endswith(":/"):  # above a host or a bucket
                return None
            below = f"{last}/{below}"
        return None

    def _database(self, path: str, shard: str, tar: _File) -> Path:
        """The path of a local database, or of a copy of a remote one."""
        if path in self._databases:
            return self._databases[path]
        with self._opened(path, shard) as file:
            _check_date(file, tar)
            if not is_url(path):
                return Path(path)
            if file.n_bytes > MAX_DATABASE_BYTES:
                raise ValueError(f"it has {file.n_bytes:,} bytes, at most {MAX_DATABASE_BYTES:,} are fetched")
            copy = self._close.enter_context(tempfile.NamedTemporaryFile(prefix="adq-index-"))  # noqa: SIM115
            for start in range(0, file.n_bytes, _MAX_HEADERS):
                copy.write(b"".join(file.read([(start, min(start + _MAX_HEADERS, file.n_bytes))])))
            copy.flush()
        self._databases[path] = Path(copy.name)
        return self._databases[path]

    def _small_file(self, path: str, shard: str, tar: _File | None = None) -> bytes | None:
        """The bytes of a file; None where there is none."""
        try:
            with self._opened(path, shard) as file:
                if tar is not None:
                    _check_date(file, tar)
                if file.n_bytes > MAX_HEADER_BYTES:
                    raise ValueError(f"it has {file.n_bytes:,} bytes, at most {MAX_HEADER_BYTES:,}")
                return file.read([(0, file.n_bytes)])[0]
        except (OSError, ShardError, NoRanges):
            return None

    @contextmanager
    def _opened(self, path: str, shard: str) -> Iterator[_File]:
        """A file, for reading. Raises `OSError` or `ShardError`: it is not there, or cannot be read."""
        if is_url(path):
            remote = self._fetch.remote(path, shard=shard)
            yield _File(remote.stamp()["bytes"], 0, remote.read_ranges)
            return
        if not os.path.isfile(path):  # opening a fifo would wait for ever
            raise FileNotFoundError(path)
        with open(path, "rb", buffering=0) as handle:
            file = ShardFile(handle, shard, sparse=True)
            date = os.fstat(handle.fileno()).st_mtime_ns
            yield _File(len(file), date, lambda ranges: [file.read_all(*part) for part in ranges])


def _check_date(index: _File, tar: _File) -> None:
    if index.mtime_ns < tar.mtime_ns:
        raise ValueError("it is older than the shard (if it holds all the same, touch it)")


def _checked_spans(entries: list[Entry], end: int, tar: _File, shard: str) -> list[Span] | None:
    """The samples of listed members, once the tar's size and some of its headers are seen to be as listed.

    Raises:
        ValueError, ShardError: they are not, or overlap, or no tar of ours has such members.
    """
    if not entries:
        return None
    gaps: list[Range] = []  # between payloads
    before = 0
    for entry in entries:
        if entry.start < before or entry.payload < entry.start + BLOCK or entry.payload % BLOCK:
            raise ValueError(f"it lists members that overlap, at byte {entry.payload:,}")
        if entry.n_bytes > DEFAULT_LIMITS.member_bytes:
            raise ValueError(f"it lists a member of {entry.n_bytes:,} bytes")
        gaps.append((before, entry.payload))
        before = entry.payload + entry.n_bytes + -entry.n_bytes % BLOCK
    _check_end(end, tar)
    leads = _leads(entries, gaps, tar, shard)
    entries = [entry._replace(start=entry.payload - leads[entry.payload - entry.start]) for entry in entries]
    return list(group_entries(entries, shard=shard, limits=DEFAULT_LIMITS, ignored=Ignored()))


def _check_end(end: int, tar: _File) -> None:
    """Raise `ValueError` unless only the zeros that end an archive follow the last member."""
    left = tar.n_bytes - end
    if left < BLOCK or left > DEFAULT_LIMITS.padding_bytes:
        raise ValueError(
            f"it ends at byte {end:,}, the shard at {tar.n_bytes:,}: it was made of another file"
        )
    if any(tar.read([(end, tar.n_bytes)])[0]):
        raise ValueError(f"it ends at byte {end:,}, where the shard goes on: it was made of another file")


def _leads(entries: list[Entry], gaps: list[Range], tar: _File, shard: str) -> dict[int, int]:
    """Bytes from a member's first header to its payload, by the distance from its `start` to its payload.

    Where the distance is one block, that is its header. Else long names stand there, or folders, which are no part of it:
    that is read from the tar for the first member at each distance, and for all members behind something unlisted.
    """
    first: dict[int, int] = {}
    for i, entry in enumerate(entries):
        first.setdefault(entry.payload - entry.start, i)
    longest = max(stop - start for start, stop in gaps)
    if longest > _MAX_HEADERS or len(first) > _MAX_DISTANCES:
        raise ValueError(f"it leaves {longest:,} bytes between members, or {len(first):,} distances")
    drawn = draws(0, 0, shard, [str(i) for i in range(N_DRAWN)]) % len(entries)
    picks = list(dict.fromkeys([*first.values(), 0, len(entries) - 1, *map(int, drawn)]))
    leads: dict[int, int] = {}
    for unlisted in (False, True):
        if unlisted:
            rows = enumerate(zip(entries, gaps, strict=True))
            picks = [i for i, (entry, gap) in rows if leads[entry.payload - entry.start] < gap[1] - gap[0]]
        headers = tar.read([gaps[i] for i in picks])
        for i, raw in zip(picks, headers, strict=True):
            distance, lead = entries[i].payload - entries[i].start, _lead(entries[i], raw, shard)
            if leads.setdefault(distance, lead) != lead:
                raise ValueError(
                    f"it does not tell folders from long names before {shorten(entries[i].name)}"
                )
    return leads


def _lead(listed: Entry, raw: bytes, shard: str) -> int:
    """Bytes from a member's first header to its payload, in the bytes between the payload before and its own.

    Raises:
        ValueError, ShardError: another member stands there, or files of a sample that are not listed.
    """
    *unlisted, entry = iter_entries(
        _Headers(raw, listed.n_bytes), shard=shard, limits=DEFAULT_LIMITS, marked=False
    )
    if (entry.name, entry.payload, entry.n_bytes) != (listed.name, len(raw), listed.n_bytes):
        text = f"it lists {shorten(listed.name)} of {listed.n_bytes:,} bytes at byte {listed.payload:,}"
        raise ValueError(f"{text}, where the shard has {shorten(entry.name)} of {entry.n_bytes:,}")
    if lost := [other.name for other in unlisted if split_name(other.name)]:
        raise ValueError(f"it does not list {shorten(lost[0])}")
    return len(raw) - entry.start


@dataclass(frozen=True)
class _Headers:
    """The headers before one payload as a tar of that member alone, zeros in the place of the payload."""

    raw: bytes
    payload_bytes: int

    def __len__(self) -> int:
        return len(self.raw) + self.payload_bytes + -self.payload_bytes % BLOCK

    def __getitem__(self, part: slice) -> bytes:
        start, stop, _ = part.indices(len(self))
        return self.raw[start:stop].ljust(stop - start, b"\0")
