"""Reads numbers per sample from a Parquet file or a folder of features, and joins them to samples by key."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from adq_wds.errors import FeaturesError, PlanError, shorten
from adq_wds.score import Score
from adq_wds.shards.names import ShardNames
from adq_wds.tables import bounds
from adq_wds.tables.features import Features


@dataclass(frozen=True)
class Column(Score):
    """A score made elsewhere: a loss, a margin, a count of forgetting events, from a Parquet file, joined by key.

    ``build_plan(..., scores=["texture", adq.Column("scores.parquet", "loss")])`` uses it, and so does the command by
    ``--scores texture scores.parquet:loss``. A bin's score is the mean of its samples; where a number is negative,
    the least one is subtracted from all.

    Attributes:
        path: the file. Its column ``key`` holds the samples' keys, as text; its column ``shard``, which may be
            missing where no key stands in two shards, the shards' names, paths or URLs. Or a folder of features.
        name: the column of numbers; a name that a `Score` may have.
    """

    path: str | os.PathLike[str]
    name: str

    def __str__(self) -> str:
        return f"{os.fspath(self.path)}:{self.name}"

    @property
    def revision(self) -> str:  # type: ignore[override]
        """The SHA-256 of the file, or of the features.

        Raises:
            FeaturesError: there is no such file, or it cannot be read.
        """
        if os.path.isdir(self.path):
            return Features(self.path).hash
        try:
            with open(self.path, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as cause:
            raise FeaturesError(
                f"{self.path}: {cause.strerror or cause}; {self} is read from there"
            ) from cause

    def per_sample(self, image: Any, h: NDArray[np.float32]) -> float:
        """Refuse: a column is not measured while embedding.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            f"{self} holds numbers that are there already; give it to build_plan, not to embed_shards"
        )

    def values(self, features: Features) -> NDArray[np.float32]:
        """(N,) float32, the number of each usable sample, in the order of the features.

        Rows of samples that are not in the features are ignored.

        Raises:
            FeaturesError: the file is not readable or lacks a column; a sample has no row, two rows, or a number
                that is not finite; a key stands in several shards and the file names none.
        """
        files = {file.shard: file for file in features}
        return self.join(list(files), lambda shard: files[shard].spans().keys)

    def join(self, shards: Sequence[str], keys_of: Callable[[str], list[str]]) -> NDArray[np.float32]:
        """(N,) float32, the number of each sample of some shards, in their order.

        Args:
            shards: their names.
            keys_of: gives the keys of a shard's samples.

        Raises:
            FeaturesError: as `values`.
        """
        table = self._from_features() if os.path.isdir(self.path) else self._read()
        if "shard" in table.column_names:
            groups = self._by_shard(table, shards)
        else:
            self._refuse_keys_of_several_shards(shards, keys_of)
            groups = dict.fromkeys(shards, table)
        parts = [self._joined(shard, keys_of(shard), groups.get(shard)) for shard in shards]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.float32)

    def _from_features(self) -> pa.Table:
        features = Features(self.path)
        first = features.files[0]
        known = sorted({"norm", "texture", *first.scores} & set(first.header["columns"]))
        if self.name not in known:
            raise FeaturesError(
                f"{self.path}: no column {self.name!r} of numbers; it holds {shorten(known, 200)}"
            )
        return pa.concat_tables(file.read(["shard", "key", self.name]) for file in features)

    def _read(self) -> pa.Table:
        try:
            bounds.check_footer(Path(self.path))
            with pq.ParquetFile(self.path) as file:
                known = file.schema_arrow.names
                for wanted in ("key", self.name):
                    if wanted not in known:
                        raise FeaturesError(
                            f"{self.path}: no column {wanted!r}; it holds {shorten(known, 200)}"
                        )
                table = file.read([name for name in ("shard", "key", self.name) if name in known])
        except FileNotFoundError:
            raise FeaturesError(f"{self.path}: no such file") from None
        except (pa.ArrowException, OSError, ValueError) as cause:
            raise FeaturesError(
                f"{self.path}: not a readable Parquet file ({shorten(str(cause))})"
            ) from cause
        for name, kind in zip(
            table.column_names, (*["text"] * (table.num_columns - 1), "numbers"), strict=True
        ):
            dtype = table.schema.field(name).type
            fits = pa.types.is_integer(dtype) or pa.types.is_floating(dtype)
            if kind == "text":
                fits = pa.types.is_string(dtype) or pa.types.is_large_string(dtype)
            if not fits:
                raise FeaturesError(f"{self.path}: column {name!r} holds {dtype}, expected {kind}")
        return table

    def _by_shard(self, table: pa.Table, shards: Sequence[str]) -> dict[str, pa.Table]:
        names = ShardNames(shards)
        groups: dict[str, list[pa.Table]] = {}
        for written in pc.unique(table["shard"]).to_pylist():
            try:
                shard = names.find(str(written))
            except PlanError as cause:
                if "may be" in str(cause):
                    raise FeaturesError(f"{self.path}: {cause}") from None
                continue  # a shard that nobody asked for
            groups.setdefault(shard, []).append(table.filter(pc.equal(table["shard"], written)))
        return {shard: pa.concat_tables(parts) for shard, parts in groups.items()}

    def _refuse_keys_of_several_shards(
        self, shards: Sequence[str], keys_of: Callable[[str], list[str]]
    ) -> None:
        times = Counter(key for shard in shards for key in keys_of(shard))
        twice = next((key for key, n in times.items() if n > 1), None)
        if twice is not None:
            raise FeaturesError(
                f"{self.path}: has no column 'shard', and key {shorten(twice)} stands in several shards; add one"
            )

    def _joined(self, shard: str, keys: list[str], table: pa.Table | None) -> NDArray[np.float32]:
        text = pa.array(keys, pa.large_string())
        rows = pa.table({"key": pa.array([], pa.large_string()), self.name: pa.array([], pa.float64())})
        if table is not None:
            rows = pa.table({"key": table["key"].cast(pa.large_string()), self.name: table[self.name]})
            rows = rows.filter(pc.is_in(rows["key"], value_set=text)).combine_chunks()
        known = rows["key"].combine_chunks()
        row = pc.index_in(text, value_set=pc.unique(known))
        if row.null_count:
            lacking = keys[row.is_null().to_pylist().index(True)]
            raise FeaturesError(
                f"{self.path}: no {self.name!r} for {row.null_count:,} samples of shard {shard}, "
                f"the first key {shorten(lacking)}"
            )
        if len(known) > len(keys):
            twice = next(key for key, n in Counter(known.to_pylist()).items() if n > 1)
            raise FeaturesError(f"{self.path}: two rows for shard {shard}, key {shorten(twice)}")
        column = rows[self.name].cast(pa.float64(), safe=False)
        with np.errstate(over="ignore"):  # infinite then, and refused
            numbers: NDArray[np.float32] = column.to_numpy()[row.to_numpy()].astype(np.float32)
        bad = ~np.isfinite(numbers)
        if bad.any():
            key = keys[int(bad.argmax())]
            raise FeaturesError(
                f"{self.path}: shard {shard}, key {shorten(key)}: {self.name!r} is not a finite number"
            )
        return numbers
