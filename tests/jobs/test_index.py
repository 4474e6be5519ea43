"""An index says where every sample lies, is made once, and notices when its shards are no longer those."""

import bz2
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import adq_wds as adq
from adq_wds.cli.main import main
from adq_wds.jobs.index import IndexReport, index_shards
from adq_wds.shards.samples_in_tar import payload_crc32, read_sample, span_at
from adq_wds.tables.index import read_index, save_index
from adq_wds.tables.spans import Spans, scan_spans
from adq_wds.writing.write_shards import write_kept
from tests.conftest import MakeShard
from tests.folders import load_index, members


@pytest.fixture
def shards(make_shard: MakeShard) -> list[Path]:
    return [make_shard("in/b.tar", 6), make_shard("in/a.tar", 5, first=6), make_shard("in/c.tar", 4)]


def rows(found: dict[str, Spans]) -> dict[str, list[tuple[int, str, int, int, int]]]:
    return {name: spans.rows() for name, spans in found.items()}


def touch(path: Path, seconds: int = 10) -> None:
    """A later date."""
    now = path.stat().st_mtime_ns + seconds * 10**9
    os.utime(path, ns=(now, now))


def replace(path: Path, data: bytes) -> None:
    """Another content under the old date."""
    before = path.stat().st_mtime_ns
    path.write_bytes(data)
    os.utime(path, ns=(before, before))


def swap_keys(data: bytes, old: bytes, new: bytes) -> bytes:
    """The same tar with another key of equal length, its headers' checksums made right."""
    blocks = [bytearray(data[i : i + 512]) for i in range(0, len(data), 512)]
    for block in blocks:
        if block[:100].startswith(old) and block[257:262] == b"ustar":
            block[: len(old)] = new
            block[148:156] = b" " * 8
            block[148:156] = b"%06o\0 " % sum(block)
    return b"".join(blocks)


# ---- What it says


def test_every_sample_is_where_the_index_says(shards: list[Path], tmp_path: Path) -> None:
    report = index_shards(shards, tmp_path / "i.parquet")
    found = load_index(tmp_path / "i.parquet")
    assert list(found) == ["a.tar", "b.tar", "c.tar"]
    for path in shards:
        data, expected = path.read_bytes(), dict(members(path))
        assert found[path.name].keys == list(dict.fromkeys(name.partition(".")[0] for name in expected))
        for _, key, byte_offset, n_bytes, crc32 in found[path.name].rows():
            part = data[byte_offset : byte_offset + n_bytes]
            span = span_at(part, shard=path.name)
            assert (span.key, payload_crc32(part, span)) == (key, crc32)
            sample = read_sample(part, span, url="u")
            payloads = {f"{key}.{field}": value for field, value in sample.items() if field[:2] != "__"}
            assert payloads == {name: data for name, data in expected.items() if name.startswith(f"{key}.")}
    total = sum(path.stat().st_size for path in shards)
    assert report == IndexReport(str(tmp_path / "i.parquet"), 3, 15, total, 3)


def test_the_file_has_the_columns_that_are_documented(shards: list[Path], tmp_path: Path) -> None:
    index_shards(shards, tmp_path / "i.parquet")
    file = pq.ParquetFile(tmp_path / "i.parquet")
    assert [(field.name, str(field.type)) for field in file.schema_arrow] == [
        ("shard", "string"), ("index", "int32"), ("key", "string"), ("byte_offset", "int64"), ("n_bytes", "int64"),
        ("crc32", "uint32"), ("members", "string"),
    ]  # fmt: skip
    assert file.metadata.num_row_groups == 3
    table = file.read()
    assert table["shard"].to_pylist() == ["a.tar"] * 5 + ["b.tar"] * 6 + ["c.tar"] * 4
    assert table["index"].to_pylist() == [*range(5), *range(6), *range(4)]
    header = json.loads(file.metadata.metadata[b"adq_wds"])
    assert header["format"] == "adq_wds.index"
    stamps = {
        path.name: {"bytes": path.stat().st_size, "mtime_ns": path.stat().st_mtime_ns} for path in shards
    }
    assert {entry["name"]: entry["source"] for entry in header["shards"]} == stamps


def test_scan_index_and_the_index_of_written_shards_agree(shards: list[Path], tmp_path: Path) -> None:
    write_kept(shards, None, tmp_path / "out" / "%d.tar", max_samples=4)
    paths = sorted((tmp_path / "out").glob("*.tar"))
    index_shards(tmp_path / "out", tmp_path / "i.parquet")
    index_shards(paths[::-1], tmp_path / "j.parquet")
    assert (tmp_path / "i.parquet").read_bytes() == (tmp_path / "j.parquet").read_bytes()
    report = index_shards(tmp_path / "out" / "_info.json", tmp_path / "k.parquet", split="train")
    assert (report.shards, report.samples) == (len(paths), 15)
    expected = rows({path.name: scan_spans(path, shard=path.name) for path in paths})
    for file in ("i.parquet", "k.parquet", "out/index.parquet"):
        assert rows(load_index(tmp_path / file)) == expected


# ---- Again


def test_shards_of_the_same_size_and_date_are_not_read_again(
    shards: list[Path], make_shard: MakeShard, tmp_path: Path
) -> None:
    out = tmp_path / "i.parquet"
    index_shards(shards, out)
    first = out.read_bytes()
    replace(shards[0], b"x" * shards[0].stat().st_size)  # would be an error if it was read
    assert index_shards(shards, out).scanned == 0
    assert out.read_bytes() == first
    touch(shards[0])
    with pytest.raises(adq.ShardError, match=r"shard b\.tar, byte 0: not a tar file"):
        index_shards(shards, out)
    assert out.read_bytes() == first  # whole or not at all
    make_shard("in/b.tar", 9)
    report = index_shards([*shards, make_shard("in/d.tar", 2)], out)
    assert (report.scanned, report.shards, report.samples) == (2, 4, 20)
    assert index_shards(shards[1:], out).samples == 9
    assert list(load_index(out)) == ["a.tar", "c.tar"]  # an index holds the shards that were named


def test_nothing_but_an_index_is_written_over(shards: list[Path], tmp_path: Path) -> None:
    plan = tmp_path / "plan.parquet"
    adq.Plan.from_keys([str(path) for path in shards], None).save(plan)
    (tmp_path / "notes.txt").write_text("mine")
    for path in (plan, tmp_path / "notes.txt", tmp_path / "in"):
        before = path.read_bytes() if path.is_file() else None
        with pytest.raises(adq.AdqError, match=r"nothing is written over it: remove it, or give"):
            index_shards(shards, path)
        assert before is None or path.read_bytes() == before


# ---- Descriptions


def test_counts_of_a_description_are_compared(shards: list[Path], tmp_path: Path) -> None:
    info: dict[str, Any] = {"splits": {"t": {"filenames": ["b.tar", "a.tar"], "shard_lengths": [6, 5]}}}
    (tmp_path / "in" / "_info.json").write_text(json.dumps(info))
    assert index_shards(tmp_path / "in" / "_info.json", tmp_path / "i.parquet").samples == 11
    index_shards(shards[:2], tmp_path / "j.parquet")
    assert (tmp_path / "i.parquet").read_bytes() == (tmp_path / "j.parquet").read_bytes()
    info["splits"]["t"]["shard_lengths"] = [6, 4]
    (tmp_path / "in" / "_info.json").write_text(json.dumps(info))
    for out in (tmp_path / "i.parquet", tmp_path / "k.parquet"):  # unchanged shards, and new ones
        with pytest.raises(adq.ShardError, match=r"shard a\.tar: 5 samples, its description says 4: fetch"):
            index_shards(tmp_path / "in" / "_info.json", out)
    assert not (tmp_path / "k.parquet").exists()
    shardlist = [{"url": "c.tar", "nsamples": 4}, {"url": "a.tar", "nsamples": 5}]
    wids = {"wids_version": 1, "shardlist": shardlist}
    (tmp_path / "in" / "index.json").write_text(json.dumps(wids))
    assert index_shards(tmp_path / "in" / "index.json", tmp_path / "w.parquet").samples == 9


# ---- What cannot be read


def test_unreadable_shards_are_named(shards: list[Path], tmp_path: Path) -> None:
    data = shards[0].read_bytes()
    (tmp_path / "z.tar").write_bytes(bz2.compress(data))
    os.mkfifo(tmp_path / "f.tar")
    (tmp_path / "e.tar").touch()
    (tmp_path / "cut.tar").write_bytes(data[:3000])
    cases = {"z": "bzip2", "f": "fifo", "e": "empty file", "cut": "truncated", "no": "cannot be opened"}
    for name, text in cases.items():
        with pytest.raises(adq.ShardError, match=rf"shard .*{name}\.tar.*{text}"):
            index_shards([*shards, tmp_path / f"{name}.tar"], tmp_path / "i.parquet")
        assert not (tmp_path / "i.parquet").exists()


def test_wrong_arguments_are_value_errors(shards: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"split 'train' needs a description, such as FOLDER/_info\.json"):
        index_shards(shards, tmp_path / "i.parquet", split="train")
    (tmp_path / "_info.json").write_text('{"splits": {}}')
    with pytest.raises(ValueError, match=r"_info\.json lists no shards"):
        index_shards(tmp_path / "_info.json", tmp_path / "i.parquet")
    shutil.copy(shards[0], tmp_path / "a*.tar")
    with pytest.raises(adq.PlanError, match=r"is refused: it holds \*; rename"):
        index_shards(tmp_path / "a*.tar", tmp_path / "i.parquet")


# ---- Is it still theirs?


@pytest.fixture
def index(shards: list[Path], tmp_path: Path) -> Path:
    index_shards(shards, tmp_path / "i.parquet")
    return tmp_path / "i.parquet"


def files(shards: list[Path]) -> dict[str, Path]:
    return {path.name: path for path in shards}


def test_an_index_of_unchanged_or_moved_shards_is_taken(
    shards: list[Path], index: Path, tmp_path: Path
) -> None:
    everything = rows(load_index(index))
    assert rows(load_index(index, files=files(shards))) == {
        path.name: everything[path.name] for path in shards
    }
    moved = [Path(shutil.copy(path, tmp_path)) for path in shards]  # with the dates of now
    for path in moved:
        touch(path)
    assert rows(load_index(index, files=files(moved[:1]))) == {"b.tar": everything["b.tar"]}


def test_a_shard_of_another_size_is_named(shards: list[Path], index: Path, make_shard: MakeShard) -> None:
    before = shards[1].stat().st_size
    make_shard("in/a.tar", 30)
    now = shards[1].stat().st_size
    text = rf"shard a\.tar: {now:,} bytes, {before:,} when it was indexed: .*index it again"
    with pytest.raises(adq.ShardError, match=text):
        load_index(index, files=files(shards))
    assert len(load_index(index)) == 3  # the index itself is whole


def test_a_later_shard_is_known_by_its_headers(shards: list[Path], index: Path) -> None:
    data = shards[0].read_bytes()
    replace(shards[0], swap_keys(data, b"s00002", b"s00092"))
    assert len(load_index(index, files=files(shards))) == 3  # of the same size and date: not looked into
    touch(shards[0])
    text = r"shard b\.tar: sample 2 is 's00092' at byte (\d+) \((\d+) bytes\), 's00002' at byte \1 \(\2 bytes\) when"
    with pytest.raises(adq.ShardError, match=text):
        load_index(index, files=files(shards))
    at = int(load_index(index)["b.tar"].byte_offset[2])
    shards[0].write_bytes(data[:at] + b"\0" * (len(data) - at))
    touch(shards[0], 20)
    text = rf"shard b\.tar: sample 2 is nothing, 's00002' at byte {at} .* index it again"
    with pytest.raises(adq.ShardError, match=text):
        load_index(index, files=files(shards))
    shards[0].write_bytes(b"\xff" + data[1:])
    touch(shards[0], 30)
    with pytest.raises(adq.ShardError, match=r"shard b\.tar.*not a tar file"):
        load_index(index, files=files(shards))


def test_an_index_without_dates_is_held_against_headers(shards: list[Path], tmp_path: Path) -> None:
    save_index(tmp_path / "i.parquet", [("b.tar", scan_spans(shards[0], shard="b.tar"))])
    assert len(load_index(tmp_path / "i.parquet", files={"b.tar": shards[0]})["b.tar"]) == 6
    with pytest.raises(adq.ShardError, match=r"shard b\.tar: sample 0 is 's00006'.*, 's00000'"):
        load_index(tmp_path / "i.parquet", files={"b.tar": shards[1]})


def test_a_shard_that_is_not_there_is_named(shards: list[Path], index: Path) -> None:
    shards[0].unlink()
    with pytest.raises(adq.ShardError, match=r"b\.tar: cannot be opened: No such file"):
        load_index(index, files=files(shards))


def spans(*rows: tuple[int, str, int, int, int]) -> Spans:
    return Spans.from_rows(rows)


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (spans((0, "a", 0, 1024, 1), (1, "a", 1024, 1024, 1)), "a key is listed twice"),
        (spans((0, "a", 0, 1024, 1), (2, "b", 1024, 1024, 1)), "positions are not 0, 1, 2"),
        (spans((0, "a", 0, 1024, 1), (1, "b", 512, 1024, 1)), "spans overlap"),
        (spans((0, "a", -512, 1024, 1)), "a span is empty or out of range"),
        (spans((0, "a", 0, 0, 1)), "a span is empty or out of range"),
        (spans((0, "a", 2**63 - 1, 1024, 1)), "a span is empty or out of range"),
    ],
)
def test_an_index_that_contradicts_itself_is_refused(found: Spans, text: str, tmp_path: Path) -> None:
    with np.errstate(over="ignore"):
        save_index(tmp_path / "i.parquet", [("a.tar", found)])
        with pytest.raises(adq.ShardError, match=rf"i\.parquet, shard a\.tar: damaged: {text}"):
            load_index(tmp_path / "i.parquet")


@pytest.mark.parametrize(
    "source", [3, {}, {"bytes": 1}, {"bytes": 1, "mtime_ns": True}, {"bytes": "1", "mtime_ns": 1}]
)
def test_a_stamp_of_another_form_is_refused(source: Any, tmp_path: Path) -> None:
    save_index(tmp_path / "i.parquet", [("a.tar", spans((0, "a", 0, 1024, 1)))], sources={"a.tar": source})
    with pytest.raises(adq.ShardError, match=r"damaged header: .*shards\[0\]\.source"):
        read_index(tmp_path / "i.parquet")


def test_rows_of_another_shard_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = spans((0, "a", 0, 1024, 1))
    columns = found.columns("b.tar", members=True)
    monkeypatch.setattr(Spans, "columns", lambda self, name, **options: columns)
    save_index(tmp_path / "i.parquet", [("a.tar", found)])
    with pytest.raises(adq.ShardError, match=r"shard a\.tar: damaged: rows of another shard"):
        read_index(tmp_path / "i.parquet")


def test_no_cut_and_no_flip_of_an_index_is_loaded_wrongly(index: Path, tmp_path: Path) -> None:
    data, expected = index.read_bytes(), rows(load_index(index))
    rng = np.random.default_rng(0)
    copy = tmp_path / "copy.parquet"
    refused = []
    for at in rng.integers(0, len(data), 60).tolist():
        for damaged in (data[:at], data[:at] + bytes([data[at] ^ (1 << at % 8)]) + data[at + 1 :]):
            copy.write_bytes(damaged)
            try:
                assert rows(load_index(copy)) == expected  # a byte that says nothing
            except adq.ShardError as error:
                refused.append(str(error))
    assert len(refused) >= 60
    assert all("copy.parquet" in text for text in refused)


# ---- The command


def test_the_command_says_what_it_did(
    shards: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "new" / "i.parquet")
    assert main(["index", *map(str, shards), "-o", out]) == 0
    assert capsys.readouterr().out == f"15 samples of 3 shards in {out} (3 shards read, 0 unchanged)\n"
    assert main(["index", str(tmp_path / "in"), "-o", out, "--json"]) == 0
    total = sum(path.stat().st_size for path in shards)
    said = json.loads(capsys.readouterr().out)
    assert said == {"path": out, "shards": 3, "samples": 15, "bytes": total, "scanned": 0}


def test_the_command_ends_with_the_code_of_its_error(
    shards: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards[0].write_bytes(shards[0].read_bytes()[:3000])
    for url, code, text in (
        (str(tmp_path / "in"), 1, "adq: ShardError: shard b.tar"),
        ("pipe:curl -u u:s3cret https://h/a.tar", 2, "adq: shard 'pipe:' … 'a.tar' is a command"),
        (" PIPE:s3cret", 2, "is a command, and running it is refused"),
        ("a.tar::pipe:s3cret", 2, "is a command, and running it is refused"),
    ):
        assert main(["index", url, "-o", str(tmp_path / "i.parquet")]) == code
        error = capsys.readouterr().err
        assert text in error
        assert "s3cret" not in error
    assert not (tmp_path / "i.parquet").exists()
