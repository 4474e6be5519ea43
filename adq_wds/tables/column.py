"""Reads numbers per sample from a user's Parquet file, and joins them to features by key."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from adq_wds.errors import FeaturesError, shorten
from adq_wds.score import Score
from adq_wds.tables.features import Features
from adq_wds.tables.keyed_rows import TELL_APART, KeyedRows


@dataclass(frozen=True)
class Column(Score):
    """A score made elsewhere: a loss, a margin, a count of forgetting events, from a Parquet file, joined by key.

    ``build_plan(..., scores=["texture", adq.Column("scores.parquet", "loss")])`` uses it, and so does the command by
    ``--scores texture scores.parquet:loss``. A bin's score is the mean of its samples; where a number is negative,
    the least one is subtracted from all.

    Attributes:
        path: the file. Its column ``key`` holds the samples' keys, as text; its column ``shard``, which may be
            missing where no key stands in two shards, the shards' names, paths or URLs.
        name: the column of numbers; a name that a `Score` may have.
    """

    path: str | os.PathLike[str]
    name: str

    def __str__(self) -> str:
        return f"{os.fspath(self.path)}:{self.name}"

    @property
    def revision(self) -> str:  # type: ignore[override]
        """The SHA-256 of the file.

        Raises:
            FeaturesError: there is no such file, or it cannot be read.
        """
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
        return self.join((file.shard, file.spans().keys) for file in features)

    def join(self, samples: Iterable[tuple[str, list[str]]]) -> NDArray[np.float32]:
        """(N,) float32, the number of each sample.

        Args:
            samples: shards, each with the keys of its samples.

        Raises:
            FeaturesError: as `values`.
        """
        keyed = KeyedRows(self.path, {self.name: (_is_number, "numbers")})
        column = keyed.file.read([self.name])[self.name].cast(pa.float64(), safe=False)
        with np.errstate(over="ignore"):  # infinite then, and refused
            numbers: NDArray[np.float32] = column.to_numpy().astype(np.float32)
        chosen: list[int] = []
        for shard, keys in samples:
            row_of = keyed.rows(shard)
            if lacking := [key for key in keys if key not in row_of]:
                raise keyed.error(
                    f"no {self.name!r} for {len(lacking):,} samples of shard {shard}, the first key {shorten(lacking[0])}"
                )
            rows = [row_of[key] for key in keys]
            bad = ~np.isfinite(numbers[rows])
            if bad.any():
                key = shorten(keys[int(bad.argmax())])
                raise keyed.error(f"shard {shard}, key {key}: {self.name!r} is not a finite number")
            chosen += rows
        row, n = Counter(chosen).most_common(1)[0] if chosen else (0, 1)
        if n > 1:
            key = shorten(keyed.keys[row].as_py())
            raise keyed.error(f"key {key} stands in several shards{TELL_APART}")
        return numbers[chosen]


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))
