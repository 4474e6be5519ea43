"""Which bin is each sample in, and what are the bins like? Made once per set, used by plans of every ratio."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from adq_wds.errors import PlanError, shorten
from adq_wds.tables.parquet import GroupFile, Header, column_hashes, write_groups

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


@dataclass(frozen=True)
class Bins:
    """The bins of a whole set, rows as in the features: by (shard name, index).

    Attributes:
        shards: (name, rows) of each shard, in row order.
        label: (N,) int32, class of each sample over the whole set; -1 for unlabelled data.
        bin: (N,) int16, 0 … K−1 in the order filled; -1 for a sample left out.
        pick: (N,) int32, position in which its bin took it, from 0; -1 for a sample left out.
        header: n_bins, kernel, features hash, classes, names, and `scores`: one list of K values per score,
            None for an empty bin; `heads`, where a diversity head was asked for: what it gave, and from what;
            `margins`, where there are some: of which samples (`fit`, a hash), `accuracy`, and by class `wrong`.
        margin: (N,) float32, how well each label fits, NaN for samples that were not in the fit; None where nobody
            asked.
    """

    shards: list[tuple[str, int]]
    label: NDArray[np.int32]
    bin: NDArray[np.int16]
    pick: NDArray[np.int32]
    header: Header
    margin: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        n = sum(rows for _, rows in self.shards)
        if not len(self.label) == len(self.bin) == len(self.pick) == n:
            raise PlanError(f"bins of {len(self.bin)} rows for {n} samples")
        missing = {"n_bins", "kernel", "features", "classes", "names", "scores"} - self.header.keys()
        if missing:
            raise PlanError(f"bins: the header lacks {sorted(missing)}")
        self._check_margins(n)
        classes = self.classes
        if (
            classes != sorted(set(classes))
            or not all(-1 <= label < 2**31 for label in classes)
            or any(len(s) != self.n_bins for s in self.scores().values())
        ):
            raise PlanError("bins: the header's classes or scores contradict it")
        if n and (self.bin.min() < -1 or self.bin.max() >= self.n_bins):
            raise PlanError(
                f"bins must lie in 0 … {self.n_bins - 1}, got {self.bin.min()} … {self.bin.max()}"
            )
        if ((self.pick < 0) | ~np.isin(self.label, self.classes))[self.bin >= 0].any():
            raise PlanError(
                "bins: a binned sample has no pick, or is of a class that the header does not list"
            )

    def _check_margins(self, n: int) -> None:
        margins = self.header.get("margins")
        if (self.margin is None) != (margins is None) or (self.margin is not None and len(self.margin) != n):
            raise PlanError("bins: the margins and the header contradict each other")
        if margins is not None:
            shares = [margins["accuracy"], *margins["wrong"]]
            if len(margins["wrong"]) != len(self.classes) or not all(0.0 <= share <= 1.0 for share in shares):
                raise PlanError("bins: the header says of margins what cannot be")

    @property
    def n_bins(self) -> int:
        """K."""
        return int(self.header["n_bins"])

    @property
    def classes(self) -> list[int]:
        """The classes that were binned, ascending."""
        return [int(label) for label in self.header["classes"]]

    def scores(self) -> dict[str, NDArray[np.float64]]:
        """(K,) float64 per score, NaN for an empty bin."""
        return {
            name: np.array([np.nan if v is None else v for v in values], dtype=np.float64)
            for name, values in self.header["scores"].items()
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to one Parquet file, whole or not at all."""
        groups, entries, start = [], [], 0
        schema = _SCHEMA if self.margin is None else _MARGIN_SCHEMA
        for name, rows in self.shards:
            part = slice(start, start + rows)
            columns = {"label": self.label[part], "bin": self.bin[part], "pick": self.pick[part]}
            if self.margin is not None:
                columns["margin"] = self.margin[part]
            groups.append(pa.table(columns, schema=schema))
            entries.append({"name": name, "n": rows, "columns": column_hashes(groups[-1])})
            start += rows
        header = {**self.header, "format": "adq_wds.bins", "version": VERSION, "shards": entries}
        write_groups(path, schema, groups, header)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Bins:
        """Read bins back.

        Raises:
            PlanError: the file is damaged or of another kind.
        """
        file = GroupFile(path, kind="bins", version=VERSION, error=PlanError)
        n_groups = len(file.header["shards"])
        groups = [file.group(i, _MARGIN_SCHEMA, optional=[_MARGIN.name]) for i in range(n_groups)]
        table = pa.concat_tables(groups) if groups else _SCHEMA.empty_table()
        try:
            shards = [(str(entry["name"]), int(entry["n"])) for entry in file.header["shards"]]
            label, bin, pick = (table[name].to_numpy() for name in _SCHEMA.names)
            margin = table["margin"].to_numpy() if "margin" in table.column_names else None
            return cls(shards, label, bin, pick, _own(file.header), margin)
        except (PlanError, AttributeError, KeyError, TypeError, ValueError, OverflowError) as cause:
            raise PlanError(f"{Path(path)}: damaged: {shorten(str(cause), 200)}") from cause


def _own(header: Header) -> Header:
    return {name: value for name, value in header.items() if name not in ("format", "version", "shards")}
