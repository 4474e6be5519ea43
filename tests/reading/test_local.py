"""Does the quick reader ever say what the strict one would not?"""

import contextlib
import io
import random
import tarfile
from pathlib import Path
from typing import Any

import pytest

import adq_wds as adq
from adq_wds.reading import local as reader
from adq_wds.reading.local import LocalShard
from adq_wds.tables.spans import Spans, scan_spans

FORMS = {"gnu": tarfile.GNU_FORMAT, "ustar": tarfile.USTAR_FORMAT, "pax": tarfile.PAX_FORMAT}


def write(path: Path, members: list[tuple[str, bytes]], form: int = tarfile.GNU_FORMAT, **info: Any) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            for attribute, value in info.items():
                setattr(member, attribute, value)
            tar.addfile(member, io.BytesIO(data))
    return path


def rows(spans: Spans) -> list[tuple[int, int, str, int]]:
    return [(offset, n, key, crc) for _, key, offset, n, crc in spans.rows()]


def span_of(data: bytes, row: tuple[int, int, str, int]) -> bytes:
    return data[row[0] : row[0] + row[1]]


MEMBERS = {
    "plain": [("a.jpg", b"one"), ("a.cls", b"1"), ("b.jpg", b"x" * 512), ("b.cls", b""), ("c.cls", b"2")],
    "dotted": [("d/a.v1.jpg", b"one"), ("d/a.v2.jpg", b"two"), ("d/b.v1.jpg", b"three")],
    "capitals": [("a.JPG", b"one"), ("a.Cls", b"1"), ("b.JPG", b"two"), ("b.cls", b"1")],
    "long": [("k" * 120 + ".jpg", b"one"), ("k" * 120 + ".cls", b"1"), ("m" * 94 + ".jpg", b"a"), ("b.jpg", b"c")],
    "unicode": [("é.jpg", b"one"), ("é.cls", b"1"), ("ü.jpg", b"two")],
    "forged": [("a.jpg", b"one"), ("a.__adq_keep__", b"1"), ("b.jpg", b"two"), ("b.__adq_keep__", b"1")],
    "ignored": [("README", b"read"), ("a.jpg", b"one"), ("._a.jpg", b"mac"), ("b.jpg", b"two")],
}  # fmt: skip


@pytest.mark.parametrize("form", sorted(FORMS))
@pytest.mark.parametrize("name", sorted(MEMBERS))
def test_every_form_of_tar_is_read_as_the_strict_reader_reads_it(
    tmp_path: Path, name: str, form: str
) -> None:
    if (name, form) == ("long", "ustar"):
        pytest.skip("ustar has no long names")
    path = write(tmp_path / "t.tar", MEMBERS[name], FORMS[form])
    local = LocalShard(str(path), "t.tar")
    for _ in range(2):  # fields unknown, then known
        for row in rows(scan_spans(path, shard="t.tar")):
            strict = local._parse_strictly(span_of(path.read_bytes(), row), *row)
            assert local.read(*row) == strict
            assert list(local.read(*row)) == list(strict)
            assert local.read(*row[:3], None) == strict


def test_usual_samples_take_the_quick_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "t.tar", [(f"k{i}.{f}", b"x" * i) for i in range(50) for f in ("jpg", "CLS")])
    strictly = []
    original = LocalShard._parse_strictly
    monkeypatch.setattr(
        LocalShard, "_parse_strictly", lambda self, *row: strictly.append(row) or original(self, *row)
    )
    local = LocalShard(str(path), "t.tar")
    for row in rows(scan_spans(path, shard="t.tar")):
        local.read(*row)
    assert len(strictly) == 1


@pytest.mark.parametrize("checked", [True, False])
def test_a_flipped_bit_is_an_error_or_changes_nothing(tmp_path: Path, checked: bool) -> None:
    """All bits of a sample; without a checksum, all but those of the payloads."""
    members = [("a.jpg", b"one"), ("a.jpf", b"1"), ("b.jpg", b"x" * 40), ("b.jpf", b"7")]
    path = write(tmp_path / "t.tar", members)
    spans = rows(scan_spans(path, shard="t.tar"))
    data = bytearray(path.read_bytes())
    local = LocalShard(str(path), "t.tar")
    for row in spans:
        local.read(*row)  # jpg and jpf, a bit apart, are both known
    offset, n_bytes, key, crc = spans[1]
    good = local.read(offset, n_bytes, key, crc)
    payloads = {*range(offset + 512, offset + 552), offset + 1536}
    found = {"error": 0, "nothing": 0}
    for byte in range(offset, offset + n_bytes):
        if not checked and byte in payloads:
            continue
        for bit in range(8):
            data[byte] ^= 1 << bit
            path.write_bytes(data)
            try:
                assert local.read(offset, n_bytes, key, crc if checked else None) == good, (byte, bit)
                found["nothing"] += 1
            except adq.ShardError as error:
                assert str(error).startswith("shard t.tar, key 'b': ")  # noqa: PT017
                found["error"] += 1
            data[byte] ^= 1 << bit
    assert found["error"] > 8 * 1000  # the headers; padding may hold anything
    assert found["nothing"] > 8 * 500


def test_random_damage_is_an_error_or_changes_nothing(tmp_path: Path) -> None:
    rng = random.Random(0)
    path = write(tmp_path / "t.tar", [(f"k{i}.{f}", bytes(rng.randbytes(9))) for i in range(9) for f in "xy"])
    spans = rows(scan_spans(path, shard="t.tar"))
    whole = path.read_bytes()
    local = LocalShard(str(path), "t.tar")
    good = [local.read(*row) for row in spans]
    for _ in range(2000):
        data = bytearray(whole)
        at = rng.randrange(len(data))
        data[at : at + rng.randrange(1, 40)] = rng.randbytes(rng.randrange(0, 40))
        path.write_bytes(data)
        for row, expected in zip(spans, good, strict=True):
            with contextlib.suppress(adq.ShardError):
                assert local.read(*row) == expected


def test_the_error_says_what_stands_there_instead(tmp_path: Path) -> None:
    path = write(tmp_path / "t.tar", MEMBERS["plain"])
    a, b, _ = rows(scan_spans(path, shard="t.tar"))
    size = path.stat().st_size
    again = r"; the shard is damaged, or changed since it was indexed or planned: do that again$"
    local = LocalShard(str(path), "t.tar")
    for row, text in (
        ((b[0], b[1], "a", b[3]), r"'a': bytes differ: found key 'b' with crc32 (\w+), expected crc32 \1"),
        ((b[0], b[1], "b", 7), r"'b': bytes differ: found key 'b' with crc32 \w+, expected crc32 00000007"),
        ((b[0], b[1], "c", None), r"'c': bytes differ: found key 'b'"),
        (
            (a[0], 1536, "a", None),
            r"'a': in its span, byte 1024: member 'a.cls' declares 1 bytes, but 0 are left.*",
        ),
        (
            (size - 512, 1024, "b", None),
            rf"'b': ends at byte {size}, but this sample at {size + 512}: truncated",
        ),
    ):
        with pytest.raises(adq.ShardError, match="^shard t.tar, key " + text + again):
            local.read(*row)


def test_a_field_twice_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "t.tar", [("b.jpg", b"1"), ("a.jpg", b"2"), ("a.jpg", b"3")])
    local = LocalShard(str(path), "t.tar")
    assert local.read(0, 1024, "b", None)["jpg"] == b"1"
    with pytest.raises(adq.ShardError, match=r"key 'a': .*field twice in a sample"):
        local.read(1024, 2048, "a", None)


def test_a_folder_in_ustars_second_name_field_is_part_of_the_key(tmp_path: Path) -> None:
    members = [("b.jpg", b"1"), ("x" * 98 + "/a.jpg", b"2")]
    path = write(tmp_path / "t.tar", members, tarfile.USTAR_FORMAT)
    b, a = rows(scan_spans(path, shard="t.tar"))
    local = LocalShard(str(path), "t.tar")
    for _ in range(2):
        assert local.read(*b)["jpg"] == b"1"
        assert local.read(*a)["jpg"] == b"2"
        with pytest.raises(adq.ShardError, match="key 'a': bytes differ: found key 'xxx"):
            local.read(a[0], a[1], "a", a[3])


def test_a_key_or_a_size_out_of_shape_is_not_taken_for_the_usual_one(tmp_path: Path) -> None:
    """Headers with right checksums that the quick way must leave to the strict one, with and without a crc32."""
    path = write(tmp_path / "t.tar", [("a.jpg", b"one"), ("b.jpg", b"two"), ("c.jpg", b"x" * 8)])
    a, b, c = rows(scan_spans(path, shard="t.tar"))
    local = LocalShard(str(path), "t.tar")
    local.read(*a)
    for crc in (b[3], None):
        with pytest.raises(adq.ShardError, match="key 'x': bytes differ: found key 'b'"):
            local.read(b[0], b[1], "x", crc)  # as long as the key that is there
    data = bytearray(path.read_bytes())
    data[c[0] + 124 : c[0] + 136] = b"000000000010"  # 12 digits, 8 in octal; the usual ones are 11
    head = data[c[0] : c[0] + 512]
    total = sum(head) - sum(head[148:156]) + 8 * 32
    data[c[0] + 148 : c[0] + 156] = b"%06o\0 " % total
    path.write_bytes(data)
    strict = local._parse_strictly(span_of(bytes(data), c), *c)
    assert strict["jpg"] == b"x" * 8
    assert local.read(*c) == local.read(*c[:3], None) == strict


def test_what_is_remembered_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "_MAX_FIELDS", 5)
    monkeypatch.setattr(reader, "_MAX_SUMS", 7)
    path = write(tmp_path / "t.tar", [(f"k{i}.f{i % 9}", b"x" * i) for i in range(50)])
    local = LocalShard(str(path), "t.tar")
    for _ in range(2):
        for row in rows(scan_spans(path, shard="t.tar")):
            assert local.read(*row)["__key__"] == row[2]
    assert len(local._fields) == 5
    assert len(local._sums) == 7


def test_a_sample_with_a_reserved_field_is_bad_and_the_shard_goes_on(tmp_path: Path) -> None:
    path = write(tmp_path / "t.tar", [("a.jpg", b"1"), ("a.__bad__", b"2"), ("b.jpg", b"3")])
    a, b = rows(scan_spans(path, shard="t.tar"))
    local = LocalShard(str(path), "t.tar")
    for _ in range(2):
        with pytest.raises(adq.SampleError, match=r"shard t.tar, key 'a', field '__bad__': reserved"):
            local.read(*a)
        assert local.read(*b)["jpg"] == b"3"


def test_reading_sparsely_gives_the_same_samples(tmp_path: Path) -> None:
    rng = random.Random(0)
    members = [(f"k{i}.bin", rng.randbytes(rng.randrange(40_000))) for i in range(40)]
    path = write(tmp_path / "t.tar", members)
    sparse, plain = LocalShard(str(path), "t.tar", sparse=True), LocalShard(str(path), "t.tar")
    for row in reversed(rows(scan_spans(path, shard="t.tar"))):
        assert sparse.read(*row) == plain.read(*row)
    with pytest.raises(adq.ShardError, match="truncated"):
        sparse.read(path.stat().st_size - 512, 20_000, "k", None)
    with pytest.raises(adq.ShardError, match="truncated"):
        sparse.read(path.stat().st_size + 50_000, 20_000, "k", None)
