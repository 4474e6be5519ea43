"""Reads and writes a URL through obstore or fsspec. No error contains the URL.

Errors of these libraries often quote the URL, which may hold a token or a password. So their texts are classified,
and neither shown nor chained.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from adq_wds.errors import ShardError, located
from adq_wds.remote.backend import Access, Backend, Range, Stamp, Trouble

logger = logging.getLogger("adq_wds")

TRIES = 3
"""Requests for one range whose answers break off, before it is an error."""


class RequestError(OSError):
    """A request to a store that failed; what the store holds may be whole."""


class RemoteFile:
    """One URL, for reading and writing. Errors are `RequestError`s, or `FileNotFoundError` where nothing is there."""

    def __init__(self, url: str, *, access: Access | None = None) -> None:
        with self._errors():
            self._backend = _backend(url, access or Access())

    def stamp(self) -> Stamp:
        """Size and date of the file."""
        with self._errors():
            return self._backend.stamp()

    def read_ranges(self, ranges: Sequence[Range]) -> list[bytes]:
        """All bytes of several ranges; `NoRanges` for a server without ranges."""
        with self._errors():
            for _ in range(TRIES - 1):
                try:
                    return self._read_once(ranges)
                except Trouble as trouble:
                    if not trouble.again:
                        raise
            return self._read_once(ranges)

    def _read_once(self, ranges: Sequence[Range]) -> list[bytes]:
        answers = self._backend.ranges(ranges)
        for (start, end), data in zip(ranges, answers, strict=True):
            if len(data) != end - start:
                raise Trouble(f"{len(data):,} of {end - start:,} bytes came", again=True)
        return answers

    def chunks(self) -> Generator[bytes, None, None]:
        """The whole file, in order."""
        with self._errors():
            yield from self._backend.chunks()

    def put(self, path: Path) -> None:
        """Write a local file there: whole, or not at all."""
        with self._errors():
            self._backend.put(path)

    def remove(self) -> None:
        """Remove the file; one that is missing may be an error or not."""
        with self._errors():
            self._backend.remove()

    def names(self) -> list[str]:
        """The names of the files in the folder at the URL, sorted; none if it is missing."""
        with self._errors():
            return sorted(self._backend.names())

    def is_folder(self) -> bool:
        """Whether there are files below the URL."""
        with self._errors():
            return self._backend.is_folder()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except Trouble as trouble:
            raise self._error(trouble) from None

    def _error(self, trouble: Trouble) -> Exception:
        return (FileNotFoundError if trouble.missing else RequestError)(str(trouble))


class Remote(RemoteFile):
    """A shard at a URL. All errors are `ShardError`s with the name of the `shard`."""

    def __init__(self, url: str, *, shard: str, access: Access) -> None:
        self._shard = shard
        super().__init__(url, access=access)

    def _error(self, trouble: Trouble) -> Exception:
        return located(ShardError(str(trouble)), shard=self._shard)


def lost_in_forks(scheme: str) -> bool:
    """Whether a process forked from this one could not read URLs that begin so: obstore was used, and nothing else can."""
    from adq_wds.remote.with_fsspec import installed
    from adq_wds.remote.with_obstore import SCHEMES, was_used

    return was_used() and scheme in SCHEMES and not installed(scheme)


def _backend(url: str, access: Access) -> Backend:
    """The library for a URL: obstore, where it is installed and can read it here; else fsspec."""
    from adq_wds.remote.with_fsspec import Fsspec, installed
    from adq_wds.remote.with_obstore import SCHEMES, Obstore, usable

    scheme = url.partition("://")[0].lower()
    if scheme in SCHEMES and importlib.util.find_spec("obstore") is not None:
        if usable():
            return Obstore(url, access)
        if not installed(scheme):
            raise Trouble(
                f"process {os.getpid()} was forked from one that had read remote files, which obstore does not survive: "
                "start workers with multiprocessing_context='forkserver' or 'spawn'"
            )
        logger.debug("a forked process: URLs are read through fsspec")
    if installed(scheme):
        return Fsspec(url, access)
    missing = "pip install 'adq-wds[cloud]'" if scheme in SCHEMES else "install the fsspec file system for it"
    raise Trouble(f"nothing here reads {scheme}:// URLs: {missing}")
