"""Caches fetched bytes in one folder, up to a size, shared by all workers and ranks of a machine.

Each entry is a file, named by the SHA-256 of its key (the whole URL and the requested part, so that URLs with one
base name stay apart). It is written under a hidden name, locked meanwhile, and renamed when it is complete: a killed
process leaves nothing that is ever read, and a process that needs an entry in progress waits for it. When the folder
would grow beyond its bound, the least recently used entries are removed; a process that has one open keeps it. Files
of other names are left alone.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from adq_wds.checks import positive
from adq_wds.errors import AdqError
from adq_wds.files import open_locked, remove_left_over

logger = logging.getLogger("adq_wds")

MAX_BYTES = 32 << 30
_AFTER = 0.9  # of the bound is left when something had to go
_PARTIAL = ".partial-"
_ENTRY = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Cache:
    """A folder for fetched bytes, shared by the processes of a machine.

    Args:
        folder: made when first used, readable by its owner only. It must be on a local disk, for file locks.
        max_bytes: most bytes of all entries; should be a few times the bytes read at one time (see `ShardDataset`). A
            larger entry is used, and not kept.

    Raises:
        ValueError: `folder` is no path, or `max_bytes` not a positive integer.
    """

    folder: str | os.PathLike[str]
    max_bytes: int = MAX_BYTES

    def __post_init__(self) -> None:
        if not isinstance(self.folder, str | os.PathLike) or not os.fspath(self.folder):
            raise ValueError(f"the cache's folder must be a path, got {self.folder!r}")
        positive("max_bytes", self.max_bytes)

    @property
    def path(self) -> Path:
        """The folder."""
        return Path(self.folder)

    def open(self, key: str, fill: Callable[[BinaryIO], None]) -> BinaryIO:
        """The entry of `key`, for reading; `fill` writes it first if it is not there, in one process at a time.

        Raises:
            AdqError: the folder cannot be written, or its disk is full.
            Errors of `fill` pass through.
        """
        final = self.path / _name(key)
        with self._our_errors():
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if (entry := _open_entry(final)) is not None:
                return entry
            unnamed = final.with_name(_PARTIAL + final.name)
            with _claimed(unnamed) as partial:
                if (entry := _open_entry(final)) is not None:  # filled by the process that was waited for
                    return entry
                fill(partial)
                partial.flush()
                entry = unnamed.open("rb")  # now: once it has its name, others may remove it
                try:
                    self._take_in(unnamed, final, partial.tell())
                except BaseException:
                    entry.close()
                    raise
            return entry

    def drop(self, key: str) -> None:
        """Remove an entry whose bytes are wrong."""
        with self._our_errors():
            (self.path / _name(key)).unlink(missing_ok=True)

    def _take_in(self, unnamed: Path, final: Path, added: int) -> None:
        """Rename a complete entry when there is room, and add its bytes to the count that all processes share.

        The count is written first, so a process killed in between leaves it too high, never too low; it is corrected
        when the bound is reached.
        """
        if added > self.max_bytes:
            reason = f"{added:,} bytes are not kept: more than max_bytes, {self.max_bytes:,}"
            logger.warning("cache %s: %s", self.path, reason)
            return
        with open(self.path / ".bytes", "a+b") as counter, _locked(counter):
            counter.seek(0)
            text = counter.read(32)
            total = int(text) + added if text.isdigit() else self.max_bytes + 1  # counted anew
            if total > self.max_bytes:
                total = self._make_room(added)
            counter.truncate(0)
            counter.write(str(total).encode())
            counter.flush()
            os.replace(unnamed, final)

    def _make_room(self, added: int) -> int:
        """Remove least recently used entries and files of killed processes; return the bytes in the folder with those
        added."""
        entries, total = [], added
        for entry in os.scandir(self.path):
            if entry.name.startswith(_PARTIAL):
                with contextlib.suppress(OSError):
                    remove_left_over(Path(entry.path))
            elif _ENTRY.fullmatch(entry.name):
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat()
                    entries.append((status.st_mtime_ns, status.st_size, entry.path))
                    total += status.st_size
        if total <= self.max_bytes:
            return total
        for _, n_bytes, path in sorted(entries):
            if total <= _AFTER * self.max_bytes:
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            total -= n_bytes
        logger.debug("cache %s: made room, %d bytes stay", self.path, total)
        return total

    @contextlib.contextmanager
    def _our_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            reason = error.strerror or type(error).__name__
            text = "no space left: give another folder, or a cache with a smaller bound" if full else reason
            raise AdqError(f"cache {self.path}: {text}") from error


def _name(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _open_entry(path: Path) -> BinaryIO | None:
    """An existing entry, marked as used now."""
    with contextlib.suppress(FileNotFoundError):
        entry = path.open("rb")
        if os.fstat(entry.fileno()).st_size:
            with contextlib.suppress(OSError):  # a folder that may only be read
                os.utime(entry.fileno())
            return entry
        entry.close()  # named, but not on the disk when the machine failed
    return None


@contextlib.contextmanager
def _locked(file: BinaryIO) -> Iterator[None]:
    """A lock, released explicitly: closing `file` would not do, since a process forked meanwhile has it open too."""
    fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)


@contextlib.contextmanager
def _claimed(partial: Path) -> Iterator[BinaryIO]:
    """A hidden, empty, locked file that only this process writes; removed afterwards unless renamed."""
    handle = open_locked(partial, wait=True, mode=0o600)
    assert handle is not None
    with os.fdopen(handle, "r+b") as file, _locked(file):
        try:
            file.truncate(0)
            yield file
        finally:
            if _is(partial, file):
                partial.unlink()


def _is(path: Path, file: BinaryIO) -> bool:
    """Whether an open file has that name now."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def as_cache(value: Cache | str | os.PathLike[str] | None) -> Cache | None:
    """The cache, or the cache in a folder.

    Raises:
        ValueError: neither.
    """
    if value is None or isinstance(value, Cache):
        return value
    if isinstance(value, str | os.PathLike):
        return Cache(value)
    raise ValueError(f"cache must be a folder or a Cache, got a {type(value).__name__}")
