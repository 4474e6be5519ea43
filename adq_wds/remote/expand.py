"""How does a whole shard reach a local file when it comes as a stream: packed, from a command, or from a server?

The stream is unpacked as it comes, and its tar headers are looked at as they pass, with the limits of `tar_headers`: what
they declare is refused before it is written, and so is a stream that goes on behind the end of its archive, or that
unpacks to a thousand times its size. All else that a tar can be wrong in is found when the file is read.
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
    """Write a tar that comes in chunks, packed with gzip or not, to a file.

    Raises:
        ShardError: empty, damaged or truncated packing, a bomb, or a header that declares more than `limits` allow.
    """
    watch = TarWatch(shard=shard, limits=limits)
    for data in _unpacked(chunks, shard):
        watch.see(data)
        out.write(data)
    if not watch.n_bytes:
        raise located(ShardError("empty, expected a tar file: write or fetch it again"), shard=shard)


def _unpacked(chunks: Iterable[bytes], shard: str) -> Iterator[bytes]:
    """The stream itself; what gzip packed, unpacked, piece by piece."""
    stream = iter(chunks)
    first = b""
    while len(first) < len(GZIP) and (more := next(stream, None)) is not None:
        first += more
    if not first.startswith(GZIP):
        if first:
            yield first
        yield from stream
        return
    yield from _Gunzip(shard).all(first, stream)


class _Gunzip:
    """Unpacks one gzip stream, of one member or several."""

    def __init__(self, shard: str) -> None:
        self._shard = shard
        self._n_in = self._n_out = 0  # bytes
        self._idle = 0  # bytes in since the last that came out
        self._member = zlib.decompressobj(wbits=31)
        self._begun = False  # whether the member has

    def all(self, first: bytes, stream: Iterator[bytes]) -> Iterator[bytes]:
        for data in chain([first], stream):
            for at in range(0, len(data), _PIECE):
                yield from self._pieces(data[at : at + _PIECE])
        if self._begun and not self._member.eof:
            raise self._error("truncated: the gzip stream ends early; write or fetch the shard again")

    def _pieces(self, data: bytes) -> Iterator[bytes]:
        while data:
            if self._member.eof:
                self._member, self._begun = zlib.decompressobj(wbits=31), False
            out, rest = self._step(data)
            n_in = len(data) - len(rest)
            self._n_in += n_in
            self._n_out += len(out)
            self._idle = 0 if out else self._idle + n_in
            if self._n_out > _FREE + _RATIO * self._n_in or self._idle > _IDLE:
                text = f"{self._n_in:,} bytes unpack to {self._n_out:,}, as no packed shard does: refused"
                raise self._error(f"{text}; unpack it yourself if you trust it")
            if out:
                yield out
            data = rest

    def _step(self, data: bytes) -> tuple[bytes, bytes]:
        """Some unpacked bytes, and the packed ones that are left."""
        if not self._begun:  # zeros may follow a member
            rest = data.lstrip(b"\0")
            if rest != data:
                return b"", rest
            self._begun = True
        try:
            out = self._member.decompress(data, _CHUNK)
        except zlib.error:
            text = "damaged: not a valid gzip stream; write or fetch the shard again"
            raise self._error(text) from None
        return out, self._member.unused_data if self._member.eof else self._member.unconsumed_tail

    def _error(self, text: str) -> ShardError:
        return located(ShardError(text), shard=self._shard)


def chunks_of(file: BinaryIO) -> Generator[bytes, None, None]:
    """A file from where it stands."""
    while chunk := file.read(_CHUNK):
        yield chunk


def run_command(url: str, *, shard: str, timeout: float) -> Generator[bytes, None, None]:
    """What the command of a ``pipe:`` URL writes. Its text is never said: it may hold a token.

    Raises:
        ShardError: it fails, or writes nothing for `timeout` seconds.
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
    try:
        with selectors.DefaultSelector() as ready:
            ready.register(process.stdout, selectors.EVENT_READ)
            while True:
                if not ready.select(timeout):
                    text = f"its command wrote nothing for {timeout:g} s"
                    raise located(ShardError(text), shard=shard)
                chunk = os.read(process.stdout.fileno(), _CHUNK)
                if not chunk:
                    break
                yield chunk
        status = _status(process, timeout)
        if status != 0:
            text = f"its command ended with exit code {status}: run it by hand to see why"
            raise located(ShardError(text), shard=shard)
    finally:
        _end(process)


def _status(process: subprocess.Popen[bytes], timeout: float) -> int | str:
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        return f"none after {timeout:g} s"


def _end(process: subprocess.Popen[bytes]) -> None:
    """No process of the command outlives its stream, even where the shell itself has ended."""
    with suppress(ProcessLookupError, PermissionError):  # none is left; macOS says it in the second way
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert process.stdout is not None
    process.stdout.close()
