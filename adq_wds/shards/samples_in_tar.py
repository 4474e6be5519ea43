"""Locates the samples in the bytes of a tar file and reads them.

Samples are grouped as by webdataset 1.0.2; names that it silently loses or mixes are refused.
Sizes are checked from headers before anything is read or skipped, and every header's checksum is verified
before its sample is given out. No file is opened here.

The key is the member's name up to the first dot of its base name, folders kept; the field is the rest in
lower case. Outcome for each kind of name:

| names in one shard | outcome |
|---|---|
| `a.jpg a.cls a.jpg a.cls` (duplicate, adjacent) | `ShardError`: field twice (also `a.jpg a.JPG`) |
| `a.jpg b.jpg a.jpg` (duplicate, apart) | `ShardError`: key twice in a shard |
| `a.jpg b.jpg a.cls b.cls` (interleaved) | `ShardError`: key twice in a shard |
| `a.jpg` in two shards, or one shard scanned twice | fine: a scan knows one shard only |
| `a.v1.jpg a.v2.jpg` (dotted) | one sample `a` with fields `v1.jpg`, `v2.jpg` |
| `./a.jpg` | key `./a` |
| `README`, `a/README`, `` (no extension, empty), directories | ignored and counted |
| `._a.jpg`, `dir/.a.jpg` (leading dot) | ignored and counted (webdataset makes the second a sample `dir/`) |
| `__x__`, `__x__/a.jpg` (webdataset's metadata) | ignored and counted |
| `a.JPG` | field `jpg`; keys keep their case |
| `é` composed and decomposed (NFC, NFD) | two keys |
| not UTF-8 | `ShardError` |
| newline, other control characters | kept, `repr` in messages (webdataset loses files of `a.\\nb/`, we do not) |
| 20 MB name | `ShardError` from the header alone: `Limits.name_bytes` |
| `a.__bad__`, `a.__key__` (reserved) | `Span.problem`: `read_sample` raises `SampleError`, the shard goes on |
| `a.__adq_keep__` | a member of its span, dropped by `read_sample` |

`tar_headers.py` reads the headers in all common forms; links, devices, fifos, sparse files and unknown
types are refused. An archive ends with one block of 512 zeros or more (POSIX writes
two) and only zeros after it, at most `Limits.padding_bytes`: data behind the marker are samples that other
readers lose, and a long tail of zeros is a file that was never filled.

A tar alone does not reveal damage in payloads and long names, which have no checksum (compare `payload_crc32` and the
key with an index), nor a zeroed header of an empty last member, which looks like the end (compare the count with an
index).
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from adq_wds.errors import SampleError, ShardError, located, shorten
from adq_wds.shards.shard_file import ShardFile
from adq_wds.shards.tar_headers import BLOCK, DEFAULT_LIMITS, Entry, Limits, View, iter_entries

Buffer: TypeAlias = bytes | bytearray | memoryview | ShardFile
"""What holds a tar: bytes in memory, or a file that is read by offset."""

_META = re.compile(r"__[^/]*__($|/)")  # webdataset's `skip_meta`
_PIECE = 1 << 20  # bytes of a payload whose crc32 is taken at one time


@dataclass(frozen=True, slots=True)
class Member:
    """One field of a sample: its payload is `buffer[offset : offset + n_bytes]`."""

    field: str
    offset: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Span:
    """One sample: `buffer[byte_offset : byte_offset + n_bytes]` holds all its headers and padded payloads.

    `byte_offset` is the first header block of its first member, long-name blocks included. `problem` is the reason
    why the sample is unusable (the text of the `SampleError` that `read_sample` raises), or None.
    """

    key: str
    byte_offset: int
    n_bytes: int
    members: tuple[Member, ...]
    problem: str | None = None


@dataclass
class Ignored:
    """Members that belong to no sample, counted while a shard is scanned; complete after the last span.

    >>> ignored = Ignored()
    >>> ignored.add("README"); ignored.add("data/")
    >>> str(ignored)
    "2 members ignored: first 'README'"
    """

    n_members: int = 0
    first: str | None = None

    def add(self, name: str) -> None:
        if self.n_members == 0:
            self.first = name
        self.n_members += 1

    def __str__(self) -> str:
        if self.n_members == 0:
            return "no members ignored"
        return f"{self.n_members} member{'s' * (self.n_members > 1)} ignored: first {shorten(self.first)}"


def iter_spans(
    buffer: Buffer, *, shard: str, limits: Limits = DEFAULT_LIMITS, ignored: Ignored | None = None
) -> Iterator[Span]:
    """Every sample of a whole shard, in order; complete samples before damage are given before its error.

    Args:
        buffer: the bytes of the tar file.
        shard: its name, for messages.
        limits: what a header may declare.
        ignored: filled with the members that belong to no sample.

    Raises:
        ShardError: not a tar, damaged, truncated, data after the end, a limit exceeded, a member that is no
            plain file, a name that is not UTF-8, a field twice in a sample, a key twice in the shard.

    Source: webdataset 1.0.2 (`tariterators.py`) for keys and fields; POSIX pax and GNU tar for headers.

    >>> import io, tarfile
    >>> file = io.BytesIO()
    >>> with tarfile.open(fileobj=file, mode="w") as tar:
    ...     for name in ("a.jpg", "a.cls", "b.jpg"):
    ...         tar.addfile(tarfile.TarInfo(name))
    >>> for span in iter_spans(file.getvalue(), shard="x.tar"):
    ...     print(span.key, span.byte_offset, span.n_bytes, [member.field for member in span.members])
    a 0 1024 ['jpg', 'cls']
    b 1024 512 ['jpg']
    """
    view = _view(buffer)
    if len(view) == 0:
        raise ShardError(f"shard {shard}: empty file, expected a tar file: write or fetch it again")
    entries = iter_entries(view, shard=shard, limits=limits, marked=True)
    yield from group_entries(
        entries, shard=shard, limits=limits, ignored=Ignored() if ignored is None else ignored
    )


def span_at(data: Buffer, *, shard: str) -> Span:
    """The one sample in the bytes of its span, as read by offset; positions count from the start of `data`.

    Raises:
        ShardError: what `iter_spans` refuses, or the bytes are not exactly one sample: none, two, or more
            bytes in front of it or behind it (the shard is not the one that the offset was taken from).
    """
    view = _view(data)
    entries = iter_entries(view, shard=shard, limits=DEFAULT_LIMITS, marked=False)
    spans = list(group_entries(entries, shard=shard, limits=DEFAULT_LIMITS, ignored=Ignored()))
    if not spans or spans[0].n_bytes != len(view):
        keys = ", ".join(shorten(span.key) for span in spans[:3])
        raise ShardError(
            f"shard {shard}: a span of {len(view)} bytes holds {len(spans)} samples ({keys}), expected exactly "
            "one from end to end: the shard has changed since it was indexed; index it again"
        )
    return spans[0]


class WrongSample(ShardError):  # noqa: N818 - it says what is
    """Bytes that are not the expected sample. The text names neither the shard nor a remedy.

    Attributes:
        span: the sample in the bytes; None without one.
        crc32: of its payloads; None where none was expected.
    """

    span: Span | None = None
    crc32: int | None = None


def expected_span(data: Buffer, *, shard: str, key: str, crc32: int | None) -> Span:
    """The sample in the bytes of its span, as `span_at`, if it has the key and crc32 that a table lists.

    Args:
        data: the bytes of the span.
        shard: its name, for messages.
        key: the key it must have.
        crc32: of its payloads; None verifies nothing.

    Raises:
        WrongSample: it is another sample, or none.
    """
    try:
        span = span_at(data, shard=shard)
    except ShardError as error:
        text = str(error).removeprefix(f"shard {shard}").lstrip(":, ")
        raise WrongSample(f"in its span, {text}") from error
    crc = None if crc32 is None else payload_crc32(data, span)
    if span.key == key and crc == crc32:
        return span
    text = f"bytes differ: found key {shorten(span.key)}"
    if crc32 is not None:
        text += f" with crc32 {crc:08x}, expected crc32 {crc32:08x}"
    wrong = WrongSample(text)
    wrong.span, wrong.crc32 = span, crc
    raise wrong


def payload_crc32(buffer: Buffer, span: Span) -> int:
    """crc32 over the payloads of all members of a span, in tar order.

    Raises:
        ShardError: the file was cut short since it was scanned, or cannot be read.
        ValueError: the span ends behind the buffer, so it belongs to another one.
    """
    crc = 0
    for member in span.members:
        _check_inside(buffer, member)
        end = member.offset + member.n_bytes
        for start in range(member.offset, end, _PIECE):
            crc = zlib.crc32(_bytes_of(buffer, start, min(start + _PIECE, end), span.key), crc)
    return crc


def span_crc32(buffer: Buffer, span: Span) -> int:
    """crc32 over all bytes of a span, headers and padding included; raises as `payload_crc32`."""
    crc, stop = 0, span.byte_offset + span.n_bytes
    for start in range(span.byte_offset, stop, _PIECE):
        crc = zlib.crc32(_bytes_of(buffer, start, min(start + _PIECE, stop), span.key), crc)
    return crc


def read_sample(buffer: Buffer, span: Span, *, url: str) -> dict[str, Any]:
    """The sample as WebDataset gives it: `__key__`, `__url__`, and each field's bytes; `__adq_*` fields left out.

    Raises:
        SampleError: the span has a problem.
        ShardError: the file was cut short since it was scanned, or cannot be read.
        ValueError: the span ends behind the buffer, so it belongs to another one.
    """
    if span.problem is not None:
        raise SampleError(span.problem)
    sample: dict[str, Any] = {"__key__": span.key, "__url__": url}
    for member in span.members:
        if not member.field.startswith("__adq_"):
            _check_inside(buffer, member)
            sample[member.field] = _bytes_of(buffer, member.offset, member.offset + member.n_bytes, span.key)
    return sample


def _view(buffer: Buffer) -> View:
    return buffer if isinstance(buffer, ShardFile) else memoryview(buffer).cast("B")


def _check_inside(buffer: Buffer, member: Member) -> None:
    end = member.offset + member.n_bytes
    if end > len(buffer):
        raise ValueError(
            f"{member} ends at byte {end} of a buffer of {len(buffer)}: pass the bytes it was found in"
        )


def _bytes_of(buffer: Buffer, start: int, stop: int, key: str) -> bytes:
    """The bytes of a member."""
    if isinstance(buffer, ShardFile):
        return buffer.read_all(start, stop, key=key)
    return bytes(buffer[start:stop])


def split_name(name: str) -> tuple[str, str] | None:
    """(key, field) of a member's name; None when it belongs to no sample.

    >>> split_name("train/n01.v1.JPG"), split_name("train/README"), split_name("._a.jpg"), split_name("__x__/a.b")
    (('train/n01', 'v1.jpg'), None, None, None)
    """
    slash = name.rfind("/") + 1
    dot = name.find(".", slash)
    if dot <= slash or (name.startswith("__") and _META.match(name)):
        return None
    return name[:dot], name[dot + 1 :].lower()


def group_entries(
    entries: Iterable[Entry], *, shard: str, limits: Limits, ignored: Ignored
) -> Iterator[Span]:
    """Group neighbours with one key into samples, as `iter_spans`; the last sample only when the entries end without
    an error. Of each sample's first entry `start` counts, of the others only the payload."""
    seen: set[str] = set()
    key: str | None = None
    start = end = 0
    members: dict[str, Member] = {}
    for entry in entries:
        split = split_name(entry.name)
        if split is None:
            ignored.add(entry.name)
            continue
        if split[0] != key:
            if key is not None:
                yield _span(key, start, end, members, shard=shard)
            key, start, members = split[0], entry.start, {}
            if key in seen:
                text = (
                    f"key twice in a shard (again at byte {start}): the members of a sample must be adjacent and "
                    "keys unique; write the shard again with one key per sample, sorted: "
                    "tar --sort=name -cf NEW.tar FOLDER"
                )
                raise located(ShardError(text), shard=shard, key=key)
            seen.add(key)
        field = split[1]
        if field in members:
            text = (
                "field twice in a sample: two samples share a key, or names differ only in case; rename one"
            )
            raise located(ShardError(text), shard=shard, key=key, field=field)
        if len(members) == limits.sample_members:
            text = (
                f"more than {len(members)} members in one sample (Limits.sample_members): keys that differ?"
            )
            raise located(ShardError(text), shard=shard, key=key)
        members[field] = Member(field, entry.payload, entry.n_bytes)
        end = entry.payload + entry.n_bytes + -entry.n_bytes % BLOCK
    if key is not None:
        yield _span(key, start, end, members, shard=shard)


def _span(key: str, start: int, end: int, members: dict[str, Member], *, shard: str) -> Span:
    problem = None
    for field in members:
        if field.startswith("__") and not field.startswith("__adq_"):
            text = "reserved: WebDataset's own fields start with '__', and this one would hide or rename the sample"
            problem = str(located(SampleError(text), shard=shard, key=key, field=field))
    return Span(key, start, end - start, tuple(members.values()), problem)
