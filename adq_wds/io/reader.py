"""How does a sample come out of its shard by offset, fast, and without believing anything unchecked?

Only headers name a sample's fields, so those of its span are read each time, or once for a mapped file that stays as it
is (`adq_wds.io.layout`). The quick way knows one shape: plain headers whose names are the expected key and a field met
before. It verifies their checksums and sizes, and the payloads' crc32 where one is known. All that is not of this shape,
damaged or merely rare (PAX headers, long names), goes to the strict reader, and its answer, or error, is the one given.
"""

from __future__ import annotations

import mmap
import os
from contextlib import ExitStack, suppress
from zlib import adler32, crc32

from adq_wds.errors import ShardError, located, shorten
from adq_wds.io.layout import FileStamp, Group
from adq_wds.remote.fetch import Fetch
from adq_wds.sample import Sample
from adq_wds.shards import is_url
from adq_wds.tar import Span, open_shard, payload_crc32, read_sample, span_at

_MAX_FIELDS = 1000  # field names remembered: strangers choose them
_MAX_SUMS = 10_000
_AHEAD = 2 * mmap.PAGESIZE
_NEVER = 2**63


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

    def parse(
        self, data: mmap.mmap | bytes, offset: int, n_bytes: int, key: str, crc: int | None, *, moved: int = 0
    ) -> Sample:
        """The sample in a part of `data`: `__key__`, `__url__`, and each field's bytes.

        Args:
            data: what holds it; its slices are bytes.
            offset: of the part's first byte.
            n_bytes: its length.
            key: the key it must have.
            crc: the crc32 its payloads must have; None takes them as they are.
            moved: how much further on in the shard `data` begins; for messages.

        Raises:
            ShardError: the bytes there are not one whole sample with that key and crc32.
            SampleError: a member is named as WebDataset's own fields are.
        """
        known, sums = self._fields, self._sums
        sample: Sample = {"__key__": key, "__url__": self._url}
        prefix = key.encode() + b"."
        n_prefix = len(prefix)
        at, end = offset, offset + n_bytes
        found = 0
        try:
            if end > len(data):
                raise IndexError  # for the strict reader to say
            while at < end:
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
                if at > end:
                    break
                sample[field] = payload = data[start:stop]
                if crc is not None:
                    found = crc32(payload, found)
        except (KeyError, ValueError, IndexError):  # a new field, odd digits, the end of the file
            pass
        else:
            if at == end and (crc is None or found == crc):
                return sample
        return self._parse_strictly(data, offset, n_bytes, key, crc, moved)

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

    def _parse_strictly(
        self, whole: mmap.mmap | bytes, offset: int, n_bytes: int, key: str, crc: int | None, moved: int
    ) -> Sample:
        """`parse` by the reader that takes every form of tar and names what is wrong."""
        data = whole[offset : offset + n_bytes]
        ends = len(whole) + moved, offset + n_bytes + moved
        trouble = f"ends at byte {ends[0]}, but this sample at {ends[1]}: truncated"
        if len(data) == n_bytes:
            try:
                span = span_at(data, shard=self._name)
            except ShardError as error:
                trouble = "in its span, " + str(error).removeprefix(f"shard {self._name}, ")
            else:
                found = None if crc is None else payload_crc32(data, span)
                if span.key == key and found == crc:
                    self._remember(data, span)
                    return read_sample(data, span, url=self._url)
                trouble = f"bytes differ: found key {shorten(span.key)}"
                if crc is not None:
                    trouble += f" with crc32 {found:08x}, expected crc32 {crc:08x}"
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


class MappedShard(SpanReader):
    """One shard, memory-mapped until closed: a local tar, or what was fetched whole and unpacked.

    Args:
        url: see `SpanReader`; a path, or what `fetch` gets.
        name: see `SpanReader`.
        fields: see `SpanReader`.
        fetch: how a shard is got that is not a plain local tar.
        sparse: only a small part will be read: the kernel is to fetch that, and nothing around it.

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
        view = self._opened.enter_context(open_shard(url, shard=shown, fetch=fetch, sparse=sparse))
        assert isinstance(view.obj, mmap.mmap)
        self._data = view.obj  # whose slices are bytes at once
        self._stamp = stamp if stamp == _stamp(url) else None  # else it is not known whose
        self._ahead = _AHEAD if sparse and hasattr(mmap, "MADV_WILLNEED") else _NEVER

    def close(self) -> None:
        """Give the mapping back."""
        self._opened.close()

    def expect(self, offset: int) -> None:
        """Nothing: the file is here."""

    def read(self, offset: int, n_bytes: int, key: str, crc: int | None) -> Sample:
        """The sample of a span; see `SpanReader.parse`."""
        if n_bytes > self._ahead:  # asked for as a whole, not page by page
            page = offset - offset % mmap.PAGESIZE
            with suppress(OSError, ValueError):  # behind the end: parsing will say so
                self._data.madvise(mmap.MADV_WILLNEED, page, min(offset + n_bytes, len(self._data)) - page)
        return self.parse(self._data, offset, n_bytes, key, crc)

    def group(self, number: int, n_listed: int, start: int, stop: int) -> Group:
        """Some of its samples, for `Layouts`."""
        return Group(number, n_listed, self._data, self._stamp, start, stop)

    def cut(self, key: str, crc: int | None, fields: tuple[str, ...], cuts: tuple[int, ...]) -> Sample | None:
        """The sample that was laid out; None unless its payloads have the crc32.

        Args:
            key: its key.
            crc: over its payloads; never None where it was laid out.
            fields: their names.
            cuts: start and stop of each; there may be more, which mean nothing.
        """
        data = self._data
        if len(fields) == 2:  # an image and its label: in a loop it would take a quarter longer
            first, second = data[cuts[0] : cuts[1]], data[cuts[2] : cuts[3]]
            if crc32(second, crc32(first)) != crc:
                return None
            return {"__key__": key, "__url__": self._url, fields[0]: first, fields[1]: second}
        sample: Sample = {"__key__": key, "__url__": self._url}
        found, bounds = 0, iter(cuts)
        for field, start, stop in zip(fields, bounds, bounds, strict=False):
            sample[field] = payload = data[start:stop]
            found = crc32(payload, found)
        return sample if found == crc else None


def _stamp(path: str) -> FileStamp | None:
    """Which file is at a path, and of what size and date; None when it cannot be looked at."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
