"""Bins are read as they were written or not at all."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import adq_wds as adq
from adq_wds.files import sha256_text
from adq_wds.planning.build_plan import find_bins
from adq_wds.tables.bins import Bins
from adq_wds.tables.features import Features
from adq_wds.tables.features_file import ShardFeatures
from adq_wds.tables.parquet import HASH_KEY, HEADER_KEY, column_hashes

MakeFeatures = Callable[..., ShardFeatures]


@pytest.fixture
def bins(make_features: MakeFeatures, tmp_path: Path) -> Bins:
    """Three shards, one of them empty; class 2 is left out."""
    make_features("a.tar", [0, 1, 0, 2, 1, 0, 0, 1, 2])
    make_features("b.tar", [])
    make_features("c.tar", [1, 1, 0, 2])
    return find_bins(Features(tmp_path / "features"), bins=3, classes=[0, 1])


@pytest.fixture
def path(bins: Bins, tmp_path: Path) -> Path:
    bins.save(tmp_path / "bins.parquet")
    return tmp_path / "bins.parquet"


def test_writing_and_reading_changes_nothing(bins: Bins, path: Path) -> None:
    again = Bins.load(path)
    assert again.shards == bins.shards == [("a.tar", 9), ("b.tar", 0), ("c.tar", 4)]
    for name, kind in (("label", np.int32), ("bin", np.int16), ("pick", np.int32)):
        assert getattr(again, name).dtype == kind
        assert getattr(again, name).tolist() == getattr(bins, name).tolist()
    assert again.header == bins.header
    assert (again.n_bins, again.classes) == (3, [0, 1])
    assert {n: s.tolist() for n, s in again.scores().items()} == {
        n: s.tolist() for n, s in bins.scores().items()
    }


def test_an_empty_bin_has_no_score_there_and_back(make_features: MakeFeatures, tmp_path: Path) -> None:
    make_features("a.tar", [0, 0])
    bins = find_bins(Features(tmp_path / "features"), bins=4)
    bins.save(tmp_path / "bins.parquet")
    for name, score in Bins.load(tmp_path / "bins.parquet").scores().items():
        assert np.isnan(score).tolist() == [False, False, True, True], name


def test_equal_bins_are_equal_bytes(bins: Bins, path: Path, tmp_path: Path) -> None:
    Bins.load(path).save(tmp_path / "again.parquet")
    assert (tmp_path / "again.parquet").read_bytes() == path.read_bytes()


def test_no_truncation_is_ever_loaded(path: Path) -> None:
    data = path.read_bytes()
    for length in np.random.default_rng(0).choice(len(data), 100, replace=False):
        path.write_bytes(data[:length])
        with pytest.raises(adq.PlanError, match=r"bins\.parquet"):
            Bins.load(path)


def test_no_bit_flip_is_ever_loaded_as_other_bins(bins: Bins, path: Path) -> None:
    data, refused = path.read_bytes(), 0
    for bit in np.random.default_rng(1).choice(len(data) * 8, 100, replace=False):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(damaged)
        try:
            again = Bins.load(path)
        except adq.PlanError:
            refused += 1
            continue
        assert again.header == bins.header
        assert again.shards == bins.shards
        for name in ("label", "bin", "pick"):
            assert getattr(again, name).tolist() == getattr(bins, name).tolist()
    assert refused > 50


Change = Callable[[dict[str, Any], list[pa.Table]], None]


def rewritten(path: Path, change: Change) -> None:
    """The file with something changed and all hashes made to agree, as an attacker would."""
    file = pq.ParquetFile(path)
    header = json.loads(file.metadata.metadata[HEADER_KEY])
    tables = [file.read_row_group(i).replace_schema_metadata(None) for i in range(file.num_row_groups)]
    change(header, tables)
    for entry, table in zip(header["shards"], tables, strict=True):
        entry["columns"] = column_hashes(table)
    text = json.dumps(header, sort_keys=True, separators=(",", ":"))
    with pq.ParquetWriter(path, tables[0].schema) as writer:
        for table in tables:
            writer.write_table(table)
        writer.add_key_value_metadata({HEADER_KEY: text, HASH_KEY: sha256_text(text)})


def put(name: str, value: Any) -> Change:
    return lambda header, tables: header.__setitem__(name, value)


def drop(name: str) -> Change:
    return lambda header, tables: header.pop(name)


def set_first(name: str, value: int) -> Change:
    def change(header: dict[str, Any], tables: list[pa.Table]) -> None:
        i = tables[0].schema.get_field_index(name)
        field = tables[0].schema.field(name)
        values = [value, *tables[0][name].to_pylist()[1:]]
        tables[0] = tables[0].set_column(i, field, pa.array(values, field.type))

    return change


def lose_name(header: dict[str, Any], tables: list[pa.Table]) -> None:
    header["shards"][0].pop("name")


TAMPERED: dict[str, tuple[Change, str]] = {
    "other format": (put("format", "adq_wds.plan"), "expected adq_wds.bins"),
    "newer version": (put("version", 7), "reads versions 1 to 1"),
    **{
        f"no {name}": (drop(name), rf"the header lacks \['{name}'\]")
        for name in ("n_bins", "kernel", "features", "classes", "names", "scores")
    },
    "more bins than scores": (put("n_bins", 4), "classes or scores contradict it"),
    "fewer bins": (put("n_bins", 2), "classes or scores contradict it"),
    "bins of text": (put("n_bins", "many"), "damaged"),
    "classes unsorted": (put("classes", [1, 0]), "classes or scores contradict it"),
    "a class lost": (put("classes", [1]), "of a class that the header does not list"),
    "classes of text": (put("classes", ["cat"]), "damaged"),
    "scores a list": (put("scores", [1, 2]), "damaged"),
    "scores of text": (put("scores", {"texture": ["x", "y", "z"]}), "damaged"),
    "bin out of range": (set_first("bin", 3), r"bins must lie in 0 … 2, got -1 … 3"),
    "bin below": (set_first("bin", -2), r"bins must lie in 0 … 2, got -2 … 2"),
    "no pick": (set_first("pick", -1), "a binned sample has no pick"),
    "unknown class": (set_first("label", 2), "of a class that the header does not list"),
    "a shard without name": (lose_name, "damaged"),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_bins_that_contradict_themselves_are_refused(name: str, path: Path) -> None:
    change, text = TAMPERED[name]
    rewritten(path, change)
    with pytest.raises(adq.PlanError, match=text) as caught:
        Bins.load(path)
    assert "bins.parquet" in str(caught.value)


def test_the_rewriting_above_is_not_itself_the_damage(bins: Bins, path: Path) -> None:
    rewritten(path, lambda header, tables: None)
    assert Bins.load(path).bin.tolist() == bins.bin.tolist()


def test_columns_of_unequal_length_are_refused(bins: Bins) -> None:
    with pytest.raises(adq.PlanError, match="bins of 12 rows for 13 samples"):
        Bins(bins.shards, bins.label, bins.bin[:12], bins.pick, bins.header)
