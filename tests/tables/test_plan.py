"""A plan is exact, checked at every door, and read one shard at a time."""

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import adq_wds as adq
from adq_wds.files import canonical_json, sha256_text
from adq_wds.tables import parquet
from adq_wds.tables.parquet import HASH_KEY, HEADER_KEY
from adq_wds.tables.plan import CACHED_SHARDS
from adq_wds.tables.plan_rows import ALWAYS, NEVER, PlanShard
from tests.conftest import MakeShard, MonkeyPatch
from tests.tampering import PLAN, explained, plan_shard, plan_spans, rewritten, small_plan


@pytest.fixture
def plan() -> adq.Plan:
    return small_plan()


def one_cell(ranks: list[int], size: int, quota: int) -> adq.Plan:
    n = len(ranks)
    zero, rank = np.zeros(n, dtype=np.int32), np.array(ranks, dtype=np.int32)
    kept = rank < quota
    shard = PlanShard("a.tar", plan_spans(n), zero, zero.astype(np.int16), zero, rank, kept)
    header = {**PLAN, "classes": [{"label": 0}], "cells": {"size": [[size]], "quota": [[quota]]}}
    return adq.Plan.from_shards([shard], header)


def test_fresh_draws_start_with_the_plan_and_see_every_sample(plan: adq.Plan) -> None:
    plan = one_cell([3, 0, 6, 1, 5, 2, 4, ALWAYS, ALWAYS], size=7, quota=3)
    epochs = [plan.kept_in("a.tar", epoch) for epoch in range(20)]
    assert epochs[0].tolist() == plan.shard("a.tar").kept.tolist()
    assert all(kept.sum() == 3 + 2 for kept in epochs)  # the must-include samples are in every one
    assert np.logical_or.reduce(epochs[:3]).all()
    assert np.logical_or.reduce(epochs[5:8]).all()


def test_fresh_draws_skip_binless_samples_and_cells_of_no_quota() -> None:
    assert not one_cell([0, 1, 2], size=3, quota=0).kept_in("a.tar", 1).any()
    header = {**PLAN, "cells": {"size": [[3, 3], [3, 2]], "quota": [[3, 3], [3, 2]]}}
    shard = plan_shard("a.tar")
    whole = replace(shard, kept=shard.rank < 3)
    assert adq.Plan.from_shards([whole], header).kept_in("a.tar", 2).tolist() == [True] * 11 + [False]


def test_a_rank_beyond_its_cell_is_refused_when_draws_are_fresh() -> None:
    with pytest.raises(adq.PlanError, match=r"shard 'a\.tar': a rank is beyond the size of its bin"):
        one_cell([0, 1, 5], size=3, quota=1).kept_in("a.tar", 1)


@pytest.fixture
def path(plan: adq.Plan, tmp_path: Path) -> Path:
    plan.save(tmp_path / "plan.parquet")
    return tmp_path / "plan.parquet"


def test_rows_come_by_shard_name_and_position(plan: adq.Plan) -> None:
    assert plan.shards == ["a.tar", "b.tar"]
    assert plan.keys() == ["k0", "k1", "k2", "k3", "k100", "k101", "k102", "k103"]
    assert len(plan) == plan.n_kept == 8
    assert plan.n_samples == 24


def test_the_table_has_the_promised_columns(plan: adq.Plan) -> None:
    table = plan.table()
    assert table.column_names == [
        "shard", "index", "key", "byte_offset", "n_bytes", "crc32", "label", "bin", "pick", "rank", "kept",
    ]  # fmt: skip
    assert table.schema.field("bin").type == pa.int16()
    assert table.schema.field("key").type == pa.string()
    assert table.num_rows == 24
    assert table["kept"].to_pylist().count(True) == 8


def test_saving_and_loading_changes_nothing(plan: adq.Plan, path: Path) -> None:
    again = adq.load_plan(path)
    assert again.hash == plan.hash
    assert again.table().equals(plan.table())
    assert again.header == json.loads(canonical_json(plan.header))
    assert pq.ParquetFile(path).num_row_groups == 2  # one per shard


def test_the_hash_is_of_the_content_not_of_the_file(plan: adq.Plan, tmp_path: Path) -> None:
    table = plan.table()
    options = {"compression": "none", "use_dictionary": True}
    with pq.ParquetWriter(tmp_path / "other.parquet", table.schema, **options) as w:
        for name in plan.shards:
            w.write_table(plan.shard(name).table())
        text = canonical_json(plan.header)
        w.add_key_value_metadata({HEADER_KEY: text, HASH_KEY: sha256_text(text)})
    other = adq.load_plan(tmp_path / "other.parquet")
    assert other.hash == plan.hash
    assert other.table().equals(table)


def test_any_change_changes_the_hash(plan: adq.Plan) -> None:
    shards = [plan_shard("a.tar"), plan_shard("b.tar", first=100)]
    assert adq.Plan.from_shards(shards, PLAN).hash == plan.hash
    moved = [plan_shard("a.tar"), plan_shard("b.tar", first=101)]
    assert adq.Plan.from_shards(moved, PLAN).hash != plan.hash
    other = {**PLAN, "settings": {"keep": 0.31}}
    assert adq.Plan.from_shards(shards, other).hash != plan.hash


def test_a_plan_pickles_as_its_path_and_hash(plan: adq.Plan, path: Path) -> None:
    loaded = adq.load_plan(path)
    data = pickle.dumps(loaded)
    assert len(data) < 400
    assert pickle.loads(data).keys() == plan.keys()  # noqa: S301 - our own bytes
    in_memory = pickle.loads(pickle.dumps(plan))  # noqa: S301
    assert in_memory.hash == plan.hash
    adq.Plan.from_shards([plan_shard("a.tar")], PLAN).save(path)
    with pytest.raises(adq.PlanError, match="changed since it was opened"):
        pickle.loads(data)  # noqa: S301


def test_only_so_many_shards_are_held(tmp_path: Path) -> None:
    names = [f"s{i:03d}.tar" for i in range(CACHED_SHARDS + 9)]
    adq.Plan.from_shards([plan_shard(name) for name in names], PLAN).save(tmp_path / "p.parquet")
    plan = adq.load_plan(tmp_path / "p.parquet")
    assert len(plan._cached_shards) == 0
    assert sum(shard.kept.sum() for shard in plan) == plan.n_kept
    assert len(plan._cached_shards) == CACHED_SHARDS


def test_reading_one_shard_reads_no_other(path: Path, monkeypatch: MonkeyPatch) -> None:
    plan = adq.load_plan(path)
    asked: list[int] = []
    read: Any = plan._table.group
    monkeypatch.setattr(plan._table, "group", lambda i, *a, **b: (asked.append(i), read(i, *a, **b))[1])
    plan.shard("b.tar")
    plan.shard("b.tar")
    assert asked == [1]


def test_every_sample_has_a_reason_and_a_copy_names_what_stays(tmp_path: Path) -> None:
    plan = adq.load_plan(explained(tmp_path / "plan.parquet"))
    assert plan.header["version"] == 2
    table = plan.table()
    assert table["reason"].to_pylist() == ["kept", "quota", "duplicate", "excluded"]
    assert table["duplicate_of"].to_pylist() == ["", "", "a.tar/k0", ""]
    assert pickle.loads(pickle.dumps(plan)).table().equals(table)  # noqa: S301 - our own bytes
    plan.save(tmp_path / "again.parquet")
    assert adq.load_plan(tmp_path / "again.parquet").hash == plan.hash


def test_streams_read_no_reasons(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    plan = adq.load_plan(explained(tmp_path / "plan.parquet"))
    asked: list[str] = []
    names = parquet._names
    monkeypatch.setattr(parquet, "_names", lambda *which: (asked.append(which[-1]), names(*which))[1])
    rows = plan.shard("a.tar")
    assert rows.reason is None
    assert rows.kept.tolist() == [True, False, False, False]
    assert asked == ["shard", "key"]


def test_reasons_and_shares_without_each_other_are_refused() -> None:
    shard = plan_shard("a.tar")
    header = {**PLAN, "cells": {**PLAN["cells"], "share": [[1.0, 1.0], [1.0, 1.0]]}}
    with pytest.raises(adq.PlanError, match="reasons for all samples and shares of all cells, or neither"):
        adq.Plan.from_shards([shard], header)


def test_a_column_of_a_later_version_leaves_a_plan_readable(path: Path, plan: adq.Plan) -> None:
    def more(header: dict[str, Any], tables: list[pa.Table]) -> None:
        tables[:] = [table.append_column("mood", [[0.5] * table.num_rows]) for table in tables]

    assert adq.load_plan(rewritten(path, more)).table().equals(plan.table())


@pytest.mark.parametrize("content", [b"", b"PAR1", b"\x80\x04K\x01.", b"not a plan" * 100])
def test_other_files_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(adq.PlanError, match="not a readable Parquet file"):
        adq.load_plan(tmp_path / "x")
    (tmp_path / "x").unlink()
    with pytest.raises(adq.PlanError, match="no such file"):
        adq.load_plan(tmp_path / "x")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "x")
    with pytest.raises(adq.PlanError, match="not made by adq_wds"):
        adq.load_plan(tmp_path / "x")


def test_a_selection_made_elsewhere_becomes_a_plan(make_shard: MakeShard) -> None:
    a, b = make_shard("a.tar", 5), make_shard("b.tar", 5, first=3)
    plan = adq.Plan.from_keys([a, b], ["s00000", "s00007", ("b.tar", "s00003")])
    assert [(s.name, k) for s in plan for k, kept in zip(s.spans.keys, s.kept, strict=True) if kept] == [
        ("a.tar", "s00000"), ("b.tar", "s00003"), ("b.tar", "s00007"),
    ]  # fmt: skip
    assert set(plan.table()["rank"].to_pylist()) == {ALWAYS, NEVER}
    assert [plan.table()["reason"].to_pylist().count(reason) for reason in ("kept", "excluded")] == [3, 7]
    assert plan.kept_in("a.tar", 5).tolist() == plan.shard("a.tar").kept.tolist()


def test_pairs_may_be_lists_and_a_bare_text_is_refused(make_shard: MakeShard) -> None:
    shard = make_shard("a.tar", 5)
    assert adq.Plan.from_keys(shard, [["a.tar", "s00001"]]).keys() == ["s00001"]  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"keys must be a list, got the text 's00001'"):
        adq.Plan.from_keys(shard, "s00001")


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        (["nothing"], "sample 'nothing' is not among the usable samples"),
        ([("a.tar", "s00007")], r"sample \('a.tar', 's00007'\) is not among the usable samples"),
        (["s00003"], r"sample 's00003' is in several shards; give \(shard, key\)"),
    ],
)
def test_keys_that_name_no_one_sample_are_refused(keys: list[Any], text: str, make_shard: MakeShard) -> None:
    shards = [make_shard("a.tar", 5), make_shard("b.tar", 5, first=3)]
    with pytest.raises(adq.PlanError, match=text):
        adq.Plan.from_keys(shards, keys)
