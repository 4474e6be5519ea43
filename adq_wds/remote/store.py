"""Reads a URL through obstore or fsspec: ranges, the whole, its size. No error contains the URL.

Errors of these libraries often quote the URL, which may hold a token or a password. So their texts are classified,
and neither shown nor chained.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager

from adq_wds.errors import ShardError, located
from adq_wds.remote.backend import Access, Backend, Range, Stamp, Trouble

logger = logging.getLogger("adq_wds")

TRIES = 3
"""Requests for one range whose answers break off, before it is an error."""


class Remote:
    """One URL, for reading. Raises `ShardError`, with the name of the `shard`: no library here reads such URLs."""

    def __init__(self, url: str, *, shard: str, access: Access) -> None:
        self._shard = shard
        with self._shard_errors():
            self._backend = _backend(url, access)

    def stamp(self) -> Stamp:
        """Size and date of the file. Raises `ShardError`: the request fails."""
        with self._shard_errors():
            return self._backend.stamp()

    def read_ranges(self, ranges: Sequence[Range]) -> list[bytes]:
        """All bytes of several ranges. Raises `ShardError`, or `NoRanges` for a server without ranges."""
        with self._shard_errors():
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
        """The whole file, in order. Raises `ShardError`: the response breaks off."""
        with self._shard_errors():
            yield from self._backend.chunks()

    @contextmanager
    def _shard_errors(self) -> Iterator[None]:
        try:
            yield
        except Trouble as trouble:
            raise located(ShardError(str(trouble)), shard=self._shard) from None


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
