"""Which row of a Parquet file is a sample's embedding? Found by shard and key, a row group at a time."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from adq_wds.errors import FeaturesError, located, shorten
from adq_wds.shards.names import base_name

MAX_HELD = 4  # row groups kept in memory: samples of a shard stand together in most files


class ParquetRows:
    """The embeddings of a Parquet file, by key, or by shard and key when it has a `shard` column.

    Keys are held in memory, embeddings a few row groups at a time: files with row groups of about 10,000 rows in the
    order of the shards are read once and stay small. May be called from several threads.

    Raises:
        FeaturesError: not a Parquet file, other columns or types, empty entries, or a key that stands twice.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = pq.ParquetFile(path)  # not mapped: a file cut short meanwhile is an error
            schema = self._file.schema_arrow
            self._has_shard = "shard" in schema.names
            self._has_norm = "norm" in schema.names
            self._check_columns(schema)
            names = self._file.read(columns=["key", "shard"] if self._has_shard else ["key"])
            counts = [self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)]
        except (pa.ArrowException, OSError) as error:
            raise self._damaged(error) from error
        self.n_rows = names.num_rows
        self._starts = np.concatenate([[0], np.cumsum(counts)]).astype(
            np.int64
        )  # first row of each row group
        self._lock = threading.Lock()
        self._held: OrderedDict[int, NDArray[np.float32]] = OrderedDict()
        self._index_names(names)
        self.width = self._first_width() if self.n_rows else 0
        if self.width < 1:
            raise FeaturesError(
                f"embeddings {path}: holds no numbers ({self.n_rows} rows of width {self.width})"
            )

    def find(self, shard: str, keys: Sequence[str]) -> NDArray[np.float32]:
        """(n, D) float32 embeddings of a shard's keys, in their order.

        Raises:
            FeaturesError: a key is not there, or the file cannot be read; names shard and key.
        """
        with self._lock:
            row_of = self._row_of(shard)
            try:
                rows = np.array([row_of[key] for key in keys], dtype=np.int64)
            except KeyError as error:
                missing = FeaturesError(f"not in embeddings {self.path}; embed it too, or leave it out")
                raise located(missing, shard=shard, key=error.args[0]) from None
            h = np.empty((len(keys), self.width), dtype=np.float32)
            groups = np.searchsorted(self._starts, rows, side="right") - 1
            for group in np.unique(groups):
                at = np.flatnonzero(groups == group)
                h[at] = self._group(int(group))[rows[at] - self._starts[group]]
        return h

    def _check_columns(self, schema: pa.Schema) -> None:
        for name in ("key", "embedding"):
            if schema.names.count(name) != 1:
                raise FeaturesError(
                    f"embeddings {self.path}: {schema.names.count(name)} columns {name!r} among "
                    f"{shorten(schema.names, 200)}; expected key, embedding and, where a key stands in two shards, shard"
                )
        kind = schema.field("embedding").type
        kind = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
        is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
        if not is_list or not pa.types.is_floating(kind.value_type):
            raise FeaturesError(
                f"embeddings {self.path}: column 'embedding' is {kind}, expected lists of floats"
            )
        if self._has_norm and not pa.types.is_floating(schema.field("norm").type):
            raise FeaturesError(
                f"embeddings {self.path}: column 'norm' is {schema.field('norm').type}, expected floats"
            )
        for name in ("key", "shard"):
            if name in schema.names and not _is_text(schema.field(name).type):
                raise FeaturesError(
                    f"embeddings {self.path}: column {name!r} is {schema.field(name).type}, expected strings"
                )

    def _index_names(self, names: pa.Table) -> None:
        """Remember the keys of each shard, by its file name; without shards, of all together."""
        if any(column.null_count for column in names.columns):
            raise FeaturesError(f"embeddings {self.path}: an empty key or shard")
        self._keys = self._strings(names, "key")
        if self._has_shard:
            coded = self._strings(names, "shard").dictionary_encode()
            code_of: dict[str, int] = {}
            merge = [code_of.setdefault(_stem(name), len(code_of)) for name in coded.dictionary.to_pylist()]
            codes = np.array(merge, dtype=np.int64)[coded.indices.to_numpy()]
        else:
            code_of, codes = {"": 0}, np.zeros(len(self._keys), dtype=np.int64)
        self._refuse_repeats(codes, list(code_of))
        order = np.argsort(codes, kind="stable")
        ends = np.cumsum(np.bincount(codes, minlength=len(code_of)))
        self._rows_of_shard = dict(zip(code_of, np.split(order, ends[:-1]), strict=True))
        self._current: tuple[str, dict[str, int]] = ("\0", {})

    def _strings(self, names: pa.Table, name: str) -> Any:
        try:
            return names[name].cast(pa.large_string()).combine_chunks()
        except pa.ArrowException as error:  # older pyarrow casts no views
            raise FeaturesError(
                f"embeddings {self.path}: column {name!r} of type {names[name].type} cannot be read by pyarrow "
                f"{pa.__version__}; write it as string"
            ) from error

    def _refuse_repeats(self, codes: NDArray[np.int64], shards: list[str]) -> None:
        pairs = (
            pa.table({"code": codes, "key": self._keys})
            .group_by(["code", "key"])
            .aggregate([([], "count_all")])
        )
        repeated = pairs.filter(pc.greater(pairs["count_all"], 1))
        if not repeated.num_rows:
            return
        first = repeated.slice(0, 1).to_pylist()[0]
        if self._has_shard:
            place, remedy = f"shard {shorten(shards[first['code']])}, ", "shards are told apart by file name"
        else:
            place, remedy = "", "add a shard column that tells them apart"
        raise FeaturesError(
            f"embeddings {self.path}: {place}key {shorten(first['key'])} stands {first['count_all']} times; {remedy}"
        )

    def _row_of(self, shard: str) -> dict[str, int]:
        """Row by key in one shard; the last one asked for is remembered."""
        name = _stem(shard) if self._has_shard else ""
        if self._current[0] != name:
            rows = self._rows_of_shard.get(name)
            if rows is None:
                some = ", ".join(shorten(known) for known in list(self._rows_of_shard)[:3])
                raise FeaturesError(
                    f"shard {shard}: not in embeddings {self.path}, which has {len(self._rows_of_shard)} shards "
                    f"({some}, ...)"
                )
            keys = self._keys.take(pa.array(rows)).to_pylist()
            self._current = (name, dict(zip(keys, rows.tolist(), strict=True)))
        return self._current[1]

    def _group(self, group: int) -> NDArray[np.float32]:
        if group not in self._held:
            while len(self._held) >= MAX_HELD:
                self._held.popitem(last=False)  # before the next is read: never more than MAX_HELD
            self._held[group] = self._read_group(group)
        self._held.move_to_end(group)
        return self._held[group]

    def _first_width(self) -> int:
        """Numbers in row 0; every other row is held against it when its row group is read."""
        group = int(np.searchsorted(self._starts, 0, side="right")) - 1  # the first that is not empty
        first = self._read("embedding", group)[:1]
        return len(first.to_pylist()[0] or ())

    def _read(self, column: str, group: int) -> Any:
        """One column of a row group as one Arrow array, of plain lists when of an extension type."""
        try:
            values = self._file.read_row_group(group, columns=[column])[column].combine_chunks()
        except (pa.ArrowException, OSError) as error:
            raise self._damaged(error) from error
        return values.storage if isinstance(values, pa.ExtensionArray) else values

    def _read_group(self, group: int) -> NDArray[np.float32]:
        """(rows of the group, D) float32."""
        h = self._matrix(self._read("embedding", group), int(self._starts[group]))
        if self._has_norm:
            h *= self._read("norm", group).to_numpy(zero_copy_only=False).astype(np.float32)[:, None]
        return h

    def _matrix(self, column: Any, first_row: int) -> NDArray[np.float32]:
        lengths = pc.list_value_length(column).fill_null(-1).to_numpy(zero_copy_only=False)
        width = self.width
        odd = np.flatnonzero(lengths != width)
        if not odd.size:  # every list is there and of one length; is every number?
            odd = np.flatnonzero(column.flatten().is_null().to_numpy(zero_copy_only=False)) // width
        if odd.size:
            row, length = first_row + int(odd[0]), int(lengths[odd[0]])
            found = "an empty entry" if length in (-1, width) else f"{length} numbers"
            raise FeaturesError(
                f"embeddings {self.path}: row {row}, key {shorten(self._keys[row].as_py())}, has {found}, "
                f"expected {width} numbers"
            )
        # float64 beyond float32 becomes Inf, which is refused where h is stored
        with np.errstate(over="ignore"):
            values: NDArray[np.float32] = column.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
        return values.reshape(len(column), width)

    def _damaged(self, error: Exception) -> FeaturesError:
        text = " ".join(str(error).split())[:160]
        return FeaturesError(
            f"embeddings {self.path}: not a whole Parquet file ({type(error).__name__}: {text})"
        )


def _stem(shard: str) -> str:
    return base_name(shard).removesuffix(".tar")


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    view = pa.types.is_string_view(kind)
    return bool(view or pa.types.is_string(kind) or pa.types.is_large_string(kind))
