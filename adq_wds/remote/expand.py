"""Writes a streamed tar (a packed file, a command's output, a server's response) to a file, unpacked.

Tar headers are checked on the fly, with the limits of `tar_headers`: a declared size beyond them is refused before a
byte is written. So is a stream that goes on behind the end of its archive, or that unpacks to a thousand times its
size. Other damage is detected when the file is read.
"""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import zlib
from collections.abc import Generator, Iterable, Iterator
from contextlib import suppress
from itertools import chain
from typing import BinaryIO

from adq_wds.errors import ShardError, located
from adq_wds.shards.tar_headers import DEFAULT_LIMITS, Limits
from adq_wds.shards.tar_stream import TarWatch

GZIP = b"\x1f\x8b"
_CHUNK = 1 << 20
_PIECE = 64 << 10  # packed bytes unpacked at one time: what is left of them is copied for each member
_IDLE = 1 << 20  # packed bytes that may hold nothing: padding, empty members, long headers
_FREE = 64 << 20  # bytes that any packed shard may unpack to
_RATIO = 200  # beyond these, for each byte that was packed


def expand(chunks: Iterable[bytes], out: BinaryIO, *, shard: str, limits: Limits = DEFAULT_LIMITS) -> None:
    """Write the chunks of a tar, packed with gzip or not, to a file; a `ShardError` if it is no tar, or a bomb."""
    watch = TarWatch(shard=shard, limits=limits)
    for data in _unpacked(iter(chunks), shard):
        watch.see(data)
        out.write(data)
    if not watch.n_bytes:
        raise _error("empty, expected a tar file: write or fetch it again", shard)


def _unpacked(stream: Iterator[bytes], shard: str) -> Iterator[bytes]:
    """The stream in chunks, unpacked where it is gzip."""
    first = b""
    while len(first) < len(GZIP) and (more := next(stream, None)) is not None:
        first += more
    if first.startswith(GZIP):
        stream = _gunzipped(chain([first], stream), shard)
    elif first:
        yield first
    yield from stream


def _gunzipped(stream: Iterable[bytes], shard: str) -> Iterator[bytes]:
    """The content of a gzip stream of one or more members; zeros may follow a member."""
    n_in = n_out = n_idle = 0  # bytes; idle: in, since the last that came out
    member = None  # between members
    for piece in (data[i : i + _PIECE] for data in stream for i in range(0, len(data), _PIECE)):
        while piece:
            out, rest = b"", piece if member else piece.lstrip(b"\0")
            if len(rest) == len(piece):
                member = member or zlib.decompressobj(wbits=31)
                try:
                    out = member.decompress(piece, _CHUNK)
                except zlib.error:
                    text = "damaged: not a valid gzip stream; write or fetch the shard again"
                    raise _error(text, shard) from None
                rest = member.unused_data if member.eof else member.unconsumed_tail
                member = None if member.eof else member
            n_in, n_out = n_in + len(piece) - len(rest), n_out + len(out)
            n_idle = 0 if out else n_idle + len(piece) - len(rest)
            if n_out > _FREE + _RATIO * n_in or n_idle > _IDLE:
                text = f"{n_in:,} bytes unpack to {n_out:,}, as no packed shard does: refused"
                raise _error(f"{text}; unpack it yourself if you trust it", shard)
            if out:
                yield out
            piece = rest
    if member is not None:
        raise _error("truncated: the gzip stream ends early; write or fetch the shard again", shard)


def _error(text: str, shard: str) -> ShardError:
    return located(ShardError(text), shard=shard)


def chunks_of(file: BinaryIO) -> Generator[bytes, None, None]:
    """The chunks of a file from its position on."""
    while chunk := file.read(_CHUNK):
        yield chunk


def run_command(url: str, *, shard: str, timeout: float) -> Generator[bytes, None, None]:
    """The output of a ``pipe:`` URL's command; a `ShardError` if it fails, or is silent for `timeout` seconds.

    No error names the command, which may hold a token.
    """
    command = url.lstrip()[len("pipe:") :]
    # a shell, as WebDataset's users write these; only the program itself may name one (allow_pipe=True)
    process = subprocess.Popen(  # noqa: S603
        ["/bin/sh", "-c", command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # a failing curl prints its headers
        start_new_session=True,
    )
    assert process.stdout is not None
    status: int | str = f"none after {timeout:g} s"
    try:
        with process.stdout as output, selectors.DefaultSelector() as ready:
            ready.register(output, selectors.EVENT_READ)
            while True:
                if not ready.select(timeout):
                    raise _error(f"its command wrote nothing for {timeout:g} s", shard)
                chunk = os.read(output.fileno(), _CHUNK)
                if not chunk:
                    break
                yield chunk
        with suppress(subprocess.TimeoutExpired):
            status = process.wait(timeout)
        if status != 0:
            raise _error(f"its command ended with exit code {status}: run it by hand to see why", shard)
    finally:  # no process of it outlives its stream, even where the shell itself has ended
        with suppress(ProcessLookupError, PermissionError):  # none is left; macOS says it in the second way
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
