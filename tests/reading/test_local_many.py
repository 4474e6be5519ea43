"""Is what is laid out for many samples at once what the reader of one finds, and for nothing else?"""

import os
import pickle
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import adq_wds as adq
from adq_wds.reading import local_many as layout
from adq_wds.reading import open_shards as readers
from adq_wds.reading.local import LocalShard
from adq_wds.reading.local_many import MAX_BYTES, Group, Layouts, Samples, cut
from adq_wds.tables.spans import scan_spans
from tests.reading.test_local import FORMS, MEMBERS, rows, write
from tests.stream.conftest import TarSet, as_worker, ids, write_set

Row = tuple[int, int, str, int]
Outcome = dict[str, Any] | str


def laid_out(local: LocalShard, listed: Sequence[Row], layouts: Layouts | None = None) -> list[Any]:
    """Each sample as it is cut out; None for those left to the reader."""
    offset, n_bytes = (np.array([row[i] for row in listed], dtype=np.int64) for i in (0, 1))
    keys = np.array([row[2] for row in listed], dtype=object)
    n = len(listed)
    data = np.full(n, None, dtype=object)
    small = np.flatnonzero(n_bytes <= MAX_BYTES)
    data[small] = local.read_spans(offset[small].tolist(), n_bytes[small].tolist())
    groups = [Group(0, n, local.stamp, 0, n)]
    laid = (Layouts() if layouts is None else layouts).find(
        Samples(groups, np.arange(n), n_bytes, keys, data)
    )
    if laid is None:
        return [None] * n
    return [
        None if fields is None else cut(span, path_of(local), row[2], row[3], fields, tuple(cuts))
        for row, span, fields, cuts in zip(listed, data, laid.fields, laid.cuts.T.tolist(), strict=True)
    ]


def path_of(local: LocalShard) -> str:
    return local._url


def outcome(read: Callable[[], dict[str, Any]]) -> Outcome:
    """The sample, or the text of the error."""
    try:
        return read()
    except (adq.ShardError, adq.SampleError) as error:
        return str(error)


def check(path: Path, listed: Sequence[Row]) -> list[Any]:
    """What is laid out is as the reader has it, also where the whole is known already; gives it."""
    local, layouts = LocalShard(str(path), "t.tar"), Layouts()
    for _ in range(2):
        found = laid_out(local, listed, layouts)
        for row, sample in zip(listed, found, strict=True):
            if sample is not None:
                read = outcome(lambda row=row: local.read(*row))  # type: ignore[misc]
                assert sample == read, row
                assert list(sample) == list(read)
    return found


@pytest.mark.parametrize("form", sorted(FORMS))
@pytest.mark.parametrize("name", sorted(MEMBERS))
def test_every_form_of_tar_is_laid_out_as_it_is_read(tmp_path: Path, name: str, form: str) -> None:
    if (name, form) == ("long", "ustar"):
        pytest.skip("ustar has no long names")
    path = write(tmp_path / "t.tar", MEMBERS[name], FORMS[form])
    listed = rows(scan_spans(path, shard="t.tar"))
    found = check(path, listed)
    if name == "plain":
        assert None not in found[:2]  # the third has other fields, and is alone in that
    if name in ("unicode", "forged"):
        assert found == [None] * len(listed)


@pytest.mark.parametrize("n_fields", [1, 2, 3, 8, 9])
def test_usual_samples_are_all_laid_out(tmp_path: Path, n_fields: int) -> None:
    """Keys of any length, payloads of any up to the bound; more fields than eight are left to the reader."""
    rng = random.Random(0)
    names = ["jpg", "CLS", "a.b", "d", "e", "f", "g", "h", "i"][:n_fields]
    members = [
        (f"f/{'k' * (i % 7)}{i}.{name}", rng.randbytes(rng.randrange(500)))
        for i in range(60)
        for name in names
    ]
    path = write(tmp_path / "t.tar", members)
    listed = rows(scan_spans(path, shard="t.tar"))
    found = check(path, listed)
    assert sum(sample is not None for sample in found) == (60 if n_fields <= 8 else 0)


def test_samples_of_several_shapes_are_laid_out_together(tmp_path: Path) -> None:
    members = [
        (f"k{i}.{name}", b"%d" % i)
        for i in range(200)
        for name in (("jpg", "cls"), ("png", "json", "txt"), ("x",))[i // 20 % 3]
    ]
    path = write(tmp_path / "t.tar", members)
    listed = rows(scan_spans(path, shard="t.tar"))
    assert None not in check(path, listed)


_NAMES = st.text(st.sampled_from("ab./_A é\n-"), min_size=1, max_size=6)
_MEMBERS = st.lists(
    st.tuples(
        st.builds("{}.{}".format, _NAMES, st.sampled_from(["jpg", "cls", "JPG", "a.b", "__x__", ""])),
        st.sampled_from([0, 1, 511, 512, 513, 7000, 9000]),
    ),
    max_size=12,
)


@settings(max_examples=300, deadline=None)
@given(members=_MEMBERS, form=st.sampled_from(sorted(FORMS)), other=_NAMES)
def test_any_tar_is_laid_out_as_it_is_read(
    tmp_path_factory: pytest.TempPathFactory, members: list[tuple[str, int]], form: str, other: str
) -> None:
    """With the keys listed, and with any other key."""
    path = tmp_path_factory.mktemp("t") / "t.tar"
    write(path, [(name, bytes([65 + i]) * size) for i, (name, size) in enumerate(members)], FORMS[form])
    try:
        listed = rows(scan_spans(path, shard="t.tar"))
    except adq.ShardError:
        return
    if listed:
        check(path, listed)
        strict, data = LocalShard(str(path), "t.tar"), path.read_bytes()
        for offset, n_bytes, key, crc in listed:
            for wrong in (other, key[:-1], key + ".jpg"):
                (sample,) = laid_out(strict, [(offset, n_bytes, wrong, crc)])
                if sample is not None:
                    assert (
                        strict._parse_strictly(data[offset : offset + n_bytes], offset, n_bytes, wrong, crc)
                        == sample
                    )


def with_right_sums(span: bytes, headers: Sequence[int]) -> bytes:
    """The same with the checksums that its headers should have."""
    data = bytearray(span)
    for at in headers:
        head = bytes(data[at : at + 148]) + b" " * 8 + bytes(data[at + 156 : at + 512])
        data[at + 148 : at + 156] = b"%06o\0 " % sum(head)
    return bytes(data)


@pytest.mark.parametrize("right_sums", [False, True])
def test_a_flipped_bit_gives_the_sample_or_the_error_that_reading_gives(
    tmp_path: Path, right_sums: bool
) -> None:
    """Every bit of a span flipped in a copy of its own; the checksums as they were, and made right again."""
    path = write(tmp_path / "t.tar", [("k.jpg", b"x" * 40), ("k.jpf", b"7")])
    ((offset, n_bytes, key, crc),) = rows(scan_spans(path, shard="t.tar"))
    span = path.read_bytes()[offset : offset + n_bytes]
    copies = [span] * 20
    for bit in range(8 * n_bytes):
        copy = bytearray(span)
        copy[bit // 8] ^= 1 << bit % 8
        copies.append(with_right_sums(bytes(copy), (0, 1024)) if right_sums else bytes(copy))
    path.write_bytes(b"".join(copies))
    local = LocalShard(str(path), "t.tar")
    listed = [(i * n_bytes, n_bytes, key, crc) for i in range(len(copies))]
    found = laid_out(local, listed)
    n_laid = 0
    for row, sample in zip(listed, found, strict=True):
        read = outcome(lambda row=row: local.read(*row))  # type: ignore[misc]
        if sample is not None:
            assert sample == read, row
            n_laid += 1
        else:
            assert right_sums or row[0] >= 20 * n_bytes
    n_padding = 8 * (2 * 512 - 40 - 1)
    assert n_laid >= 20 + n_padding
    if not right_sums:
        assert (
            n_laid <= 20 + n_padding + 2 * 8 * 8
        )  # what stands in a checksum's field may be written otherwise


def test_a_name_longer_than_its_place_is_not_taken_for_the_one_cut_off_there(tmp_path: Path) -> None:
    """The last key with `.jpg` would have 102 bytes; its header has the first 100 of them."""
    members = [(f"{i:02d}" * 48 + ".jpg", b"one") for i in range(20)]
    path = write(tmp_path / "t.tar", [*members, ("k" * 98 + ".j", b"two")])
    found = check(path, rows(scan_spans(path, shard="t.tar")))
    assert None not in found[:20]
    assert found[20] is None


def header(name: bytes, size: bytes = b"00000000003", *, mtime: int = 0) -> bytearray:
    """A plain header, its checksum left out."""
    head = bytearray(name.ljust(100, b"\0") + b"0000644\0" * 3 + size + b"\0" + b"%011o\0" % mtime)
    return head + b" " * 8 + b"0" + bytes(100) + b"ustar\0" + b"00".ljust(249, b"\0")


def octal_sum(head: bytearray) -> bytes:
    return b"%06o" % sum(head)


def spans_of(*names: bytes) -> list[bytes]:
    """Members of three bytes each, with good headers."""
    found = []
    for name in names:
        head = header(name)
        head[148:156] = octal_sum(head) + b"\0 "
        found.append(bytes(head) + b"one".ljust(512, b"\0"))
    return found


def test_numbers_and_checksums_written_otherwise_are_left_to_the_reader(tmp_path: Path) -> None:
    """Each adds up as the usual ones do."""
    odd_end, odd_digit, odd_size = header(b"k.x"), header(b"k.x"), header(b"k.x", b"00000000008")
    odd_end[148:156] = octal_sum(odd_end) + b"\x10\x10"  # as much as NUL and space
    times = (
        int("7" * n + str(digit), 8) for n in range(11) for digit in range(8)
    )  # digits that add up to 0 … 77
    mtime = next(t for t in times if octal_sum(header(b"k.x", mtime=t)).endswith(b"10"))
    odd_digit = header(b"k.x", mtime=mtime)
    odd_digit[148:156] = octal_sum(odd_digit)[:-2] + b"08\0 "
    odd_size[148:156] = octal_sum(odd_size) + b"\0 "
    for head, payload in ((odd_end, b"one"), (odd_digit, b"one"), (odd_size, b"eight by")):
        assert len(head) == 512
        path = tmp_path / "t.tar"
        path.write_bytes(spans_of(b"k.x")[0] * 3 + head + payload.ljust(512, b"\0"))
        local = LocalShard(str(path), "t.tar")
        *good, odd = [(1024 * i, 1024, "k", crc32(b"one")) for i in range(3)] + [
            (3072, 1024, "k", crc32(payload))
        ]
        assert [sample is not None for sample in laid_out(local, [*good, odd])] == [True] * 3 + [False]
        with pytest.raises(adq.ShardError, match=r"key 'k': in its span, byte 0: "):
            local.read(*odd)


@pytest.mark.parametrize(
    ("names", "key"),
    [
        ([b"k.a/x.jpg"], "k"),
        ([b"k.v1.jpg"], "k.v1"),
        ([b"__x__/a.jpg"], "__x__/a"),
        ([b"d/.jpg"], "d/"),
        ([b".jpg"], ""),
        ([b"k\0.jpg"], "k\0"),
        ([b"k.jpg", b"k.JPG"], "k"),
        ([b"k.jpg", b"m.jpg"], "k"),
        ([b"kjpg"], "k"),
        ([b"k.__x"], "k"),
    ],
    ids=repr,
)
def test_a_name_that_is_not_the_keys_and_a_fields_is_left_to_the_reader(
    tmp_path: Path, names: list[bytes], key: str
) -> None:
    path = tmp_path / "t.tar"
    path.write_bytes(b"".join(spans_of(*names)))
    local = LocalShard(str(path), "t.tar")
    row = (0, 1024 * len(names), key, crc32(b"one" * len(names)))
    assert laid_out(local, [row]) == [None]
    with pytest.raises((adq.ShardError, adq.SampleError), match="key '"):
        local.read(*row)


def test_a_member_more_or_less_is_another_shape_though_it_is_empty(tmp_path: Path) -> None:
    """So that no crc32 tells; the first ten samples say what is usual."""
    fields = [["x", "y"]] * 10 + [["x", "y", "z"], ["x"], ["x", "y"]]
    members = [(f"k{i:02d}.{name}", b"1" * (name == "x")) for i, names in enumerate(fields) for name in names]
    path = write(tmp_path / "t.tar", members)
    found = check(path, rows(scan_spans(path, shard="t.tar")))
    assert [sample is not None for sample in found] == [True] * 10 + [False, False, True]


def test_a_sample_whose_padding_is_cut_off_is_left_to_the_reader(tmp_path: Path) -> None:
    path = write(tmp_path / "t.tar", [("a.x", b"one"), ("b.x", b"two")])
    listed = rows(scan_spans(path, shard="t.tar"))
    path.write_bytes(path.read_bytes()[:2000])
    local = LocalShard(str(path), "t.tar")
    first, second = laid_out(local, listed)
    assert first is not None
    assert second is None
    with pytest.raises(
        adq.ShardError, match="key 'b': ends at byte 2000, but this sample at 2048: truncated"
    ):
        local.read(*listed[1])


# ---- as the stream uses it


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Keys of the samples whose headers are looked at together, as it happens."""
    seen: list[str] = []
    original = layout.payload_sizes
    monkeypatch.setattr(
        layout,
        "payload_sizes",
        lambda data, n_bytes, keys, endings: (
            seen.extend(keys.tolist()) or original(data, n_bytes, keys, endings)
        ),
    )
    return seen


@pytest.fixture
def tars(tmp_path: Path) -> TarSet:
    return write_set(tmp_path / "set", [60, 50])


def stream(tars: TarSet, **options: Any) -> adq.ShardDataset:
    return adq.ShardDataset(tars.urls, **{"plan": tars.plan, "shuffle": True, **options})


def test_headers_are_looked_at_once_for_all_epochs_and_those_of_kept_samples_only(
    tars: TarSet, looked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed = []
    original = LocalShard.read
    monkeypatch.setattr(LocalShard, "read", lambda self, *row: parsed.append(row) or original(self, *row))
    dataset = stream(tars)
    for _ in range(3):
        got = {(Path(s["__url__"]).name, s["__key__"]): s for s in dataset}
        assert sorted(got) == sorted(tars.kept)
        for place, sample in got.items():
            assert {name: sample[name] for name in ("txt", "cls")} == tars.bytes[place]
        assert not parsed
    assert sorted(looked) == sorted(key for _, key in tars.kept)


def test_each_worker_looks_at_what_it_reads(tars: TarSet, looked: list[str]) -> None:
    n_all = 0
    for worker in (0, 1):
        with as_worker(worker, 2):
            n_read = len(list(pickle.loads(pickle.dumps(stream(tars)))))  # noqa: S301
        assert len(looked) == n_read
        n_all += n_read
        looked.clear()
    assert n_all == len(tars.kept)


@pytest.mark.parametrize(
    "why", ["no crc32 is asked for", "none is known", "few samples a shard", "large samples"]
)
def test_nothing_is_laid_out_where(tmp_path: Path, looked: list[str], why: str) -> None:
    tars = write_set(tmp_path / "set", [60] if why != "few samples a shard" else [20] * 5)
    if why == "no crc32 is asked for":
        got = list(stream(tars, verify=False))
    elif why == "none is known":
        got = list(adq.ShardDataset(tars.urls))
    elif why == "large samples":
        big = str(write(tmp_path / "b.tar", [(f"k{i}.bin", bytes(8192)) for i in range(40)]))
        got = list(adq.ShardDataset(big, plan=adq.Plan.from_keys(big, None)))
    else:
        got = list(stream(tars))
    assert got
    assert not looked


def test_the_same_samples_come_from_parse_and_from_layouts(
    tars: TarSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = list(stream(tars))
    monkeypatch.setattr(readers, "_ENOUGH", 10**9)
    assert list(stream(tars)) == quick


def test_another_file_in_the_shards_place_is_laid_out_anew(tmp_path: Path) -> None:
    """Payloads the same, so that their crc32 is right: only the headers tell that the fields are others."""
    members = [(f"k{i}.{name}", b"%d" % i) for i in range(40) for name in ("abc", "cls")]
    path = write(tmp_path / "t.tar", members)
    dataset = adq.ShardDataset(str(path), plan=adq.Plan.from_keys(str(path), None))
    assert {tuple(s) for s in dataset} == {("__key__", "__url__", "abc", "cls")}
    status = path.stat()
    write(tmp_path / "new.tar", [(name.replace("abc", "xyz"), data) for name, data in members])
    os.utime(tmp_path / "new.tar", ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(tmp_path / "new.tar", path)
    assert {tuple(s) for s in dataset} == {("__key__", "__url__", "xyz", "cls")}
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    path.write_bytes(path.read_bytes().replace(b".xyz", b".abc"))
    with pytest.raises(adq.ShardError, match=r"key 'k0': .*checksum does not match"):
        list(dataset)


def test_a_payload_changed_in_place_is_the_error_it_always_was(tmp_path: Path) -> None:
    path = write(tmp_path / "t.tar", [(f"k{i}.bin", b"%04d" % i) for i in range(40)])
    dataset = adq.ShardDataset(str(path), plan=adq.Plan.from_keys(str(path), None))
    assert len(list(dataset)) == 40
    status = path.stat()
    path.write_bytes(path.read_bytes().replace(b"0017", b"0018"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # same file, size and date
    got: list[Any] = []
    expected = f"key 'k17': bytes differ: found key 'k17' with crc32 {crc32(b'0018'):08x}"
    with pytest.raises(adq.ShardError, match=expected):
        got.extend(iter_each(dataset, got))
    assert [s["__key__"] for s in got] == [f"k{i}" for i in range(17)]


def iter_each(dataset: adq.ShardDataset, into: list[Any]) -> list[Any]:
    for sample in dataset:
        into.append(sample)  # one by one: what came before an error is kept
    return []


def test_a_shard_that_is_gone_is_an_error_when_its_turn_comes(tars: TarSet) -> None:
    dataset = stream(tars, shuffle=False)
    os.remove(tars.urls[1])
    got: list[Any] = []
    with pytest.raises(adq.ShardError, match=r"t-001\.tar: cannot be opened: No such file"):
        iter_each(dataset, got)
    assert ids(got) == [place for place in tars.kept if place[0] == "t-000.tar"]


def test_what_is_remembered_is_bounded_and_stays_in_its_process(
    tars: TarSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = stream(tars, shuffle=False)
    before = len(pickle.dumps(dataset))
    list(dataset)
    layouts = dataset._recipe.layouts
    assert list(layouts._known) == [0, 1]
    assert layouts._n_rows == 110
    assert sum(known.shape.nbytes + known.size.nbytes for known in layouts._known.values()) == 17 * 110
    assert len(pickle.dumps(dataset)) == before
    assert not pickle.loads(pickle.dumps(layouts))._known  # noqa: S301 - our own bytes
    monkeypatch.setattr(layout, "_MAX_ROWS", 100)
    dataset = stream(tars, shuffle=False)
    assert ids(dataset) == ids(dataset) == tars.kept
    assert list(dataset._recipe.layouts._known) == [1]
    assert dataset._recipe.layouts._n_rows == 50
