"""Gets bytes of a URL: ranges, the whole, and its size, through obstore or fsspec; no error says the URL.

What these libraries raise often quotes the URL, which may hold a token or a password. So their texts are read for what
went wrong, and neither passed on nor chained.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Generator, Sequence

from adq_wds.errors import ShardError, located
from adq_wds.remote.backend import Access, Backend, Range, Stamp, T, Trouble

logger = logging.getLogger("adq_wds")


TRIES = 3
"""Requests for one range whose answers break off, before it is an error."""


class Remote:
    """One URL, for reading.

    Args:
        url: what is read.
        shard: its name, for messages.
        access: how.

    Raises:
        ShardError: no library here reads such URLs.
    """

    def __init__(self, url: str, *, shard: str, access: Access) -> None:
        self._shard = shard
        self._backend = self._told(lambda: _backend(url, access))

    def stamp(self) -> Stamp:
        """Size and date of the file.

        Raises:
            ShardError: it cannot be asked for.
        """
        return self._told(self._backend.stamp)

    def read(self, start: int, end: int) -> bytes:
        """The bytes of one range, all of them.

        Raises:
            ShardError: not to be had, or fewer than there should be.
            NoRanges: the server gives the whole only.
        """
        return self.read_many([(start, end)])[0]

    def read_many(self, ranges: Sequence[Range]) -> list[bytes]:
        """The bytes of several ranges; what `read` says. An answer that breaks off is asked for again."""

        def ask() -> list[bytes]:
            for left in reversed(range(TRIES)):
                try:
                    found = self._backend.ranges(ranges)
                    for (start, end), data in zip(ranges, found, strict=True):
                        if len(data) != end - start:
                            raise Trouble(f"{len(data):,} of {end - start:,} bytes came", again=True)
                    return found
                except Trouble as trouble:
                    if not trouble.again or not left:
                        raise
            raise AssertionError("unreachable")

        return self._told(ask)

    def chunks(self) -> Generator[bytes, None, None]:
        """The whole, in order; a `ShardError` where it breaks off."""
        try:
            yield from self._backend.chunks()
        except Trouble as trouble:
            raise self._error(trouble) from None

    def _told(self, ask: Callable[[], T]) -> T:
        try:
            return ask()
        except Trouble as trouble:
            raise self._error(trouble) from None

    def _error(self, trouble: Trouble) -> ShardError:
        return located(ShardError(str(trouble)), shard=self._shard)


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
                f"process {os.getpid()} was forked from one that had read remote shards, which obstore does not survive: "
                "start workers with multiprocessing_context='forkserver' or 'spawn'"
            )
        logger.debug("a forked process: remote shards are read through fsspec")
    if installed(scheme):
        return Fsspec(url, access)
    missing = "pip install 'adq-wds[cloud]'" if scheme in SCHEMES else "install the fsspec file system for it"
    raise Trouble(f"nothing here reads {scheme}:// URLs: {missing}")
