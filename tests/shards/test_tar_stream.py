"""Does the watch over a tar that passes by let every good one through, and stop a bad one at its first wrong byte?"""

import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adq_wds.errors import ShardError
from adq_wds.shards.samples_in_tar import iter_spans
from adq_wds.shards.tar_headers import DEFAULT_LIMITS, Limits
from adq_wds.shards.tar_stream import TarWatch
from tests.shards.test_samples_in_tar import FORMATS, LONG, pack
from tests.shards.test_tar_headers import END, base_256, header, octal, pax, record

SMALL = Limits(member_bytes=5000, name_bytes=300, pax_bytes=2000, padding_bytes=4096)


def watched(data: bytes, cuts: list[int] = [], limits: Limits = DEFAULT_LIMITS) -> TarWatch:  # noqa: B006
    """A watch that saw all of it, cut at these places."""
    watch = TarWatch(shard="s.tar", limits=limits)
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    for start, end in pairwise(edges):
        watch.see(data[start:end])
    return watch


def refused_at(data: bytes, limits: Limits = DEFAULT_LIMITS) -> tuple[int, str]:
    """Bytes that a watch fed one at a time had seen when it refused, and its text."""
    watch = TarWatch(shard="s.tar", limits=limits)
    for i in range(len(data)):
        try:
            watch.see(data[i : i + 1])
        except ShardError as error:
            return i + 1, str(error)
    raise AssertionError("not refused")


def reader_refuses(data: bytes, limits: Limits = DEFAULT_LIMITS) -> bool:
    try:
        list(iter_spans(data, shard="s.tar", limits=limits))
    except ShardError:
        return True
    return False


names = st.one_of(
    st.integers(0, 99).map(lambda i: f"k{i:03d}.jpg"),
    st.integers(0, 99).map(lambda i: f"{LONG}{i}.jpg"),
    st.integers(0, 99).map(lambda i: f"é{i}/ü.txt"),
    st.sampled_from(["README", "__m__/x.jpg"]),
)
members = st.lists(
    st.tuples(names, st.one_of(st.integers(0, 1500), st.sampled_from([0, 511, 512, 513, 1024]))),
    max_size=6,
    unique_by=lambda member: member[0],
)
cuts = st.lists(st.integers(0, 12_000), max_size=8)


@settings(max_examples=60)
@given(members, st.sampled_from(sorted(FORMATS.values())), cuts)
def test_every_good_tar_passes_in_any_cut(found: list[tuple[str, int]], form: int, at: list[int]) -> None:
    data = pack(*[(name, b"\xff" * size) for name, size in found], form=form)
    list(iter_spans(data, shard="s.tar"))
    assert watched(data, at).n_bytes == len(data)


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_a_good_tar_passes_byte_by_byte(form: int) -> None:
    data = pack(LONG + ".jpg", "é.txt", ("b.jpg", bytes(700)), form=form)
    assert watched(data, list(range(len(data)))).n_bytes == len(data)


def test_a_pax_size_is_what_is_passed_over() -> None:
    """The header's own size field says 0: what follows would be taken for headers."""
    first = pax(record(b"size", b"600")) + header(b"a.jpg")
    data = first + b"\xff" * 600 + bytes(424) + header(b"b.jpg") + END
    (first, second) = iter_spans(data, shard="s.tar")
    assert (first.n_bytes, second.key) == (1024 + 512 + 1024, "b")
    for cut in range(0, len(data), 97):
        watched(data, [cut, cut + 5])


@settings(max_examples=150)
@given(st.data())
def test_it_refuses_as_the_reader_does_however_it_is_cut(data: st.DataObject) -> None:
    """A tar with a few bytes changed, or cut off: never a false alarm."""
    form = data.draw(st.sampled_from(sorted(FORMATS.values())))
    tar = bytearray(pack(LONG + ".jpg", ("é.txt", b"\xff" * 700), "b.jpg", form=form))
    for _ in range(data.draw(st.integers(1, 3))):
        tar[data.draw(st.integers(0, len(tar) - 1))] = data.draw(st.integers(0, 255))
    told = []
    for at in ([], data.draw(cuts)):
        try:
            watched(bytes(tar), at)
            told.append("")
        except ShardError as error:
            told.append(str(error))
    if told[0]:
        assert reader_refuses(bytes(tar))
    assert told[0] == told[1] or "after the end" in told[0]  # how much is there differs


@settings(max_examples=150)
@given(st.lists(st.integers(0, 12_000), min_size=1, max_size=3), st.integers(0, 2**32))
def test_headers_beyond_the_limits_are_refused_by_both(sizes: list[int], seed: int) -> None:
    """Both read the same sizes, from a header or from PAX records before it."""
    rng = np.random.default_rng(seed)
    parts = []
    for i, size in enumerate(sizes):
        if rng.random() < 0.5:
            parts.append(pax(record(b"size", b"%d" % size)) + header(b"k%d.jpg" % i))
        else:
            parts.append(header(b"k%d.jpg" % i, octal(size)))
        parts.append(b"\xff" * size + bytes(-size % 512))
    data = b"".join(parts) + END
    at = rng.integers(0, len(data), 5).tolist()
    if max(sizes) > 5000:
        assert reader_refuses(data, SMALL)
        with pytest.raises(ShardError, match=r"more than Limits.member_bytes \(5000\)"):
            watched(data, at, SMALL)
    else:
        assert not reader_refuses(data, SMALL)
        watched(data, at, SMALL)


SIZES = [10**9 * 5, 2**33, 10**12, 2**40, 2**50, 2**62]


FORMS = [(form, size) for form in ("base 256", "PAX") for size in (*SIZES, 2**32 + 1)]
FORMS += [("octal", size) for size in (*SIZES, 2**32 + 1) if size < 8**12]


@pytest.mark.parametrize(("form", "size"), FORMS)
def test_a_declared_size_above_the_limit_fails_at_its_header(form: str, size: int) -> None:
    """F8: nothing of the payload is waited for."""
    before = pack("ok.jpg")[:1024]
    if form == "PAX":
        data = pax(record(b"size", b"%d" % size)) + header(b"a.jpg")
    elif form == "octal":
        data = header(b"a.jpg", b"%012o" % size)
    else:
        data = header(b"a.jpg", base_256(size))
    n_seen, text = refused_at(before + data + bytes(4096))
    assert n_seen == len(before + data)
    said = f"declares {size} bytes, more than Limits.member_bytes (4294967296)"
    assert text == f"shard s.tar, byte {n_seen - 512}: {said}"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("kind", "which"), [("L", "name_bytes"), ("K", "name_bytes"), ("x", "pax_bytes"), ("g", "pax_bytes")]
)
def test_a_long_name_or_pax_header_above_its_limit_is_refused(size: int, kind: str, which: str) -> None:
    data = header(b"././@LongLink", base_256(size), kind.encode())
    n_seen, text = refused_at(data + bytes(4096))
    assert n_seen == 512
    assert f"declares {size} bytes, more than Limits.{which} " in text


@pytest.mark.parametrize(
    ("data", "n_seen", "text"),
    [
        (b"<html>please log in</html>" * 100, 512, r"byte 0: not a tar file \(starts with b'<html>please log"),
        (b"\xff" * 2000, 512, r"byte 0: not a tar file"),
        (b"BZh91AY&SY" + b"\1" * 600, 512, r"byte 0: not a tar file \(starts with b'BZh91AY&SY"),
        (b"y\n" * 600, 512, r"byte 0: not a tar file"),
        (pack("a.jpg")[:1024] + b"\xff" * 600, 1536, r"byte 1024: bad header: checksum does not match"),
        (header(b"a.jpg", b"\xff" * 12) + END, 512, r"byte 0: negative number"),
        (header(b"a.jpg", b"12x45".ljust(12, b"\0")) + END, 512, r"byte 0: number b'12x45' in a header, expected octal digits"),
        (pax(record(b"size", b"1e9")) + END, 524, r"PAX size b'1e9': expected a decimal number"),
        (pax(b"99 size=5\n") + END, 522, r"damaged PAX record b'99 size=5"),
        (bytes(512) + b"\1", 513, r"byte 0: data after the end-of-archive marker"),
        (pack("a.jpg")[:1024] + bytes(2000) + b"\1" + bytes(10), 3025, r"byte 1024: data after the end-of-archive"),
        (pack("a.jpg") + pack("b.jpg"), 10241, r"byte 1024: data after the end-of-archive marker \(a zeroed header, or"),
    ],
    ids=["HTML", "noise", "bzip2", "yes", "bad second header", "negative", "no number", "PAX number", "PAX record",
         "data behind zeros", "data far behind the end", "two tars"],
)  # fmt: skip
def test_damage_is_refused_at_the_first_byte_that_shows_it(data: bytes, n_seen: int, text: str) -> None:
    found = refused_at(data)
    assert found[0] == n_seen
    with pytest.raises(ShardError, match=rf"^shard s.tar, .*{text.removeprefix('byte 0: ')}"):
        watched(data)
    with pytest.raises(ShardError, match=text):
        watched(data, [1, 300, 512, 515, 1025])
    assert reader_refuses(data)


def test_zeros_without_end_are_refused_at_the_limit() -> None:
    """F9: a file that was never filled, or /dev/zero."""
    data = pack("a.jpg")[:1024] + bytes(SMALL.padding_bytes)
    watched(data, limits=SMALL)
    assert not reader_refuses(data, SMALL)
    watch = watched(data, limits=SMALL)
    text = r"byte 1024: more than Limits.padding_bytes \(4096\) after the end of the archive"
    watch.see(bytes(512))  # the reader has the whole file, and counts its first zeros too
    with pytest.raises(ShardError, match=text):
        watch.see(bytes(1))
    with pytest.raises(ShardError, match=r"byte 0: more than Limits.padding_bytes \(1048576\)"):
        watched(bytes(3 << 20), list(range(0, 3 << 20, 1 << 16)))


def test_a_tar_cut_off_is_for_the_reader_to_say() -> None:
    data = pack("a.jpg", "b.jpg")
    for n in range(0, 2048, 13):
        assert watched(data[:n]).n_bytes == n
        assert reader_refuses(data[:n])


def test_it_holds_no_more_than_a_header_or_a_pax_body() -> None:
    """Whatever passes: payloads and padding are counted, not kept."""
    body = b"".join(record(b"k%d" % i, b"v" * 100) for i in range(1000))
    data = pax(body) + header(b"a.jpg", octal(30 << 20)) + bytes(30 << 20) + END
    watch = TarWatch(shard="s.tar")
    view = memoryview(data)
    most = 0
    for at in range(0, len(data), 1000):
        watch.see(bytes(view[at : at + 1000]))
        most = max(most, len(watch._header))
    assert most <= len(body) <= DEFAULT_LIMITS.pax_bytes
    assert watch._header == b""
    tracemalloc.start()
    try:
        watched(header(b"a.jpg", octal(30 << 20)), limits=DEFAULT_LIMITS)
        chunk = bytes(1 << 20)
        base = tracemalloc.get_traced_memory()[0]
        watch = watched(header(b"a.jpg", octal(30 << 20)))
        for _ in range(30):
            watch.see(chunk)
        assert tracemalloc.get_traced_memory()[1] - base < 100_000
    finally:
        tracemalloc.stop()
