"""What does one shard's file of features hold? One row per usable sample, checked when written and when read."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from adq_wds.core.unit_rows import unit_rows
from adq_wds.errors import AdqError, FeaturesError, shorten
from adq_wds.score import check_score_name
from adq_wds.shards.names import check_shard_name
from adq_wds.tables.members import MEMBERS
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

VERSION = 4
"""1: embedding, norm, texture. 2: also logit_grad or scores of users. 3: also digest, or without texture. 4: also members.

A file says the least one that it needs.
"""
DIGEST_BYTES = 16
LOGIT_GRAD = "softmax"  # what `logit_grad` in a header says; files of earlier versions may say _EARLIER
_EARLIER = "double_softmax"
NO_LABEL = -1  # unlabelled data is one class of this number


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
        names: the string labels in this shard, sorted; None for integer labels or none.
        bad: samples that could not be used; `bad_reasons` says why.
        logit_grad: (n, C) float16, the directions of the loss's gradients by the logits, unit rows; or None.
        scores: (n,) float32 of each score of users, by name.
        digest: (n, 16) uint8, `content_digest` of each sample; None in files from before there was one.
        header: encoder, revision, preprocessing_hash, image, label (specifications), source; with `logit_grad` its
            kind under that name and as "head_right" how many samples the head is right about; with `scores` their
            revisions by name.
    """

    shard: str
    spans: Spans
    label: NDArray[np.int32]
    embedding: NDArray[np.float16]
    norm: NDArray[np.float32]
    texture: NDArray[np.float32] | None
    header: Header
    names: list[str] | None = None
    bad: Spans | None = None
    bad_reasons: list[str] = field(default_factory=list)
    logit_grad: NDArray[np.float16] | None = None
    scores: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    digest: NDArray[np.uint8] | None = None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file, whole or not at all, its rows checked first."""
        self.check()
        columns: dict[str, Any] = {
            **self.spans.columns(self.shard),
            "label": self.label,
            "embedding": embedding_array(self.embedding),
            "norm": self.norm,
            **self.scores,
        }
        if self.texture is not None:
            columns["texture"] = self.texture
        if self.digest is not None:
            columns["digest"] = _digest_array(self.digest)
        n_classes = None
        if self.logit_grad is not None:
            columns["logit_grad"], n_classes = embedding_array(self.logit_grad), self.logit_grad.shape[1]
        schema = _schema(self.embedding.shape[1], n_classes, self.scores, columns)
        table = pa.table(columns, schema=schema)
        entry = {"name": self.shard, "n": len(self.spans), "columns": column_hashes(table)}
        header = {
            **self.header,
            "format": "adq_wds.features",
            "version": self._version(),
            **({"n_classes": n_classes} if n_classes else {}),
            "width": self.embedding.shape[1],
            "columns": table.column_names,
            "label_names": self.names,
            "shards": [entry],
            "bad": _bad_rows(self.bad, self.bad_reasons),
        }
        # random mantissas do not compress, so the zstd pass would only cost time
        write_groups(path, table.schema, [table], header, compression="none")

    def _version(self) -> int:
        if self.spans.members is not None:
            return 4
        if self.digest is not None or self.texture is None:
            return 3
        return 2 if self.scores or self.logit_grad is not None else 1

    def check(self) -> None:
        """Raise `FeaturesError` unless the columns fit together and every number is finite."""
        n = len(self.spans)
        texture = {} if self.texture is None else {"texture": self.texture}
        numbers: dict[str, NDArray[np.float32]] = {"norm": self.norm, **texture, **self.scores}
        shapes = [len(self.label), len(self.embedding), *map(len, numbers.values())]
        if shapes != [n] * len(shapes):
            raise FeaturesError(f"shard {self.shard}: columns of {shapes} rows for {n} samples")
        if self.embedding.ndim != 2 or self.embedding.shape[1] == 0 or self.embedding.dtype != np.float16:
            found = f"{self.embedding.shape} {self.embedding.dtype}"
            raise FeaturesError(f"shard {self.shard}: embeddings are {found}, expected (n, D) float16")
        if self.digest is not None and (
            self.digest.shape != (n, DIGEST_BYTES) or self.digest.dtype != np.uint8
        ):
            found = f"{self.digest.shape} {self.digest.dtype}"
            raise FeaturesError(f"shard {self.shard}: digests are {found}, expected ({n}, 16) uint8")
        if set(self.header.get("scores", {})) != set(self.scores):
            raise FeaturesError(f"shard {self.shard}: scores {sorted(self.scores)}, its header says others")
        self._check_logit_grad(n)
        _check_finite(self.shard, "embedding", self.embedding, lambda: self.spans.keys)
        for name, values in numbers.items():
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

    def _check_logit_grad(self, n: int) -> None:
        rows = self.logit_grad
        if (rows is None) != ("logit_grad" not in self.header):
            raise FeaturesError(f"shard {self.shard}: logit gradients and a header that contradicts them")
        if rows is None:
            return
        if rows.ndim != 2 or len(rows) != n or rows.shape[1] == 0 or rows.dtype != np.float16:
            raise FeaturesError(
                f"shard {self.shard}: logit gradients are {rows.shape} {rows.dtype}, expected ({n}, C) float16"
            )
        _check_finite(self.shard, "logit_grad", rows, lambda: self.spans.keys)


def numbered(labels: Sequence[int | str | None]) -> tuple[NDArray[np.int32], list[str] | None]:
    """Labels of one kind as int32, and the names they stand for, sorted, when they are words.

    >>> numbered(["dog", "cat", "dog"])
    (array([1, 0, 1], dtype=int32), ['cat', 'dog'])
    """
    if labels and isinstance(labels[0], str):
        names = sorted({str(label) for label in labels})
        number = {name: i for i, name in enumerate(names)}
        return np.array([number[str(label)] for label in labels], dtype=np.int32), names
    return np.array([NO_LABEL if label is None else label for label in labels], dtype=np.int32), None


def unit_and_norm(rows: NDArray[np.float32]) -> tuple[NDArray[np.float16], NDArray[np.float32]]:
    """(n, D) float16 rows of length 1, zero rows left zero, and the (n,) float32 norms they had.

    >>> unit_and_norm(np.array([[3.0, 4.0]], np.float32))
    (array([[0.6, 0.8]], dtype=float16), array([5.], dtype=float32))
    """
    unit, norm = unit_rows(rows)
    return unit.astype(np.float16), np.minimum(norm, np.finfo(np.float32).max).astype(np.float32)


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


def _schema(
    width: int,
    n_classes: int | None = None,
    scores: Iterable[str] = (),
    columns: Iterable[str] = ("texture",),
) -> pa.Schema:
    """The columns of a file, `texture`, `digest` and `members` where they are among `columns`."""
    optional = [
        pa.field("texture", pa.float32(), nullable=False),
        pa.field("digest", pa.binary(DIGEST_BYTES), nullable=False),
        MEMBERS,
    ]
    texture, digest, members = ([field] if field.name in columns else [] for field in optional)
    fields = [
        *SPAN_FIELDS,
        pa.field("label", pa.int32(), nullable=False),
        pa.field("embedding", embedding_type(width), nullable=False),
        pa.field("norm", pa.float32(), nullable=False),
        *texture,
    ]
    if n_classes is not None:
        fields.append(pa.field("logit_grad", embedding_type(n_classes), nullable=False))
    own = (pa.field(name, pa.float32(), nullable=False) for name in sorted(scores))
    return pa.schema([*fields, *own, *digest, *members])


def _digest_array(rows: NDArray[np.uint8]) -> pa.FixedSizeBinaryArray:
    """(n, 16) uint8 as an Arrow column of fixed-size binary values."""
    values = pa.py_buffer(np.ascontiguousarray(rows).tobytes())
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(DIGEST_BYTES), len(rows), [None, values])


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
        n_classes: C of the logit gradients, or None without them.
        scores: revision of each score of users, by name.
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
            self.n_classes = _checked_classes(self.header)
            self.scores = _checked_scores(self.header.get("scores", {}))
            columns = _checked_columns(self.header["columns"])
            self._schema = _schema(self.width, self.n_classes, self.scores, columns)
            self.names = _checked_names(self.header["label_names"])
            self.bad = _checked_bad(self.header["bad"])
            self.bad_spans()
            _check_origin(self.header)
            if lacking := sorted(set(self._schema.names) - set(columns)):
                raise ValueError(f"columns {shorten(columns)} without {lacking}")
        except (AdqError, KeyError, TypeError, ValueError, OverflowError) as cause:
            raise FeaturesError(f"{self.path}: damaged header: {shorten(str(cause), 200)}") from cause
        if limit is not None and limit < self.n + len(self.bad):
            self.bad = [row for row in self.bad if row[0] < limit]
            self.n = int(np.searchsorted(self.read(["index"])["index"].to_numpy(), limit))
        self.n_read = self.n + len(self.bad)

    def read(self, columns: list[str]) -> pa.Table:
        """Some columns of the n usable samples, checked against the header's hashes."""
        return self._file.group(0, self._schema, columns).slice(0, self.n)

    def spans(self) -> Spans:
        """Where the usable samples lie."""
        return Spans.from_table(self.read(["index", "key", "byte_offset", "n_bytes", "crc32", MEMBERS.name]))

    def bad_spans(self) -> Spans:
        """Where the unusable samples lie."""
        return Spans.from_rows([row[:5] for row in self.bad])

    def embedding(self) -> NDArray[np.float16]:
        """(n, D) float16 unit rows, all finite."""
        rows = embedding_rows(self.read(["embedding"])["embedding"], self.width)
        _check_finite(self.shard, "embedding", rows, lambda: self.spans().keys)
        return rows

    def logit_grad(self) -> NDArray[np.float16]:
        """(n, C) float16 unit rows, all finite.

        Raises:
            FeaturesError: the file has none, or is damaged.
        """
        if self.n_classes is None:
            raise FeaturesError(
                f"{self.path}: no logit gradients here; embed with logit_grad=True (--logit-grad)"
            )
        rows = embedding_rows(self.read(["logit_grad"])["logit_grad"], self.n_classes)
        _check_finite(self.shard, "logit_grad", rows, lambda: self.spans().keys)
        return rows

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
        """Whether texture was measured: not where no image was looked at."""
        return "texture" in self._schema.names

    def texture(self) -> NDArray[np.float32]:
        """(n,) float32 texture levels, all finite.

        Raises:
            FeaturesError: the file has none, since it was made without images; or is damaged.
        """
        if not self.has_texture:
            raise FeaturesError(
                f"{self.path}: no texture here, as no image was looked at; plan with scores=['diversity'] "
                "(--scores diversity), or embed into another folder with the images, image='jpg' (--image jpg)"
            )
        return self._numbers("texture")

    @property
    def has_digest(self) -> bool:
        """Whether there are digests: not in files of versions 1 and 2."""
        return "digest" in self._schema.names

    def digest(self) -> NDArray[np.uint8] | None:
        """(n, 16) uint8, `content_digest` of each sample: equal rows, equal contents. None in older files."""
        if not self.has_digest:
            return None
        column = self.read(["digest"])["digest"].combine_chunks()
        if len(column) == 0:  # then Arrow may give no buffer
            return np.empty((0, DIGEST_BYTES), dtype=np.uint8)
        values = np.frombuffer(column.buffers()[1], dtype=np.uint8)[column.offset * DIGEST_BYTES :]
        return values[: len(column) * DIGEST_BYTES].reshape(-1, DIGEST_BYTES)

    def score(self, name: str) -> NDArray[np.float32]:
        """(n,) float32 numbers of a score of users, all finite.

        Raises:
            FeaturesError: the file has no such score, or is damaged.
        """
        if name not in self.scores:
            raise FeaturesError(
                f"{self.path}: no score {name!r} here, only {sorted(self.scores) or 'texture'}; embed with it in scores="
            )
        return self._numbers(name)

    def _numbers(self, name: str) -> NDArray[np.float32]:
        numbers: NDArray[np.float32] = self.read([name])[name].to_numpy()
        _check_finite(self.shard, name, numbers, lambda: self.spans().keys)
        return numbers


def _checked_width(width: object) -> int:
    if type(width) is not int or not 1 <= width < 2**31:
        raise ValueError(f"width {width!r}")
    return width


def _checked_classes(header: Header) -> int | None:
    """C, where a header says that there are logit gradients."""
    if "logit_grad" not in header:
        return None
    if header["logit_grad"] not in (LOGIT_GRAD, _EARLIER):
        raise ValueError(f"logit_grad {shorten(header['logit_grad'])}")
    right, (entry,) = header["head_right"], header["shards"]
    if type(right) is not int or not 0 <= right <= entry["n"]:
        raise ValueError(f"head_right {shorten(right)}")
    return _checked_width(header["n_classes"])


def _checked_scores(scores: object) -> dict[str, str]:
    if not isinstance(scores, dict) or any(not isinstance(value, str) for value in scores.values()):
        raise ValueError(f"scores {shorten(scores)}")
    return {check_score_name(name): revision for name, revision in scores.items()}


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


def _checked_columns(columns: object) -> list[str]:
    """The names of a file's columns; a later version may have added some."""
    if not isinstance(columns, list) or not all(isinstance(name, str) for name in columns):
        raise ValueError(f"columns {shorten(columns)}")
    return columns


def _check_origin(header: Header) -> None:
    """Raise unless a header says of which source it is, and whether of all of it."""
    if type(header["complete"]) is not bool:
        raise ValueError(f"complete {shorten(header['complete'])}, expected true or false")
    source = header["source"]
    if not isinstance(source, dict) or any(type(value) is not int for value in source.values()):
        raise ValueError(f"source {shorten(source)}, expected whole numbers by name")
