"""How does a sample come out of its shard by offset, fast, and without believing anything unchecked?

Only headers name a sample's fields, so those of its span are read each time, or once for a local file that stays as it
is (`adq_wds.reading.local_many`). The quick way knows one shape: plain headers whose names are the expected key and a field met
before. It verifies their checksums and sizes, and the payloads' crc32 where one is known. All that is not of this shape,
damaged or merely rare (PAX headers, long names), goes to the strict reader, and its answer, or error, is the one given.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from zlib import adler32, crc32

from adq_wds.errors import ShardError, located
from adq_wds.reading.local_many import FileStamp
from adq_wds.remote.fetch import Fetch
from adq_wds.remote.open_shard import open_shard
from adq_wds.samples.fields import Sample
from adq_wds.shards.names import is_url
from adq_wds.shards.samples_in_tar import Span, WrongSample, expected_span, read_sample

_MAX_FIELDS = 1000  # field names remembered: strangers choose them
_MAX_SUMS = 10_000


class WrongBytes(ShardError):  # noqa: N818 - it says what is
    """The bytes at a place are not the sample that should be there."""


class SpanReader:
    """Reads samples of one shard from bytes, wherever these came from.

    Args:
        url: the shard as the user wrote it, the samples' `__url__`.
        name: its name, for messages.
        fields: a header's bytes → field, filled here; the shards of a stream share one.
    """

    def __init__(self, url: str, name: str, fields: dict[bytes, str] | None = None) -> None:
        self._url, self._name = url, name
        self._fields: dict[bytes, str] = {} if fields is None else fields
        self._sums: dict[bytes, int] = {}

    def parse(self, data: bytes, offset: int, n_bytes: int, key: str, crc: int | None) -> Sample:
        """The sample in its span: `__key__`, `__url__`, and each field's bytes.

        Args:
            data: the span's bytes, fewer where the shard ends before it does.
            offset: of the span's first byte in the shard; for messages.
            n_bytes: the span's length.
            key: the key it must have.
            crc: the crc32 its payloads must have; None takes them as they are.

        Raises:
            ShardError: the bytes there are not one whole sample with that key and crc32.
            SampleError: a member is named as WebDataset's own fields are.
        """
        known, sums = self._fields, self._sums
        sample: Sample = {"__key__": key, "__url__": self._url}
        prefix = key.encode() + b"."
        n_prefix = len(prefix)
        at = found = 0
        try:
            if len(data) != n_bytes:
                raise IndexError  # for the strict reader to say
            while at < n_bytes:
                head = data[at : at + 512]
                field = known[head[n_prefix:100].rstrip(b"\0")]
                start, size = at + 512, head[124:135]
                if (
                    not head.startswith(prefix)
                    or adler32(head) & 0xFFFF != (sums.get(head[148:157]) or self._sum(head[148:157]))
                    or head[345]  # more of the name
                    or head[135] not in b"\0 "
                    or not size.isdigit()
                    or field in sample
                ):
                    break
                stop = start + int(size, 8)
                at = stop + -stop % 512
                if at > n_bytes:
                    break
                sample[field] = payload = data[start:stop]
                if crc is not None:
                    found = crc32(payload, found)
        except (KeyError, ValueError, IndexError):  # a new field, odd digits, the end of the file
            pass
        else:
            if at == n_bytes and (crc is None or found == crc):
                return sample
        return self._parse_strictly(data, offset, n_bytes, key, crc)

    def _sum(self, stored: bytes) -> int:
        """The low half of a whole header's adler32, from its stored checksum and type: -1 unless a usual plain file's.

        That half is 1 + the sum of all bytes, mod 65521; the stored sum counts its own 8 bytes as spaces.
        """
        digits = stored[:6]
        if not digits.isdigit() or stored[6:] not in (b"\0 0", b"\0 \0"):
            return -1
        low = (1 + int(digits, 8) - 8 * 32 + sum(stored[:8])) % 65521
        if len(self._sums) < _MAX_SUMS:
            self._sums[stored] = low
        return low

    def _parse_strictly(self, data: bytes, offset: int, n_bytes: int, key: str, crc: int | None) -> Sample:
        """`parse` by the reader that takes every form of tar and names what is wrong."""
        if len(data) == n_bytes:
            try:
                span = expected_span(data, shard=self._name, key=key, crc32=crc)
            except WrongSample as error:
                trouble = str(error)
            else:
                self._remember(data, span)
                return read_sample(data, span, url=self._url)
        else:
            where = f"at byte {offset + len(data)}" if data else f"before byte {offset}"
            trouble = f"ends {where}, but this sample at {offset + n_bytes}: truncated"
        text = f"{trouble}; the shard is damaged, or changed since it was indexed or planned: do that again"
        raise located(WrongBytes(text), shard=self._name, key=key)

    def _remember(self, data: bytes, span: Span) -> None:
        """Know this sample's fields from now on, but not those that need a strict look each time."""
        n_prefix = len(span.key.encode()) + 1
        for member in span.members:
            raw = data[member.offset - 512 + n_prefix : member.offset - 412].partition(b"\0")[0]
            plain = not member.field.startswith("__") and b"/" not in raw
            if plain and raw.lower() == member.field.encode() and len(self._fields) < _MAX_FIELDS:
                self._fields[raw] = member.field


class LocalShard(SpanReader):
    """One shard in an open file: a local tar, or what was fetched whole and unpacked.

    Args:
        url: see `SpanReader`; a path, or what `fetch` gets.
        name: see `SpanReader`.
        fields: see `SpanReader`.
        fetch: how a shard is got that is not a plain local tar.
        sparse: a small part will be read; see `ShardFile`.

    Attributes:
        stamp: the file's; None when it is not known.

    Raises:
        ShardError: missing, unreadable, empty, no regular file, or not to be unpacked.
    """

    def __init__(
        self,
        url: str,
        name: str,
        fields: dict[bytes, str] | None = None,
        *,
        fetch: Fetch | None = None,
        sparse: bool = False,
    ) -> None:
        super().__init__(url, name, fields)
        self._opened = ExitStack()
        shown = name if is_url(url) else None  # a path says more
        stamp = _stamp(url)
        self._file = self._opened.enter_context(open_shard(url, shard=shown, fetch=fetch, sparse=sparse))
        self.stamp = stamp if stamp == _stamp(url) else None  # else it is not known whose

    def close(self) -> None:
        """Close the file."""
        self._opened.close()

    def expect(self, offset: int) -> None:
        """Nothing: the file is here."""

    def read(self, offset: int, n_bytes: int, key: str, crc: int | None) -> Sample:
        """The sample of a span; see `SpanReader.parse`."""
        return self.parse(self._file.read_some(offset, n_bytes, key=key), offset, n_bytes, key, crc)

    def read_spans(self, offsets: Sequence[int], sizes: Sequence[int]) -> list[bytes | None]:
        """The bytes of some spans, for `Layouts`; see `ShardFile.read_spans`."""
        return self._file.read_spans(offsets, sizes)


def _stamp(path: str) -> FileStamp | None:
    """Which file is at a path, and of what size and date; None when it cannot be looked at."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
