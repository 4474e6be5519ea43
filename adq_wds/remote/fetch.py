"""Fetches shards that are no plain local tars; `Fetch` holds the cache and the permissions of the program."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Generator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from typing import BinaryIO

from adq_wds.errors import AdqError, ShardError, located
from adq_wds.files import canonical_json
from adq_wds.remote.backend import Access, Stamp
from adq_wds.remote.cache import Cache
from adq_wds.remote.expand import chunks_of, expand, run_command
from adq_wds.remote.store import Remote
from adq_wds.shards.names import is_pipe, is_url, path_of


@dataclass(frozen=True)
class Fetch:
    """Options of fetching: cache, permissions, servers.

    Attributes:
        cache: where fetched bytes stay; None keeps nothing.
        allow_pipe: whether ``pipe:`` URLs run their command in a shell.
        access: options for requests to servers.
    """

    cache: Cache | None = None
    allow_pipe: bool = False
    access: Access = field(default_factory=Access)

    def remote(self, url: str, *, shard: str) -> Remote:
        """A URL, for reading parts of it. Raises `ShardError`: nothing here reads such URLs."""
        return Remote(url, shard=shard, access=self.access)

    def stamp(self, url: str, *, shard: str) -> Stamp:
        """Size and date of a URL's file. Raises `ShardError`: they are unknown, as for a command."""
        self.check(url, shard=shard)
        if is_pipe(url):
            raise located(ShardError("a command's output has no size or date"), shard=shard)
        return self.remote(url, shard=shard).stamp()

    def check(self, url: str, *, shard: str) -> None:
        """Raise `ShardError` for a command that the program did not allow."""
        if is_pipe(url) and not self.allow_pipe:
            text = "a 'pipe:' URL runs a command, and is refused: say ShardDataset(allow_pipe=True), or fetch it first"
            raise located(ShardError(text), shard=shard)

    def whole(self, url: str, *, shard: str) -> BinaryIO:
        """The tar at a URL or of a command, unpacked if it was packed, as an open local file.

        With a cache it is fetched once for all processes; else into a temporary file, deleted when closed.
        """
        self.check(url, shard=shard)
        if is_pipe(url):
            return self._expanded(
                url, lambda: run_command(url, shard=shard, timeout=self.access.timeout), shard
            )
        remote = self.remote(url, shard=shard)
        return self._expanded(_url_key(url, remote), remote.chunks, shard)

    def unpacked(self, packed: BinaryIO, path: str, *, shard: str) -> BinaryIO:
        """As `whole`, for an open packed local file."""
        return self._expanded(_file_key(path, os.fstat(packed.fileno())), lambda: chunks_of(packed), shard)

    def forget(self, url: str, *, shard: str) -> None:
        """Remove it from the cache, so that the next `whole` fetches it again."""
        if self.cache is not None:
            key = url
            if not is_url(url):
                key = _file_key(url, os.stat(url))
            elif not is_pipe(url):
                key = _url_key(url, self.remote(url, shard=shard))
            self.cache.drop(f"whole\n{key}")

    def _expanded(self, key: str, chunks: Callable[[], Generator[bytes, None, None]], shard: str) -> BinaryIO:
        """Write chunks to an open file: the cache's entry of a key, or a temporary one."""

        def fill(out: BinaryIO) -> None:
            with closing(chunks()) as stream:  # a command ends now, not when the last traceback of it goes
                expand(stream, out, shard=shard)

        if self.cache is not None:
            return self.cache.open(f"whole\n{key}", fill)
        with ExitStack() as close:
            try:
                file = close.enter_context(tempfile.TemporaryFile(prefix="adq-shard-"))
                fill(file)
                file.flush()  # it is read by its number
            except OSError as error:
                text = f"cannot be kept in {tempfile.gettempdir()}: {error.strerror}; set TMPDIR"
                raise located(AdqError(text), shard=shard) from error
            close.pop_all()  # the caller's
        return file


def _url_key(url: str, remote: Remote) -> str:
    """The cache key of a URL with its file's size and date, so that a changed file is fetched again."""
    try:
        return f"{url}\n{canonical_json(remote.stamp())}"
    except ShardError:  # the fetch itself will say why
        return url


def _file_key(path: str, status: os.stat_result) -> str:
    return f"{os.path.realpath(path)}\n{status.st_size} {status.st_mtime_ns}"


def comes_whole(url: str) -> bool:
    """Whether a URL can only be fetched whole: a command, or a packed file by its name.

    >>> [comes_whole(url) for url in ("s3://b/a.tar", "s3://b/a.tar.gz?x=1", "pipe:cat a.tar")]
    [False, True, True]
    """
    return is_pipe(url) or path_of(url).lower().endswith((".gz", ".tgz"))
