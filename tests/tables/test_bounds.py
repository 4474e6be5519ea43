"""A small file never takes much memory, and whatever its header says, what comes out is the file's own error."""

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import adq_wds as adq
from adq_wds.files import canonical_json
from adq_wds.tables import bounds
from adq_wds.tables.bins import _SCHEMA as BINS
from adq_wds.tables.bins import Bins
from adq_wds.tables.features_file import FeaturesFile, _schema
from adq_wds.tables.parquet import HASH_KEY, HEADER_KEY, write_groups
from adq_wds.tables.plan_rows import OPTIONAL, SCHEMA
from adq_wds.tables.spans import SPAN_FIELDS
from tests.folders import load_index
from tests.programs import run

INDEX = pa.schema(SPAN_FIELDS)
HEAD: dict[str, dict[str, Any]] = {
    "plan": {
        "classes": [], "cells": {"size": [], "quota": []}, "bins": [], "settings": {}, "n_samples": 0, "n_kept": 0,
    },
    "bins": {
        "n_bins": 2, "kernel": "features", "features": "x", "classes": [], "names": None, "scores": {"texture": [1, 2]},
    },
    "features": {
        **dict.fromkeys(("encoder", "revision", "preprocessing_hash", "image", "label"), "x"),
        "width": 4, "label_names": None, "bad": [], "columns": _schema(4).names, "complete": True, "source": {},
    },
    "index": {},
}  # fmt: skip
ERROR = {"plan": adq.PlanError, "bins": adq.PlanError, "features": adq.FeaturesError, "index": adq.ShardError}
READ: dict[str, Callable[[Path], object]] = {
    "plan": lambda path: adq.load_plan(path).table(),
    "bins": Bins.load,
    "features": lambda path: FeaturesFile(path).embedding(),
    "index": load_index,
}
Batches = Iterator[pa.RecordBatch]

PLAN = pa.schema([field for field in SCHEMA if field.name not in OPTIONAL])


def put(path: Path, kind: str, schema: pa.Schema, batches: Any = (), *, raw: Any = None, **said: Any) -> None:
    """A file of one row group (none without batches) and a header whose hash is right, as an attacker would make it."""
    options = said.pop("options", {})
    with pq.ParquetWriter(
        path, schema, **{"compression": "zstd", "use_dictionary": False, **options}
    ) as writer:
        table = pa.Table.from_batches(batches, schema)
        n = table.num_rows
        if n:
            writer.write_table(table, row_group_size=n)
        if raw is None:
            shards = [{"name": "a.tar", "n": n, "kept": 0, "columns": {}}] if n else []
            header = {
                **HEAD[kind],
                "format": f"adq_wds.{kind}",
                "version": 1,
                "shards": shards,
                "n_samples": n,
            }
            raw = canonical_json({**header, **said}).encode()
        writer.add_key_value_metadata({HEADER_KEY: raw, HASH_KEY: hashlib.sha256(raw).hexdigest()})


def zeros(schema: pa.Schema, n: int, times: int, **columns: pa.Array) -> Batches:
    """`times` batches of `n` rows of nothing."""
    row = {
        field.name: np.zeros(n, field.type.to_pandas_dtype()) for field in schema if field.name not in columns
    }
    arrays = [columns.get(f.name, pa.array(row[f.name], f.type) if f.name in row else None) for f in schema]
    batch = pa.record_batch(arrays, schema=schema)
    return iter([batch] * times)


def same(text: str, n: int) -> pa.Array:
    return pa.array([text]).take(pa.array(np.zeros(n, np.int32)))


def dictionary_of_keys(path: Path) -> None:
    schema = PLAN.set(2, pa.field("key", pa.dictionary(pa.int32(), pa.string()), nullable=False))
    n = 500_000
    keys = pa.DictionaryArray.from_arrays(pa.array(np.zeros(n, np.int32)), ["k" * 20_000])
    batches = zeros(schema, n, 1, shard=same("a.tar", n), key=keys)
    put(path, "plan", schema, batches, options={"store_schema": False, "use_dictionary": True})


def compressed_keys(path: Path) -> None:
    n = 1000
    put(path, "plan", PLAN, zeros(PLAN, n, 30, shard=same("a.tar", n), key=same("k" * 20_000, n)))


def wide_embeddings(path: Path) -> None:
    width, n = 2_000_000, 4
    schema = _schema(width)
    flat = pa.array(np.zeros(n * width, np.float16))
    rows = pa.FixedSizeListArray.from_arrays(flat, type=schema.field("embedding").type)
    batches = zeros(schema, n, 25, shard=same("a.tar", n), key=same("k", n), embedding=rows)
    put(path, "features", schema, batches, width=width, columns=schema.names)


def many_rows(path: Path) -> None:
    put(path, "bins", BINS, zeros(BINS, 1_000_000, 20))


def header_of(n: int) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        text = b'{"format":"adq_wds.plan","version":1,"shards":[' + b"{}," * n + b"{}]}"
        put(path, "plan", PLAN, raw=text)

    return make


BOMBS: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "a dictionary of one long key": ("plan", dictionary_of_keys, "column 'key' has over .* bytes of names"),
    "long keys compressed": ("plan", compressed_keys, "column 'key' has over .* bytes of names in 30,000 rows"),
    "embeddings of a huge width": ("features", wide_embeddings, "claims 100 rows of 2,000,000 numbers in a"),
    "rows of nothing": ("bins", many_rows, "20,000,000 rows in one shard, at most"),
    "a header of objects": ("plan", header_of(20_000_000), "header of values of about .* bytes, at most"),
    "a header beyond the limit": ("plan", header_of(31_000_000), "not a readable Parquet file"),
}  # fmt: skip
PROBE = """
import sys, time
from adq_wds.errors import AdqError
import adq_wds as adq
from adq_wds.tables.bins import Bins
from adq_wds.tables.features_file import FeaturesFile
def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) / 1024
read = {"plan": lambda p: adq.load_plan(p).table(), "bins": Bins.load, "features": lambda p: FeaturesFile(p).embedding()}
before, start = peak(), time.process_time()
try:
    read[sys.argv[1]](sys.argv[2])
    said = "read"
except AdqError as error:
    said = f"{type(error).__name__}: {error}"
print(peak() - before, time.process_time() - start, said)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="peak memory is read from /proc")
@pytest.mark.parametrize("name", BOMBS)
def test_a_small_file_that_unfolds_is_refused(name: str, tmp_path: Path) -> None:
    kind, make, text = BOMBS[name]
    make(tmp_path / "bomb.parquet")
    ran = run(PROBE, kind, str(tmp_path / "bomb.parquet"))
    assert ran.returncode == 0, ran.stderr
    mib, seconds, said = ran.stdout.split(" ", 2)
    with pytest.raises(ERROR[kind], match=text):
        raise ERROR[kind](said)
    assert said.startswith(ERROR[kind].__name__)
    assert "bomb.parquet" in said
    assert float(mib) < 256
    assert float(seconds) < 5


# ---- Headers

PLAN_START = b'{"format":"adq_wds.plan","version":1,"shards":[],"x":'
ODD_JSON = {
    "deep": PLAN_START + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "40 levels": PLAN_START + b"[" * 40 + b"]" * 40 + b"}",
    "40 levels of objects": PLAN_START + b'{"a":' * 40 + b"1" + b"}" * 40 + b"}",
    "no JSON": b"{'format': 1}",
    "no UTF-8": PLAN_START + b'"\xff"}',
    "a number of 100,000 digits": PLAN_START + b"1" * 100_000 + b"}",
    "NaN": PLAN_START + b"NaN}",
    "infinity": PLAN_START + b"1e999}",
    "half a surrogate pair": PLAN_START + b'"\\ud800"}',
}


@pytest.mark.parametrize("kind", READ)
@pytest.mark.parametrize("name", ODD_JSON)
def test_a_header_that_is_no_json_of_ours_is_refused(name: str, kind: str, tmp_path: Path) -> None:
    put(tmp_path / "x.parquet", kind, PLAN, raw=ODD_JSON[name])
    with pytest.raises(ERROR[kind], match=r"x\.parquet: damaged: .* not JSON of ours \(.{5,90}\)$"):
        READ[kind](tmp_path / "x.parquet")


def test_a_file_of_other_columns_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "x.parquet", "bins", INDEX, zeros(INDEX, 1, 1, shard=same("a", 1), key=same("k", 1)))
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda *a, **k: pytest.fail("read"))
    with pytest.raises(adq.PlanError, match=r"damaged: .no column 'label', only .*byte_offset"):
        Bins.load(tmp_path / "x.parquet")


@pytest.mark.parametrize("n_bytes", [bounds.MAX_HEADER_BYTES + 1, 110_000_000])
def test_a_header_that_could_not_be_read_back_is_not_written(n_bytes: int, tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"old")
    with pytest.raises(adq.AdqError, match=r"cannot write .*x\.parquet: header of .* use fewer, .* shards"):
        write_groups(tmp_path / "x.parquet", PLAN, [], {"shards": [], "x": "y" * n_bytes})
    assert (tmp_path / "x.parquet").read_bytes() == b"old"


def test_names_that_could_not_be_read_back_are_not_written(tmp_path: Path) -> None:
    (batch,) = zeros(INDEX, 3, 1, shard=same("a.tar", 3), key=same("k" * 5000, 3))
    table = pa.Table.from_batches([batch])
    with pytest.raises(adq.AdqError, match="column 'key' has over 12,304 bytes of names in 3 rows; use"):
        write_groups(tmp_path / "x.parquet", INDEX, [table], {"shards": [{}]})
    assert not list(tmp_path.iterdir())


def test_a_header_at_the_limit_is_written_and_read(tmp_path: Path) -> None:
    header = {**HEAD["plan"], "format": "adq_wds.plan", "version": 1, "shards": []}
    header["x"] = "y" * (bounds.MAX_HEADER_BYTES - len(canonical_json({**header, "x": ""})))
    write_groups(tmp_path / "x.parquet", PLAN, [], header)
    assert adq.load_plan(tmp_path / "x.parquet").header == header


def test_the_limits_admit_plans_of_55_000_shards() -> None:
    hashes = dict.fromkeys(SCHEMA.names, "0" * 64)
    entry = {"name": "imagenet/train-000000.tar", "n": 10_000, "kept": 3_000, "columns": hashes}
    raw = canonical_json([entry] * 55_000).encode()
    bounds.check_header(raw, 55_000)
    with pytest.raises(ValueError, match=r"header of .* bytes, at most 67,108,864"):
        bounds.check_header(raw + raw, 55_000)


def test_headers_are_limited_in_values_and_in_shards() -> None:
    with pytest.raises(ValueError, match="header of values of about 343,000,000 bytes, at most 268,435,456"):
        bounds.check_header(b"{}," * 1_000_000, 0)
    with pytest.raises(ValueError, match="262,145 shards in one file, at most 262,144"):
        bounds.check_header(b"{}", bounds.MAX_GROUPS + 1)


@pytest.mark.parametrize(
    ("rows", "size"), [([1 << 20], 0), ([12_810] * 100, 90_000), ([100_000_000], 400_000_000)]
)
def test_rows_that_a_file_can_hold_are_admitted(rows: list[int], size: int) -> None:
    bounds.check_rows(rows, size)


@pytest.mark.parametrize(
    ("rows", "size", "text"),
    [
        ([(1 << 20) + 1], 0, "1,048,577 rows in one shard, at most 1,048,576"),
        ([100_000_001], 1 << 30, "at most 100,000,000 in"),
        ([1 << 20] * 17, 0, "17,825,792 rows, at most 16,777,216"),
    ],
)
def test_more_rows_than_a_file_can_hold_are_refused(rows: list[int], size: int, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        bounds.check_rows(rows, size)


def test_a_footer_larger_than_ours_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.parquet"
    with path.open("wb") as handle:
        handle.truncate(bounds.MAX_FOOTER_BYTES + 100)
        handle.seek(0, os.SEEK_END)
        handle.write((bounds.MAX_FOOTER_BYTES + 1).to_bytes(4, "little") + b"PAR1")
    monkeypatch.setattr(bounds, "header_weight", lambda raw: pytest.fail("read"))
    with pytest.raises(adq.PlanError, match="a footer of 268,435,457 bytes in a file of"):
        adq.load_plan(path)
