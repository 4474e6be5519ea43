"""Reads embeddings by shard and key from a Parquet file, a row group at a time."""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from adq_wds.embedding.source import StoredEmbeddings
from adq_wds.embedding.stored_npy import file_hash
from adq_wds.errors import FeaturesError, located, shorten
from adq_wds.samples.fields import Sample
from adq_wds.shards.names import base_name

MAX_GROUPS = 4  # row groups in memory: samples of a shard stand together in most files


class ParquetEmbeddings(StoredEmbeddings):
    """The embeddings of a Parquet file, by key, or by shard and key when it has a `shard` column.

    Keys are kept in memory, embeddings a few row groups at a time: files with row groups of about 10,000 rows in the
    order of the shards are read once and stay small. May be called from several threads.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, f"stored:{path.name}"
        try:
            self._file = pq.ParquetFile(path)  # not mapped: a file cut short meanwhile is an error
            schema = self._file.schema_arrow
            self._has_shard, self._has_norm = "shard" in schema.names, "norm" in schema.names
            self._check_columns(schema)
            names = self._file.read(columns=["key", "shard"] if self._has_shard else ["key"])
        except (pa.ArrowException, OSError) as error:
            raise self._damaged(error) from error
        metadata = self._file.metadata
        sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        self._starts = np.cumsum([0, *sizes])  # first row of each row group
        self._lock = threading.Lock()
        self._groups: OrderedDict[int, NDArray[np.float32]] = OrderedDict()
        self._index_names(names)
        self.n_rows = names.num_rows
        self.width = self._first_width() if self.n_rows else 0
        if not self.width:
            raise self._error(f"holds no numbers ({self.n_rows} rows of width 0)")
        self.revision = file_hash(path)

    def row(self, sample: Sample, *, shard: str, position: int) -> NDArray[np.float32]:
        """The row of a sample's key; see `StoredEmbeddings.row`. Of `shard` only the file name counts, without `.tar`."""
        key = sample["__key__"]
        with self._lock:
            row = self._row_of(shard).get(key)
            if row is None:
                missing = FeaturesError(f"not in embeddings {self.path}; embed it too, or leave it out")
                raise located(missing, shard=shard, key=key)
            group = int(np.searchsorted(self._starts, row, side="right")) - 1
            h: NDArray[np.float32] = self._group(group)[row - self._starts[group]].copy()
            return h

    def _check_columns(self, schema: pa.Schema) -> None:
        for name in ("key", "embedding"):
            if schema.names.count(name) != 1:
                raise self._error(
                    f"{schema.names.count(name)} columns {name!r} among {shorten(schema.names, 200)}; expected key, "
                    "embedding and, where a key stands in two shards, shard"
                )
        expected = {
            "embedding": (_is_list_of_floats, "lists of floats"),
            "norm": (pa.types.is_floating, "floats"),
            "key": (_is_text, "strings"),
            "shard": (_is_text, "strings"),
        }
        for name, (is_right, kind) in expected.items():
            if name in schema.names and not is_right(schema.field(name).type):
                raise self._error(f"column {name!r} is {schema.field(name).type}, expected {kind}")

    def _index_names(self, names: pa.Table) -> None:
        """Remember the keys of each shard, by its file name; without shards, of all together."""
        if any(column.null_count for column in names.columns):
            raise self._error("an empty key or shard")
        self._keys = self._strings(names, "key")
        code_of: dict[str, int] = {"": 0}
        codes = np.zeros(len(self._keys), dtype=np.int64)
        if self._has_shard:
            coded = self._strings(names, "shard").dictionary_encode()
            code_of = {}
            merge = [code_of.setdefault(_stem(name), len(code_of)) for name in coded.dictionary.to_pylist()]
            codes = np.array(merge, dtype=np.int64)[coded.indices.to_numpy()]
        self._refuse_repeats(codes, list(code_of))
        order = np.argsort(codes, kind="stable")
        ends = np.cumsum(np.bincount(codes, minlength=len(code_of)))
        self._rows_of_shard = dict(zip(code_of, np.split(order, ends[:-1]), strict=True))
        self._last: tuple[str, dict[str, int]] = (
            "\0",
            {},
        )  # the shard requested last, and row by key in it

    def _strings(self, names: pa.Table, name: str) -> Any:
        try:
            return names[name].cast(pa.large_string()).combine_chunks()
        except pa.ArrowException as error:  # older pyarrow casts no views
            kind = names[name].type
            raise self._error(
                f"column {name!r} of type {kind} cannot be read by pyarrow {pa.__version__}; write it as string"
            ) from error

    def _refuse_repeats(self, codes: NDArray[np.int64], shards: list[str]) -> None:
        pairs = pa.table({"code": codes, "key": self._keys}).group_by(["code", "key"])
        counts = pairs.aggregate([([], "count_all")])
        repeated = counts.filter(pc.greater(counts["count_all"], 1)).slice(0, 1).to_pylist()
        for first in repeated:
            where, remedy = "", "add a shard column that tells them apart"
            if self._has_shard:
                where, remedy = (
                    f"shard {shorten(shards[first['code']])}, ",
                    "shards are told apart by file name",
                )
            raise self._error(
                f"{where}key {shorten(first['key'])} stands {first['count_all']} times; {remedy}"
            )

    def _row_of(self, shard: str) -> dict[str, int]:
        name = _stem(shard) if self._has_shard else ""
        if self._last[0] != name:
            rows = self._rows_of_shard.get(name)
            if rows is None:
                some = ", ".join(shorten(known) for known in list(self._rows_of_shard)[:3])
                raise FeaturesError(
                    f"shard {shard}: not in embeddings {self.path}, which has {len(self._rows_of_shard)} shards "
                    f"({some}, ...)"
                )
            keys = self._keys.take(pa.array(rows)).to_pylist()
            self._last = (name, dict(zip(keys, rows.tolist(), strict=True)))
        return self._last[1]

    def _group(self, group: int) -> NDArray[np.float32]:
        """(rows of the group, D) float32."""
        if group not in self._groups:
            while len(self._groups) >= MAX_GROUPS:
                self._groups.popitem(last=False)  # before the next is read: never more than MAX_GROUPS
            h = self._matrix(self._read("embedding", group), int(self._starts[group]))
            if self._has_norm:
                h *= self._read("norm", group).to_numpy(zero_copy_only=False).astype(np.float32)[:, None]
            self._groups[group] = h
        self._groups.move_to_end(group)
        return self._groups[group]

    def _first_width(self) -> int:
        """The length of row 0; other rows are compared with it when their row group is read."""
        group = int(np.searchsorted(self._starts, 0, side="right")) - 1  # the first that is not empty
        return len(self._read("embedding", group)[0].as_py() or ())

    def _read(self, column: str, group: int) -> Any:
        """One column of a row group as one Arrow array, of plain lists when of an extension type."""
        try:
            values = self._file.read_row_group(group, columns=[column])[column].combine_chunks()
        except (pa.ArrowException, OSError) as error:
            raise self._damaged(error) from error
        return values.storage if isinstance(values, pa.ExtensionArray) else values

    def _matrix(self, column: Any, first_row: int) -> NDArray[np.float32]:
        lengths = pc.list_value_length(column).fill_null(-1).to_numpy(zero_copy_only=False)
        width = int(self.width or 0)
        odd = np.flatnonzero(lengths != width)
        if not odd.size:  # every list is there and of one length; is every number?
            odd = np.flatnonzero(column.flatten().is_null().to_numpy(zero_copy_only=False)) // width
        if odd.size:
            row, length = first_row + int(odd[0]), int(lengths[odd[0]])
            has = "an empty entry" if length in (-1, width) else f"{length} numbers"
            key = shorten(self._keys[row].as_py())
            raise self._error(f"row {row}, key {key}, has {has}, expected {width} numbers")
        with np.errstate(over="ignore"):
            values: NDArray[np.float32] = column.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
        return values.reshape(len(column), width)

    def _error(self, text: str) -> FeaturesError:
        return FeaturesError(f"embeddings {self.path}: {text}")

    def _damaged(self, error: Exception) -> FeaturesError:
        text = " ".join(str(error).split())[:160]
        return self._error(f"not a whole Parquet file ({type(error).__name__}: {text})")


def _stem(shard: str) -> str:
    return base_name(shard).removesuffix(".tar")


def _is_list_of_floats(kind: pa.DataType) -> bool:
    kind = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return bool(is_list and pa.types.is_floating(kind.value_type))


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return any(
        is_it(kind) for is_it in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    )
