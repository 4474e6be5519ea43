"""Defines what a library that reads URLs must offer (`Backend`), and what its answers are held against.

Servers are not trusted: an answer holds what was asked for and no byte more, comes at `LEAST_RATE` at least, is of one
version of the file (size, ETag), and is not packed (Content-Encoding). A redirect is followed to http and https URLs only;
another host is asked without the password of the URL.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


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
    """How servers are asked.

    Attributes:
        timeout: seconds without an answer after which a request has failed, > 0; an answer that comes at less than
            `LEAST_RATE` bytes a second from then on has failed too.
        storage_options: for the library that reads the URL: obstore's store configuration (``endpoint``,
            ``access_key_id``, ``skip_signature``, …) or fsspec's options; by default what it finds in the environment.
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
    """The server gives a file as a whole only."""


class Trouble(Exception):  # noqa: N818
    """Why a request failed, in words that hold nothing of the URL; `again` where another try may help."""

    def __init__(self, text: str, *, again: bool = False) -> None:
        super().__init__(text)
        self.again = again


class Answer:
    """Collects the bytes of one range, and refuses more of them than were asked for.

    Args:
        start: first byte asked for.
        end: behind the last.
    """

    def __init__(self, start: int, end: int) -> None:
        self._n_bytes = end - start
        self._chunks: list[bytes] = []
        self._n_left = self._n_bytes

    def add(self, chunk: bytes) -> None:
        """Take in the next bytes. Raises `Trouble`: more than asked for."""
        self._n_left -= len(chunk)
        if self._n_left < 0:
            raise Trouble(f"the server sends more than the {self._n_bytes:,} bytes asked for")
        self._chunks.append(chunk)

    def all(self) -> bytes:
        """The bytes that came, perhaps too few."""
        return b"".join(self._chunks)


class Version:
    """Which version of a file a server's answers are parts of: all of one, or it is an error."""

    def __init__(self) -> None:
        self._first: tuple[int | None, str | None] | None = None

    def see(self, size: int | None, tag: str | None) -> None:
        """Compare an answer's size of the whole file, and its strong ETag, with those of the first answer.

        Raises:
            Trouble: the file changed on the server.
        """
        tag = None if tag is None or tag.startswith("W/") else tag
        if self._first is None:
            self._first = size, tag
        for now, then in zip((size, tag), self._first, strict=True):
            if None not in (now, then) and now != then:
                raise Trouble(
                    "changed on the server while it was read (another size or ETag): start anew, and index or plan the "
                    "shard again if its samples are others"
                )


class Pace:
    """Whether an answer comes fast enough.

    Args:
        timeout: seconds that it may take to begin.

    Attributes:
        n_bytes: that came so far.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout, self._waited, self.n_bytes = timeout, 0.0, 0

    def limit(self, n_bytes: int) -> float:
        """Seconds in which so many bytes must have come."""
        return self._timeout + n_bytes / LEAST_RATE

    def timed(self, chunks: Iterator[T], n_bytes: Callable[[T], int]) -> Iterator[T]:
        """The chunks as they come; only waiting for them counts. Raises `Trouble`: too slow."""
        while True:
            start = time.monotonic()
            chunk = next(chunks, None)
            if chunk is None:
                return
            self._waited += time.monotonic() - start
            self.n_bytes += n_bytes(chunk)
            if self._waited > self.limit(self.n_bytes):
                raise self.trouble()
            yield chunk

    def trouble(self) -> Trouble:
        """The error of an answer that is too slow."""
        return Trouble(
            f"too slow: {self.n_bytes:,} bytes came in time (timeout= {self._timeout:g} s and {LEAST_RATE:,} bytes/s): "
            "the server stalls"
        )


class Backend(Protocol):
    """One URL as a library reads it. Any method may raise `Trouble`."""

    def stamp(self) -> Stamp:
        """Size, and date where it is known (else 0)."""
        ...

    def ranges(self, ranges: Sequence[Range]) -> list[bytes]:
        """The bytes of some ranges, asked for together. May raise `NoRanges`."""
        ...

    def chunks(self) -> Iterator[bytes]:
        """The whole, in order."""
        ...
