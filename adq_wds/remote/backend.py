"""Defines `Backend`, the interface to a library that reads and writes URLs, and checks servers' responses.

Servers are not trusted: a response must hold the requested bytes and no more, arrive at `LEAST_RATE` at least, be of
one version of the file (size, ETag), and not be packed (Content-Encoding). A redirect is followed to http and https
URLs only, and to another host without the password of the URL.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

TIMEOUT = 30.0

LEAST_RATE = 16 << 10
"""Bytes a second that an answer must bring on average, once `timeout` seconds have passed: n bytes come within
timeout + n / LEAST_RATE seconds, or not at all."""

N_AT_ONCE = 10
"""Ranges of one file that are asked for at one time."""

Stamp = dict[str, int]
"""Size and date of a shard's file: {"bytes", "mtime_ns"}."""

Range = tuple[int, int]
"""First byte, and the byte behind the last."""


@dataclass(frozen=True)
class Access:
    """Options for requests to servers.

    Attributes:
        timeout: seconds without a response after which a request fails, > 0; from then on a response slower than
            `LEAST_RATE` bytes a second fails too.
        storage_options: for the library that reads the URL: obstore's store configuration (``endpoint``,
            ``access_key_id``, ``skip_signature``, …) or fsspec's options; by default those of the environment.
    """

    timeout: float = TIMEOUT
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)  # may hold secrets

    def __post_init__(self) -> None:
        number = isinstance(self.timeout, int | float) and not isinstance(self.timeout, bool)
        if not number or not 0 < self.timeout < 1e6:
            raise ValueError(f"timeout must be a number of seconds > 0, got {self.timeout!r}")
        if not isinstance(self.storage_options, Mapping):
            kind = type(self.storage_options).__name__
            raise ValueError(f"storage_options must be a dict, got a {kind}")


class NoRanges(Exception):  # noqa: N818 - it says what is
    """The server does not serve ranges."""


class Trouble(Exception):  # noqa: N818
    """A failed request; the text holds nothing of the URL. `again`: a retry may help; `missing`: nothing is there."""

    def __init__(self, text: str, *, again: bool = False, missing: bool = False) -> None:
        super().__init__(text)
        self.again, self.missing = again, missing


def explain(
    error: BaseException, status: int | None = None, *, late: bool, unconnected: bool, broken: bool
) -> Trouble:
    """A library's error without its text, which may quote the URL. `broken`: the response broke off."""
    kind = type(error).__name__
    if isinstance(error, FileNotFoundError) or kind == "NotFoundError" or status == 404:
        return Trouble("not found (404): check its URL", missing=True)
    if status == 416:
        return Trouble("ends before the bytes asked for (416): truncated, or not the file that was indexed")
    refused = isinstance(error, PermissionError) or kind in ("PermissionDeniedError", "UnauthenticatedError")
    if refused or status in (401, 403):
        return Trouble(f"refused ({status or kind}): check credentials, or that the URL has not expired")
    if status is not None and status < 400:
        return Trouble(f"moved ({status}) to a place that is not read: give its new URL")
    if status is not None:
        return Trouble(f"the server fails ({status}): try again later", again=status >= 500)
    if late:
        return Trouble("no answer in time (timeout=): the server stalls")
    if unconnected:
        return Trouble("no connection: check host and port")
    return Trouble(f"the answer broke off ({kind})" if broken else f"cannot be read ({kind})", again=broken)


class Answer:
    """Collects the bytes of one range, and refuses more than were requested."""

    def __init__(self, byte_range: Range) -> None:
        self._n_bytes_wanted = byte_range[1] - byte_range[0]
        self._chunks: list[bytes] = []
        self.n_bytes = 0

    def add(self, chunk: bytes) -> None:
        """Add the next bytes. Raises `Trouble`: more than requested."""
        self.n_bytes += len(chunk)
        if self.n_bytes > self._n_bytes_wanted:
            raise Trouble(f"the server sends more than the {self._n_bytes_wanted:,} bytes asked for")
        self._chunks.append(chunk)

    def all(self) -> bytes:
        """The received bytes, perhaps too few."""
        return b"".join(self._chunks)


class Checks:
    """Checks that a server's responses for one URL are of one version of the file, and fast enough after `timeout`
    seconds."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._version: tuple[int | None, str | None] | None = None  # of the first response

    def version(self, size: int | None, tag: str | None) -> None:
        """Raise `Trouble` if the size of the whole file, or its strong ETag, differs from the first response."""
        tag = None if tag is None or tag.startswith("W/") else tag
        self._version = self._version or (size, tag)
        for now, then in zip((size, tag), self._version, strict=True):
            if None not in (now, then) and now != then:
                raise Trouble(
                    "changed on the server while it was read (another size or ETag): start anew, and index or plan the "
                    "shard again if its samples are others"
                )

    def limit(self, n_bytes: int) -> float:
        """Seconds within which so many bytes must arrive."""
        return self._timeout + n_bytes / LEAST_RATE

    def timed(self, chunks: Iterator[Any]) -> Iterator[bytes]:
        """The chunks as they arrive; only time spent waiting counts. Raises `Trouble`: too slow."""
        waited, n_bytes = 0.0, 0
        while True:
            start = time.monotonic()
            chunk = next(chunks, None)
            if chunk is None:
                return
            waited += time.monotonic() - start
            n_bytes += len(chunk)
            if waited > self.limit(n_bytes):
                raise self.too_slow(n_bytes)
            yield bytes(chunk)

    def too_slow(self, n_bytes: int) -> Trouble:
        """The error of a response with so many bytes in time."""
        return Trouble(
            f"too slow: {n_bytes:,} bytes came in time (timeout= {self._timeout:g} s and {LEAST_RATE:,} bytes/s): "
            "the server stalls"
        )


class Backend(Protocol):
    """One URL, read and written by a library. Any method may raise `Trouble`."""

    def stamp(self) -> Stamp:
        """Size, and date where it is known (else 0)."""

    def ranges(self, ranges: Sequence[Range]) -> list[bytes]:
        """The bytes of some ranges, requested together. May raise `NoRanges`."""

    def chunks(self) -> Iterator[bytes]:
        """The whole, in order."""

    def put(self, path: Path) -> None:
        """Write a local file there: whole, or not at all."""

    def remove(self) -> None:
        """Remove the file; one that is missing may be an error or not."""

    def names(self) -> list[str]:
        """The names of the files in the folder at the URL, not of those in folders below it; none if it is missing."""

    def is_folder(self) -> bool:
        """Whether there are files below the URL."""
