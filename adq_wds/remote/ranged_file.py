"""A file at a URL that is read by ranges, as Python and Arrow read an open file."""

from __future__ import annotations

import io
import os
from typing import Any

from adq_wds.remote.backend import NoRanges
from adq_wds.remote.store import RemoteFile, RequestError

BLOCK = 256 << 10
"""Bytes that one request asks for at least; small reads side by side share it."""


class RangedFile(io.RawIOBase):
    """An open file at a URL: every read is a request for its bytes, unless the last one brought them.

    Its position is this process's own, and after a fork requests go through a library that survives it.

    Raises:
        OSError: a request fails, the file changed since it was opened (fsspec does not see it), or the server serves
            no ranges.
    """

    def __init__(self, url: str) -> None:
        super().__init__()
        self._url = url
        self._open()
        self.size = self._remote.stamp()["bytes"]
        self._at, self._block_start, self._block = 0, 0, b""

    def _open(self) -> None:
        self._process, self._remote = os.getpid(), RemoteFile(self._url)

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """The position of the next read."""
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Set the position, and return it."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self.size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Read up to as many bytes as the buffer takes."""
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def read(self, n: int | None = -1, /) -> bytes:
        """The next `n` bytes, fewer at the end of the file; all that are left by default."""
        start = min(self._at, self.size)
        end = self.size if n is None or n < 0 else min(start + n, self.size)
        if start < self._block_start or end > self._block_start + len(self._block):
            self._fetch(start, end)
        data = self._block[start - self._block_start : end - self._block_start]
        self._at = end
        return data

    def _fetch(self, start: int, end: int) -> None:
        """Hold the bytes of a range, and more where that is a small one."""
        if end - start < BLOCK:
            start, end = max(0, min(start, self.size - BLOCK)), min(start + BLOCK, self.size)
        if start == end:
            return
        if self._process != os.getpid():
            self._open()
        try:
            (self._block,) = self._remote.read_ranges([(start, end)])
        except NoRanges:
            raise RequestError(
                "the server serves no ranges: fetch the file first, and give its path"
            ) from None
        self._block_start = start
