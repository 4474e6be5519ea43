"""An index of another library is taken where it is true of the shard, and equals the walk of the tar, sample by sample."""

import gzip
import importlib.util
import json
import logging
import os
import random
import shutil
import sqlite3
import tarfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import adq_wds as adq
from adq_wds.reading import listing
from adq_wds.remote.fetch import Fetch
from adq_wds.shards.samples_in_tar import Span, iter_spans
from adq_wds.tables import beside, webshart
from adq_wds.tables.beside import IndexesBeside
from adq_wds.tables.info import read_info
from tests.conftest import Caplog, MakeShard, MonkeyPatch, write_tar
from tests.golden.others import make

GOLDEN = Path(make.__file__).parent
DATABASE = ".nv-meta/index.sqlite"


def walked(path: Path) -> list[Span]:
    """The oracle."""
    return list(iter_spans(path.read_bytes(), shard=path.name))


def taken(path: Path) -> list[Span] | None:
    with IndexesBeside() as indexes:
        return indexes.spans(str(path), shard=path.name)


def put(folder: Path, *names: str) -> None:
    """Golden files, as young as can be."""
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(GOLDEN / name, folder / name)


ENERGON = (".nv-meta/.info.json", DATABASE)
WEBSHART = tuple(name.replace(".tar", ".json") for name in make.NAMES)


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    return make.make_shards(tmp_path)


@pytest.mark.parametrize("files", [ENERGON, WEBSHART], ids=["energon", "webshart"])
def test_golden_indexes_equal_the_walk(
    shards: list[Path], tmp_path: Path, files: tuple[str, ...], caplog: Caplog
) -> None:
    assert [taken(path) for path in shards] == [None, None]
    put(tmp_path, *files)
    assert [taken(path) for path in shards] == [walked(path) for path in shards]
    assert not caplog.records


def test_golden_counts_are_those_of_the_walk(shards: list[Path], tmp_path: Path) -> None:
    put(tmp_path, "wids.json")
    assert read_info(tmp_path / "wids.json") == [(str(shards[0]), len(walked(shards[0])))]


@pytest.mark.parametrize(
    ("library", "run"), [("megatron.energon", make.run_energon), ("webshart", make.run_webshart)]
)
def test_the_libraries_own_indexes_equal_the_walk(
    shards: list[Path], tmp_path: Path, library: str, run: Callable[[Path], None]
) -> None:
    package = library.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}, which writes the index")
    run(tmp_path)
    assert [taken(path) for path in shards] == [walked(path) for path in shards]


def webshart_index(path: Path, **more: Any) -> dict[str, Any]:
    """What webshart writes of a shard, by Python's tarfile; files in no order."""
    with tarfile.open(path) as tar:
        files = {m.name: {"offset": m.offset_data, "length": m.size} for m in tar if m.isfile()}
    names = sorted(files, key=hash)
    return {"filesize": path.stat().st_size, "files": {name: files[name] for name in names}, **more}


def write_index(path: Path, index: object) -> None:
    path.with_suffix(".json").write_text(json.dumps(index), encoding="utf-8")


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_any_tar_equals_the_walk_or_is_walked(seed: int, form: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=form) as tar:
        for i in range(rng.randint(1, 30)):
            folder = rng.choice(["", "f/", "f/" * 40])
            if rng.random() < 0.2:
                member = tarfile.TarInfo(f"{folder}d{i}")
                member.type = tarfile.DIRTYPE
                tar.addfile(member)
            for field in rng.sample(["jpg", "cls", "x.json", "TXT"], rng.randint(1, 4)):
                member = tarfile.TarInfo(f"{folder}k{i}.{field}")
                if form == tarfile.PAX_FORMAT and rng.random() < 0.5:
                    member.mtime = 0.5  # type: ignore[assignment]
                member.size = rng.choice([0, 1, 511, 512, 513, 3000])
                with (Path("/dev/zero")).open("rb") as zeros:
                    tar.addfile(member, zeros)
            if rng.random() < 0.2:
                tar.addfile(tarfile.TarInfo(f"{folder}README{i}"))
    write_index(path, webshart_index(path))
    assert taken(path) in (walked(path), None)
    if form == tarfile.USTAR_FORMAT:
        assert taken(path) is not None


def test_all_forms_of_webshart_are_read(shards: list[Path]) -> None:
    index = webshart_index(shards[0])
    files = index["files"].items()
    for form in (
        {"files": index["files"]},  # of no known size
        {"files": [{"path": name, **file} for name, file in files], "filesize": 0},
        {"files": [{"fname": name, **file} for name, file in files]},
        {
            "files": {name: {"offset": file["offset"], "size": file["length"]} for name, file in files},
            "hash": "x",
        },
    ):
        write_index(shards[0], form)
        assert taken(shards[0]) == walked(shards[0])


def other(index: dict[str, Any], name: str, **values: Any) -> dict[str, Any]:
    return {**index, "files": {**index["files"], name: {**index["files"][name], **values}}}


def without(index: dict[str, Any], *names: str) -> dict[str, Any]:
    return {**index, "files": {name: file for name, file in index["files"].items() if name not in names}}


NOT_TAKEN: list[tuple[str, Callable[[dict[str, Any]], object], str]] = [
    ("another size", lambda i: {**i, "filesize": 9}, "it was made of a file of 9 bytes"),
    ("no text", lambda i: {**i, "filesize": "9"}, "filesize is '9', expected int"),
    ("negative", lambda i: other(i, "s001.jpg", offset=-512), r"files\.s001\.jpg\.offset is -512"),
    ("negative size", lambda i: other(i, "s001.jpg", length=-1), r"files\.s001\.jpg\.length is -1"),
    ("beyond int64", lambda i: other(i, "s001.jpg", offset=2**70), r"offset is 11805916"),
    ("beyond the end", lambda i: other(i, "s004.v1.CLS", offset=1 << 40), "ends at byte 1,099,511,628,288, the shard at"),
    ("huge", lambda i: other(i, "s004.v1.CLS", length=1 << 40), "a member of 1,099,511,627,776 bytes"),
    ("overlapping", lambda i: other(i, "s001.jpg", length=900), "members that overlap, at byte"),
    ("no block", lambda i: other(i, "s000.jpg", offset=513), "members that overlap, at byte 513"),
    ("two at one byte", lambda i: {**i, "files": {**i["files"], "x.jpg": i["files"]["s001.jpg"]}}, "overlap"),
    ("another length", lambda i: other(i, "s004.jpg", length=1199), "is not used: "),
    ("half a character", lambda i: {**i, "files": {"\ud800.jpg": {"offset": 512, "length": 1}}}, "surrogates"),
    ("no length", lambda i: {**i, "files": {"a.jpg": {"offset": 512}}}, "lists a file without its length: 'a.jpg'"),
    ("a list", lambda i: {**i, "files": [1]}, r"files\[0\] is 1, expected object"),
    ("a sample left out", lambda i: without(i, "s002.jpg", "s002.v1.CLS"), r"it does not list 's002\.jpg'"),
    ("a field left out", lambda i: without(i, "s002.v1.CLS"), r"it does not list 's002\.v1\.CLS'"),
    ("cut", lambda i: {**i, "files": dict(sorted(i["files"].items())[:-2])}, "where the shard goes on"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "why"), [row[1:] for row in NOT_TAKEN], ids=[row[0] for row in NOT_TAKEN])
def test_a_wrong_index_is_not_taken_and_said(
    shards: list[Path], change: Callable[[dict[str, Any]], object], why: str, caplog: Caplog
) -> None:
    write_index(shards[0], change(webshart_index(shards[0])))
    assert taken(shards[0]) is None
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith("shard plain-000000.tar: webshart's index is not used: ")
    caplog.clear()
    assert taken(shards[0]) is None
    with pytest.raises(AssertionError, match=why):
        raise AssertionError(caplog.text)


def test_the_index_of_another_shard_of_that_size_is_not_taken(make_shard: MakeShard, caplog: Caplog) -> None:
    a, b = make_shard("a.tar", 5), make_shard("b.tar", 5, first=5)
    write_index(b, {"files": webshart_index(a)["files"]})
    assert taken(b) is None
    assert "webshart's index is not used: it " in caplog.text


def test_a_key_twice_is_the_walks_error(tmp_path: Path, caplog: Caplog) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.jpg", b"1"), ("b.jpg", b"2"), ("a.cls", b"3")])
    write_index(path, webshart_index(path))
    assert taken(path) is None
    assert "webshart's index is not used: key 'a': key twice in a shard" in caplog.text
    with pytest.raises(adq.ShardError, match=r"key twice in a shard"):
        adq.ShardDataset(str(path))


def test_a_file_left_out_behind_files_of_no_sample_is_seen(tmp_path: Path, caplog: Caplog) -> None:
    """Where unlisted files stand before members, the first one at a distance does not speak for the others."""
    members = [("a.jpg", b"1"), ("README", b"2"), ("b.jpg", b"3"), ("c.jpg", b"4"), ("d.jpg", b"5")]
    path = write_tar(tmp_path / "a.tar", members)
    index = without(webshart_index(path), "README")
    write_index(path, index)
    assert taken(path) == walked(path)
    write_index(path, without(index, "c.jpg"))
    assert taken(path) is None
    assert "webshart's index is not used: it does not list 'c.jpg'" in caplog.text


def test_an_index_older_than_its_shard_is_not_taken(
    shards: list[Path], tmp_path: Path, caplog: Caplog
) -> None:
    put(tmp_path, *ENERGON, *WEBSHART)
    later = (tmp_path / DATABASE).stat().st_mtime_ns + 10**9
    for path in shards:
        os.utime(path, ns=(later, later))
    assert [taken(path) for path in shards] == [None, None]
    assert (
        "Energon's index is not used: it is older than the shard (if it holds all the same, touch it)"
        in caplog.text
    )
    os.utime(tmp_path / WEBSHART[0], ns=(later, later))
    assert taken(shards[0]) == walked(shards[0])


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "not JSON that can be read"),
        ("<html>", "not JSON that can be read"),
        ("[" * 100_000, "not JSON that can be read"),
        ('{"files": {' + ",".join(f'"{i}":{{}}' for i in range(9000)) + "}}", "at most"),
        ("{}" + " " * 5000, None),
        ('{"files": 3}', None),
        ('{"caption": "of a sample"}', None),
        ("[]", None),
    ],
)
def test_json_of_all_kinds_is_no_error(
    shards: list[Path], text: str, why: str | None, caplog: Caplog, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.setattr("adq_wds.tables.bounds.MAX_HEADER_WEIGHT", 1 << 21)
    shards[0].with_suffix(".json").write_text(text)
    assert taken(shards[0]) is None
    assert why is None if not caplog.text else why is not None and why in caplog.text


def test_a_huge_index_is_not_read(
    shards: list[Path], tmp_path: Path, caplog: Caplog, monkeypatch: MonkeyPatch
) -> None:
    put(tmp_path, WEBSHART[0])
    monkeypatch.setattr(beside, "MAX_HEADER_BYTES", 100)
    monkeypatch.setattr(webshart, "read_members", None)
    assert taken(shards[0]) is None
    assert "it has 685 bytes, at most 100" in caplog.text


def test_a_shard_or_an_index_that_is_no_file_is_no_error(tmp_path: Path, caplog: Caplog) -> None:
    (path,) = [make.make_shards(tmp_path)[0]]
    assert taken(tmp_path / "missing.tar") is None
    assert taken(tmp_path) is None
    path.with_suffix(".json").mkdir()
    assert taken(path) is None
    path.with_suffix(".json").rmdir()
    os.mkfifo(path.with_suffix(".json"))
    assert taken(path) is None
    assert not caplog.records


@pytest.mark.parametrize(
    ("statement", "why"),
    [
        (
            "DELETE FROM samples WHERE sample_index = 2",
            r"does not have the 5 samples that \.nv-meta/\.info\.json lists",
        ),
        ("DELETE FROM sample_parts WHERE sample_index = 2", "a sample without members"),
        ("DELETE FROM sample_parts WHERE sample_index = 4", "a sample without members: 4"),
        ("INSERT INTO sample_parts VALUES (1, 9, 'jpg', 512, 1)", "members without a sample"),
        ("UPDATE sample_parts SET content_byte_offset = -512 WHERE sample_index = 2", "a negative number"),
        ("UPDATE sample_parts SET content_byte_size = 'x'", "it has a row"),
        (
            "UPDATE samples SET sample_key = x'ff00' WHERE tar_file_id = 1 AND sample_index = 2",
            "it has a row",
        ),
        ("UPDATE samples SET sample_key = 'x' || sample_key", "it lists 'xs00"),
        ("UPDATE samples SET byte_offset = byte_offset + 512", "members that overlap"),
        ("UPDATE samples SET byte_offset = 0 WHERE sample_index = 2", "members that overlap"),
        ("UPDATE samples SET byte_size = 1 << 40 WHERE sample_index = 4", "it ends at byte 1,099,5"),
        ("UPDATE sample_parts SET content_byte_size = 1 << 33", "a member of 8,589,934,592 bytes"),
        (
            "DELETE FROM sample_parts WHERE sample_index = 2 AND part_name = 'jpg'; "
            "UPDATE samples SET byte_offset = byte_offset + 1536 WHERE sample_index = 2",
            r"it does not list 's002\.jpg'",
        ),
        ("DROP TABLE sample_parts", "no table sample_parts: an older Energon's?"),
        (
            "ALTER TABLE samples RENAME TO old; CREATE TABLE samples(tar_file_id, sample_index, byte_offset, byte_size, "
            "sample_key AS (hex(zeroblob(4000)))); INSERT INTO samples SELECT tar_file_id, sample_index, byte_offset, "
            "byte_size FROM old",
            "no table samples",
        ),
        ("DROP TABLE samples; CREATE VIEW samples AS SELECT * FROM sample_parts", "no table samples"),
        ("DROP TABLE samples; CREATE VIRTUAL TABLE samples USING fts5(x)", "no table samples"),
        (
            "UPDATE sample_parts SET part_name = cast(zeroblob(100000) AS TEXT)",
            "no database that can be read",
        ),
    ],
)
def test_a_wrong_database_is_not_taken_and_said(
    shards: list[Path], tmp_path: Path, statement: str, why: str, caplog: Caplog
) -> None:
    put(tmp_path, *ENERGON)
    with closing(sqlite3.connect(tmp_path / DATABASE)) as connection:
        connection.executescript(statement)
    assert taken(shards[0]) is None
    with pytest.raises(AssertionError, match=f"shard plain-000000.tar: Energon's index is not used: .*{why}"):
        raise AssertionError(caplog.text)


def test_rows_that_share_their_bytes_are_bounded(shards: list[Path], tmp_path: Path, caplog: Caplog) -> None:
    put(tmp_path, *ENERGON)
    with closing(sqlite3.connect(tmp_path / DATABASE, isolation_level=None)) as connection:
        connection.executescript(
            "DROP TABLE samples; CREATE TABLE samples(tar_file_id, sample_key, sample_index, byte_offset, byte_size); "
            "INSERT INTO samples VALUES(0, hex(zeroblob(2000)), 0, 0, 512); PRAGMA page_size = 65536; VACUUM"
        )
        ((root,),) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'samples'")
    raw = bytearray((tmp_path / DATABASE).read_bytes())
    page, n = (root - 1) * 65536, 9000
    raw[page + 3 : page + 5] = n.to_bytes(2, "big")
    raw[page + 8 : page + 8 + 2 * n] = n * raw[page + 8 : page + 10]
    (tmp_path / DATABASE).write_bytes(raw)
    (tmp_path / ENERGON[0]).write_text('{"shard_counts": {"plain-000000.tar": 9000}}', encoding="utf-8")
    assert taken(shards[0]) is None
    assert "it has more text than bytes" in caplog.text


@pytest.mark.parametrize("data", [b"", b"SQLite format 3\0" + b"x" * 4000, b"{}", None])
def test_what_is_no_database_is_said(
    shards: list[Path], tmp_path: Path, data: bytes | None, caplog: Caplog
) -> None:
    put(tmp_path, *ENERGON)
    database = tmp_path / DATABASE
    database.unlink()
    if data is not None:
        database.write_bytes(data)
    assert taken(shards[0]) is None
    assert (data is None) == (not caplog.records)  # Energon 6 writes none


@pytest.mark.parametrize(
    "info", [b"{", b"[]", b'{"shard_counts": {"plain-000000.tar": -1}}', b'{"shard_counts": []}']
)
def test_a_wrong_list_of_shards_is_said_once(
    shards: list[Path], tmp_path: Path, info: bytes, caplog: Caplog
) -> None:
    put(tmp_path, *ENERGON)
    (tmp_path / ENERGON[0]).write_bytes(info)
    with IndexesBeside() as indexes:
        assert [indexes.spans(str(path), shard=path.name) for path in shards] == [None, None]
    assert len(caplog.records) == 1


def test_a_database_is_neither_written_nor_locked(shards: list[Path], tmp_path: Path) -> None:
    put(tmp_path, *ENERGON)
    before = (tmp_path / DATABASE).read_bytes()
    with closing(sqlite3.connect(tmp_path / DATABASE, isolation_level=None)) as writer:
        writer.execute("BEGIN EXCLUSIVE")
        assert taken(shards[0]) == walked(shards[0])
    assert (tmp_path / DATABASE).read_bytes() == before
    assert sorted(path.name for path in (tmp_path / ".nv-meta").iterdir()) == [".info.json", "index.sqlite"]


def test_a_stream_without_plan_takes_them_and_walks_nothing(
    shards: list[Path], tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    urls = [str(path) for path in shards]
    expected = list(adq.ShardDataset(urls, shuffle=True))
    put(tmp_path, *WEBSHART)
    monkeypatch.setattr(listing, "scan_spans", lambda *_: pytest.fail("walked"))
    ds = adq.ShardDataset(urls, shuffle=True)
    assert len(ds) == len(expected) == 11
    assert list(ds) == expected


def test_shards_with_and_without_an_index_give_one_order(
    shards: list[Path], tmp_path: Path, make_shard: MakeShard
) -> None:
    """One is taken from its index, one walked, one unpacked first, whose checksums the others lack."""
    packed = tmp_path / "packed.tar.gz"
    packed.write_bytes(gzip.compress(make_shard("packed.tar", 3, first=90).read_bytes()))
    urls = [*map(str, shards), str(packed)]
    expected = list(adq.ShardDataset(urls, shuffle=True, batch_size=2))
    put(tmp_path, WEBSHART[0])
    assert taken(shards[0]) is not None
    assert taken(shards[1]) is None
    assert list(adq.ShardDataset(urls, shuffle=True, batch_size=2)) == expected


def test_a_sample_that_has_changed_is_an_error_of_the_stream(shards: list[Path], tmp_path: Path) -> None:
    """Headers that no check looked at are compared when their sample is read."""
    put(tmp_path, *WEBSHART)
    ds = adq.ShardDataset(str(shards[0]))
    data = bytearray(shards[0].read_bytes())
    data[512] ^= 1  # the second header
    shards[0].write_bytes(data)
    with pytest.raises(adq.ShardError, match=r"plain-000000\.tar"):
        list(ds)


@pytest.mark.parametrize("folder", ["s3://bucket", "https://host.example"])
def test_nothing_is_asked_for_above_a_host_or_bucket(folder: str) -> None:
    asked: list[str] = []

    class Recorded(Fetch):
        def remote(self, url: str, *, shard: str) -> Any:
            asked.append(url)
            if url.endswith(".tar"):
                return SimpleNamespace(stamp=lambda: {"bytes": 1024}, read_ranges=None)
            raise adq.ShardError("none")

    with IndexesBeside(Recorded()) as indexes:
        assert indexes.spans(f"{folder}/a.tar", shard="a.tar") is None
    assert asked == [f"{folder}/{name}" for name in ("a.tar", ".nv-meta/.info.json", "a.json")]
