"""A table in parts says what one file says; parts are checked against the file that lists them, and opened late."""

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import adq_wds as adq
from adq_wds.shards.names import MAX_SHARDS
from adq_wds.tables import parts
from adq_wds.tables.index import read_index, save_index
from adq_wds.tables.plan_header import header_without_bins
from adq_wds.tables.plan_rows import PlanShard
from adq_wds.tables.soft_labels import ShardSoftLabels, SoftTable, save_soft_labels
from adq_wds.tables.write_table import write_table
from tests.conftest import MakeShard, MonkeyPatch
from tests.tampering import KINDS, SOFT, plan_spans, put, rewritten

N = 8


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "ONE_FILE", 4)
    monkeypatch.setattr(parts, "PART_SHARDS", 3)


def plan_of(n: int = N, kept: int = 1) -> adq.Plan:
    """Shards of three samples, of which the first are kept; as many as `kept`."""
    rows = [PlanShard.chosen(f"s{i}.tar", plan_spans(3, 3 * i), np.arange(3) < kept) for i in range(n)]
    return adq.Plan.from_shards(rows, header_without_bins({"source": "keys"}))


def folder_of(path: Path) -> Path:
    (folder,) = path.parent.glob(f"{path.stem}-*")
    return folder


@pytest.fixture
def path(tmp_path: Path) -> Path:
    plan_of().save(tmp_path / "plan.parquet")
    return tmp_path / "plan.parquet"


def test_a_plan_in_parts_reads_as_the_plan_in_memory(path: Path, tmp_path: Path) -> None:
    made, read = plan_of(), adq.load_plan(path)
    assert sorted(os.listdir(folder_of(path))) == [f"part-0000{i}.parquet" for i in range(3)]
    assert sorted(os.listdir(tmp_path)) == [folder_of(path).name, "plan.parquet"]
    assert folder_of(path).name == f"plan-{read.hash[:16]}"
    assert read.hash == made.hash
    assert read.table().equals(made.table())
    assert (read.shards, read.n_kept, read.keys()) == (made.shards, N, made.keys())
    assert (read.shard_sizes.tolist(), read.shard_kept.tolist()) == ([3] * N, [1] * N)
    assert {**made.header, "shards": 0} == {**read.header, "shards": 0}
    assert pickle.loads(pickle.dumps(read)).table().equals(made.table())  # noqa: S301 - our own bytes
    assert pickle.loads(pickle.dumps(made)).hash == made.hash  # noqa: S301
    assert "8 shards" in repr(read)
    assert "8 shards" in read._repr_html_()


def test_a_plan_of_few_shards_stays_one_file(tmp_path: Path) -> None:
    plan_of(4).save(tmp_path / "plan.parquet")
    assert os.listdir(tmp_path) == ["plan.parquet"]
    assert len(adq.load_plan(tmp_path / "plan.parquet").header["shards"]) == 4


def test_equal_plans_give_equal_bytes(path: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    adq.load_plan(path).save(tmp_path / "other" / "plan.parquet")
    files = ["plan.parquet", *(f"{folder_of(path).name}/part-0000{i}.parquet" for i in range(3))]
    assert [(tmp_path / f).read_bytes() for f in files] == [
        (tmp_path / "other" / f).read_bytes() for f in files
    ]


def test_opening_reads_no_part_and_a_shard_its_own(path: Path) -> None:
    (folder_of(path) / "part-00000.parquet").unlink()
    plan = adq.load_plan(path)
    assert plan.shard("s3.tar").spans.keys == ["k9", "k10", "k11"]
    with pytest.raises(
        adq.PlanError, match=r"plan\.parquet: its part plan-\w{16}/part-00000\.parquet is missing; copy"
    ):
        plan.shard("s0.tar")
    with pytest.raises(adq.PlanError, match=r"shard 's9\.tar' is not in the plan"):
        plan.shard("s9.tar")


def test_a_stream_reads_a_plan_in_parts(make_shard: MakeShard, tmp_path: Path) -> None:
    paths = [str(make_shard(f"s{i}.tar", 3, first=3 * i)) for i in range(N)]
    adq.Plan.from_keys(paths, None).save(tmp_path / "all.parquet")
    ds = adq.ShardDataset(paths, plan=tmp_path / "all.parquet", shuffle=True)
    read = [sample["__key__"] for sample in ds]
    assert sorted(read) == sorted(adq.load_plan(tmp_path / "all.parquet").keys())
    assert len(read) == 3 * N


BAD: dict[str, tuple[Callable[[Path, Path], Any], str]] = {
    "exchanged": (
        lambda folder, other: os.replace(folder / "part-00001.parquet", folder / "part-00000.parquet"),
        r"part-00000\.parquet: not the part that plan\.parquet lists, but of another plan or place; copy the folder again",
    ),
    "of another plan": (
        lambda folder, other: shutil.copy(other / "part-00000.parquet", folder),
        r"part-00000\.parquet: not the part that plan\.parquet lists",
    ),
    "a whole plan in its place": (
        lambda folder, other: plan_of(2).save(folder / "part-00000.parquet"),
        r"part-00000\.parquet: holds 'adq_wds\.plan', expected adq_wds\.part",
    ),
    "changed": (
        lambda folder, other: flip(folder / "part-00000.parquet", 40),
        r"part-00000\.parquet, shard 's0\.tar': damaged: .*; make it again",
    ),
    "cut": (
        lambda folder, other: os.truncate(folder / "part-00000.parquet", 500),
        r"part-00000\.parquet: not a readable Parquet file",
    ),
}  # fmt: skip


def flip(path: Path, i: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[i] ^= 255
    path.write_bytes(raw)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_part_is_one_line(name: str, path: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    plan_of(kept=2).save(tmp_path / "other" / "plan.parquet")
    change, text = BAD[name]
    change(folder_of(path), folder_of(tmp_path / "other" / "plan.parquet"))
    with pytest.raises(adq.PlanError, match=text) as error:
        adq.load_plan(path).shard("s0.tar")
    assert "\n" not in str(error.value)


def renamed(header: dict[str, Any], tables: list[pa.Table]) -> None:
    names = [f"t{name[1:]}" for name in tables[0]["name"].to_pylist()]
    tables[0] = tables[0].set_column(0, tables[0].schema.field("name"), pa.array(names))


def of_size(n: int) -> Callable[[dict[str, Any], list[pa.Table]], None]:
    def change(header: dict[str, Any], tables: list[pa.Table]) -> None:
        tables[0] = tables[0].set_column(1, tables[0].schema.field("n"), pa.array([n] * N))

    return change


LISTS: dict[str, tuple[Any, str]] = {
    "other names": (renamed, r"part-00000\.parquet: damaged header: .*'name' of its shards are not what plan\.parquet lists"),
    "fewer parts": (lambda h, t: h["parts"].pop(), "damaged header: .*8 shards in 2 parts"),
    "negative": (of_size(-1), "damaged: a shard of less than no samples"),
    "too many rows": (of_size(2**62), "damaged: a shard .* over 100,000,000"),
    "other columns": (lambda h, t: h["columns"].append("margin"), "part-00000.*its columns are not those that plan"),
    "hashes no list": (put("parts", "abc"), "damaged header: .*header.parts is 'abc', expected list"),
    "no header": (lambda h, t: h.pop("header"), "damaged header: .*header has no 'header'"),
    "of another kind": (lambda h, t: h["header"].update(format="adq_wds.bins"), "holds 'adq_wds.bins', expected adq_wds.plan"),
    "of a later version": (lambda h, t: h["header"].update(version=9), "version 9 of the plan format"),
    "later parts": (put("version", 2), "version 2 of the plan.parts format"),
    "no settings": (lambda h, t: h["header"].pop("settings"), "damaged header: .*no 'settings'"),
    "other counts": (lambda h, t: h["header"].update(n_kept=9), "counts, shards or classes contradict"),
}  # fmt: skip


@pytest.mark.parametrize("name", LISTS)
def test_a_bad_list_of_parts_is_one_line(name: str, path: Path) -> None:
    change, text = LISTS[name]
    folder = folder_of(path)
    rewritten(path, change)
    if name in ("other names", "other columns"):
        folder.rename(path.parent / f"plan-{adq.load_plan(path).hash[:16]}")
    with pytest.raises(adq.PlanError, match=text) as error:
        adq.load_plan(path).table()
    assert "\n" not in str(error.value)


def test_a_list_of_too_many_shards_is_refused_unread(path: Path, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "MAX_SHARDS", 7)
    monkeypatch.setattr(parts.GroupFile, "group", lambda *a, **k: pytest.fail("read"))
    with pytest.raises(adq.PlanError, match="8 shards in 3 parts, at most 7 shards"):
        adq.load_plan(path)


def test_writing_over_a_plan_leaves_the_new_one_alone(path: Path, tmp_path: Path) -> None:
    (folder_of(path) / "notes.txt").write_text("mine")
    plan_of(kept=2).save(path)
    read = adq.load_plan(path)
    old, new = sorted(tmp_path.glob("plan-*"), key=lambda folder: folder.name == f"plan-{read.hash[:16]}")
    assert os.listdir(old) == ["notes.txt"]
    assert read.keys() == plan_of(kept=2).keys()
    plan_of(2).save(path)  # one file takes its place
    assert not new.exists()
    assert adq.load_plan(path).n_kept == 2


def test_a_link_leads_to_the_parts_of_its_file(path: Path, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    link = tmp_path / "here" / "link.parquet"
    link.symlink_to(path)
    assert adq.load_plan(link).keys() == plan_of().keys()
    plan_of(kept=2).save(link)
    assert adq.load_plan(path).keys() == adq.load_plan(link).keys() == plan_of(kept=2).keys()
    assert os.listdir(link.parent) == ["link.parquet"]
    assert len(os.listdir(tmp_path)) == 3


def test_an_error_midway_leaves_the_old_plan_and_nothing_else(path: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    table = plan_of().shard("s0.tar").table()

    def groups() -> Any:
        for i in range(5):
            yield {"name": f"s{i}.tar", "kept": 1}, table
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_table(path, table.schema, groups(), plan_of().header, n_shards=N)
    assert sorted(tmp_path.rglob("*")) == before
    assert adq.load_plan(path).table().equals(plan_of().table())


def test_more_shards_than_are_opened_are_not_written(tmp_path: Path) -> None:
    text = r"cannot write .*plan\.parquet: 1,000,001 shards, at most 1,000,000; use larger shards"
    with pytest.raises(adq.AdqError, match=text):
        write_table(tmp_path / "plan.parquet", pa.schema([]), [], {}, n_shards=MAX_SHARDS + 1)


@pytest.mark.parametrize("kind", ["bins", "index"])
def test_other_tables_in_parts_read_as_one_file(kind: str, tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    KINDS[kind].make(tmp_path / "one.parquet")
    monkeypatch.setattr(parts, "ONE_FILE", 1)
    monkeypatch.setattr(parts, "PART_SHARDS", 1)
    KINDS[kind].make(tmp_path / "many.parquet")
    assert len(list(folder_of(tmp_path / "many.parquet").iterdir())) > 1
    assert KINDS[kind].read(tmp_path / "many.parquet") == KINDS[kind].read(tmp_path / "one.parquet")


def test_an_index_in_parts_keeps_the_stamps(tmp_path: Path) -> None:
    names = [f"s{i}.tar" for i in range(N)]
    stamps: Any = {name: {"bytes": i, "mtime_ns": i} for i, name in enumerate(names)}
    save_index(tmp_path / "i.parquet", [(name, plan_spans(2)) for name in names], sources=stamps)
    assert {name: shard.source for name, shard in read_index(tmp_path / "i.parquet").items()} == stamps


def test_soft_labels_in_parts(tmp_path: Path) -> None:
    top, p = np.array([[0, 1]], np.int32), np.array([[0.75, 0.25]], np.float32)
    save_soft_labels(
        tmp_path / "soft.parquet", [ShardSoftLabels(f"s{i}.tar", ["k"], top, p) for i in range(N)], SOFT
    )
    assert folder_of(tmp_path / "soft.parquet").is_dir()
    assert SoftTable(tmp_path / "soft.parquet").find("x/s7.tar").probability.tolist() == [[0.75, 0.25]]
