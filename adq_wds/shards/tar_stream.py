"""Checks the headers of a streamed tar against the limits, before a byte is stored."""

from __future__ import annotations

from adq_wds.errors import ShardError, shorten
from adq_wds.shards.tar_headers import (
    BLOCK,
    DEFAULT_LIMITS,
    FILES,
    PREFIXES,
    Limits,
    at_byte,
    number,
    pax_size,
    sum_fits,
)

_ZEROS = bytes(BLOCK)


class TarWatch:
    """Follows a tar's headers by their sizes; `see` takes its bytes in order, cut anywhere.

    It refuses streams that must not be stored: no tar, a bad checksum, a size beyond the limits, data or too many
    zeros behind the end. `iter_spans` later checks members and completeness.

    Args:
        shard: its name, for messages.
        limits: as for a tar in a file.

    Attributes:
        n_bytes: bytes seen.
    """

    def __init__(self, *, shard: str, limits: Limits = DEFAULT_LIMITS) -> None:
        self._shard, self._limits = shard, limits
        self.n_bytes = 0
        self._next = 0  # where the next bytes to look at begin
        self._header, self._want = b"", BLOCK  # bytes of it so far, and how many are wanted
        self._pax = False  # whether they are a PAX header's records
        self._size: int | None = None  # of the next member, as these say
        self._end: int | None = None  # where the end-of-archive marker begins

    def see(self, data: bytes) -> None:
        """Check the next bytes.

        Raises:
            ShardError: see the class; with the offset.
        """
        start = self.n_bytes
        self.n_bytes += len(data)
        done = max(0, self._next - start)
        while self._end is None and done < len(data):
            piece = data[done : done + self._want - len(self._header)]
            self._header += piece
            done += len(piece)
            if len(self._header) < self._want:
                break
            header, self._header = self._header, b""
            position = start + done - len(header)
            try:
                done += self._skip(header, position)
            except ValueError as error:
                raise at_byte(self._shard, position, str(error)) from None
        self._next = start + done
        if self._end is not None:
            self._see_tail(data[done:])

    def _skip(self, header: bytes, position: int) -> int:
        """Bytes from here to the next header. Raises ValueError."""
        padding = -len(header) % BLOCK
        if self._pax:
            self._pax, self._want = False, BLOCK
            self._size = pax_size(header)
            return padding
        if header == _ZEROS:
            self._end = position
            return 0
        if not sum_fits(header):
            what = f"not a tar file (starts with {shorten(header[:16])})" if position == 0 else "bad header"
            raise ValueError(f"{what}: checksum does not match; write or fetch the shard again")
        size = number(header[124:136])
        kind = header[156]
        if kind in PREFIXES:
            which = "name_bytes" if kind in b"LK" else "pax_bytes"
            self._check(size, which)
            if kind in b"xX" and size:
                self._pax, self._want = True, size
                return 0
            return size + -size % BLOCK
        if self._size is not None:
            size, self._size = self._size, None
        self._check(size, "member_bytes")
        return size + -size % BLOCK if kind in FILES else 0

    def _check(self, size: int, which: str) -> None:
        limit = getattr(self._limits, which)
        if size > limit:
            raise ValueError(f"declares {size} bytes, more than Limits.{which} ({limit})")

    def _see_tail(self, data: bytes) -> None:
        assert self._end is not None
        left = self.n_bytes - self._end
        if data.count(0) != len(data):
            text = "data after the end-of-archive marker (a zeroed header, or concatenated tars): samples would be lost"
        elif left > self._limits.padding_bytes + BLOCK:
            text = (
                f"more than Limits.padding_bytes ({self._limits.padding_bytes}) after the end of the archive"
            )
        else:
            return
        raise self._fault(text)

    def _fault(self, text: str) -> ShardError:
        assert self._end is not None
        return at_byte(self._shard, self._end, f"{text}; write or fetch the shard again")
