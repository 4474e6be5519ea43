"""Small files of each kind of table, how they are read, and how an attacker changes them: all hashes agree."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import adq_wds as adq
from adq_wds.files import canonical_json, sha256_text
from adq_wds.tables.bins import Bins
from adq_wds.tables.features_file import FeaturesFile
from adq_wds.tables.parquet import HASH_KEY, HEADER_KEY, column_hash
from adq_wds.tables.soft_labels import ShardSoftLabels, SoftTable, save_soft_labels
from adq_wds.tables.views import ShardViews
from tests.conftest import synthetic_features

Change = Callable[[dict[str, Any], list[pa.Table]], object]


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
    table = file.read_columns(
        ["index", "key", "byte_offset", "n_bytes", "crc32", "label", "norm", "texture", "sharp"]
    )
    arrays = (
        file.embedding(),
        file.logit_grad(),
        file.digest(),
        file.norm(),
        file.texture(),
        file.score("sharp"),
    )
    rest = (file.shard, file.n, file.n_read, file.width, file.names, file.bad)
    return (
        canonical_json(file.header),
        *(a.tobytes() for a in arrays if a is not None),
        table.to_pydict(),
        *rest,
    )


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
    top, p = (
        np.array([[0, 1], [2, 0], [1, 2]], np.int32),
        np.array([[0.75, 0.25], [1, 0], [0.5, 0.5]], np.float32),
    )
    save_soft_labels(path, [ShardSoftLabels("deep/a.tar", ["k0", "k1", "k2"], top, p)], SOFT)


def all_soft_labels(path: Path) -> tuple[Any, ...]:
    table = SoftTable(path)
    shards = [table.shard(entry["name"]) for entry in table.header["shards"]]
    return (
        canonical_json(table.header),
        *(fields(s, ["shard", "keys", "top", "probability"]) for s in shards),
    )


class Kind(NamedTuple):
    """How a kind of file is made and read, and the class of all its errors."""

    make: Callable[[Path], object]
    read: Callable[[Path], tuple[Any, ...]]
    error: type[Exception]


def fields(table: Any, names: Sequence[str]) -> tuple[Any, ...]:
    values = (getattr(table, name) for name in names)
    return tuple(v.tolist() if isinstance(v, np.ndarray) else v for v in values)


KINDS = {
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
}


def rewritten(path: Path, change: Change) -> None:
    """The file with something changed and all hashes made to agree."""
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
    with pq.ParquetWriter(path, tables[0].schema) as writer:
        for table in tables:
            writer.write_table(table)
        writer.add_key_value_metadata({HEADER_KEY: text, HASH_KEY: sha256_text(text)})


def put(name: str, value: Any) -> Change:
    """Another entry in the header."""
    return lambda header, tables: header.__setitem__(name, value)


def drop(name: str) -> Change:
    return lambda header, tables: header.pop(name)


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


def lose_column(name: str) -> Change:
    return lambda header, tables: tables.__setitem__(0, tables[0].drop_columns([name]))
