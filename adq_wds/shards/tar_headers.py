"""Walks the headers of a tar file, verifies them, and gives its members.

v7, ustar, GNU and PAX headers, with long names, PAX sizes and base-256 sizes. Sizes are checked before anything
is read or skipped; every header's checksum is verified before its member is given out. Links, devices, fifos,
sparse files and unknown types are refused. `samples_in_tar.py` groups the members into samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from adq_wds.errors import ShardError, shorten

BLOCK = 512


class View(Protocol):
    """A tar's bytes: a memoryview of format 'B', a `ShardFile`, or a part whose payloads are not there."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> bytes | memoryview: ...


_ZEROS = bytes(BLOCK)
_BATCH = 4096  # headers whose checksums are verified together: 2 MiB
_AHEAD = 256 << 10  # bytes of a file that are read for the headers in them
_APART = 4096  # and where payloads are large, so that few headers would be in them
_LARGE = 16 << 10
FILES = b"0\x007"
PREFIXES = b"xXLKg"
_KINDS = {"1": "hard link", "2": "symbolic link", "3": "character device", "4": "block device", "6": "fifo",
          "S": "sparse file"}  # fmt: skip
_GLOBAL = "(global PAX header)"  # no dot: ignored and counted like any name without extension


@dataclass(frozen=True)
class Limits:
    """Limits for an untrusted tar. All are checked before memory is allocated or bytes are skipped.

    Attributes:
        member_bytes: one payload; 4 GiB, so that one read of one field cannot take the machine's memory.
        name_bytes: a name kept outside its header (PAX, GNU); 4096 is PATH_MAX on Linux.
        sample_members: members of one sample; more means that the keys are not what they seem.
        pax_bytes: one PAX header; 1 MiB, where real ones hold a few hundred bytes.
        padding_bytes: zeros after the end; 1 MiB is GNU tar's largest record (`-b 2048`).
    """

    member_bytes: int = 1 << 32
    name_bytes: int = 4096
    sample_members: int = 1000
    pax_bytes: int = 1 << 20
    padding_bytes: int = 1 << 20


DEFAULT_LIMITS = Limits()


class Entry(NamedTuple):
    """One file, or one directory (its name ends with '/').

    `start` is its first header block, long-name and PAX blocks included; its payload is
    `view[payload : payload + n_bytes]`.
    """

    start: int
    name: str
    payload: int
    n_bytes: int


def iter_entries(view: View, *, shard: str, limits: Limits, marked: bool) -> Iterator[Entry]:
    """Every entry in tar order, each given out only when the checksums of its headers have been verified.

    Checksums are verified a batch at a time, for speed. A damaged size can misdirect the walk meanwhile, but only
    inside the view, and the earlier bad checksum is then reported.

    Args:
        view: the bytes.
        marked: True: an end-of-archive marker must follow; False: the bytes end with the last payload's block.

    Raises:
        ShardError: what `adq_wds.shards.samples_in_tar.iter_spans` lists, except for fields and keys.
    """
    heads: list[tuple[int, bytes]] = []
    walk = _walk(view, heads, shard=shard, limits=limits, marked=marked)
    fault: ShardError | None = None
    more = True
    while more:
        batch = []
        more = False
        try:
            for entry in walk:
                batch.append(entry)
                if len(heads) >= _BATCH:
                    more = True
                    break
        except ShardError as error:
            fault = error
        bad = _first_bad_sum([head for _, head in heads])
        if bad is not None:
            position, head = heads[bad]
            batch = [entry for entry in batch if entry.payload <= position]
            what = f"not a tar file (starts with {shorten(head[:16])})" if position == 0 else "bad header"
            fault = at_byte(
                shard, position, f"{what}: checksum does not match; write or fetch the shard again"
            )
        heads.clear()
        yield from batch
        if fault is not None:
            raise fault


def _first_bad_sum(heads: list[bytes]) -> int | None:
    """Index of the first header block whose checksum is wrong."""
    if len(heads) < 8:
        return next((i for i, head in enumerate(heads) if not sum_fits(head)), None)
    blocks = np.frombuffer(b"".join(heads), dtype=np.uint8).reshape(-1, BLOCK)  # (n, 512)
    field = blocks[:, 148:156]  # counted as eight spaces
    sums = blocks.sum(axis=1, dtype=np.uint32) - field.sum(axis=1, dtype=np.uint32) + 8 * 32  # (n,)
    digits = (sums[:, None] >> np.arange(15, -1, -3, dtype=np.uint32)) & 7  # (n, 6)
    usual = (field[:, :6] == digits + ord("0")).all(axis=1) & (field[:, 6] == 0)
    return next((int(i) for i in np.flatnonzero(~usual) if not sum_fits(heads[i])), None)


def sum_fits(head: bytes) -> bool:
    """Whether the stored checksum is that of the block, its bytes taken as unsigned or (old writers) signed."""
    try:
        stored = number(head[148:156])
    except ValueError:
        return False
    rest = head[:148] + b" " * 8 + head[156:]
    return stored == sum(rest) or stored == int(np.frombuffer(rest, dtype=np.int8).sum(dtype=np.int64))


def _walk(
    view: View, heads: list[tuple[int, bytes]], *, shard: str, limits: Limits, marked: bool
) -> Iterator[Entry]:
    """Every entry in tar order; each header is appended to `heads` before it is parsed, for the caller to verify."""
    total, position, limit = len(view), 0, limits.member_bytes
    prefix: _Prefix | None = None
    ahead, start, size = b"", 0, 0  # bytes read ahead, where they start, and the size of the last payload
    while marked or position < total:
        head = ahead[position - start : position - start + BLOCK]
        if len(head) < BLOCK:
            ahead, start = bytes(view[position : position + (_AHEAD if size < _LARGE else _APART)]), position
            head = ahead[:BLOCK]
        if len(head) < BLOCK:
            raise at_byte(shard, total, "truncated: no end-of-archive marker; write or fetch the shard again")
        if head == _ZEROS and prefix is None:
            _check_tail(view, position, shard=shard, limits=limits, marked=marked)
            return
        heads.append((position, head))
        payload = position + BLOCK
        try:
            if head[156] in PREFIXES:
                prefix = prefix or _Prefix(position)
                end = prefix.parse(view, head, payload, limits)
                if head[156] == ord("g"):
                    yield Entry(position, _GLOBAL, payload, end - payload)
                    prefix = None
                position = end
                continue
            name = _header_name(head) if prefix is None or prefix.name is None else prefix.name
            digits = head[124:135]
            usual = head[135] in b" \0" and not digits.strip(b"01234567")
            size = int(digits, 8) if usual else number(head[124:136])
            if prefix is not None and prefix.size is not None:
                size = prefix.size
            if head[156] not in FILES:
                _check_directory(head[156:157], name)
                name += "/"
            if name[-1:] == "/" and size:  # tools disagree on whether data follow such a header
                raise ValueError(
                    f"directory {shorten(name)} declares {size} bytes: pack the shard without it"
                )
            end = payload + size + -size % BLOCK
            if size > limit or end > total:
                text = _too_long(size, limit, "member_bytes", total - payload)
                raise ValueError(f"member {shorten(name)} {text}")
        except ValueError as error:
            raise at_byte(shard, position, str(error)) from None
        yield Entry(position if prefix is None else prefix.start, name, payload, size)
        prefix = None
        position = end
    if prefix is not None:
        raise at_byte(shard, total, "a long-name or PAX header without its member")


@dataclass(slots=True)
class _Prefix:
    """The long-name and PAX headers in front of a member."""

    start: int
    name: str | None = None
    size: int | None = None
    kinds: bytes = b""

    def parse(self, view: View, head: bytes, payload: int, limits: Limits) -> int:
        """Parse one prefix header; returns where the next header starts. Raises ValueError."""
        kind = head[156:157]
        if kind in self.kinds or (kind == b"g" and self.kinds):
            raise ValueError(f"prefix headers {(self.kinds + kind)!r} in front of one member: write it again")
        self.kinds += kind
        which = "name_bytes" if kind in b"LK" else "pax_bytes"
        size, left = number(head[124:136]), len(view) - payload
        if size > getattr(limits, which) or size + -size % BLOCK > left:
            what = f"{kind.decode()!r} header (long name or PAX)"
            raise ValueError(f"{what} {_too_long(size, getattr(limits, which), which, left)}")
        body = bytes(view[payload : payload + size])
        if kind == b"L":
            self._set_name(body.partition(b"\0")[0], limits)
        elif kind != b"K":
            self._take_records(_pax_records(body), kind, limits)
        return payload + size + -size % BLOCK

    def _take_records(self, records: dict[bytes, bytes], kind: bytes, limits: Limits) -> None:
        if any(key.startswith(b"GNU.sparse.") for key in records):
            raise ValueError("sparse file (PAX GNU.sparse): only plain files are read; pack without --sparse")
        if kind == b"g" and (b"path" in records or b"size" in records):
            raise ValueError("global PAX header sets path or size for every member: write the shard again")
        if b"path" in records:
            self._set_name(records[b"path"], limits)
        if b"size" in records:
            self.size = _decimal(records[b"size"])

    def _set_name(self, name: bytes, limits: Limits) -> None:
        if self.name is not None:
            raise ValueError(f"two long names for one member: {shorten(self.name)} and {shorten(name)}")
        if len(name) > limits.name_bytes or b"\0" in name:
            raise ValueError(f"name of {len(name)} bytes: longer than Limits.name_bytes, or with a NUL in it")
        self.name = _decoded(name)


def _pax_records(body: bytes) -> dict[bytes, bytes]:
    """Records `<length> <key>=<value>\\n`, the length counting all of its record.

    >>> _pax_records(b"12 path=a.b\\n")
    {b'path': b'a.b'}
    """
    records, start = {}, 0
    while start < len(body) and body[start] != 0:
        space = body.find(b" ", start, start + 20)
        end = start + int(body[start:space]) if space > 0 and body[start:space].isdigit() else 0
        key, equals, value = body[space + 1 : end - 1].partition(b"=")
        if not (body[end - 1 : end] == b"\n" and key and equals):
            raise ValueError(f"damaged PAX record {shorten(body[start : start + 40])}: fetch the shard again")
        records[key] = value
        start = end
    if body.count(0, start) != len(body) - start:
        raise ValueError("data behind the last PAX record: write or fetch the shard again")
    return records


def pax_size(body: bytes) -> int | None:
    """The size that a PAX header's records give the next member, where they do. Raises ValueError.

    >>> pax_size(b"12 path=a.b\\n13 size=1000\\n")
    1000
    """
    digits = _pax_records(body).get(b"size")
    return None if digits is None else _decimal(digits)


def _decimal(digits: bytes) -> int:
    if not digits.isdigit() or len(digits) > 20:
        raise ValueError(f"PAX size {shorten(digits)}: expected a decimal number >= 0")
    return int(digits)


def _header_name(head: bytes) -> str:
    """The name in a header block, with ustar's prefix field in front."""
    name = head[:100].partition(b"\0")[0]
    if head[345]:
        if head[257:263] != b"ustar\0":  # GNU puts times there, v7 nothing
            raise ValueError("a header with access times (tar --incremental): pack the shard without")
        name = head[345:500].partition(b"\0")[0] + b"/" + name
    return _decoded(name)


def _decoded(name: bytes) -> str:
    try:
        return name.decode()
    except UnicodeDecodeError:
        text = f"name {shorten(name)} is not UTF-8: rename the file and pack the shard again"
        raise ValueError(text) from None


def _check_directory(kind: bytes, name: str) -> None:
    """Refuse anything but plain files and directories, by kind and name."""
    if kind != b"5":
        letter = kind.decode("latin-1")
        what = _KINDS.get(letter, f"member of unknown type {letter!r}")
        raise ValueError(f"{what} {shorten(name)}: only plain files are read; pack the shard without it")


def number(field: bytes) -> int:
    """A header's number: octal digits, or GNU's base 256 when the first bit is set.

    >>> number(b"0000644\\0"), number(b"\\x80\\0\\0\\0\\0\\0\\0\\x02\\0\\0\\0\\0"), number(b"        ")
    (420, 8589934592, 0)
    """
    if field[0] & 0x80:
        if field[0] & 0x40:
            raise ValueError(f"negative number {field!r} in a header: write or fetch the shard again")
        return int.from_bytes(bytes([field[0] & 0x3F]) + field[1:], "big")
    text = field.partition(b"\0")[0].strip(b" ")
    if text.strip(b"01234567"):
        raise ValueError(f"number {text!r} in a header, expected octal digits: fetch the shard again")
    return int(text or b"0", 8)


def _check_tail(view: View, position: int, *, shard: str, limits: Limits, marked: bool) -> None:
    """From a block of zeros on there are only zeros, and not suspiciously many."""
    if not marked:
        raise at_byte(shard, position, "end-of-archive marker inside a span: index the shard again")
    left = len(view) - position
    tail = bytes(view[position : position + limits.padding_bytes])
    if tail.count(0) != len(tail):
        text = "data after the end-of-archive marker (a zeroed header, or concatenated tars): samples would be lost"
        raise at_byte(shard, position, f"{text}; write or fetch the shard again")
    if left > limits.padding_bytes:
        text = f"{left} bytes after the end of the archive, more than Limits.padding_bytes ({limits.padding_bytes})"
        raise at_byte(
            shard, position, f"{text}: a file that was never filled? write or fetch the shard again"
        )


def _too_long(size: int, limit: int, which: str, left: int) -> str:
    if size > limit:
        return f"declares {size} bytes, more than Limits.{which} ({limit})"
    return f"declares {size} bytes, but {left} are left: truncated; write or fetch the shard again"


def at_byte(shard: str, position: int, text: str) -> ShardError:
    return ShardError(f"shard {shard}, byte {position}: {text}")
