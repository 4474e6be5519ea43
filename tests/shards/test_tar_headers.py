"""Are tar headers read as their writers meant them, and lying ones refused before anything is read or skipped?"""

import os
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from adq_wds.errors import ShardError
from adq_wds.remote.open_shard import open_shard
from adq_wds.shards.samples_in_tar import Ignored, Span, iter_spans, span_at
from adq_wds.shards.tar_headers import Limits

END = bytes(1024)
NEGATIVE = b"\xff" * 12


def octal(n: int) -> bytes:
    return b"%011o\0" % n


def base_256(n: int) -> bytes:
    return b"\x80" + n.to_bytes(11, "big")


def header(
    name: bytes = b"a.jpg",
    size: bytes = octal(0),
    kind: bytes = b"0",
    *,
    magic: bytes = b"ustar\x0000",
    prefix: bytes = b"",
    checksum: bytes | None = None,
) -> bytes:
    """One header block, its checksum right unless given."""
    fixed = name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + size + octal(0)
    rest = kind + bytes(100) + magic.ljust(8, b"\0") + bytes(80) + prefix.ljust(155, b"\0") + bytes(12)
    if checksum is None:
        checksum = b"%06o\0 " % sum(fixed + b" " * 8 + rest)
    return fixed + checksum + rest


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def pax(records: bytes, kind: bytes = b"x") -> bytes:
    return header(b"PaxHeader", octal(len(records)), kind) + padded(records)


def record(key: bytes, value: bytes) -> bytes:
    body = b" " + key + b"=" + value + b"\n"
    length = len(body) + 1
    while len(b"%d" % length) + len(body) != length:
        length += 1
    return b"%d" % length + body


def long_name(name: bytes) -> bytes:
    return header(b"././@LongLink", octal(len(name) + 1), b"L", magic=b"ustar  ") + padded(name + b"\0")


def spans_of(data: bytes, **limits: int) -> list[Span]:
    return list(iter_spans(data, shard="s.tar", limits=Limits(**limits)))


@contextmanager
def quick_and_small() -> Iterator[None]:
    """Less than a second of the processor, and 64 MiB."""
    tracemalloc.start()
    begin = time.process_time()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
        assert time.process_time() - begin < 1
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("head", "key", "n_bytes"),
    [
        (header(b"a.x", octal(700), magic=b""), "a", 700),
        (header(b"a.x", octal(700), b"\0", magic=b""), "a", 700),
        (header(b"a.x", octal(700), b"7"), "a", 700),
        (header(b"a.x", octal(700), magic=b"ustar  "), "a", 700),
        (header(b"a.x", b"       1274 "), "a", 700),
        (header(b"a.x", b"000000001274"), "a", 700),
        (header(b"a.x", b"1274\0junk\0\0\0"), "a", 700),
        (header(b"a.x", base_256(700)), "a", 700),
        (header(b"a.x", octal(700), prefix=b"some/folder"), "some/folder/a", 700),
        (header(b"n" * 98 + b".x", octal(700), prefix=b"p" * 155), "p" * 155 + "/" + "n" * 98, 700),
        (long_name(b"l" * 300 + b".x") + header(b"l" * 100, octal(700)), "l" * 300, 700),
        (pax(record(b"path", b"p" * 300 + b".x")) + header(b"a.y", octal(700)), "p" * 300, 700),
        (pax(record(b"size", b"700") + record(b"mtime", b"1.5")) + header(b"a.x", octal(0)), "a", 700),
        (pax(record(b"path", b"b.x") + bytes(9)) + header(b"a.y", octal(700)), "b", 700),
        (long_name(b"l.x") + pax(record(b"size", b"700")) + header(b"a.y", octal(9)), "l", 700),
        (header(b"", octal(3), b"K") + padded(b"b\0") + header(b"a.x", octal(700)), "a", 700),
    ],
)
def test_a_header_of_any_writer_gives_name_and_payload(head: bytes, key: str, n_bytes: int) -> None:
    payload = os.urandom(n_bytes)
    data = head + padded(payload) + END
    (span,) = spans_of(data)
    assert (span.key, span.byte_offset, span.n_bytes) == (key, 0, len(data) - len(END))
    (member,) = span.members
    assert data[member.offset : member.offset + member.n_bytes] == payload
    assert span_at(data[: -len(END)], shard="s.tar") == span


def test_a_checksum_may_be_signed_and_written_in_any_width() -> None:
    name = "é.jpg".encode()
    plain = header(name)
    total = sum(plain[:148]) + 8 * 32 + sum(plain[156:])
    signed = total - 256 * sum(byte > 127 for byte in plain)
    for checksum in (b"%06o\0 " % signed, b"%07o\0" % total, b"%6o\0 " % total, b"%06o  " % total):
        for n_members in (1, 20):  # verified one by one, and together
            heads = b"".join(header(b"%d.jpg" % i) for i in range(n_members))
            assert len(spans_of(heads + header(name, checksum=checksum) + END)) == n_members + 1
    wrong = (b"%06o\0 " % (total + 1), b"%06o\0 " % (total - 256), bytes(8), b"00x123\0 ", b"%06o1 " % total)
    for checksum in wrong:
        for n_members in (1, 20):
            heads = b"".join(header(b"%d.jpg" % i) for i in range(n_members))
            with pytest.raises(ShardError, match=f"byte {len(heads)}: bad header: checksum does not match"):
                spans_of(heads + header(name, checksum=checksum) + END)


def test_a_global_header_is_ignored_even_inside_a_sample() -> None:
    extra = pax(record(b"comment", b"0123"), b"g")
    ignored = Ignored()
    data = extra + header(b"a.jpg") + extra + header(b"a.cls") + END
    (span,) = iter_spans(data, shard="s.tar", ignored=ignored)
    assert (span.byte_offset, span.n_bytes) == (1024, 2048)
    assert str(ignored) == "2 members ignored: first '(global PAX header)'"
    assert span_at(data[1024:3072], shard="s.tar").key == "a"


def test_directories_are_ignored_and_counted() -> None:
    ignored = Ignored()
    data = header(b"x.y", kind=b"5") + header(b"x.y/", kind=b"\0", magic=b"") + header(b"x.y/a.jpg") + END
    assert [span.key for span in iter_spans(data, shard="s.tar", ignored=ignored)] == ["x.y/a"]
    assert str(ignored) == "2 members ignored: first 'x.y/'"


BIG = record(b"size", b"%d" % (1 << 40))


@pytest.mark.parametrize(
    ("head", "text"),
    [
        (header(b"d.x", octal(5), b"5"), "directory 'd.x/' declares 5 bytes"),
        (header(b"d.x/", octal(5), b"\0"), "directory 'd.x/' declares 5 bytes"),
        (header(size=NEGATIVE), "negative number"),
        (header(size=b"-0000000001\0"), "number b'-0000000001' in a header, expected octal digits"),
        (header(size=b"00000000009\0"), "expected octal digits"),
        (header(size=b"0o000000_1 \0"), "expected octal digits"),
        (header(size=NEGATIVE, kind=b"x"), "negative number"),
        (pax(BIG) + header(), r"member 'a.jpg' declares 1099511627776 bytes, more than Limits.member_bytes"),
        (pax(record(b"size", b"9999")) + header(), "member 'a.jpg' declares 9999 bytes, but 1536 are left"),
        (pax(record(b"size", b"-1")) + header(), "PAX size b'-1': expected a decimal number"),
        (pax(record(b"size", b"9" * 30)) + header(), "PAX size"),
        (pax(record(b"GNU.sparse.major", b"1")) + header(), r"sparse file \(PAX GNU.sparse\)"),
        (pax(record(b"path", b"b.jpg"), b"g") + header(), "global PAX header sets path or size"),
        (pax(record(b"size", b"0"), b"g") + header(), "global PAX header sets path or size"),
        (header(b"Pax", octal(99999), b"x"), r"'x' header .* declares 99999 bytes, but 1536 are left"),
        (pax(b"3 path=b.jpg\n") + header(), "damaged PAX record"),
        (pax(b"99 path=b.jpg\n") + header(), "damaged PAX record b'99 path=b.jpg"),
        (pax(b"0 path=b.jpg\n") + header(), "damaged PAX record"),
        (pax(b"13 path=b.jpg") + header(), "damaged PAX record"),
        (pax(b"14 path b.jpg\n") + header(), "damaged PAX record"),
        (pax(b"path=b.jpg\n") + header(), "damaged PAX record"),
        (pax(record(b"a", b"b") + b"\0x") + header(), "data behind the last PAX record"),
        (pax(record(b"path", b"a\0.jpg")) + header(), "with a NUL in it"),
        (pax(record(b"path", b"\xff.jpg")) + header(), r"name b'\\xff.jpg' is not UTF-8"),
        (pax(record(b"path", b"p" * 4097)) + header(), "name of 4097 bytes: longer than Limits.name_bytes"),
        (long_name(b"b.x") + pax(record(b"path", b"c.x")) + header(), "two long names.*'b.x' and b'c.x'"),
        (long_name(b"b.jpg") * 2 + header(), "prefix headers b'LL' in front of one member"),
        (pax(record(b"a", b"b")) + pax(record(b"a", b"b"), b"g") + header(), "prefix headers b'xg'"),
        (header(magic=b"ustar  ", prefix=b"14000000000"), "access times"),
    ],
)
def test_a_lying_or_ambiguous_header_is_refused(head: bytes, text: str) -> None:
    text = f"shard s.tar, byte (512|1024|1536|2560): .*{text}"
    with quick_and_small(), pytest.raises(ShardError, match=text):
        spans_of(header(b"ok.jpg") + head + padded(b"12345") + END)


def test_a_sparse_file_as_long_as_declared_fails_by_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(header(b"a.jpg", base_256(5 << 30)))
    os.truncate(path, (5 << 30) + 2048)
    refused = pytest.raises(ShardError, match=r"more than Limits.member_bytes \(4294967296\)")
    with quick_and_small(), open_shard(path) as view, refused:
        list(iter_spans(view, shard="a.tar"))


def test_a_wrong_checksum_explains_the_walk_that_it_led_astray() -> None:
    good = header(b"a.jpg", octal(512)) + bytes(512)
    liar = bytearray(good)
    liar[124:136] = octal(3 << 29)  # another digit sum: checksums do not see digits change places
    for n_good in (0, 20):
        before = b"".join(header(b"%d.x" % i, octal(1)) + padded(b"x") for i in range(n_good))
        with pytest.raises(ShardError, match=f"byte {n_good * 1024}: .*checksum does not match"):
            spans_of(before + bytes(liar) + END)


def test_an_archive_ends_with_zeros_and_nothing_behind() -> None:
    body = header(b"a.jpg")
    for n_zeros in (512, 513, 1024, 10240, 1 << 20):
        assert len(spans_of(body + bytes(n_zeros))) == 1
    assert spans_of(END) == []
    for data, text in [
        (b"", "shard s.tar: empty file"),
        (body, "byte 512: truncated: no end-of-archive marker"),
        (body + bytes(511), "byte 1023: truncated: no end-of-archive marker"),
        (body + bytes(512) + header(b"b.jpg") + END, r"byte 512: data after the end-of-archive marker"),
        (body + bytes(9000) + b"x", "data after the end-of-archive marker"),
        (body + bytes((1 << 20) + 512), "1049088 bytes after the end .*, more than Limits.padding_bytes"),
        (b"<html>" + b"x" * 2000, r"byte 0: not a tar file \(starts with b'<html>"),
        (b"\x1f\x8b" + b"x" * 2000, r"not a tar file"),
        (long_name(b"b.jpg") + END, "byte 1024: bad header"),
    ]:
        with quick_and_small(), pytest.raises(ShardError, match=text):
            spans_of(data)
    with pytest.raises(ShardError, match="a long-name or PAX header without its member"):
        span_at(body + long_name(b"a.cls"), shard="s.tar")


def test_headers_without_members_take_no_memory() -> None:
    data = pax(record(b"a", b"b"), b"g") * 20_000 + END  # 20 MB, 10 MB of headers
    tracemalloc.start()
    assert spans_of(data) == []
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


def test_limits_hold() -> None:
    data = header(b"a.jpg", octal(700)) + bytes(1024) + END
    assert len(spans_of(data, member_bytes=700)) == 1
    with pytest.raises(ShardError, match=r"declares 700 bytes, more than Limits.member_bytes \(699\)"):
        spans_of(data, member_bytes=699)
