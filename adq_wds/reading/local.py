"""Reads one sample from the bytes of its span, verified by headers or crc32.

Three methods are tried in turn; where one does not apply, the next decides, and the last gives the result or error.

1. A table that lists each member's field and size says where the payloads lie, and the crc32 of all bytes of the sample, of
   its headers and padding too. Where the bytes have it, they are those that were walked, and no header is parsed.
2. Plain headers are read one by one: each one's checksum, size and key are verified, and the crc32 where one is known.
3. The strict reader of `adq_wds.shards` takes every form of tar, and says what is wrong.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from functools import lru_cache
from zlib import adler32, crc32

from adq_wds.errors import ShardError, located
from adq_wds.reading.places import Place
from adq_wds.remote.fetch import Fetch
from adq_wds.remote.open_shard import open_shard
from adq_wds.samples.fields import Sample
from adq_wds.shards.names import is_url
from adq_wds.shards.samples_in_tar import WrongSample, expected_span, read_sample
from adq_wds.shards.tar_headers import BLOCK


class WrongBytes(ShardError):  # noqa: N818 - it says what is
    """The bytes at a place are not the expected sample."""


class SpanReader:
    """Reads samples of one shard from bytes, wherever these came from.

    Args:
        url: the shard as the user wrote it, the samples' `__url__`.
        name: its name, for messages.
    """

    def __init__(self, url: str, name: str) -> None:
        self._url, self._name = url, name

    def parse(self, data: bytes, place: Place) -> Sample:
        """The sample in its span: `__key__`, `__url__`, and each field's bytes.

        Args:
            data: the span's bytes, fewer where the shard ends early.
            place: their offset, and the expected sample.

        Raises:
            ShardError: the bytes there are not one whole sample with that key and crc32.
            SampleError: a member has the name of one of WebDataset's own fields.
        """
        _, offset, n_bytes, key, crc, fields, cuts, span_crc32 = place
        if fields is not None and crc32(data) == span_crc32 and len(data) == n_bytes:
            sample: Sample = {"__key__": key, "__url__": self._url}
            i = 0
            for field in fields:
                sample[field] = data[cuts[i] : cuts[i + 1]]
                i += 2
            return sample
        if len(data) != n_bytes:
            where = f"at byte {offset + len(data)}" if data else f"before byte {offset}"
            raise self._wrong(f"ends {where}, but this sample at {offset + n_bytes}: truncated", key)
        return self._read_headers(data, key, crc) or self._read_strictly(data, key, crc)

    def _read_headers(self, data: bytes, key: str, crc: int | None) -> Sample | None:
        """The sample, if all headers are plain and of this key, and the payloads have the crc32."""
        sample: Sample = {"__key__": key, "__url__": self._url}
        prefix = key.encode() + b"."
        n_prefix, n_bytes = len(prefix), len(data)
        start = total = 0
        while start < n_bytes:
            head = data[start : start + BLOCK]
            field, digits = _plain_field(head[n_prefix:100].rstrip(b"\0")), head[124:135]
            start += BLOCK
            if (
                start > n_bytes
                or field is None
                or field in sample
                or not head.startswith(prefix)
                or adler32(head) & 0xFFFF != _header_sum(head[148:157])
                or head[345]  # more of the name
                or head[135] not in b"\0 "
                or digits.strip(b"01234567")
            ):
                return None
            stop = start + int(digits, 8)
            payload, start = data[start:stop], stop + -stop % BLOCK
            sample[field] = payload
            if crc is not None:
                total = crc32(payload, total)
        return sample if start == n_bytes and (crc is None or total == crc) else None

    def _read_strictly(self, data: bytes, key: str, crc: int | None) -> Sample:
        """`parse` by the reader that takes every form of tar and names what is wrong."""
        try:
            span = expected_span(data, shard=self._name, key=key, crc32=crc)
        except WrongSample as error:
            raise self._wrong(str(error), key) from error
        return read_sample(data, span, url=self._url)

    def _wrong(self, trouble: str, key: str) -> ShardError:
        text = f"{trouble}; the shard is damaged, or changed since it was indexed or planned: do that again"
        return located(WrongBytes(text), shard=self._name, key=key)


@lru_cache(maxsize=1000)
def _plain_field(raw: bytes) -> str | None:
    """The field behind the key and its dot in a header; None for a header that only the strict reader can judge."""
    try:
        field = raw.decode().lower()
    except UnicodeDecodeError:
        return None
    return None if field.startswith("__") or set(field) & {"/", "\0"} else field


@lru_cache(maxsize=10_000)
def _header_sum(stored: bytes) -> int:
    """The low half of a whole header's adler32, from its stored checksum and type: -1 unless a usual plain file's.

    That half is 1 + the sum of all bytes, mod 65521; the stored sum counts its own 8 bytes as spaces.
    """
    digits = stored[:6]
    if not digits.isdigit() or digits.strip(b"01234567") or stored[6:] not in (b"\0 0", b"\0 \0"):
        return -1
    return (1 + int(digits, 8) - 8 * 32 + sum(stored[:8])) % 65521


class LocalShard(SpanReader):
    """One shard in an open file: a local tar, or what was fetched whole and unpacked.

    Args:
        url: see `SpanReader`; a path, or what `fetch` gets.
        name: see `SpanReader`.
        fetch: fetches shards that are no plain local tars.
        sparse: a small part will be read; see `ShardFile`.

    Raises:
        ShardError: missing, unreadable, empty, no regular file, or not to be unpacked.
    """

    def __init__(self, url: str, name: str, *, fetch: Fetch | None = None, sparse: bool = False) -> None:
        super().__init__(url, name)
        self._opened = ExitStack()
        shown = name if is_url(url) else None  # a path says more
        self._file = self._opened.enter_context(open_shard(url, shard=shown, fetch=fetch, sparse=sparse))
        self._fd, self._n_bytes = self._file.fd, self._file.n_bytes

    def close(self) -> None:
        """Close the file."""
        self._opened.close()

    def expect(self, offset: int) -> None:
        """Does nothing: the file is local."""

    def read_sample(self, place: Place) -> Sample:
        """The sample at a place; see `SpanReader.parse`."""
        offset, n_bytes = place[1], place[2]
        try:  # before the slower `read_some`, which names what is wrong
            data = os.pread(self._fd, n_bytes, offset) if offset + n_bytes <= self._n_bytes else b""
        except OSError:
            data = b""
        if len(data) != n_bytes:
            data = self._file.read_some(offset, n_bytes, key=place[3])
        return self.parse(data, place)

    def read_neighbours(self, places: Sequence[Place]) -> list[Sample]:
        """The samples at places that follow each other without a gap, by one read; see `SpanReader.parse`."""
        start = places[0][1]
        n_bytes = places[-1][1] + places[-1][2] - start
        with suppress(OSError):
            data = os.pread(self._fd, n_bytes, start)
            if len(data) == n_bytes:
                return [self.parse(data[p[1] - start : p[1] + p[2] - start], p) for p in places]
        return [self.read_sample(place) for place in places]  # one of which says what is wrong
