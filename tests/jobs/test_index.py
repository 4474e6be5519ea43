"""An index says where every sample lies, is made once, and notices when its shards are no longer those."""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pyarrow.parquet as pq
import pytest

import adq_wds as adq
from adq_wds.cli.main import main
from adq_wds.engines.engine import Task
from adq_wds.engines.shared import Shared
from adq_wds.jobs.index import IndexReport, _Scan, index_shards
from adq_wds.jobs.verify import verify_shards
from adq_wds.shards.samples_in_tar import payload_crc32, read_sample, span_at
from adq_wds.tables.index import read_index, save_index
from adq_wds.tables.spans import Spans, scan_spans
from adq_wds.writing.write_shards import write_kept
from tests.conftest import Capsys, MakeShard
from tests.folders import load_index, members
from tests.golden.others.make import make_shards


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
    found = [(path.name, path.stat()) for path in shards]
    stamps = {name: {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns} for name, stat in found}
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


def test_wrong_arguments_are_value_errors(shards: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"split 'train' needs a description, such as FOLDER/_info\.json"):
        index_shards(shards, tmp_path / "i.parquet", split="train")
    (tmp_path / "_info.json").write_text('{"splits": {}}')
    with pytest.raises(ValueError, match=r"_info\.json lists no shards"):
        index_shards(tmp_path / "_info.json", tmp_path / "i.parquet")
    shutil.copy(shards[0], tmp_path / "a*.tar")
    with pytest.raises(adq.PlanError, match=r"is refused: it holds \*; rename"):
        index_shards(tmp_path / "a*.tar", tmp_path / "i.parquet")


@pytest.fixture
def index(shards: list[Path], tmp_path: Path) -> Path:
    index_shards(shards, tmp_path / "i.parquet")
    return tmp_path / "i.parquet"


def files(shards: list[Path]) -> dict[str, Path]:
    return {path.name: path for path in shards}


def test_an_index_of_same_or_moved_shards_is_taken(shards: list[Path], index: Path, tmp_path: Path) -> None:
    everything = rows(load_index(index))
    assert rows(load_index(index, files=files(shards))) == {p.name: everything[p.name] for p in shards}
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


def test_the_command_says_what_it_did(shards: list[Path], tmp_path: Path, capsys: Capsys) -> None:
    out = str(tmp_path / "new" / "i.parquet")
    assert main(["index", *map(str, shards), "-o", out]) == 0
    assert capsys.readouterr().out == f"15 samples of 3 shards in {out} (3 shards read, 0 unchanged)\n"
    assert main(["index", str(tmp_path / "in"), "-o", out, "--json"]) == 0
    total = sum(path.stat().st_size for path in shards)
    said = json.loads(capsys.readouterr().out)
    assert said == {"path": out, "shards": 3, "samples": 15, "bytes": total, "scanned": 0, "taken": 0}


def test_without_checksums_headers_or_an_index_are_read(
    tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same samples; none has a crc32, and a stream verifies headers alone."""
    shards = make_shards(tmp_path)
    golden = Path(make_shards.__code__.co_filename).parent / "plain-000000.json"
    shutil.copyfile(golden, tmp_path / golden.name)
    out, every = tmp_path / "i.parquet", tmp_path / "all.parquet"
    index_shards(shards, every)
    flags = [*map(str, shards), "--no-checksums", "-o"]
    assert main(["index", *flags, str(out)]) == 0
    said = f"11 samples of 2 shards in {out} (1 shards read, 1 taken from indexes beside them, 0 unchanged)"
    assert capsys.readouterr().out == f"{said}\n"
    assert {name: [row[:-1] for row in found] for name, found in rows(load_index(out)).items()} == {
        name: [row[:-1] for row in found] for name, found in rows(load_index(every)).items()
    }
    assert not any(shard.checked for shard in read_index(out).values())
    assert "crc32" not in pq.read_schema(out).names
    assert index_shards(shards, out, checksums=False).scanned == 0
    golden_samples = list(adq.ShardDataset(list(map(str, shards)), index=every))
    ds = adq.ShardDataset(list(map(str, shards)), index=out)
    assert list(ds) == golden_samples
    with pytest.raises(adq.ShardError, match=r"no checksums to compare with: make it without --no-checksums"):
        verify_shards(out, list(map(str, shards)))
    with pytest.raises(
        adq.AdqError, match=r"it has checksums, which the new one would not have; .*another name"
    ):
        index_shards(shards, every, checksums=False)
    assert index_shards(shards, out).scanned == 2
    assert rows(load_index(out)) == rows(load_index(every))


def test_the_command_ends_with_its_errors_code(shards: list[Path], tmp_path: Path, capsys: Capsys) -> None:
    shards[0].write_bytes(shards[0].read_bytes()[:3000])
    assert main(["index", str(tmp_path / "in"), "-o", str(tmp_path / "i.parquet")]) == 1
    assert "adq: ShardError: shard b.tar" in capsys.readouterr().err
    assert not (tmp_path / "i.parquet").exists()


# ---- By several commands


def test_a_command_that_is_late_reads_no_shard_again(
    shards: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another makes the index, and removes the scratch files, while this one is about to read its first shard."""
    out, scan = tmp_path / "i.parquet", _Scan._scanned

    def late(self: _Scan, task: Task) -> Spans:
        monkeypatch.setattr(_Scan, "_scanned", scan)
        scratch = next(tmp_path.glob(".adq-scratch-*"))
        index_shards(shards, tmp_path / "other" / "i.parquet")
        os.replace(tmp_path / "other" / "i.parquet", out)
        scratch.rename(tmp_path / "gone")
        monkeypatch.setattr("adq_wds.jobs.index.scan_spans", None)  # nothing calls it
        return scan(self, task)

    monkeypatch.setattr(_Scan, "_scanned", late)
    assert index_shards(shards, out, engine=Shared(tmp_path, beat=0.1)).samples == 15


def test_commands_that_share_read_each_shard_once_and_make_one_index(
    shards: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are at work at once; one that was killed before them had read a shard."""
    index_shards(shards, tmp_path / "one" / "i.parquet")
    out, read = tmp_path / "two" / "i.parquet", list[str]()

    def killed(path: str, *, shard: str, checksums: bool) -> Spans:
        if read:
            raise KeyboardInterrupt
        read.append(shard)
        return scan_spans(path, shard=shard, checksums=checksums)

    monkeypatch.setattr("adq_wds.jobs.index.scan_spans", killed)
    with pytest.raises(KeyboardInterrupt):
        index_shards(shards, out, engine=Shared(out.parent, beat=0.1))
    both = Barrier(2, timeout=60)

    def scan(path: str, *, shard: str, checksums: bool) -> Spans:
        both.wait()
        read.append(shard)
        return scan_spans(path, shard=shard, checksums=checksums)

    monkeypatch.setattr("adq_wds.jobs.index.scan_spans", scan)
    with ThreadPoolExecutor(2) as pool:
        reports = list(
            pool.map(lambda _: index_shards(shards, out, engine=Shared(out.parent, beat=0.1)), range(2))
        )
    assert sorted(read) == ["a.tar", "b.tar", "c.tar"]
    assert {report.samples for report in reports} == {15}
    assert out.read_bytes() == (tmp_path / "one" / "i.parquet").read_bytes()
    assert os.listdir(out.parent) == ["i.parquet"]
    late = index_shards(shards, out, engine=Shared(out.parent, beat=0.1))
    assert str(late).endswith("(0 shards read, 3 unchanged)")


def test_a_shared_index_is_not_written_to_a_url(shards: list[Path]) -> None:
    with pytest.raises(ValueError, match="engine='shared' writes an index to a folder, not to a URL"):
        index_shards(shards, "s3://bucket/i.parquet", engine="shared")
