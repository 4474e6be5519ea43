"""Small files of each kind of table, how they are read, and how an attacker changes them: all hashes agree."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors
import safetensors.numpy

import adq_wds as adq
from adq_wds.files import canonical_json, sha256_text
from adq_wds.tables.bins import Bins
from adq_wds.tables.features_file import FeaturesFile
from adq_wds.tables.index import save_index
from adq_wds.tables.parquet import HASH_KEY, HEADER_KEY, column_hash
from adq_wds.tables.plan_rows import NEVER, PlanShard
from adq_wds.tables.soft_labels import ShardSoftLabels, SoftTable, save_soft_labels
from adq_wds.tables.spans import Spans
from adq_wds.tables.views import ShardViews
from tests.conftest import synthetic_features
from tests.folders import load_index

Change = Callable[[dict[str, Any], Any], object]
"""Changes a header and the tables (of a codebook: the arrays by name) in place; of a codebook it may return metadata."""


def plan_spans(n: int, first: int = 0) -> Spans:
    return Spans.from_rows([(i, f"k{i + first}", i * 1024, 1024, i + 7) for i in range(n)])


def plan_shard(name: str, n: int = 12, first: int = 0) -> PlanShard:
    """Two classes, two bins; the first of each cell is kept; the last sample is of no bin."""
    i = np.arange(n)
    label, bin = (i % 2).astype(np.int32), (i // 2 % 2).astype(np.int16)
    pick = (i // 4).astype(np.int32)
    rank = pick.copy()
    bin[-1], pick[-1], rank[-1], label[-1] = -1, -1, NEVER, -1
    return PlanShard(name, plan_spans(n, first), label, bin, pick, rank, rank < 1)


PLAN: dict[str, Any] = {
    "settings": {"keep": 0.3},
    "classes": [{"label": 0}, {"label": 1}],
    "cells": {"size": [[3, 3], [3, 2]], "quota": [[1, 1], [1, 1]]},
    "bins": [],
}


def small_plan() -> adq.Plan:
    return adq.Plan.from_shards([plan_shard("b.tar", first=100), plan_shard("a.tar")], PLAN)


def explained(path: Path) -> Path:
    """A plan of version 2: a copy and a sample of a class left out besides those of `plan_shard`."""
    n = 4
    i = np.arange(n, dtype=np.int32)
    none = np.full(n, -1, dtype=np.int32)
    bin, rank = np.where(i < 2, 0, none), np.where(i < 2, i, NEVER).astype(np.int32)
    label = np.array([0, 0, 0, 5], dtype=np.int32)
    reason = np.array([0, 1, 2, 5], dtype=np.uint8)
    columns = (label, bin.astype(np.int16), np.where(i < 2, i, none), rank, rank < 1, reason)
    cells = {"size": [[2]], "quota": [[1]], "share": [[1.0]]}
    header = {**PLAN, "settings": {"seed": 0}, "classes": [{"label": 0}], "cells": cells}
    shard = PlanShard("a.tar", plan_spans(n), *columns, duplicate_of={2: "a.tar/k0"})
    adq.Plan.from_shards([shard], header).save(path)
    return path


def whole_plan(path: Path) -> tuple[Any, ...]:
    plan = adq.load_plan(path)
    return canonical_json(plan.header), plan.hash, plan.table().to_pydict()


def codebook(*, names: list[str] | None = None, bins: int = 4, **changed: Any) -> adq.Codebook:
    """Rules of two checkpoints over all classes, and for classes 1 and 3 of 0, 1 and 3; D = 5."""
    rng = np.random.default_rng(0)
    query = (np.rint(rng.normal(size=(3, bins - 1, 2, 5)) / 9 * 2.0**23) / 2.0**23).astype(np.float32)
    arrays: dict[str, Any] = {
        "query": query,
        "threshold": rng.normal(size=(3, bins - 1, 2)) / 9,
        "label": np.array([-1, 1, 3], dtype=np.int32),
        "held_out": rng.integers(1, 50, (3, bins)),
        "weight": rng.random((3, bins)),
    }
    header = {
        "encoder": "e", "revision": "1", "preprocessing_hash": "p", "label": "cls", "features": "f",
        "classes": [0, 1, 3], "names": names, "settings": {"seed": 0, "pilot": [9, 5, 5]}, "scores": {},
    }  # fmt: skip
    header |= changed.pop("header", {})
    return adq.Codebook(**{**arrays, **changed, "header": header})


TENSORS = ("query", "threshold", "label", "held_out", "weight")


def whole_codebook(path: Path) -> tuple[Any, ...]:
    made = adq.load_codebook(path)
    return canonical_json(made.header), made.hash, *(getattr(made, name).tobytes() for name in TENSORS)


def signed(text: str) -> dict[str, str]:
    return {"adq_wds": f"{sha256_text(text)} {text}"}


def rewritten_codebook(path: Path, change: Change) -> Path:
    """The file with something changed, the header's hash made to agree; the change may return other metadata."""
    with safetensors.safe_open(path, framework="np") as file:
        header = json.loads(file.metadata()["adq_wds"].partition(" ")[2])
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    metadata: Any = change(header, arrays)
    if metadata is None:
        metadata = signed(canonical_json(header))
    path.write_bytes(safetensors.numpy.save(arrays, metadata))
    return path


def features(path: Path) -> None:
    """Eight usable samples, positions 2 and 7 are bad; classes by name, a head of three classes, a score, digests."""
    label = [0, 1, 1, 0, 2, 2, 0, 1]
    made = synthetic_features(
        "deep/a.tar", label, bad=[2, 7], names=["cat", "dog", "öwl"], n_classes=3, scores={"sharp": "1"}, contents=label
    )  # fmt: skip
    made.save(path)


def everything(path: Path) -> tuple[Any, ...]:
    """All that a file of features says."""
    file = FeaturesFile(path)
    names = ["index", "key", "byte_offset", "n_bytes", "crc32", "label", "norm", "texture", "sharp"]
    table = file.read_columns(names).to_pydict()
    arrays = [
        file.embedding(),
        file.logit_grad(),
        file.digest(),
        file.norm(),
        file.texture(),
        file.score("sharp"),
    ]
    rest = (file.shard, file.n, file.n_read, file.width, file.names, file.bad)
    return canonical_json(file.header), *(a.tobytes() for a in arrays if a is not None), table, *rest


BINS: dict[str, Any] = {
    "n_bins": 3, "kernel": "features", "features": "f", "classes": [0, 1], "names": None,
    "scores": {"texture": [0.5, 0.25, None]},
}  # fmt: skip


def bins(path: Path) -> None:
    """Three shards, one of them empty; class 2 is left out, and bin 2 empty."""
    columns = np.array([[0, 1, 0, 2, 1], [0, 0, 1, -1, 1], [0, 0, 1, -1, 2]])
    label, bin, pick = (column.astype(kind) for column, kind in zip(columns, "ihi", strict=True))
    Bins([("a.tar", 3), ("b.tar", 0), ("c.tar", 2)], label, bin, pick, BINS).save(path)


VIEWS: dict[str, Any] = {
    "encoder": "synthetic", "revision": "1", "preprocessing_hash": "0", "image": "jpg", "width": 6, "seed": 3, "view": "1",
}  # fmt: skip


def unit_views(n: int, width: int = 6, seed: int = 0) -> Any:
    z = np.random.default_rng(seed).normal(size=(n, 2, width))
    return (z / np.linalg.norm(z, axis=2, keepdims=True)).astype(np.float16)


def some_views(n: int = 5) -> ShardViews:
    """Samples 0, 2, 4, ...; one view of sample 4 is a zero row."""
    index, z = np.arange(n, dtype=np.int32) * 2, unit_views(n)
    z[2:3, 1] = 0
    crc32 = np.arange(n, dtype=np.uint32) + 7
    return ShardViews("a.tar", index, [f"k{i}" for i in index], crc32, z, VIEWS)


SOFT: Any = {
    "source": "ridge", "temperature": 0.5, "agreement": 1.0, "features": "f", "encoder": "synthetic", "revision": "1",
    "label": "cls", "n_classes": 3, "names": None,
}  # fmt: skip


def soft_labels(path: Path) -> None:
    """Three samples, three classes of which two are stored."""
    top = np.array([[0, 1], [2, 0], [1, 2]], np.int32)
    p = np.array([[0.75, 0.25], [1, 0], [0.5, 0.5]], np.float32)
    save_soft_labels(path, [ShardSoftLabels("deep/a.tar", ["k0", "k1", "k2"], top, p)], SOFT)


def all_soft_labels(path: Path) -> tuple[Any, ...]:
    table = SoftTable(path)
    shards = [table.shard(entry["name"]) for entry in table.header["shards"]]
    rows = (fields(s, ["shard", "keys", "top", "probability"]) for s in shards)
    return canonical_json(table.header), *rows


def rewritten(path: Path, change: Change, out: Path | None = None) -> Path:
    """The file with something changed and all hashes made to agree, in its place or elsewhere."""
    file = pq.ParquetFile(path)
    header = json.loads(file.metadata.metadata[HEADER_KEY])
    tables = [file.read_row_group(i).replace_schema_metadata(None) for i in range(file.num_row_groups)]
    change(header, tables)
    shards = header["shards"] if isinstance(header["shards"], list) else []
    for entry, table in zip(shards, tables, strict=False):
        if entry.get("columns"):
            nested = {field.name for field in table.schema if pa.types.is_list(field.type)}
            plain = [n for n in table.column_names if n not in nested and not table[n].null_count]
            entry["columns"] |= {name: column_hash(table[name]) for name in plain}
    text = canonical_json(header)
    with pq.ParquetWriter(out or path, tables[0].schema) as writer:
        for table in tables:
            writer.write_table(table)
        writer.add_key_value_metadata({HEADER_KEY: text, HASH_KEY: sha256_text(text)})
    return out or path


class Kind(NamedTuple):
    """How a kind of file is made, read and changed, the class of its errors, and how much damage of each sort it gets."""

    make: Callable[[Path], object]
    read: Callable[[Path], tuple[Any, ...]]
    error: type[Exception]
    n_cuts: int = 100
    n_flips: int = 100
    refused: float = 0.5  # the share of flips that is noticed, at least: others change nothing that is read
    suffix: str = ".parquet"
    rewritten: Callable[[Path, Change], Path] = rewritten


def fields(table: Any, names: Sequence[str]) -> tuple[Any, ...]:
    values = (getattr(table, name) for name in names)
    return tuple(v.tolist() if isinstance(v, np.ndarray) else v for v in values)


KINDS = {
    "plan": Kind(lambda path: small_plan().save(path), whole_plan, adq.PlanError, 500, 1000),
    "explained plan": Kind(explained, whole_plan, adq.PlanError),
    "index": Kind(
        lambda path: save_index(path, [(name, plan_spans(5)) for name in ("a.tar", "b.tar")]),
        lambda path: tuple((name, spans.rows()) for name, spans in load_index(path).items()),
        adq.ShardError,
    ),
    "soft": Kind(soft_labels, all_soft_labels, adq.FeaturesError),
    "features": Kind(features, everything, adq.FeaturesError),
    "bins": Kind(
        bins,
        lambda path: fields(Bins.load(path), ["shards", "label", "bin", "pick", "header"]),
        adq.PlanError,
    ),
    "views": Kind(
        lambda path: some_views().save(path),
        lambda path: fields(ShardViews.load(path), ["shard", "index", "keys", "crc32", "z", "header"]),
        adq.FeaturesError,
    ),
    "codebook": Kind(
        lambda path: codebook().save(path), whole_codebook, adq.CodebookError, 150, 400, 0.95, ".safetensors",
        rewritten_codebook,
    ),
}  # fmt: skip


def put(name: str, value: Any) -> Change:
    """Another entry in the header."""
    return lambda header, tables: header.__setitem__(name, value)


def drop(name: str) -> Change:
    return lambda header, tables: header.__delitem__(name)


def put_entry(name: str, value: Any) -> Change:
    """Another entry of the first shard."""
    return lambda header, tables: header["shards"][0].__setitem__(name, value)


def put_column(name: str, values: Any) -> Change:
    """Another column: an Arrow array, or a function of the old one's values as a list."""

    def change(header: dict[str, Any], tables: list[pa.Table]) -> None:
        i, old = tables[0].schema.get_field_index(name), tables[0][name]
        new = pa.array(values(old.to_pylist()), old.type) if callable(values) else values
        field = pa.field(name, new.type, nullable=bool(new.null_count))
        tables[0] = tables[0].set_column(i, field, new)

    return change


def put_value(name: str, row: int, value: Any) -> Change:
    """Another value in a column."""
    return put_column(name, lambda values: [*values[:row], value, *values[row + 1 :]])


def lose_column(name: str) -> Change:
    return lambda header, tables: tables.__setitem__(0, tables[0].drop_columns([name]))
