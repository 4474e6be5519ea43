"""Finds rows of a user's Parquet file by key, or by shard and key."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from adq_wds.errors import FeaturesError, PlanError, reason_of, shorten
from adq_wds.shards.names import ShardNames, path_of
from adq_wds.tables import bounds

TELL_APART = "; write each sample once, and the names of shards in a column 'shard' where they share keys"
Kind = tuple[Callable[[pa.DataType], bool], str]
"""Whether a column may have a type, and what is expected, in words."""


class KeyedRows:
    """A user's Parquet file with a column ``key`` and, where a key stands in two shards, a column ``shard``.

    A shard may be written as its name, its path or a URL, with or without ``.tar``; where several have one file name,
    that counts whose path agrees longest, from its end on.

    Args:
        path: the file.
        kinds: the further columns that are read, by name.
        optional: those that may be missing.
        what: in front of the path in errors.

    Attributes:
        file: the file, opened.
        keys: (N,) the keys of its rows, as Arrow text.

    Raises:
        FeaturesError: it is missing, damaged or without rows, or a column is missing or of another type.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        kinds: Mapping[str, Kind],
        *,
        optional: tuple[str, ...] = (),
        what: str = "",
    ) -> None:
        self.path, self._what = Path(path), what
        try:
            bounds.check_footer(self.path)
            self.file = pq.ParquetFile(self.path)  # not mapped: a file cut short meanwhile is an error
            known = self.file.schema_arrow
            for name, (fits, kind) in {"key": _TEXT, "shard": _TEXT, **kinds}.items():
                n = known.names.count(name)
                if n > 1 or (n == 0 and name not in ("shard", *optional)):
                    raise self.error(f"{n} columns {name!r} among {shorten(known.names, 200)}; expected one")
                if n and not fits(known.field(name).type):
                    raise self.error(f"column {name!r} is {known.field(name).type}, expected {kind}")
            self._has_shard = "shard" in known.names
            names = self.file.read(["key", "shard"] if self._has_shard else ["key"])
            texts = [column.cast(pa.large_string()).combine_chunks() for column in names.columns]
        except FileNotFoundError:
            raise self.error("no such file") from None
        except (pa.ArrowException, OSError, ValueError) as cause:
            raise self.damaged(cause) from cause
        if any(column.null_count for column in texts):
            raise self.error("an empty key or shard")
        if not len(texts[0]):
            raise self.error("no rows; expected one for each sample")
        self.keys = texts[0]
        self._rows: dict[str, NDArray[np.int64]] = {"": np.arange(len(self.keys))}
        if self._has_shard:
            coded = texts[1].dictionary_encode()
            code_of: dict[str, int] = {}
            merged = [code_of.setdefault(_plain(name), len(code_of)) for name in coded.dictionary.to_pylist()]
            codes = np.array(merged, dtype=np.int64)[coded.indices.to_numpy()]
            ends = np.cumsum(np.bincount(codes, minlength=len(code_of)))
            self._rows = dict(
                zip(code_of, np.split(np.argsort(codes, kind="stable"), ends[:-1]), strict=True)
            )
        self._names = ShardNames(self._rows)
        self._last: tuple[str | None, dict[str, int]] = (None, {})  # the shard asked for last, and its rows

    def rows(self, shard: str) -> dict[str, int]:
        """The row of each key of a shard; not for several threads at a time.

        Raises:
            FeaturesError: the file has no such shard, or a key of it twice.
        """
        name = self._name(shard) if self._has_shard else ""
        if self._last[0] != name:
            rows = self._rows[name]
            keys = self.keys.take(pa.array(rows)).to_pylist()
            row_of = dict(zip(keys, rows.tolist(), strict=True))
            if len(row_of) < len(rows):
                key, n = Counter(keys).most_common(1)[0]
                raise self.error(f"shard {shard}, key {shorten(key)} stands {n} times{TELL_APART}")
            self._last = name, row_of
        return self._last[1]

    def _name(self, shard: str) -> str:
        try:
            return self._names.find(_plain(shard))
        except PlanError as cause:
            some = ", ".join(shorten(known) for known in list(self._rows)[:3])
            of = f"of its {len(self._rows)} shards ({some}, ...)"
            raise self.error(f"shard {shard} is none {of}, or is like several; name it in full") from cause

    def error(self, text: str) -> FeaturesError:
        """The error with the file's path in front."""
        return FeaturesError(f"{self._what}{self.path}: {text}")

    def damaged(self, error: Exception) -> FeaturesError:
        """The error of a file that cannot be read."""
        return self.error(f"not a whole Parquet file ({reason_of(error)})")


def _plain(shard: str) -> str:
    return path_of(shard).removesuffix(".tar")


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return any(
        is_it(kind) for is_it in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    )


_TEXT: Kind = (_is_text, "strings")
