"""Holds one shard's features, one row per usable sample; reads and writes their file."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, NotRequired, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from adq_wds.errors import FeaturesError, shorten
from adq_wds.score import check_score_name
from adq_wds.shards.names import check_shard_name
from adq_wds.tables.headers import EmbeddedBy, Natural, Natural31, Natural32, TableHeader, Width
from adq_wds.tables.members import MEMBERS
from adq_wds.tables.parquet import (
    GroupFile,
    column_hashes,
    embedding_type,
    list_array,
    list_rows,
    write_groups,
)
from adq_wds.tables.spans import SPAN_FIELDS, Spans

VERSION = 4
"""1: embedding, norm, texture. 2: also logit_grad or scores of users. 3: also digest, or without texture. 4: also members.

A file says the least one that it needs.
"""
DIGEST_BYTES = 16
LOGIT_GRAD = "softmax"  # the kind of logit gradients; files of earlier versions may hold another
NO_LABEL = -1  # unlabelled data is one class of this number

BadRow = tuple[Natural31, str, Natural, Natural, Natural32, str]
"""index, key, byte_offset, n_bytes, crc32, reason."""


class FeaturesSource(EmbeddedBy):
    """The entries of a features header that the maker fills in: sources and settings."""

    label: str
    complete: bool
    source: dict[str, int]
    scores: NotRequired[dict[str, str]]
    logit_grad: NotRequired[Annotated[str, (LOGIT_GRAD, "double_softmax")]]
    head_right: NotRequired[Natural31]
    first_row: NotRequired[Natural]


class FeaturesHeader(TableHeader, FeaturesSource):
    """The header of a file of features, as FORMAT.md describes it."""

    width: Width
    columns: list[str]
    label_names: list[str] | None
    bad: list[BadRow]
    n_classes: NotRequired[Width]


@dataclass(frozen=True)
class ShardFeatures:
    """The features of one shard, as its file holds them.

    Attributes:
        shard: the shard's name.
        spans: n usable samples.
        label: (n,) int32; an index into `names` for string labels; -1 for unlabelled data.
        embedding: (n, D) float16 unit rows; a zero row stays zero.
        norm: (n,) float32, the norms before that.
        texture: (n,) float32; None where there are no images.
        header: sources and settings.
        names: the string labels in this shard, sorted; None for integer labels or none.
        bad: samples that could not be used; `bad_reasons` says why.
        logit_grad: (n, C) float16, the directions of the loss's gradients by the logits, unit rows; or None.
        scores: (n,) float32 of each score of users, by name.
        digest: (n, 16) uint8, `content_digest` of each sample; None in files from before there was one.
    """

    shard: str
    spans: Spans
    label: NDArray[np.int32]
    embedding: NDArray[np.float16]
    norm: NDArray[np.float32]
    texture: NDArray[np.float32] | None
    header: FeaturesSource
    names: list[str] | None = None
    bad: Spans | None = None
    bad_reasons: list[str] = field(default_factory=list)
    logit_grad: NDArray[np.float16] | None = None
    scores: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    digest: NDArray[np.uint8] | None = None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file, whole or not at all, its rows checked first."""
        self.check()
        columns = {name: _arrow(values) for name, values in self._columns().items()}
        schema = self._schema()
        table = pa.table({**self.spans.columns(self.shard), **columns}, schema=schema)
        bad = [] if self.bad is None else self.bad.rows()
        n_classes = {} if self.logit_grad is None else {"n_classes": self.logit_grad.shape[1]}
        is_old = self.digest is None and self.texture is not None
        newest = 3 if self.spans.members is None else VERSION
        header = {
            **self.header,
            **n_classes,
            "format": "adq_wds.features",
            "version": newest if newest > 3 or not is_old else 2 if self.scores or n_classes else 1,
            "width": self.embedding.shape[1],
            "columns": table.column_names,
            "label_names": self.names,
            "shards": [{"name": self.shard, "n": len(self.spans), "columns": column_hashes(table)}],
            "bad": [[*row, why] for row, why in zip(bad, self.bad_reasons, strict=True)],
        }
        # random mantissas do not compress, so the zstd pass would only cost time
        write_groups(path, schema, [table], header, compression="none")

    def _columns(self) -> dict[str, NDArray[Any]]:
        """The columns that exist, besides those of spans."""
        columns = {
            "label": self.label,
            "embedding": self.embedding,
            "norm": self.norm,
            "texture": self.texture,
            "logit_grad": self.logit_grad,
            **self.scores,
            "digest": self.digest,
        }
        return {name: values for name, values in columns.items() if values is not None}

    def _schema(self) -> pa.Schema:
        width, n_classes = (
            None if rows is None else rows.shape[1] if rows.ndim == 2 else 1
            for rows in (self.embedding, self.logit_grad)
        )
        members = [] if self.spans.members is None else [MEMBERS.name]
        return _schema(width or 1, n_classes, self.scores, [*self._columns(), *members])

    def check(self) -> None:
        """Raise `FeaturesError` unless the columns fit together and every number is finite."""
        n, schema = len(self.spans), self._schema()
        for name, values in self._columns().items():
            expected = schema.field(name).type
            if len(values) != n or _arrow_type(values) != expected:
                raise self._error(f"{name} is {values.shape} {values.dtype}, expected {n} rows of {expected}")
            if values.dtype.kind == "f":
                _check_finite(self.shard, name, values, lambda: self.spans.keys)
        if set(self.header.get("scores", {})) != set(self.scores):
            raise self._error(f"scores {sorted(self.scores)}, its header says others")
        if (self.logit_grad is None) != ("logit_grad" not in self.header):
            raise self._error("logit gradients and a header that contradicts them")
        least, most = (NO_LABEL, np.inf) if self.names is None else (0, len(self.names) - 1)
        if n and not least <= self.label.min() <= self.label.max() <= most:
            raise self._error(f"labels {self.label.min()} … {self.label.max()}, expected {least} … {most}")
        if len(self.bad or []) != len(self.bad_reasons):
            raise self._error(f"{len(self.bad_reasons)} reasons for {len(self.bad or [])} bad samples")

    def _error(self, text: str) -> FeaturesError:
        return FeaturesError(f"shard {self.shard}: {text}")


def _check_finite(shard: str, name: str, values: NDArray[Any], keys: Callable[[], list[str]]) -> None:
    """Raise `FeaturesError` with the key of the first row, (n, …), that holds NaN or infinity."""
    # float16 by its exponent bits: six times as fast as isfinite
    half = values.dtype == np.float16
    wrong = (values.view(np.uint16) & 0x7C00) == 0x7C00 if half else ~np.isfinite(values)
    if wrong.any():
        row = int(np.argwhere(wrong)[0][0])
        raise FeaturesError(f"shard {shard}, key {shorten(keys()[row])}: {name} holds NaN or infinity")


def _schema(
    width: int,
    n_classes: int | None = None,
    scores: Iterable[str] = (),
    columns: Collection[str] = ("texture",),
) -> pa.Schema:
    """The columns of a file, `texture`, `digest` and `members` where they are among `columns`."""
    kinds = {"label": pa.int32(), "embedding": embedding_type(width), "norm": pa.float32()}
    if "texture" in columns:
        kinds["texture"] = pa.float32()
    if n_classes is not None:
        kinds["logit_grad"] = embedding_type(n_classes)
    kinds |= dict.fromkeys(sorted(scores), pa.float32())
    if "digest" in columns:
        kinds["digest"] = pa.binary(DIGEST_BYTES)
    if MEMBERS.name in columns:
        kinds[MEMBERS.name] = MEMBERS.type
    return pa.schema([*SPAN_FIELDS, *(pa.field(name, kind, nullable=False) for name, kind in kinds.items())])


def _arrow_type(values: NDArray[Any]) -> pa.DataType | None:
    """The Arrow type of a column: of numbers, of embeddings (float16) or of digests (uint8); None where there is none."""
    if values.ndim == 1:
        return pa.from_numpy_dtype(values.dtype)
    if values.ndim == 2 and values.dtype in (np.float16, np.uint8) and values.shape[1]:
        width = values.shape[1]
        return embedding_type(width) if values.dtype == np.float16 else pa.binary(width)
    return None


def _arrow(values: NDArray[Any]) -> pa.Array:
    """The Arrow column of values that have an `_arrow_type`."""
    if values.dtype == np.uint8:
        raw = pa.py_buffer(np.ascontiguousarray(values).tobytes())
        return pa.FixedSizeBinaryArray.from_buffers(_arrow_type(values), len(values), [None, raw])
    return list_array(values) if values.ndim == 2 else pa.array(values)


class FeaturesFile:
    """One shard's file, opened: reads the header at once, columns on demand.

    Args:
        path: the file.
        limit: use only the shard's first samples, this many (usable or not).
        keeps_open: as in `GroupFile`.

    Attributes:
        shard: the shard's name.
        n: usable samples.
        n_read: all samples, usable or not.
        width: D.
        n_classes: C of the logit gradients, or None without them.
        scores: revision of each score of users, by name.
        names: the string labels in this shard, sorted; None for integer labels or none.
        bad: samples that could not be used: (index, key, byte_offset, n_bytes, crc32, reason) each.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, limit: int | None = None, keeps_open: bool = True
    ) -> None:
        self._file = GroupFile(
            path, kind="features", version=VERSION, error=FeaturesError, header=FeaturesHeader,
            keeps_open=keeps_open,
        )  # fmt: skip
        self.path, self.header = self._file.path, cast(FeaturesHeader, self._file.header)
        with self._file.reading_header():
            (entry,) = self.header["shards"]
            self.shard, self.n = check_shard_name(entry["name"]), entry["n"]
            self.width, self.names = self.header["width"], self.header["label_names"]
            self.n_classes: int | None = None
            if self.header.get("logit_grad") is not None:
                self.n_classes = self.header["n_classes"]
                if (right := int(self.header["head_right"])) > self.n:
                    raise ValueError(f"header.head_right is {right}, of {self.n} samples")
            self.scores = {check_score_name(name): by for name, by in self.header.get("scores", {}).items()}
            columns = self.header["columns"]
            self._schema = _schema(self.width, self.n_classes, self.scores, columns)
            if lacking := sorted(set(self._schema.names) - set(columns)):
                raise ValueError(f"columns {shorten(columns)} without {lacking}")
        self.bad: list[BadRow] = [(*row,) for row in self.header["bad"]]
        if limit is not None and limit < self.n + len(self.bad):
            self.bad = [row for row in self.bad if row[0] < limit]
            self.n = int(np.searchsorted(self.read_columns(["index"])["index"].to_numpy(), limit))
        self.n_read = self.n + len(self.bad)

    def read_columns(self, columns: list[str]) -> pa.Table:
        """Some columns of the n usable samples, checked against the header's hashes."""
        return self._file.group(0, self._schema, columns).slice(0, self.n)

    def spans(self) -> Spans:
        """The spans of the usable samples."""
        return Spans.from_table(
            self.read_columns(["index", "key", "byte_offset", "n_bytes", "crc32", MEMBERS.name])
        )

    def bad_spans(self) -> Spans:
        """The spans of the unusable samples."""
        return Spans.from_rows([row[:5] for row in self.bad])

    def all_spans(self) -> tuple[Spans, NDArray[np.int64]]:
        """All spans in the shard's order, and (n_read,) int64: each one's row among the usable, then the other samples."""
        both = Spans.joined([self.spans(), self.bad_spans()])
        order = np.argsort(both.index, kind="stable")
        return both.take(order), order

    def embedding(self) -> NDArray[np.float16]:
        """(n, D) float16 unit rows, all finite."""
        return self._numbers("embedding", self.width)

    def logit_grad(self) -> NDArray[np.float16]:
        """(n, C) float16 unit rows, all finite; a `FeaturesError` where there are none."""
        if self.n_classes is None:
            raise FeaturesError(
                f"{self.path}: no logit gradients here; embed with logit_grad=True (--logit-grad)"
            )
        return self._numbers("logit_grad", self.n_classes)

    def norm(self) -> NDArray[np.float32]:
        """(n,) float32 norms of the embeddings before they were scaled, all finite, none below 0."""
        norm = self._numbers("norm")
        if (norm < 0).any():
            key = self.spans().keys[int((norm < 0).argmax())]
            raise FeaturesError(
                f"shard {self.shard}, key {shorten(key)}: a norm below 0; embed the shard again"
            )
        return norm

    @property
    def has_texture(self) -> bool:
        """Whether texture was measured, as for features with images."""
        return "texture" in self._schema.names

    def texture(self) -> NDArray[np.float32]:
        """(n,) float32 texture levels, all finite; a `FeaturesError` for features without images."""
        if not self.has_texture:
            raise FeaturesError(
                f"{self.path}: no texture here, as no image was looked at; plan with scores=['diversity'] "
                "(--scores diversity), or embed into another folder with the images, image='jpg' (--image jpg)"
            )
        return self._numbers("texture")

    @property
    def has_members(self) -> bool:
        """Whether the fields and sizes of each sample's members are known: not in files before version 4."""
        return MEMBERS.name in self._schema.names

    @property
    def has_digest(self) -> bool:
        """Whether there are digests: not in files of versions 1 and 2."""
        return "digest" in self._schema.names

    def digest(self) -> NDArray[np.uint8] | None:
        """(n, 16) uint8, `content_digest` of each sample: equal rows, equal contents. None in older files."""
        if not self.has_digest:
            return None
        column = self.read_columns(["digest"])["digest"].combine_chunks()
        if len(column) == 0:  # then Arrow may give no buffer
            return np.empty((0, DIGEST_BYTES), dtype=np.uint8)
        values = np.frombuffer(column.buffers()[1], dtype=np.uint8)[column.offset * DIGEST_BYTES :]
        return values[: len(column) * DIGEST_BYTES].reshape(-1, DIGEST_BYTES)

    def score(self, name: str) -> NDArray[np.float32]:
        """(n,) float32 numbers of a score of users, all finite; a `FeaturesError` where there are none."""
        if name not in self.scores:
            raise FeaturesError(
                f"{self.path}: no score {name!r} here, only {sorted(self.scores) or 'texture'}; embed with it in scores="
            )
        return self._numbers(name)

    def _numbers(self, name: str, width: int | None = None) -> NDArray[Any]:
        column = self.read_columns([name])[name]
        numbers = column.to_numpy() if width is None else list_rows(column, width)
        _check_finite(self.shard, name, numbers, lambda: self.spans().keys)
        return numbers
