"""Holds the bin of each sample of a set and the scores of the bins, for plans of every ratio."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, NotRequired, TypedDict

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from adq_wds.errors import PlanError
from adq_wds.tables.features_file import NO_LABEL
from adq_wds.tables.headers import TableHeader, checked
from adq_wds.tables.parquet import Header
from adq_wds.tables.table import open_table
from adq_wds.tables.write_table import write_table

VERSION = 1
_SCHEMA = pa.schema(
    [
        pa.field("label", pa.int32(), nullable=False),
        pa.field("bin", pa.int16(), nullable=False),
        pa.field("pick", pa.int32(), nullable=False),
    ]
)
_MARGIN = pa.field("margin", pa.float32(), nullable=False)
_MARGIN_SCHEMA = pa.schema([*_SCHEMA, _MARGIN])


class MarginsSource(TypedDict):
    """The header's summary of the margins of labels."""

    fit: str
    accuracy: float
    wrong: list[float]


class BinsSource(TypedDict):
    """The entries of the header that the maker of bins fills in; see FORMAT.md."""

    n_bins: int
    kernel: str
    features: str
    classes: list[Annotated[int, range(NO_LABEL, 2**31)]]
    names: list[str] | None
    scores: dict[str, list[float | None]]
    dedup: NotRequired[str | float | None]
    bins_by: NotRequired[str]
    asked_classes: NotRequired[Any]
    heads: NotRequired[dict[str, Any]]
    margins: NotRequired[MarginsSource]


class BinsHeader(TableHeader, BinsSource):
    """The header of a file of bins."""


@dataclass(frozen=True)
class Bins:
    """The bins of a whole set, rows as in the features: by (shard name, index).

    Attributes:
        shards: (name, rows) of each shard, in row order.
        label: (N,) int32, class of each sample over the whole set; -1 for unlabelled data.
        bin: (N,) int16, 0 … K−1 in the order filled; -1 for a sample left out.
        pick: (N,) int32, position in which its bin took it, from 0; -1 for a sample left out.
        header: what was binned and how; `scores` holds one list of K values per score, None for an empty bin; `heads`,
            where a diversity head was asked for, what it gave, and from what; `margins`, where they were asked
            for, of which samples margins are, and what they say of the classes; `bins_by`, "difficulty" for strata by
            margin.
        margin: (N,) float32, how well each label fits, NaN for samples that were not in the fit; None where nobody
            asked.
    """

    shards: list[tuple[str, int]]
    label: NDArray[np.int32]
    bin: NDArray[np.int16]
    pick: NDArray[np.int32]
    header: BinsSource
    margin: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        n = sum(rows for _, rows in self.shards)
        if not len(self.label) == len(self.bin) == len(self.pick) == n:
            raise PlanError(f"bins of {len(self.bin)} rows for {n} samples")
        try:
            checked(self.header, BinsSource)
            lengths = {len(values) for values in self.scores().values()}
        except (ValueError, OverflowError) as error:
            raise PlanError(f"bins: {error}") from error
        self._check_margins(n)
        classes = self.header["classes"]
        if classes != sorted(set(classes)) or not lengths <= {self.n_bins}:
            raise PlanError("bins: the header's classes or scores contradict it")
        if n and (self.bin.min() < -1 or self.bin.max() >= self.n_bins):
            raise PlanError(
                f"bins must lie in 0 … {self.n_bins - 1}, got {self.bin.min()} … {self.bin.max()}"
            )
        if ((self.pick < 0) | ~np.isin(self.label, classes))[self.bin >= 0].any():
            raise PlanError(
                "bins: a binned sample has no pick, or is of a class that the header does not list"
            )

    def _check_margins(self, n: int) -> None:
        margins = self.header.get("margins")
        if (self.margin is None) != (margins is None) or (self.margin is not None and len(self.margin) != n):
            raise PlanError("bins: the margins and the header contradict each other")
        if margins is not None:
            shares = [margins["accuracy"], *margins["wrong"]]
            if len(shares) != 1 + len(self.header["classes"]) or not all(0 <= share <= 1 for share in shares):
                raise PlanError("bins: the header says of margins what cannot be")

    @property
    def n_bins(self) -> int:
        """K."""
        return self.header["n_bins"]

    @property
    def classes(self) -> list[int]:
        """The classes that were binned, ascending."""
        return self.header["classes"]

    def scores(self) -> dict[str, NDArray[np.float64]]:
        """(K,) float64 per score, NaN for an empty bin."""
        return {
            name: np.array([np.nan if v is None else v for v in values], dtype=np.float64)
            for name, values in self.header["scores"].items()
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to one Parquet file, of more than 10,000 shards with a folder of parts beside it; whole or not at all."""
        schema = _SCHEMA if self.margin is None else _MARGIN_SCHEMA

        def groups() -> Iterator[tuple[Header, pa.Table]]:
            start = 0
            for name, rows in self.shards:
                columns = {field: getattr(self, field)[start : start + rows] for field in schema.names}
                yield {"name": name}, pa.table(columns, schema=schema)
                start += rows

        header = {**self.header, "format": "adq_wds.bins", "version": VERSION}
        write_table(path, schema, groups(), header, n_shards=len(self.shards))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Bins:
        """Read bins back.

        Raises:
            PlanError: the file is damaged or of another kind.
        """
        file = open_table(path, kind="bins", version=VERSION, error=PlanError, header=BinsHeader)
        shards = list(zip(file.names, file.counts("n").tolist(), strict=True))
        groups = [file.group(i, _MARGIN_SCHEMA, optional=[_MARGIN.name]) for i in range(len(shards))]
        table = pa.concat_tables(groups) if groups else _SCHEMA.empty_table()
        header: Any = {name: file.header[name] for name in BinsSource.__annotations__ if name in file.header}
        try:
            label, bin, pick = (table[name].to_numpy() for name in _SCHEMA.names)
            margin = table["margin"].to_numpy() if "margin" in table.column_names else None
            return cls(shards, label, bin, pick, header, margin)
        except PlanError as cause:
            raise PlanError(f"{file.path}: damaged: {cause}") from cause
