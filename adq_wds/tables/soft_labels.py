"""Stores soft labels: the likeliest classes of every sample and their probabilities, a row group per shard."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, TypedDict, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from adq_wds.errors import FeaturesError, PlanError, shorten
from adq_wds.remote.url_path import as_path
from adq_wds.shards.names import ShardNames, base_name, check_shard_names
from adq_wds.tables.headers import TableHeader, reopened
from adq_wds.tables.parquet import Header, list_array, list_rows, list_type
from adq_wds.tables.plan import CACHED_SHARDS
from adq_wds.tables.table import open_table
from adq_wds.tables.write_table import write_table

VERSION = 1
MAX_CLASSES = 1 << 20
SOURCES = ("ridge", "logits", "probabilities")
_ROUNDING = 1e-3  # of a row's sum


class SoftSource(TypedDict):
    """The header's entries on where soft labels come from, and on their classes."""

    source: Annotated[str, SOURCES]
    temperature: float
    agreement: float | None
    features: str
    encoder: str
    revision: str
    label: str
    n_classes: Annotated[int, range(1, MAX_CLASSES + 1)]
    names: list[str] | None


class SoftHeader(TableHeader, SoftSource):
    """The header of a file of soft labels, as FORMAT.md describes it."""

    n_top: Annotated[int, range(1, 1 << 10)]


@dataclass(frozen=True)
class ShardSoftLabels:
    """The soft labels of one shard.

    Attributes:
        shard: its name.
        keys: of its n usable samples, in tar order.
        top: (n, T) int32, the likeliest classes of each, the likeliest first.
        probability: (n, T) float32, theirs; every row sums to 1.
    """

    shard: str
    keys: list[str]
    top: NDArray[np.int32]
    probability: NDArray[np.float32]

    @cached_property
    def row_of(self) -> dict[str, int]:
        """The row of each key."""
        return {key: row for row, key in enumerate(self.keys)}

    def check(self, n_classes: int) -> None:
        """Raise `FeaturesError` unless every row has different classes and probabilities that sum to 1."""
        p = self.probability
        ordered = np.sort(self.top, axis=1)
        bad = (
            (ordered[:, 0] < 0) | (ordered[:, -1] >= n_classes) | (np.diff(ordered, axis=1) == 0).any(axis=1)
        )
        bad |= ~((p >= 0).all(axis=1) & (abs(p.sum(axis=1) - 1.0) <= _ROUNDING))  # NaN fails too
        if bad.any():
            raise FeaturesError(
                f"shard {self.shard}, key {shorten(self.keys[int(bad.argmax())])}: not the probabilities of different "
                f"classes out of {n_classes}; make the soft labels again"
            )
        if len(self.row_of) != len(self.keys):
            raise FeaturesError(f"shard {self.shard}: a key stands twice; make the soft labels again")

    def table(self) -> pa.Table:
        """The columns key, top and probability."""
        rows = [list_array(self.top), list_array(self.probability)]
        return pa.Table.from_arrays(
            [pa.array(self.keys, pa.string()), *rows], schema=_schema(self.top.shape[1])
        )


def _schema(n_top: int) -> pa.Schema:
    kinds = {
        "key": pa.string(),
        "top": list_type(pa.int32(), n_top),
        "probability": list_type(pa.float32(), n_top),
    }
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in kinds.items()])


def save_soft_labels(
    path: str | os.PathLike[str], shards: Sequence[ShardSoftLabels], header: SoftSource
) -> None:
    """Write soft labels of one or more shards, sorted by name, whole or not at all; all are checked first.

    They are one file, of more than 10,000 shards with a folder of parts beside it.
    """
    for shard in shards:
        shard.check(header["n_classes"])
    n_top = shards[0].top.shape[1]
    whole = {**header, "n_top": n_top, "format": "adq_wds.soft", "version": VERSION}
    groups: Iterator[tuple[Header, pa.Table]] = (({"name": s.shard}, s.table()) for s in shards)
    # readers bound lists by the file's size
    write_table(path, _schema(n_top), groups, whole, n_shards=len(shards), compression="none")


class SoftTable:
    """A file of soft labels, opened: reads the header at once, a shard's rows when first needed.

    Pickles as its path and hash, so that workers read the same file instead of copying it.

    Args:
        path: what `soften_labels` wrote.

    Attributes:
        header: source, classes and counts.
        class_of: the number of each class that has a name.
        hash: SHA-256 of the header, which has a hash of every column.

    Raises:
        FeaturesError: the file is missing, damaged or of another kind.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = open_table(path, kind="soft", version=VERSION, error=FeaturesError, header=SoftHeader)
        self.path, self.hash = as_path(path).absolute(), self._file.hash
        self.header = cast(SoftHeader, self._file.header)
        with self._file.reading_header():
            names = check_shard_names(self._file.names)
            self._position = {name: i for i, name in enumerate(names)}
            words, n_classes = self.header["names"], self.header["n_classes"]
            if len(self._position) != len(names) or self.header["n_top"] > n_classes:
                raise ValueError("its shards or classes contradict each other")
            self.class_of = {word: c for c, word in enumerate(words or [])}
            if words is not None and len(self.class_of) != n_classes:
                raise ValueError(f"{len(self.class_of)} names of {n_classes} classes")
        self._names = ShardNames(names)
        self._shard_of_url: dict[str, str] = {}
        self._cached: OrderedDict[str, ShardSoftLabels] = OrderedDict()

    def find(self, url: str) -> ShardSoftLabels:
        """The soft labels of the shard at a URL or path.

        Raises:
            FeaturesError: there are none of that shard, the URL fits several, or the rows are damaged.
        """
        name = self._shard_of_url.get(url)
        if name is None:
            name = self._shard_of_url[url] = self._find_name(url)
        return self.shard(name)

    def _find_name(self, url: str) -> str:
        try:
            return self._names.find(url)
        except PlanError as cause:
            trouble = f"shard {shorten(base_name(url))} has no soft labels in {self.path}; make them from features of it"
            if "may be" in str(cause):
                trouble = f"{self.path}: {str(cause).partition(';')[0]}; open the shards by longer paths"
            raise FeaturesError(trouble) from None

    def shard(self, name: str) -> ShardSoftLabels:
        """The soft labels of one shard, checked; the last 72 are cached.

        Raises:
            KeyError: no shard has that name.
            FeaturesError: its rows are damaged.
        """
        if name not in self._cached:
            n_top = self.header["n_top"]
            table = self._file.group(self._position[name], _schema(n_top))
            rows = (list_rows(table[column], n_top) for column in ("top", "probability"))
            read = ShardSoftLabels(name, table["key"].to_pylist(), *rows)
            try:
                read.check(self.header["n_classes"])
            except FeaturesError as cause:
                raise FeaturesError(f"{self.path}: damaged: {cause}") from None
            self._cached[name] = read
            while len(self._cached) > CACHED_SHARDS:
                self._cached.popitem(last=False)
        return self._cached[name]

    def __reduce__(self) -> tuple[Any, ...]:
        return reopened, (SoftTable, FeaturesError, str(self.path), self.hash)
