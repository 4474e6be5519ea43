"""What do we know of each sample? Features: a folder, one Parquet file per shard, one row per usable sample."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from adq_wds.errors import AdqError, FeaturesError, shorten
from adq_wds.files import canonical_json, sha256_text
from adq_wds.shards import check_shard_name
from adq_wds.tables.parquet import (
    GroupFile,
    Header,
    column_hashes,
    embedding_array,
    embedding_rows,
    embedding_type,
    write_groups,
)
from adq_wds.tables.spans import SPAN_FIELDS, Spans

VERSION = 1
NO_LABEL = -1  # unlabelled data is one class of this number
# What must be equal in all files of a folder for their rows to be comparable.
ALIKE = ("encoder", "revision", "preprocessing_hash", "width", "image", "label")


@dataclass(frozen=True)
class ShardFeatures:
    """The features of one shard, as its file holds them.

    Attributes:
        shard: the shard's name.
        spans: n usable samples.
        label: (n,) int32; an index into `names` for string labels; -1 for unlabelled data.
        embedding: (n, D) float16 unit rows; a zero row stays zero.
        norm: (n,) float32, the norms before that.
        texture: (n,) float32.
        names: the string labels in this shard, sorted; None for integer labels or none.
        bad: samples that could not be used; `bad_reasons` says why.
        header: encoder, revision, preprocessing_hash, image, label (specifications), source.
    """

    shard: str
    spans: Spans
    label: NDArray[np.int32]
    embedding: NDArray[np.float16]
    norm: NDArray[np.float32]
    texture: NDArray[np.float32]
    header: Header
    names: list[str] | None = None
    bad: Spans | None = None
    bad_reasons: list[str] = field(default_factory=list)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file, whole or not at all, its rows checked first."""
        self.check()
        table = pa.table(
            {
                **self.spans.columns(self.shard),
                "label": self.label,
                "embedding": embedding_array(self.embedding),
                "norm": self.norm,
                "texture": self.texture,
            },
            schema=_schema(self.embedding.shape[1]),
        )
        entry = {"name": self.shard, "n": len(self.spans), "columns": column_hashes(table)}
        header = {
            **self.header,
            "format": "adq_wds.features",
            "version": VERSION,
            "width": self.embedding.shape[1],
            "columns": table.column_names,
            "label_names": self.names,
            "shards": [entry],
            "bad": _bad_rows(self.bad, self.bad_reasons),
        }
        # random mantissas do not compress, so the zstd pass would only cost time
        write_groups(path, table.schema, [table], header, compression="none")

    def check(self) -> None:
        """Raise `FeaturesError` unless the columns fit together and every number is finite."""
        n = len(self.spans)
        shapes = [len(self.label), len(self.embedding), len(self.norm), len(self.texture)]
        if shapes != [n] * 4:
            raise FeaturesError(f"shard {self.shard}: columns of {shapes} rows for {n} samples")
        if self.embedding.ndim != 2 or self.embedding.shape[1] == 0 or self.embedding.dtype != np.float16:
            found = f"{self.embedding.shape} {self.embedding.dtype}"
            raise FeaturesError(f"shard {self.shard}: embeddings are {found}, expected (n, D) float16")
        for name, values in (("embedding", self.embedding), ("norm", self.norm), ("texture", self.texture)):
            _check_finite(self.shard, name, values, lambda: self.spans.keys)
        least, most = (NO_LABEL, np.inf) if self.names is None else (0, len(self.names) - 1)
        if n and not least <= self.label.min() <= self.label.max() <= most:
            raise FeaturesError(
                f"shard {self.shard}: labels {self.label.min()} … {self.label.max()}, expected {least} … {most}"
            )
        if len(self.bad or []) != len(self.bad_reasons):
            raise FeaturesError(
                f"shard {self.shard}: {len(self.bad_reasons)} reasons for {len(self.bad or [])} bad samples"
            )


def _check_finite(
    shard: str, name: str, values: NDArray[np.floating[Any]], keys: Callable[[], list[str]]
) -> None:
    """Raise `FeaturesError` with the key of the first row, (n, …), that holds NaN or infinity."""
    # float16 by its exponent bits: six times as fast as isfinite
    wrong = (
        (values.view(np.uint16) & 0x7C00) == 0x7C00 if values.dtype == np.float16 else ~np.isfinite(values)
    )
    if wrong.any():
        row = int(np.argwhere(wrong)[0][0])
        raise FeaturesError(f"shard {shard}, key {shorten(keys()[row])}: {name} holds NaN or infinity")


def _schema(width: int) -> pa.Schema:
    return pa.schema(
        [
            *SPAN_FIELDS,
            pa.field("label", pa.int32(), nullable=False),
            pa.field("embedding", embedding_type(width), nullable=False),
            pa.field("norm", pa.float32(), nullable=False),
            pa.field("texture", pa.float32(), nullable=False),
        ]
    )


def _bad_rows(bad: Spans | None, reasons: list[str]) -> list[list[Any]]:
    if bad is None:
        return []
    return [[*row, why] for row, why in zip(bad.rows(), reasons, strict=True)]


class FeaturesFile:
    """One shard's file, opened: the header at once, columns when asked for.

    Args:
        path: the file.
        limit: use only the shard's first samples, this many (usable or not).

    Attributes:
        shard: the shard's name.
        n: usable samples.
        n_read: all samples, usable or not.
        width: D.
        names: the string labels in this shard, sorted; None for integer labels or none.
        bad: samples that could not be used: (index, key, byte_offset, n_bytes, crc32, reason) each.
    """

    def __init__(self, path: str | os.PathLike[str], *, limit: int | None = None) -> None:
        self._file = GroupFile(path, kind="features", version=VERSION, error=FeaturesError)
        self.path, self.header = self._file.path, self._file.header
        try:
            (entry,) = self.header["shards"]
            self.shard = check_shard_name(entry["name"])
            self.n = int(entry["n"])
            self.width = _checked_width(self.header["width"])
            self.names = _checked_names(self.header["label_names"])
            self.bad = _checked_bad(self.header["bad"])
            self.bad_spans()
            _check_origin(self.header, _schema(self.width).names)
        except (AdqError, KeyError, TypeError, ValueError, OverflowError) as cause:
            raise FeaturesError(f"{self.path}: damaged header: {shorten(str(cause))}") from cause
        if limit is not None and limit < self.n + len(self.bad):
            self.bad = [row for row in self.bad if row[0] < limit]
            self.n = int(np.searchsorted(self.read(["index"])["index"].to_numpy(), limit))
        self.n_read = self.n + len(self.bad)

    def read(self, columns: list[str]) -> pa.Table:
        """Some columns of the n usable samples, checked against the header's hashes."""
        return self._file.group(0, _schema(self.width), columns).slice(0, self.n)

    def spans(self) -> Spans:
        """Where the usable samples lie."""
        return Spans.from_table(self.read(["index", "key", "byte_offset", "n_bytes", "crc32"]))

    def bad_spans(self) -> Spans:
        """Where the unusable samples lie."""
        return Spans.from_rows([row[:5] for row in self.bad])

    def embedding(self) -> NDArray[np.float16]:
        """(n, D) float16 unit rows, all finite."""
        rows = embedding_rows(self.read(["embedding"])["embedding"], self.width)
        _check_finite(self.shard, "embedding", rows, lambda: self.spans().keys)
        return rows

    def texture(self) -> NDArray[np.float32]:
        """(n,) float32 texture levels, all finite."""
        levels: NDArray[np.float32] = self.read(["texture"])["texture"].to_numpy()
        _check_finite(self.shard, "texture", levels, lambda: self.spans().keys)
        return levels


def _checked_width(width: object) -> int:
    if type(width) is not int or not 1 <= width < 2**31:
        raise ValueError(f"width {width!r}")
    return width


def _checked_names(names: object) -> list[str] | None:
    if names is None or (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        return names
    raise ValueError(f"label names {names!r}")


def _checked_bad(rows: object) -> list[tuple[Any, ...]]:
    """(index, key, byte_offset, n_bytes, crc32, reason) per bad sample, of the types and signs they are written with."""
    if not isinstance(rows, list):
        raise ValueError(f"bad samples are a {type(rows).__name__}, expected a list")
    for row in rows:
        kinds = [type(value) for value in row] if isinstance(row, list) else None
        if kinds != [int, str, int, int, int, str] or min(row[0], *row[2:5]) < 0:
            raise ValueError(f"bad sample {shorten(row)}")
    return [tuple(row) for row in rows]


def _check_origin(header: Header, columns: list[str]) -> None:
    """Raise unless a header says of which source it is, whether of all of it, and which columns it has."""
    if header["columns"] != columns:
        raise ValueError(f"columns {shorten(header['columns'])}")
    if type(header["complete"]) is not bool:
        raise ValueError(f"complete {shorten(header['complete'])}, expected true or false")
    source = header["source"]
    if not isinstance(source, dict) or any(type(value) is not int for value in source.values()):
        raise ValueError(f"source {shorten(source)}, expected whole numbers by name")


class Features:
    """A folder of features, opened: headers read and compared, rows left on the disk.

    Iterating gives the files of its shards; `len` counts usable samples, not shards.

    Args:
        folder: where `embed_shards` wrote one file per shard.
        shards: use only these; every one must be there. All by default.
        limit: use only the first samples, this many, over the shards in the order of `shards` (of file names,
            without it).

    Attributes:
        files: one `FeaturesFile` per shard, sorted by shard name: the order of samples in every plan.

    Raises:
        ValueError: `limit` is not a positive integer.
        FeaturesError: no files, a damaged one, a shard missing, or files of different encoders or settings.
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, shards: Sequence[str] | None = None, limit: int | None = None
    ) -> None:
        if limit is not None and (
            type(limit) is bool or not isinstance(limit, (int, np.integer)) or limit < 1
        ):
            raise ValueError(f"limit must be an integer >= 1, got {limit!r}")
        self.folder = Path(folder)
        self.limit = None if limit is None else int(limit)
        if shards is None:
            paths = sorted(self.folder.glob("*.parquet"))
        else:
            paths = [self.folder / file_name(shard) for shard in shards]
        if not paths:
            raise FeaturesError(
                f"{self.folder}: no features here (no *.parquet); make them with embed_shards"
            )
        files = []
        left = self.limit
        for path in paths:
            if left is not None and left <= 0:
                break
            files.append(FeaturesFile(path, limit=left))
            left = None if left is None else left - files[-1].n_read
        self.files = sorted(files, key=lambda file: file.shard)
        self._compare()

    def _compare(self) -> None:
        first = self.files[0]
        names = {file.shard for file in self.files}
        for file in self.files:
            short = file.shard.partition("/")[2]
            if short in names:
                raise FeaturesError(
                    f"{self.folder}: {file.shard} and {short} may be one shard, embedded in two runs; remove the older file"
                )
        for before, file in zip(self.files, self.files[1:], strict=False):
            if before.shard == file.shard:
                raise FeaturesError(
                    f"{before.path} and {file.path} both describe shard {file.shard}; remove one"
                )
        for file in self.files:
            for name in ALIKE:
                a, b = first.header.get(name), file.header.get(name)
                if a != b:
                    raise FeaturesError(
                        f"{first.path} and {file.path} do not belong together: {name} {shorten(a)} and "
                        f"{shorten(b)}; embed all shards with the same settings"
                    )

    def __iter__(self) -> Iterator[FeaturesFile]:
        """The file of each shard, in order."""
        return iter(self.files)

    def __len__(self) -> int:
        """Usable samples in all shards."""
        return sum(file.n for file in self.files)

    def __repr__(self) -> str:
        return f"<Features {len(self):,} samples in {len(self.files)} shards, {self.header['encoder']}, D = {self.width}>"

    @property
    def width(self) -> int:
        """D, the length of an embedding."""
        return self.files[0].width

    @property
    def header(self) -> Header:
        """What all files have in common."""
        return {name: self.files[0].header.get(name) for name in ALIKE}

    @cached_property
    def hash(self) -> str:
        """SHA-256 over the contents: settings and one hash per shard and column, not file bytes or dates."""
        shards = [[*file.header["shards"], file.n_read, file.names, file.bad] for file in self.files]
        return sha256_text(canonical_json([self.header, shards]))


def file_name(shard: str) -> str:
    """The file that holds a shard's features.

    >>> file_name("train-000001.tar"), file_name("a/train.tar")
    ('train-000001.parquet', 'a--train.parquet')
    """
    return shard.removesuffix(".tar").replace("/", "--") + ".parquet"
