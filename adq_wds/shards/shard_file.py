"""Reads a shard's file by offset, so that a file cut short meanwhile is an error."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import BinaryIO

from adq_wds.errors import ShardError, located

_ONE_READ = 1 << 30  # Linux reads 2 GiB at most at one time


class ShardFile:
    """The bytes of an open file: its length and its slices, read on demand.

    It is not mapped into memory: when another process shortens a mapped file, access behind its end kills the process
    (SIGBUS), while `pread` returns fewer bytes. Threads may share one.

    Args:
        file: open for reading, and open as long as this is used; only its descriptor is used.
        name: the shard's name, for messages.
        sparse: a small part will be read; the kernel is advised not to read ahead.

    Attributes:
        fd: the file's descriptor.
        n_bytes: its length.

    Raises:
        ShardError: empty, or no file that can be read.
    """

    def __init__(self, file: BinaryIO, name: str, *, sparse: bool = False) -> None:
        self.name = name
        self.fd = file.fileno()
        self.n_bytes = os.fstat(self.fd).st_size
        if not self.n_bytes:
            raise ShardError(f"shard {name}: empty file, expected a tar file: write or fetch it again")
        if sparse and hasattr(os, "posix_fadvise"):
            with suppress(OSError):  # advice only
                os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_RANDOM)

    def __len__(self) -> int:
        return self.n_bytes

    def __getitem__(self, part: slice) -> bytes:
        start, stop, _ = part.indices(self.n_bytes)
        return self.read_all(start, stop)

    def read_all(self, start: int, stop: int, *, key: str | None = None) -> bytes:
        """The bytes from `start` to `stop`, all of them; `key` is the sample's, for messages.

        Raises:
            ShardError: the file ends before them, or cannot be read.
        """
        data = self.read_some(start, stop - start, key=key)
        if len(data) < stop - start:
            ends = os.fstat(self.fd).st_size
            text = f"truncated while it was read: {self.n_bytes:,} bytes when it was opened, {ends:,} now"
            raise located(ShardError(f"{text}; write or fetch the shard again"), shard=self.name, key=key)
        return data

    def read_some(self, start: int, n_bytes: int, key: str | None = None) -> bytes:
        """`n_bytes` from `start` on, or fewer where the file ends, or ended when it was opened.

        Raises:
            ShardError: the file cannot be read.
        """
        if start + n_bytes > self.n_bytes:  # before memory is taken for them
            n_bytes = max(0, self.n_bytes - start)
        try:
            data = os.pread(self.fd, n_bytes, start) if n_bytes <= _ONE_READ else b""
            while len(data) < n_bytes:
                more = os.pread(self.fd, min(n_bytes - len(data), _ONE_READ), start + len(data))
                if not more:
                    break
                data += more
        except OSError as error:
            text = f"cannot be read: {error.strerror}"
            raise located(ShardError(text), shard=self.name, key=key) from error
        return data
