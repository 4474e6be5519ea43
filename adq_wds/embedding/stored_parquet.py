"""Reads embeddings by shard and key from a Parquet file, a row group at a time."""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from adq_wds.embedding.source import StoredEmbeddings
from adq_wds.embedding.stored_npy import file_hash
from adq_wds.errors import FeaturesError, located, shorten
from adq_wds.samples.fields import Sample
from adq_wds.tables.keyed_rows import KeyedRows

MAX_GROUPS = 4  # row groups in memory: samples of a shard stand together in most files


def _reopened(path: Path, revision: str) -> ParquetEmbeddings:
    embeddings = ParquetEmbeddings(path)
    if embeddings.revision != revision:
        raise FeaturesError(
            f"embeddings {path} differ between processes: give them one file, unchanged during a job"
        )
    return embeddings


class ParquetEmbeddings(StoredEmbeddings):
    """The embeddings of a Parquet file, by key, or by shard and key when it has a `shard` column.

    Keys are kept in memory, embeddings a few row groups at a time: files with row groups of about 10,000 rows in the
    order of the shards are read once and stay small. May be called from several threads.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, f"stored:{path.name}"
        kinds = {
            "embedding": (_is_list_of_floats, "lists of floats"),
            "norm": (pa.types.is_floating, "floats"),
        }
        self._rows = KeyedRows(path, kinds, optional=("norm",), what="embeddings ")
        self._has_norm = "norm" in self._rows.file.schema_arrow.names
        metadata = self._rows.file.metadata
        sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        self._starts = np.cumsum([0, *sizes])  # first row of each row group
        self._lock = threading.Lock()
        self._groups: OrderedDict[int, NDArray[np.float32]] = OrderedDict()
        self.n_rows = len(self._rows.keys)
        self.width = self._first_width() if self.n_rows else 0
        if not self.width:
            raise self._rows.error(f"holds no numbers ({self.n_rows} rows of width 0)")
        self.revision = file_hash(path)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the path: another process opens the same file again."""
        return _reopened, (self.path, self.revision)

    def row(self, sample: Sample, *, shard: str, position: int) -> NDArray[np.float32]:
        """The row of a sample's key; see `StoredEmbeddings.row`."""
        key = sample["__key__"]
        with self._lock:
            row = self._rows.rows(shard).get(key)
            if row is None:
                missing = FeaturesError(f"not in embeddings {self.path}; embed it too, or leave it out")
                raise located(missing, shard=shard, key=key)
            group = int(np.searchsorted(self._starts, row, side="right")) - 1
            h: NDArray[np.float32] = self._group(group)[row - self._starts[group]].copy()
            return h

    def _group(self, group: int) -> NDArray[np.float32]:
        """(rows of the group, D) float32."""
        if group not in self._groups:
            while len(self._groups) >= MAX_GROUPS:
                self._groups.popitem(last=False)  # before the next is read: never more than MAX_GROUPS
            h = self._matrix(self._read_column("embedding", group), int(self._starts[group]))
            if self._has_norm:
                h *= (
                    self._read_column("norm", group)
                    .to_numpy(zero_copy_only=False)
                    .astype(np.float32)[:, None]
                )
            self._groups[group] = h
        self._groups.move_to_end(group)
        return self._groups[group]

    def _first_width(self) -> int:
        """The length of row 0; other rows are compared with it when their row group is read."""
        group = int(np.searchsorted(self._starts, 0, side="right")) - 1  # the first that is not empty
        return len(self._read_column("embedding", group)[0].as_py() or ())

    def _read_column(self, column: str, group: int) -> Any:
        """One column of a row group as one Arrow array, of plain lists when of an extension type."""
        try:
            values = self._rows.file.read_row_group(group, columns=[column])[column].combine_chunks()
        except (pa.ArrowException, OSError) as error:
            raise self._rows.damaged(error) from error
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
            key = shorten(self._rows.keys[row].as_py())
            raise self._rows.error(f"row {row}, key {key}, has {has}, expected {width} numbers")
        with np.errstate(over="ignore"):
            values: NDArray[np.float32] = column.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
        return values.reshape(len(column), width)


def _is_list_of_floats(kind: pa.DataType) -> bool:
    kind = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return bool(is_list and pa.types.is_floating(kind.value_type))
