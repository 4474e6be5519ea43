"""Does a quick way of reading a sample ever give what the strict one would not?"""

import contextlib
import io
import os
import random
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import adq_wds as adq
from adq_wds.reading.local import LocalShard
from adq_wds.reading.places import Place, ShardPlaces, are_neighbours, each_place
from adq_wds.tables.spans import scan_spans
from tests.stream.conftest import TarSet, ids, write_set

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


def places_of(path: Path) -> list[Place]:
    """Of a shard's samples, with what a walk knows of their members."""
    places = ShardPlaces.from_spans(scan_spans(path, shard="t.tar"))
    rows = np.arange(len(places.keys))
    return list(each_place([(0, places, rows)], rows, verify=True))


def ways(place: Place) -> list[Place]:
    """The place, and without what is known of its members, and of its payloads."""
    bare = place._replace(fields=None, cuts=())
    return [place, bare, bare._replace(crc32=None)]


def strictly(local: LocalShard, data: bytes, place: Place) -> dict[str, Any]:
    span = data[place.byte_offset : place.byte_offset + place.n_bytes]
    return local._read_strictly(span, place.key, place.crc32)


def outcome(read: Callable[[], dict[str, Any]]) -> object:
    """The sample, its fields in order, or the text of the error."""
    try:
        return list(read().items())
    except (adq.ShardError, adq.SampleError) as error:
        return str(error)


def check(path: Path) -> list[Place]:
    """Every way reads each sample as the strict one does; gives the places."""
    local, data, places = LocalShard(str(path), "t.tar"), path.read_bytes(), places_of(path)
    for place in places:
        strict = outcome(lambda place=place: strictly(local, data, place))  # type: ignore[misc]
        for way in ways(place):
            assert outcome(lambda way=way: local.read_sample(way)) == strict, way  # type: ignore[misc]
    return places


MEMBERS = {
    "plain": [("a.jpg", b"one"), ("a.cls", b"1"), ("b.jpg", b"x" * 512), ("b.cls", b""), ("c.cls", b"2")],
    "dotted": [("d/a.v1.jpg", b"one"), ("d/a.v2.jpg", b"two"), ("d/b.v1.jpg", b"three")],
    "capitals": [("a.JPG", b"one"), ("a.Cls", b"1"), ("b.JPG", b"two"), ("b.cls", b"1")],
    "long": [("k" * 120 + ".jpg", b"one"), ("k" * 120 + ".cls", b"1"), ("m" * 94 + ".jpg", b"a"), ("b.jpg", b"c")],
    "unicode": [("é.jpg", b"one"), ("é.clé", b"1"), ("ü.jpg", b"two")],
    "forged": [("a.jpg", b"one"), ("a.__adq_keep__", b"1"), ("b.jpg", b"two"), ("b.__bad__", b"1"), ("c.jpg", b"c")],
    "ignored": [("README", b"read"), ("a.jpg", b"one"), ("._a.jpg", b"mac"), ("a.cls", b"1"), ("b.jpg", b"two")],
}  # fmt: skip
KNOWN = {"long": [False, True, True], "forged": [False, False, True], "ignored": [False, True]}


@pytest.mark.parametrize("form", sorted(FORMS))
@pytest.mark.parametrize("name", sorted(MEMBERS))
def test_every_form_of_tar_reads_as_by_the_strict_reader(tmp_path: Path, name: str, form: str) -> None:
    if (name, form) == ("long", "ustar"):
        pytest.skip("ustar has no long names")
    places = check(write(tmp_path / "t.tar", MEMBERS[name], FORMS[form]))
    known = [place.fields is not None for place in places]
    if (name, form) != ("unicode", "pax"):
        assert known == KNOWN.get(name, [True] * len(places))


_NAMES = st.text(st.sampled_from("ab./_A é\n-"), min_size=1, max_size=6)
_MEMBERS = st.lists(
    st.tuples(
        st.builds("{}.{}".format, _NAMES, st.sampled_from(["jpg", "cls", "JPG", "a.b", "__x__", ""])),
        st.sampled_from([0, 1, 511, 512, 513, 7000]),
    ),
    max_size=12,
)


@settings(max_examples=300)
@given(members=_MEMBERS, form=st.sampled_from(sorted(FORMS)))
def test_any_tar_is_read_as_the_strict_reader_reads_it(
    tmp_path_factory: pytest.TempPathFactory, members: list[tuple[str, int]], form: str
) -> None:
    path = tmp_path_factory.mktemp("t") / "t.tar"
    write(path, [(name, bytes([65 + i]) * size) for i, (name, size) in enumerate(members)], FORMS[form])
    with contextlib.suppress(adq.ShardError):
        check(path)


@pytest.mark.parametrize("n_fields", [1, 2, 3, 8, 9])
def test_usual_samples_take_the_quickest_way(
    tmp_path: Path, n_fields: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More fields than eight are looked for in the headers, one after the other, and then not strictly."""
    names = ["jpg", "CLS", "a.b", "d", "e", "f", "g", "h", "i"][:n_fields]
    path = write(tmp_path / "t.tar", [(f"f/k{i}.{name}", b"x" * 40 * i) for i in range(30) for name in names])
    places = check(path)
    assert {place.fields for place in places} == {tuple(map(str.lower, names)) if n_fields < 9 else None}
    for way in ("_read_strictly", *(["_read_headers"] if n_fields < 9 else [])):
        monkeypatch.setattr(LocalShard, way, None)
    local = LocalShard(str(path), "t.tar")
    assert [len(local.read_sample(place)) for place in places] == [2 + n_fields] * 30


def test_neighbours_read_together_are_those_read_alone(tmp_path: Path) -> None:
    path = write(
        tmp_path / "t.tar", [(f"k{i}.{name}", b"x" * 40 * i) for i in range(9) for name in ("a", "b")]
    )
    local, places = LocalShard(str(path), "t.tar"), places_of(path)
    assert are_neighbours(places)
    assert local.read_neighbours(places) == [local.read_sample(place) for place in places]
    swapped = [places[0], places[2], places[1], places[3]]
    of_two_shards = [places[0], places[1]._replace(shard=1)]
    for others in (places[:1], places[::-1], places[::2], swapped, of_two_shards):
        assert not are_neighbours(others)
    for n_bytes in (places[3].byte_offset + 700, places[3].byte_offset):
        os.truncate(path, n_bytes)
        with pytest.raises(adq.ShardError, match=r"t\.tar, key 'k3': .*truncated"):
            local.read_neighbours(places)


@pytest.mark.parametrize("way", [0, 1, 2], ids=["members", "headers", "unchecked"])
def test_a_flipped_bit_is_an_error_or_changes_nothing(tmp_path: Path, way: int) -> None:
    """All bits of a sample; without a checksum, all but those of the payloads."""
    members = [("a.jpg", b"one"), ("a.jpf", b"1"), ("b.jpg", b"x" * 40), ("b.jpf", b"7")]
    path = write(tmp_path / "t.tar", members)
    place = ways(places_of(path)[1])[way]  # jpg and jpf are a bit apart
    data, local = path.read_bytes(), LocalShard(str(path), "t.tar")
    good, first = local.read_sample(place), place.byte_offset
    payloads = {*range(first + 512, first + 552), first + 1536}
    n_errors, n_same = 0, 0
    with path.open("r+b", buffering=0) as file:
        for byte, bit in product(range(first, first + place.n_bytes), range(8)):
            if way == 2 and byte in payloads:
                continue
            file.seek(byte)
            file.write(bytes([data[byte] ^ 1 << bit]))
            try:
                assert local.read_sample(place) == good, (byte, bit)
                n_same += 1
            except adq.ShardError as error:
                assert str(error).startswith("shard t.tar, key 'b': ")  # noqa: PT017
                n_errors += 1
            file.seek(byte)
            file.write(data[byte : byte + 1])
    assert n_same > 8 * 500  # padding may hold anything
    assert n_errors > 8 * 1000


LIES: dict[str, dict[str, Any]] = {
    "a size": {"cuts": (512, 514, 1536, 1537)},
    "an order": {"cuts": (1536, 1537, 512, 515)},
    "beyond the span": {"cuts": (512, 515, 9000, 9001)},
    "no fields": {"fields": ()},
    "a field more": {"fields": ("jpg", "cls", "txt"), "cuts": (512, 515, 1536, 1537, 600, 601)},
}


@pytest.mark.parametrize("name", LIES)
def test_members_hold_for_the_bytes_that_were_walked_only(tmp_path: Path, name: str) -> None:
    """Where the span has another crc32 the headers tell, and a wrong crc32 of the payloads is an error."""
    path = write(tmp_path / "t.tar", MEMBERS["plain"])
    place = places_of(path)[0]
    local = LocalShard(str(path), "t.tar")
    lie = place._replace(**LIES[name], span_crc32=place.span_crc32 ^ 1)
    assert local.read_sample(lie) == local.read_sample(place)
    with pytest.raises(adq.ShardError, match=r"^shard t.tar, key 'a': .*expected crc32 00000007"):
        local.read_sample(lie._replace(crc32=7))


def test_the_error_says_what_stands_there_instead(tmp_path: Path) -> None:
    path = write(tmp_path / "t.tar", MEMBERS["plain"])
    a, b, _ = places_of(path)
    size = path.stat().st_size
    local = LocalShard(str(path), "t.tar")
    for place, text in (
        (b._replace(key="a", fields=None), r"'a': bytes differ: found key 'b' with crc32 (\w+), expected crc32 \1"),
        (b._replace(crc32=7, fields=None), r"'b': bytes differ: found key 'b' with crc32 \w+, expected crc32 00000007"),
        (Place(0, b.byte_offset, b.n_bytes, "c", None), "'c': bytes differ: found key 'b'"),
        (Place(0, a.byte_offset, 1536, "a", None), "'a': in its span, byte 1024: .* 0 are left"),
        (Place(0, size - 512, 1024, "b", None), f"'b': ends at byte {size}, .*{size + 512}: truncated"),
        (Place(0, size + 512, 1024, "b", None), f"'b': ends before byte {size + 512}, .*: truncated"),
        (Place(0, 0, 2**62, "b", None), f"'b': ends at byte {size}, .*: truncated"),
    ):  # fmt: skip
        text = "^shard t.tar, key " + text + ".*; .*planned: do that again$"
        with pytest.raises(adq.ShardError, match=text):
            local.read_sample(place)


def test_a_sample_whose_padding_is_cut_off_is_truncated(tmp_path: Path) -> None:
    path = write(tmp_path / "t.tar", [("a.x", b"one"), ("b.x", b"two")])
    for place, text in zip(places_of(path), (None, "key 'b': ends at byte 2000, "), strict=True):
        for early in (False, True):  # cut before it is opened, or while it is open
            whole = path.read_bytes()
            path.write_bytes(whole[:2000] if early else whole)
            local = LocalShard(str(path), "t.tar")
            path.write_bytes(whole[:2000])
            if text is None:
                assert local.read_sample(place)["x"] == b"one"
            else:
                with pytest.raises(adq.ShardError, match=text + ".*truncated"):
                    local.read_sample(place)
            path.write_bytes(whole)


@pytest.mark.parametrize("known", [True, False])
def test_a_file_that_cannot_be_read_is_an_error_with_its_place(
    tmp_path: Path, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "t.tar", MEMBERS["plain"])
    place = ways(places_of(path)[0])[0 if known else 1]

    def fails(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    local = LocalShard(str(path), "t.tar")
    monkeypatch.setattr(os, "pread", fails)
    with pytest.raises(adq.ShardError, match=r"t\.tar, key 'a': cannot be read: Input/output error"):
        local.read_sample(place)


def test_a_field_twice_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "t.tar", [("b.jpg", b"1"), ("a.jpg", b"2"), ("a.jpg", b"3")])
    local = LocalShard(str(path), "t.tar")
    assert local.read_sample(Place(0, 0, 1024, "b", None))["jpg"] == b"1"
    with pytest.raises(adq.ShardError, match=r"key 'a': .*field twice in a sample"):
        local.read_sample(Place(0, 1024, 2048, "a", None))


def test_a_folder_in_ustars_prefix_field_is_part_of_the_key(tmp_path: Path) -> None:
    members = [("b.jpg", b"1"), ("x" * 98 + "/a.jpg", b"2")]
    path = write(tmp_path / "t.tar", members, tarfile.USTAR_FORMAT)
    _, a = check(path)
    with pytest.raises(adq.ShardError, match="key 'a': bytes differ: found key 'xxx"):
        LocalShard(str(path), "t.tar").read_sample(ways(a)[1]._replace(key="a"))


def test_an_unusual_key_or_size_is_not_taken_for_the_usual_one(tmp_path: Path) -> None:
    """Headers with right checksums that are left to the strict way, with and without a crc32."""
    path = write(tmp_path / "t.tar", [("a.jpg", b"one"), ("b.jpg", b"two"), ("c.jpg", b"x" * 8)])
    _, b, c = places_of(path)
    local = LocalShard(str(path), "t.tar")
    for place in ways(b)[1:]:
        with pytest.raises(adq.ShardError, match="key 'x': bytes differ: found key 'b'"):
            local.read_sample(place._replace(key="x"))  # as long as the key that is there
    data, first = bytearray(path.read_bytes()), c.byte_offset
    data[first + 124 : first + 136] = b"000000000010"  # 12 digits, 8 in octal; the usual ones are 11
    head = data[first : first + 512]
    data[first + 148 : first + 156] = b"%06o\0 " % (sum(head) - sum(head[148:156]) + 8 * 32)
    path.write_bytes(data)
    strict = strictly(local, bytes(data), c)
    assert strict["jpg"] == b"x" * 8
    assert [local.read_sample(way) for way in ways(c)] == [strict] * 3


def test_reading_sparsely_gives_the_same_samples(tmp_path: Path) -> None:
    rng = random.Random(0)
    members = [(f"k{i}.bin", rng.randbytes(rng.randrange(40_000))) for i in range(40)]
    path = write(tmp_path / "t.tar", members)
    sparse, plain = LocalShard(str(path), "t.tar", sparse=True), LocalShard(str(path), "t.tar")
    for place in reversed(places_of(path)):
        assert sparse.read_sample(place) == plain.read_sample(place)


# ---- As the stream uses it


@pytest.fixture
def tars(tmp_path: Path) -> TarSet:
    return write_set(tmp_path / "set", [60, 50])


def count_of(monkeypatch: pytest.MonkeyPatch, name: str) -> list[Any]:
    """The last argument of each call of a method of `LocalShard` from now on."""
    places: list[Any] = []
    original = getattr(LocalShard, name)
    counted = lambda self, *given: places.append(given[-1]) or original(self, *given)  # noqa: E731
    monkeypatch.setattr(LocalShard, name, counted)
    return places


def without_members(plan: adq.Plan) -> adq.Plan:
    """As one that was made before there were any."""
    shards = [replace(shard, spans=replace(shard.spans, members=None)) for shard in plan]
    header = {
        name: value for name, value in plan.header.items() if name not in ("shards", "n_kept", "n_samples")
    }
    return adq.Plan.from_shards(shards, header)


def test_a_plan_without_members_gives_the_same_samples(tars: TarSet, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = adq.Plan.from_keys(tars.urls, None)
    parsed = count_of(monkeypatch, "_read_headers")
    quick = list(adq.ShardDataset(tars.urls, plan=plan))
    assert not parsed
    assert list(adq.ShardDataset(tars.urls, plan=without_members(plan))) == quick
    assert list(adq.ShardDataset(tars.urls, plan=plan, verify=False)) == quick
    assert list(adq.ShardDataset(tars.urls)) == quick  # payloads without a crc32
    assert len(parsed) == 3 * len(quick) == 330


def test_a_payload_changed_in_place_is_an_error_where_it_stands(tmp_path: Path) -> None:
    path = write(tmp_path / "t.tar", [(f"k{i}.bin", b"%04d" % i) for i in range(40)])
    dataset = adq.ShardDataset(str(path), plan=adq.Plan.from_keys(str(path), None))
    assert len(list(dataset)) == 40
    status = path.stat()
    path.write_bytes(path.read_bytes().replace(b"0017", b"0018"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # same file, size and date
    samples = iter(dataset)
    assert [next(samples)["__key__"] for _ in range(17)] == [f"k{i}" for i in range(17)]
    expected = f"key 'k17': bytes differ: found key 'k17' with crc32 {crc32(b'0018'):08x}"
    with pytest.raises(adq.ShardError, match=expected):
        next(samples)


def test_a_shard_that_is_gone_is_an_error_when_its_turn_comes(tars: TarSet) -> None:
    samples: Iterator[Any] = iter(adq.ShardDataset(tars.urls, plan=tars.plan))
    os.remove(tars.urls[1])
    kept = [place for place in tars.kept if place[0] == "t-000.tar"]
    assert ids(next(samples) for _ in kept) == kept
    with pytest.raises(adq.ShardError, match=r"t-001\.tar: cannot be opened: No such file"):
        next(samples)
