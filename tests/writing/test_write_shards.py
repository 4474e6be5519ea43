"""New shards hold exactly the kept samples, bytes untouched, and never look whole while they are not."""

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import webdataset as wds

import adq_wds as adq
from adq_wds.tables.spans import scan_spans
from adq_wds.writing.write_shards import WriteReport, write_kept
from tests.conftest import MakeShard
from tests.folders import contents, load_index, samples_in

Setup = tuple[list[Path], Path]


@pytest.fixture
def setup(make_shard: MakeShard, tmp_path: Path) -> Setup:
    """Three shards of 40 samples, two with the same keys; a plan that keeps a third."""
    shards = [make_shard("in/b.tar", 40), make_shard("in/a.tar", 40, first=40), make_shard("in/c.tar", 40)]
    features = adq.embed_shards(shards, out=tmp_path / "features")
    adq.build_plan(features, bins=3, keep=1 / 3, out=tmp_path / "plan.parquet")
    return shards, tmp_path / "plan.parquet"


def kept_samples(shards: list[Path], plan: Path) -> list[dict[str, Any]]:
    path_of = {path.name: path for path in shards}
    pairs = [zip(samples_in(path_of[s.name]), s.kept, strict=True) for s in adq.load_plan(plan)]
    return [sample for each in pairs for sample, kept in each if kept]


def test_kept_samples_are_written_in_order_with_their_bytes(setup: Setup, tmp_path: Path) -> None:
    shards, plan = setup
    report = write_kept(shards, plan, tmp_path / "out" / "%06d.tar", max_samples=15)
    expected = kept_samples(shards, plan)
    assert len(expected) == 40
    assert samples_in(tmp_path / "out") == expected
    sizes = [path.stat().st_size for path in (tmp_path / "out").glob("*.tar")]
    payload = sum(len(v) for s in expected for k, v in s.items() if k != "__key__")
    total, source = sum(sizes), sum(path.stat().st_size for path in shards)
    assert report == WriteReport(len(sizes), 40, payload_bytes=payload, bytes=total, source_bytes=source)
    urls = sorted(map(str, (tmp_path / "out").glob("*.tar")))
    places = ("__url__", "__local_path__")
    stock = wds.WebDataset(urls, shardshuffle=False)
    assert [{n: v for n, v in sample.items() if n not in places} for sample in stock] == expected


def test_without_a_plan_everything_is_samples_in(setup: Setup, tmp_path: Path) -> None:
    shards, _ = setup
    report = write_kept(shards, None, tmp_path / "out" / "%06d.tar", max_bytes=20_000)
    assert report.samples == 120
    assert samples_in(tmp_path / "out") == samples_in(*sorted(shards))
    assert not (tmp_path / "out" / "plan.parquet").exists()
    write_kept(shards, None, tmp_path / "all" / "%06d.tar")  # no shard holds a key twice
    assert [len(samples_in(p)) for p in sorted((tmp_path / "all").glob("*.tar"))] == [80, 40]


def test_equal_input_gives_equal_bytes_in_every_file(setup: Setup, tmp_path: Path) -> None:
    shards, plan = setup
    for name, order in (("x", shards), ("y", shards[::-1])):
        write_kept(order, plan, tmp_path / name / "%06d.tar", max_samples=7)
    assert contents(tmp_path / "x") == contents(tmp_path / "y")
    assert set(contents(tmp_path / "x")) >= {"_info.json", "index.parquet", "plan.parquet", "000000.tar"}


def test_beside_the_shards_lie_info_index_and_plan(setup: Setup, tmp_path: Path) -> None:
    shards, plan = setup
    out = tmp_path / "out"
    write_kept(shards, plan, out / "small-%04d.tar", max_samples=12, split="val")
    paths = sorted(out.glob("*.tar"))
    lengths = [len(samples_in(path)) for path in paths]
    names = [path.name for path in paths]
    split = {"name": "val", "num_samples": 40, "filenames": names, "shard_lengths": lengths}
    assert json.loads((out / "_info.json").read_text()) == {"splits": {"val": split}}
    index = {name: spans.rows() for name, spans in load_index(out / "index.parquet").items()}
    assert index == {path.name: scan_spans(path, shard=path.name).rows() for path in paths}
    assert adq.load_plan(out / "plan.parquet").hash == adq.load_plan(plan).hash


def test_class_names_are_in_info(make_shard: MakeShard, tmp_path: Path) -> None:
    shard = make_shard("a.tar", 10, label="txt")
    adq.embed_shards(shard, out=tmp_path / "f", label="txt")
    plan = adq.build_plan(tmp_path / "f", bins=2, keep=0.5)
    write_kept(shard, plan, tmp_path / "out" / "%d.tar")
    assert json.loads((tmp_path / "out" / "_info.json").read_text())["classes"] == ["0", "1"]


def test_a_stream_of_webdataset_is_samples_in(setup: Setup, tmp_path: Path) -> None:
    shards, plan = setup
    stream = wds.WebDataset(sorted(map(str, shards)), shardshuffle=False).compose(adq.Subsample(plan))
    report = adq.write_shards(stream, tmp_path / "out" / "%06d.tar")
    assert samples_in(tmp_path / "out") == kept_samples(shards, plan)
    assert (report.samples, report.source_bytes) == (40, None)


def test_a_plan_that_keeps_nothing_writes_a_complete_empty_set(setup: Setup, tmp_path: Path) -> None:
    shards, _ = setup
    plan = adq.build_plan(tmp_path / "features", bins=2, keep=0.0)
    assert write_kept(shards, plan, tmp_path / "out" / "%06d.tar").samples == 0
    assert json.loads((tmp_path / "out" / "_info.json").read_text())["splits"]["train"]["filenames"] == []


def test_an_earlier_runs_folder_is_refused_and_left_alone(setup: Setup, tmp_path: Path) -> None:
    shards, plan = setup
    pattern = tmp_path / "out" / "%06d.tar"
    write_kept(shards, None, pattern, max_samples=15)
    before = contents(tmp_path / "out")
    with pytest.raises(
        adq.AdqError, match=r"out' holds _info.json .*give another folder, empty this one, or overwrite=True"
    ):
        write_kept(shards, plan, pattern)
    (tmp_path / "out" / "_info.json").unlink()
    with pytest.raises(adq.AdqError, match=r"out' holds 000000.tar of an earlier run"):
        write_kept(shards, plan, pattern)
    del before["_info.json"]
    assert contents(tmp_path / "out") == before


def test_overwriting_leaves_what_a_fresh_folder_would_hold(setup: Setup, tmp_path: Path) -> None:
    shards, plan = setup
    write_kept(shards, plan, tmp_path / "fresh" / "%06d.tar")
    write_kept(shards, None, tmp_path / "out" / "%06d.tar", max_samples=5)
    write_kept(shards, plan, tmp_path / "out" / "%06d.tar", overwrite=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")
    write_kept(shards, None, tmp_path / "all" / "%06d.tar")
    write_kept(shards, None, tmp_path / "out" / "%06d.tar", overwrite=True)  # the plan's copy must go too
    assert contents(tmp_path / "out") == contents(tmp_path / "all")


def test_a_plan_in_the_overwritten_folder_may_be_in_use(setup: Setup, tmp_path: Path) -> None:
    shards, plan = setup
    pattern = tmp_path / "out" / "%06d.tar"
    write_kept(shards, plan, pattern)
    before = contents(tmp_path / "out")
    write_kept(shards, tmp_path / "out" / "plan.parquet", pattern, overwrite=True)
    assert contents(tmp_path / "out") == before
    shards[0].write_bytes(shards[0].read_bytes()[:5000])
    with pytest.raises(adq.ShardError):
        write_kept(shards, tmp_path / "out" / "plan.parquet", pattern, overwrite=True)
    assert (tmp_path / "out" / "plan.parquet").read_bytes() == before["plan.parquet"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_sources_are_never_written_over(make_shard: MakeShard, tmp_path: Path, overwrite: bool) -> None:
    shards = [make_shard(f"in/{i:06d}.tar", 5) for i in range(3)]
    before = contents(tmp_path / "in")
    (tmp_path / "link").symlink_to(tmp_path / "in")
    for folder in ("in", "link"):
        with pytest.raises(ValueError, match=r"000000.tar' would be written over .*; write to another"):
            write_kept(shards, None, tmp_path / folder / "%06d.tar", overwrite=overwrite)
    assert contents(tmp_path / "in") == before


def test_a_stream_that_breaks_leaves_whole_shards_and_no_info(setup: Setup, tmp_path: Path) -> None:
    shards, _ = setup

    def broken() -> Iterator[dict[str, Any]]:
        yield from samples_in(shards[0])[:25]
        raise RuntimeError("broke")

    with pytest.raises(RuntimeError, match="broke"):
        adq.write_shards(broken(), tmp_path / "out" / "%06d.tar", max_samples=10)
    assert sorted(contents(tmp_path / "out")) == ["000000.tar", "000001.tar"]
    assert len(samples_in(tmp_path / "out")) == 20


# ---- A plan of other shards (F29)


@pytest.mark.parametrize(
    ("more", "without", "text"),
    [
        ([], 1, r"shard 'b.tar' of the plan is not among the 2 shards given \(1 missing"),
        (["in/d.tar"], 0, "shard 'd.tar' is not in the plan"),
        (["other/b.tar"], 0, "both match 'b.tar' of the plan"),
    ],
)
def test_other_shards_than_the_plans_are_named(
    setup: Setup, make_shard: MakeShard, tmp_path: Path, more: list[str], without: int, text: str
) -> None:
    shards, plan = setup
    given = [*shards[without:], *(make_shard(name, 40) for name in more)]
    with pytest.raises(adq.PlanError, match=text):
        write_kept(given, plan, tmp_path / "out" / "%06d.tar")


def test_a_changed_byte_of_a_kept_payload_is_refused_by_name(setup: Setup, tmp_path: Path) -> None:
    shards, plan = setup
    (rows,) = [shard for shard in adq.load_plan(plan) if shard.name == "b.tar"]
    data = shards[0].read_bytes()
    with tarfile.open(shards[0]) as tar:
        members = {m.name: m for m in tar}
    row = int(rows.kept.nonzero()[0][3])
    key = rows.spans.keys[row]
    for name in (f"{key}.jpg", f"{key}.cls"):
        member = members[name]
        for at in (member.offset_data, member.offset_data + member.size - 1):
            shards[0].write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
            with pytest.raises(adq.ShardError, match=rf"shard b.tar, key '{key}': bytes differ: .* crc32 "):
                write_kept(shards, plan, tmp_path / "out" / "%06d.tar", overwrite=True)
            assert not (tmp_path / "out" / "_info.json").exists()


def test_a_shard_of_other_samples_is_refused(setup: Setup, make_shard: MakeShard, tmp_path: Path) -> None:
    shards, plan = setup
    make_shard("in/b.tar", 40, first=500)
    with pytest.raises(adq.ShardError, match=r"shard b.tar.*key '?s000\d\d.*planned"):
        write_kept(shards, plan, tmp_path / "out" / "%06d.tar")
    make_shard("in/b.tar", 2)
    with pytest.raises(adq.ShardError, match=r"shard b.tar.*s000\d\d.*planned"):
        write_kept(shards, plan, tmp_path / "out" / "%06d.tar", overwrite=True)


def test_a_folder_that_moved_is_matched(setup: Setup, tmp_path: Path) -> None:
    shards, plan = setup
    expected = kept_samples(shards, plan)
    (tmp_path / "in").rename(tmp_path / "moved")
    write_kept(tmp_path / "moved", plan, tmp_path / "out" / "%06d.tar")
    assert samples_in(tmp_path / "out") == expected


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_samples": 0}, "max_samples must be an integer >= 1, got 0"),
        ({"max_bytes": -1}, "max_bytes must be an integer >= 1, got -1"),
        ({"max_samples": True}, "max_samples must be an integer >= 1, got True"),
        ({"pattern": "out.tar"}, r"pattern 'out.tar' must hold one number"),
    ],
)
def test_wrong_arguments_are_value_errors(
    setup: Setup, tmp_path: Path, options: dict[str, Any], text: str
) -> None:
    shards, plan = setup
    pattern = options.pop("pattern", tmp_path / "out" / "%06d.tar")
    with pytest.raises(ValueError, match=text):
        write_kept(shards, plan, pattern, **options)
    assert not (tmp_path / "out").exists()
