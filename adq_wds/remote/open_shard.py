"""Opens a shard for reading by offset; remote and packed ones are fetched whole and unpacked first."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import BinaryIO

from adq_wds.errors import ShardError
from adq_wds.remote.fetch import Fetch
from adq_wds.shards.names import base_name, is_url
from adq_wds.shards.shard_file import ShardFile

_PACKED = {b"\x1f\x8b": "gzip", b"BZh91AY&SY": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


@contextmanager
def open_shard(
    path: str | os.PathLike[str],
    *,
    shard: str | None = None,
    fetch: Fetch | None = None,
    sparse: bool = False,
) -> Iterator[ShardFile]:
    """Open a shard for reading by offset; closed when the block ends.

    A shard at a URL, or packed with gzip, is fetched whole and unpacked first, into `fetch`'s cache or a temporary file.
    Missing bytes in a file that another process shortens meanwhile raise `ShardError`.

    Args:
        path: a local path, a URL, or a command (``pipe:``), if `fetch` allows it.
        shard: its name, for messages.
        fetch: fetches shards that are no plain local tars.
        sparse: a small part will be read; see `ShardFile`.

    Raises:
        ShardError: missing, unreadable, no regular file, empty, or packed otherwise than with gzip.
    """
    url = os.fspath(path)
    fetch = fetch or Fetch()
    remote = is_url(url)
    name = shard or (base_name(url) if remote else url)
    with ExitStack() as close:
        file = close.enter_context(fetch.whole(url, shard=name) if remote else _open_local(url, name))
        data = ShardFile(file, name, sparse=sparse)
        start = data[: max(map(len, _PACKED))]
        packer = next((packer for magic, packer in _PACKED.items() if start.startswith(magic)), None)
        if packer is not None:
            if packer != "gzip" or remote:
                text = f"{packer}: unpack it, samples are read from tar files by offset"
                raise ShardError(f"shard {name}: {text}")
            unpacked = close.enter_context(fetch.unpacked(file, url, shard=name))
            data = ShardFile(unpacked, name, sparse=sparse)
        yield data


def _open_local(path: str, name: str) -> BinaryIO:
    try:
        # O_NONBLOCK: opening a fifo that nobody writes to would wait for ever
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise ShardError(f"shard {name}: cannot be opened: {error.strerror}") from error
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        kind = "directory" if stat.S_ISDIR(mode) else "fifo, socket or device"
        raise ShardError(f"shard {name}: a {kind}, expected a tar file")
    return open(handle, "rb", buffering=0)
