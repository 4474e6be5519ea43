"""A plan is exact, checked at every door, and read one shard at a time."""

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import adq_wds as adq
from adq_wds.files import canonical_json, sha256_text
from adq_wds.tables.parquet import HASH_KEY, HEADER_KEY, column_hashes
from adq_wds.tables.plan import CACHED_SHARDS
from adq_wds.tables.plan_rows import ALWAYS, NEVER, PlanShard
from adq_wds.tables.spans import Spans


def spans_of(n: int, first: int = 0) -> Spans:
    offset = np.arange(n, dtype=np.int64) * 1024
    return Spans(
        np.arange(n, dtype=np.int32),
        [f"k{i + first}" for i in range(n)],
        offset,
        np.full(n, 1024, dtype=np.int64),
        np.arange(n, dtype=np.uint32) + 7,
    )


def shard_of(name: str, n: int = 12, first: int = 0) -> PlanShard:
    """Two classes, two bins; the first of each cell is kept; the last sample is of no bin."""
    i = np.arange(n)
    label, bin = (i % 2).astype(np.int32), (i // 2 % 2).astype(np.int16)
    pick = (i // 4).astype(np.int32)
    rank = pick.copy()
    bin[-1], pick[-1], rank[-1], label[-1] = -1, -1, NEVER, -1
    return PlanShard(name, spans_of(n, first), label, bin, pick, rank, rank < 1)


HEADER: dict[str, Any] = {
    "settings": {"keep": 0.3},
    "classes": [{"label": 0}, {"label": 1}],
    "cells": {"size": [[3, 3], [3, 2]], "quota": [[1, 1], [1, 1]]},
    "bins": [],
}


@pytest.fixture
def plan() -> adq.Plan:
    return adq.Plan.from_shards([shard_of("b.tar", first=100), shard_of("a.tar")], HEADER)


def one_cell(ranks: list[int], size: int, quota: int) -> adq.Plan:
    n = len(ranks)
    zero, rank = np.zeros(n, dtype=np.int32), np.array(ranks, dtype=np.int32)
    kept = rank < quota
    shard = PlanShard("a.tar", spans_of(n), zero, zero.astype(np.int16), zero, rank, kept)
    header = {**HEADER, "classes": [{"label": 0}], "cells": {"size": [[size]], "quota": [[quota]]}}
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
    header = {**HEADER, "cells": {"size": [[3, 3], [3, 2]], "quota": [[3, 3], [3, 2]]}}
    shard = shard_of("a.tar")
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


def test_a_saved_plan_has_one_row_group_per_shard(path: Path) -> None:
    assert pq.ParquetFile(path).num_row_groups == 2


def test_the_hash_is_of_the_content_not_of_the_file(plan: adq.Plan, tmp_path: Path) -> None:
    table = plan.table()
    with pq.ParquetWriter(
        tmp_path / "other.parquet", table.schema, compression="none", use_dictionary=True
    ) as w:
        for name in plan.shards:
            w.write_table(plan.shard(name).table())
        text = canonical_json(plan.header)
        w.add_key_value_metadata({HEADER_KEY: text, HASH_KEY: sha256_text(text)})
    other = adq.load_plan(tmp_path / "other.parquet")
    assert other.hash == plan.hash
    assert other.table().equals(table)


def test_any_change_changes_the_hash(plan: adq.Plan) -> None:
    shards = [shard_of("a.tar"), shard_of("b.tar", first=100)]
    assert adq.Plan.from_shards(shards, HEADER).hash == plan.hash
    moved = [shard_of("a.tar"), shard_of("b.tar", first=101)]
    assert adq.Plan.from_shards(moved, HEADER).hash != plan.hash
    other = {**HEADER, "settings": {"keep": 0.31}}
    assert adq.Plan.from_shards(shards, other).hash != plan.hash


def test_a_plan_pickles_as_its_path_and_hash(plan: adq.Plan, path: Path) -> None:
    loaded = adq.load_plan(path)
    data = pickle.dumps(loaded)
    assert len(data) < 400
    assert pickle.loads(data).keys() == plan.keys()  # noqa: S301 - our own bytes
    in_memory = pickle.loads(pickle.dumps(plan))  # noqa: S301
    assert in_memory.hash == plan.hash
    adq.Plan.from_shards([shard_of("a.tar")], HEADER).save(path)
    with pytest.raises(adq.PlanError, match="changed since it was opened"):
        pickle.loads(data)  # noqa: S301


def test_only_so_many_shards_are_held(tmp_path: Path) -> None:
    names = [f"s{i:03d}.tar" for i in range(CACHED_SHARDS + 9)]
    adq.Plan.from_shards([shard_of(name) for name in names], HEADER).save(tmp_path / "p.parquet")
    plan = adq.load_plan(tmp_path / "p.parquet")
    assert len(plan._cached_shards) == 0
    assert sum(shard.kept.sum() for shard in plan) == plan.n_kept
    assert len(plan._cached_shards) == CACHED_SHARDS


def test_reading_one_shard_reads_no_other(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = adq.load_plan(path)
    asked: list[int] = []
    read = plan._groups.group  # type: ignore[union-attr]
    monkeypatch.setattr(
        plan._groups, "group", lambda i, *given, **options: (asked.append(i), read(i, *given, **options))[1]
    )
    plan.shard("b.tar")
    plan.shard("b.tar")
    assert asked == [1]


# ---- Damage (F30)


def rewritten(
    path: Path, change: Callable[[dict[str, Any], list[pa.Table]], None], *, vouch: bool = True
) -> Path:
    """The plan's file with something changed, and the header's hashes made to agree, as an attacker would."""
    file = pq.ParquetFile(path)
    header = json.loads(file.metadata.metadata[HEADER_KEY])
    tables = [file.read_row_group(i).replace_schema_metadata(None) for i in range(file.num_row_groups)]
    change(header, tables)
    if vouch:
        for entry, table in zip(header["shards"] if header["shards"] != 5 else [], tables, strict=False):
            entry["columns"] = column_hashes(table)
    text = json.dumps(header, sort_keys=True, separators=(",", ":"))
    out = path.with_name("changed.parquet")
    with pq.ParquetWriter(out, tables[0].schema) as writer:
        for table in tables:
            writer.write_table(table)
        writer.add_key_value_metadata({HEADER_KEY: text, HASH_KEY: sha256_text(text)})
    return out


def put(tables: list[pa.Table], name: str, row: int, value: Any) -> None:
    values = tables[0][name].to_pylist()
    values[row] = value
    field = tables[0].schema.field(name)
    tables[0] = tables[0].set_column(
        tables[0].schema.get_field_index(name), field, pa.array(values, field.type)
    )


def set_header(name: str, value: Any) -> Callable[[dict[str, Any], list[pa.Table]], None]:
    return lambda header, tables: header.__setitem__(name, value)


def set_shard(name: str, value: Any) -> Callable[[dict[str, Any], list[pa.Table]], None]:
    return lambda header, tables: header["shards"][0].__setitem__(name, value)


def set_value(name: str, row: int, value: Any) -> Callable[[dict[str, Any], list[pa.Table]], None]:
    return lambda header, tables: put(tables, name, row, value)


def drop_column(header: dict[str, Any], tables: list[pa.Table]) -> None:
    tables[:] = [table.drop_columns(["rank"]) for table in tables]


def retype_column(header: dict[str, Any], tables: list[pa.Table]) -> None:
    i = tables[0].schema.get_field_index("bin")
    tables[:] = [t.set_column(i, "bin", t["bin"].cast(pa.int64())) for t in tables]


def swap_groups(header: dict[str, Any], tables: list[pa.Table]) -> None:
    tables.reverse()


def lose_group(header: dict[str, Any], tables: list[pa.Table]) -> None:
    del tables[1]


VIOLATIONS: dict[str, tuple[Callable[[dict[str, Any], list[pa.Table]], None], str]] = {
    "other format": (set_header("format", "adq_wds.features"), "expected adq_wds.plan"),
    "newer version": (
        set_header("version", 99),
        "version 99 of the plan format; this adq_wds reads versions 1",
    ),
    "version as text": (set_header("version", "1"), "version '1' of the plan format"),
    "no shard list": (set_header("shards", 5), "shards is 5"),
    "hostile shard name": (set_shard("name", "../a.tar"), "shard name '../a.tar' is refused"),
    "unsorted shards": (set_shard("name", "z.tar"), "contradict each other"),
    "wrong row count": (set_shard("n", 11), "row groups are not those its header lists"),
    "wrong kept count": (set_shard("kept", 5), "contradict each other"),
    "wrong total": (set_header("n_samples", 25), "contradict each other"),
    "no cells": (set_header("cells", {}), "damaged header"),
    "quota of text": (set_header("cells", {"quota": [["x", 1], [1, 1]]}), "damaged header"),
    "no sizes": (set_header("cells", {"quota": [[1, 1], [1, 1]]}), "damaged header"),
    "sizes of another shape": (
        set_header("cells", {"size": [[3, 3]], "quota": [[1, 1], [1, 1]]}),
        "damaged header",
    ),
    "other quota": (
        set_header("cells", {"size": [[3, 3], [3, 2]], "quota": [[2, 1], [1, 1]]}),
        "does not follow from ranks and quotas",
    ),
    "missing column": (drop_column, "damaged"),
    "column of another type": (retype_column, "damaged"),
    "row groups swapped": (swap_groups, "rows of another shard"),
    "row group lost": (lose_group, "row groups are not those"),
    "key twice": (set_value("key", 1, "k0"), "a key is listed twice"),
    "overlapping spans": (set_value("n_bytes", 0, 2000), "spans overlap"),
    "negative offset": (set_value("byte_offset", 0, -512), "empty or out of range"),
    "position twice": (set_value("index", 1, 0), "positions are not ascending"),
    "bin out of range": (set_value("bin", 0, 2), "class or bin is not one of the plan's"),
    "unknown class": (set_value("label", 0, 9), "class or bin is not one of the plan's"),
    "kept against its rank": (set_value("kept", 4, True), "keeps 5 samples, its header says 4"),
    "rank below always": (set_value("rank", 0, -2), "rank is below"),
}


def explained(path: Path) -> Path:
    """A plan of version 2: a copy and a sample of a class left out besides those of `shard_of`."""
    n = 4
    i = np.arange(n, dtype=np.int32)
    none = np.full(n, -1, dtype=np.int32)
    bin, rank = np.where(i < 2, 0, none), np.where(i < 2, i, NEVER).astype(np.int32)
    label = np.array([0, 0, 0, 5], dtype=np.int32)
    reason = np.array([0, 1, 2, 5], dtype=np.uint8)
    columns = (label, bin.astype(np.int16), np.where(i < 2, i, none), rank, rank < 1, reason)
    header = {
        **HEADER,
        "settings": {"seed": 0},
        "classes": [{"label": 0}],
        "cells": {"size": [[2]], "quota": [[1]], "share": [[1.0]]},
    }
    shard = PlanShard("a.tar", spans_of(n), *columns, duplicate_of={2: "a.tar/k0"})
    adq.Plan.from_shards([shard], header).save(path)
    return path


def set_share(share: Any) -> Callable[[dict[str, Any], list[pa.Table]], None]:
    return set_header("cells", {"size": [[2]], "quota": [[1]], "share": share})


EXPLAINED: dict[str, tuple[Callable[[dict[str, Any], list[pa.Table]], None], str]] = {
    "unknown reason": (set_value("reason", 1, "mood"), "a reason is not one of kept, quota, duplicate"),
    "a kept sample with a reason against it": (set_value("reason", 0, "quota"), "a reason contradicts"),
    "a binned sample without a quota": (set_value("reason", 1, "excluded"), "a reason contradicts"),
    "a sample outside that has a quota": (set_value("reason", 3, "quota"), "a reason contradicts"),
    "a sample outside that is kept": (set_value("reason", 3, "kept"), "a reason contradicts"),
    "a sample outside with a rank": (set_value("rank", 3, 7), "a reason contradicts"),
    "a copy of none": (set_value("duplicate_of", 2, ""), "a copy names no sample that stays"),
    "a copy that is none": (set_value("duplicate_of", 3, "a.tar/k0"), "or another sample names one"),
    "no shares": (set_header("cells", {"size": [[2]], "quota": [[1]]}), "damaged header"),
    "shares of another shape": (set_share([[0.5, 0.5]]), "damaged header"),
    "a share beyond its cell": (set_share([[3.0]]), "shares that contradict the sizes and quotas"),
    "a share below 0": (set_share([[-1.0]]), "shares that contradict"),
    "a share between the steps": (set_share([[1 + 2**-30]]), "shares that contradict"),
    "shares of another sum": (set_share([[0.5]]), "shares that contradict"),
    "a share of text": (set_share([["x"]]), "damaged header"),
    "no seed": (set_header("settings", {}), "damaged header"),
    "a seed of text": (set_header("settings", {"seed": "0"}), "damaged header: .*seed must be an integer"),
}


@pytest.mark.parametrize("name", EXPLAINED)
def test_reasons_and_shares_that_contradict_a_plan_are_refused(name: str, tmp_path: Path) -> None:
    change, text = EXPLAINED[name]
    path = explained(tmp_path / "plan.parquet")
    assert read_all(rewritten(path, lambda header, tables: None)).equals(read_all(path))
    with pytest.raises(adq.PlanError, match=text):
        read_all(rewritten(path, change))


def test_every_sample_has_a_reason_and_a_copy_names_what_stays(tmp_path: Path) -> None:
    plan = adq.load_plan(explained(tmp_path / "plan.parquet"))
    assert plan.header["version"] == 2
    table = plan.table()
    assert table["reason"].to_pylist() == ["kept", "quota", "duplicate", "excluded"]
    assert table["duplicate_of"].to_pylist() == ["", "", "a.tar/k0", ""]
    assert pickle.loads(pickle.dumps(plan)).table().equals(table)  # noqa: S301 - our own bytes
    plan.save(tmp_path / "again.parquet")
    assert adq.load_plan(tmp_path / "again.parquet").hash == plan.hash


def test_streams_read_no_reasons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = adq.load_plan(explained(tmp_path / "plan.parquet"))
    asked: list[str] = []
    names = plan._groups._names  # type: ignore[union-attr]
    monkeypatch.setattr(plan._groups, "_names", lambda i, n, name: (asked.append(name), names(i, n, name))[1])
    rows = plan.shard("a.tar")
    assert rows.reason is None
    assert rows.kept.tolist() == [True, False, False, False]
    assert asked == ["shard", "key"]


def test_reasons_and_shares_without_each_other_are_refused() -> None:
    shard = shard_of("a.tar")
    header = {**HEADER, "cells": {**HEADER["cells"], "share": [[1.0, 1.0], [1.0, 1.0]]}}
    with pytest.raises(adq.PlanError, match="reasons for all samples and shares of all cells, or neither"):
        adq.Plan.from_shards([shard], header)


def test_a_column_of_a_later_version_leaves_a_plan_readable(path: Path, plan: adq.Plan) -> None:
    def more(header: dict[str, Any], tables: list[pa.Table]) -> None:
        tables[:] = [table.append_column("mood", [[0.5] * table.num_rows]) for table in tables]

    assert read_all(rewritten(path, more)).equals(plan.table())


def read_all(path: Path) -> pa.Table:
    return adq.load_plan(path).table()


@pytest.mark.parametrize("name", VIOLATIONS)
def test_a_plan_that_breaks_its_schema_is_refused(name: str, path: Path) -> None:
    change, text = VIOLATIONS[name]
    with pytest.raises(adq.PlanError, match=text):
        read_all(rewritten(path, change))


def test_the_rewriting_above_is_not_itself_the_damage(path: Path, plan: adq.Plan) -> None:
    assert read_all(rewritten(path, lambda header, tables: None)).equals(plan.table())


def test_a_changed_value_is_refused_by_its_hash(path: Path) -> None:
    with pytest.raises(adq.PlanError, match="column 'crc32' does not match its hash"):
        read_all(rewritten(path, set_value("crc32", 3, 1), vouch=False))


def test_no_truncation_is_ever_loaded(path: Path, plan: adq.Plan, tmp_path: Path) -> None:
    data, cut = path.read_bytes(), tmp_path / "cut.parquet"
    for length in np.random.default_rng(0).integers(0, len(data), 500):
        cut.write_bytes(data[:length])
        with pytest.raises(adq.PlanError, match=r"cut\.parquet"):
            read_all(cut)


def test_no_bit_flip_is_ever_loaded_as_another_plan(path: Path, plan: adq.Plan, tmp_path: Path) -> None:
    data, flipped = path.read_bytes(), tmp_path / "flipped.parquet"
    expected = plan.table()
    refused = 0
    for bit in np.random.default_rng(1).choice(len(data) * 8, 1000, replace=False):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << (bit % 8)
        flipped.write_bytes(damaged)
        try:
            found = adq.load_plan(flipped)
            table = found.table()
        except adq.PlanError:
            refused += 1
            continue
        assert table.equals(expected), "a flipped bit went through"
        assert found.hash == plan.hash
    assert refused > 500


@pytest.mark.parametrize("content", [b"", b"PAR1", b"\x80\x04K\x01.", b"not a plan" * 100])
def test_other_files_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(adq.PlanError, match="not a readable Parquet file"):
        adq.load_plan(tmp_path / "x")


def test_a_missing_plan_and_a_foreign_parquet_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(adq.PlanError, match="no such file"):
        adq.load_plan(tmp_path / "x")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "x")
    with pytest.raises(adq.PlanError, match="not made by adq_wds"):
        adq.load_plan(tmp_path / "x")


# ---- From keys


def test_a_selection_made_elsewhere_becomes_a_plan(make_shard: Callable[..., Path]) -> None:
    a, b = make_shard("a.tar", 5), make_shard("b.tar", 5, first=3)
    plan = adq.Plan.from_keys([a, b], ["s00000", "s00007", ("b.tar", "s00003")])
    assert [(s.name, k) for s in plan for k, kept in zip(s.spans.keys, s.kept, strict=True) if kept] == [
        ("a.tar", "s00000"), ("b.tar", "s00003"), ("b.tar", "s00007"),
    ]  # fmt: skip
    assert set(plan.table()["rank"].to_pylist()) == {ALWAYS, NEVER}
    assert [plan.table()["reason"].to_pylist().count(reason) for reason in ("kept", "excluded")] == [3, 7]
    assert plan.kept_in("a.tar", 5).tolist() == plan.shard("a.tar").kept.tolist()


def test_pairs_may_be_lists_and_a_bare_text_is_refused(make_shard: Callable[..., Path]) -> None:
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
def test_keys_that_name_no_one_sample_are_refused(
    keys: list[Any], text: str, make_shard: Callable[..., Path]
) -> None:
    shards = [make_shard("a.tar", 5), make_shard("b.tar", 5, first=3)]
    with pytest.raises(adq.PlanError, match=text):
        adq.Plan.from_keys(shards, keys)
