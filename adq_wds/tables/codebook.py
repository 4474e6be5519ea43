"""Defines `Codebook`, rules for the bin and rate of any sample; reads and writes its file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from adq_wds.core.allocation import budget_for
from adq_wds.core.codebook import QUERY_STEP, Checkpoints, solve_rates
from adq_wds.errors import CodebookError, shorten
from adq_wds.files import atomic_path, canonical_json, sha256_text
from adq_wds.tables import bounds
from adq_wds.tables.headers import Natural31, checked, parse_header

VERSION = 1
SUFFIX = ".safetensors"
POOLED = 0  # the row fitted over all classes
NO_LABEL = -1  # the pooled row's entry in `label`
_HEADER_KEY = "adq_wds"  # the one entry: of several, the order in the file would change from run to run
_TENSORS = {"held_out": "I64", "label": "I32", "query": "F32", "threshold": "F64", "weight": "F64"}
_NUMPY = {"I64": np.int64, "I32": np.int32, "F32": np.float32, "F64": np.float64}


class CodebookSource(TypedDict):
    """The entries of a codebook's header that the fit fills in."""

    encoder: str
    revision: str
    preprocessing_hash: str
    label: str
    features: str
    classes: list[Natural31]
    names: list[str] | None
    settings: Any
    scores: Any


class CodebookHeader(CodebookSource):
    """The header of a codebook's file, as FORMAT.md describes it."""

    format: str
    version: int
    tensors: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Codebook:
    """Rules for samples that no fit has seen; made by `fit_codebook`, opened by `load_codebook`.

    A row is the rule of one class. Row 0 is that of all classes together, for unlabelled samples and unseen classes.
    It pickles as its path and hash when it has a file, so that workers read the same file instead of copying it.

    Attributes:
        query: (R, K-1, M, D) float32; see `core.codebook.Checkpoints`.
        threshold: (R, K-1, M) float64.
        label: (R,) int32, class of each row; -1 for row 0, then ascending.
        held_out: (R, K) int64, samples outside the pilot that fell into each bin.
        weight: (R, K) float64, relative weight of a sample of each bin, by the allocation.
        header: encoder, revision and preprocessing_hash of the embeddings, label (the specification), features (their
            hash), all classes of the fit, with or without a row, their names or None, settings, scores per bin.
        path: its file, or None while it is only in memory.
    """

    query: NDArray[np.float32]
    threshold: NDArray[np.float64]
    label: NDArray[np.int32]
    held_out: NDArray[np.int64]
    weight: NDArray[np.float64]
    header: CodebookSource
    path: Path | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        for fault in self._faults():
            raise CodebookError(f"{self.path or 'codebook'}: {fault}")

    def _faults(self) -> Iterator[str]:
        """The faults of the codebook, in an order where each check relies on earlier ones."""
        for name, kind in _TENSORS.items():
            if getattr(self, name).dtype != _NUMPY[kind]:
                yield f"{name} is {getattr(self, name).dtype}, expected {np.dtype(_NUMPY[kind])}"
        shape = self.query.shape
        if len(shape) != 4 or 0 in (shape[0], *shape[2:]) or shape[1] >= 2**15:
            yield f"queries of shape {shape}, expected (R, K-1, M, D)"
        R, others, M, _ = shape
        expected = {"threshold": (R, others, M), "label": (R,)}
        expected |= dict.fromkeys(("held_out", "weight"), (R, others + 1))
        for name, shape in expected.items():
            if getattr(self, name).shape != shape:
                yield f"{name} has shape {getattr(self, name).shape}, expected {shape}"
        for query in self.query:  # row by row: the temporary arrays stay small; no NaN passes a comparison
            if not (np.abs(query) < 2).all() or (np.rint(query / QUERY_STEP) * QUERY_STEP != query).any():
                yield "a query is not a multiple of 2^-23 below 2"
        if not np.isfinite(self.threshold).all():
            yield "a threshold is not finite"
        if not (np.isfinite(self.weight) & (self.weight >= 0)).all():
            yield "a weight is negative or not finite"
        if self.held_out.min() < 0 or (self.held_out.astype(np.float64).sum(axis=1) < 1).any():
            yield "a row's counts of held-out samples are negative or all 0"
        if self.label[0] != NO_LABEL or (np.diff(self.label.astype(np.int64)) <= 0).any():
            yield "the labels of the rows are not -1 and then ascending"
        try:
            checked(self.header, CodebookSource)
        except ValueError as error:
            yield str(error)
        classes, names = self.header["classes"], self.header["names"]
        if not set(self.label[1:].tolist()) <= set(classes):
            yield "a class with a row is not among the classes"
        if names is not None and (
            len(set(names)) != len(names) or max(classes, default=0) >= max(1, len(names))
        ):
            yield "a name stands for two classes, or a class has no name"

    # ---- What it says

    @property
    def n_bins(self) -> int:
        """K."""
        return int(self.query.shape[1]) + 1

    @property
    def width(self) -> int:
        """D."""
        return int(self.query.shape[3])

    @property
    def encoder(self) -> tuple[str, str, str]:
        """Name, revision and preprocessing hash of the encoder that embeddings must come from."""
        return self.header["encoder"], self.header["revision"], self.header["preprocessing_hash"]

    @property
    def needs_label(self) -> bool:
        """Whether a class has a row of its own."""
        return len(self.label) > 1

    def __repr__(self) -> str:
        return f"<Codebook {self.n_bins} bins, {len(self.label) - 1} classes, {self.header['encoder']}, D = {self.width}>"

    def row(self, label: int | str | None) -> int | None:
        """The row for samples of a class; None for a class that was not in the fit.

        Row 0 for a class of the fit with too few samples for its own row, and for no label.

        Raises:
            CodebookError: a name where classes are numbers, or a number where they have names.
        """
        if label is None:
            return POOLED
        if isinstance(label, str) != (self.header["names"] is not None):
            has, got = ("numbers", "the name") if isinstance(label, str) else ("names", "the number")
            raise CodebookError(
                f"classes of this codebook are {has}, got {got} {shorten(label)}; read the label as it was read when "
                f"the features were made: label={self.header['label']!r}"
            )
        return self._rows.get(label)

    @cached_property
    def _rows(self) -> dict[int | str, int]:
        row_of = {c: r for r, c in enumerate(self.label.tolist()) if r != POOLED}
        names = self.header["names"]
        return {c if names is None else names[c]: row_of.get(c, POOLED) for c in self.header["classes"]}

    @cached_property
    def checkpoints(self) -> Checkpoints:
        """The rules, ready to assign."""
        return Checkpoints(self.query, self.threshold)

    def frequency(self) -> NDArray[np.float64]:
        """(R, K) float64: part of new samples of each row that falls into each bin, by the held-out ones."""
        counts = self.held_out.astype(np.float64)
        share: NDArray[np.float64] = counts / counts.sum(axis=1, keepdims=True)
        return share

    def rates(self, keep: float) -> NDArray[np.float64]:
        """The probability of keeping a sample of each row and bin, so that `keep` of each row is kept: (R, K) float64.

        Raises:
            ValueError: `keep` is not a number in [0, 1].
        """
        budget_for(keep, 0)
        pairs = zip(self.frequency(), self.weight, strict=True)
        return np.stack([solve_rates(frequency, weight, float(keep)) for frequency, weight in pairs])

    # ---- As a file

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the header with one hash per array: equal hashes, equal codebooks."""
        return sha256_text(canonical_json(self._whole_header()))

    def _tensors(self) -> dict[str, NDArray[Any]]:
        return {name: np.ascontiguousarray(getattr(self, name)) for name in _TENSORS}

    def _whole_header(self) -> CodebookHeader:
        tensors = {
            name: [list(array.shape), hashlib.sha256(array.data).hexdigest()]
            for name, array in self._tensors().items()
        }
        return {**self.header, "format": "adq_wds.codebook", "version": VERSION, "tensors": tensors}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to one safetensors file, whole or not at all.

        Raises:
            ValueError: a name that does not end in .safetensors.
            AdqError: the file cannot be written; the old one, if any, is intact.
        """
        check_codebook_name(path)
        text = canonical_json(self._whole_header())
        metadata = {_HEADER_KEY: f"{sha256_text(text)} {text}"}
        with atomic_path(path) as partial:
            partial.write_bytes(safetensors.numpy.save(self._tensors(), metadata))

    def __reduce__(self) -> tuple[Any, ...]:
        if self.path is not None:
            return _reopen, (str(self.path), self.hash)
        return Codebook, (self.query, self.threshold, self.label, self.held_out, self.weight, self.header)


def check_codebook_name(path: str | os.PathLike[str]) -> None:
    """Raise `ValueError` unless a path ends in .safetensors, by which a codebook is told from a plan."""
    if Path(path).suffix != SUFFIX:
        raise ValueError(f"{os.fspath(path)}: a codebook's file ends in {SUFFIX}")


def load_codebook(path: str | os.PathLike[str]) -> Codebook:
    """Open a codebook's file; all of it is read and checked.

    Raises:
        CodebookError: missing, damaged, of another kind, or of a newer version.
    """
    path = Path(path).absolute()
    try:
        _check_size(path)
        with safetensors.safe_open(
            path, framework="np"
        ) as file:  # holds the arrays' places against the file's size
            header = _read_header(file.metadata() or {})
            arrays = {name: _tensor(file, name) for name in _TENSORS}
            if surplus := set(file.keys()) - set(_TENSORS):
                raise ValueError(f"array {shorten(sorted(surplus)[0])}, which no codebook has")
    except FileNotFoundError:
        raise CodebookError(f"{path}: no such file") from None
    except CodebookError as error:
        raise CodebookError(f"{path}: {error}") from None
    except (safetensors.SafetensorError, OSError, ValueError, RecursionError, MemoryError) as cause:
        raise CodebookError(f"{path}: damaged, or no codebook ({shorten(str(cause), 200)})") from cause
    source: Any = {
        name: value for name, value in header.items() if name not in ("format", "version", "tensors")
    }
    codebook = Codebook(**arrays, header=source, path=path)
    if codebook._whole_header()["tensors"] != header["tensors"]:
        raise CodebookError(f"{path}: damaged: an array does not match its hash; fit it again")
    return codebook


def as_codebook(codebook: Codebook | str | os.PathLike[str]) -> Codebook:
    """`codebook` itself, or the codebook at that path."""
    return codebook if isinstance(codebook, Codebook) else load_codebook(codebook)


def _check_size(path: Path) -> None:
    """Raise `ValueError` for a safetensors header that is larger than the file or than ours are."""
    with path.open("rb") as handle:
        size = handle.seek(0, os.SEEK_END)
        handle.seek(0)
        declared = int.from_bytes(handle.read(8), "little")
        if declared > min(size, bounds.MAX_HEADER_BYTES):
            raise ValueError(f"a header of {declared:,} bytes in a file of {size:,}")
        weight = bounds.header_weight(handle.read(declared))
    if weight > bounds.MAX_HEADER_WEIGHT:
        raise ValueError(
            f"a header of values of about {weight:,} bytes, at most {bounds.MAX_HEADER_WEIGHT:,}"
        )


def _read_header(metadata: Mapping[str, str]) -> CodebookHeader:
    if _HEADER_KEY not in metadata:
        raise CodebookError("not made by adq_wds (no header); expected a codebook")
    digest, _, text = metadata[_HEADER_KEY].partition(" ")
    try:
        return parse_header(text.encode(), digest, kind="codebook", version=VERSION, header=CodebookHeader)
    except ValueError as error:
        raise CodebookError(str(error)) from error


def _tensor(file: Any, name: str) -> NDArray[Any]:
    if name not in file.keys():  # noqa: SIM118 - no mapping
        raise ValueError(f"no array {name!r}")
    kind = file.get_slice(name).get_dtype()
    if kind != _TENSORS[name]:
        raise ValueError(f"array {name!r} is {shorten(kind)}, expected {_TENSORS[name]}")
    array: NDArray[Any] = file.get_tensor(name)
    return array


def _reopen(path: str, expected: str) -> Codebook:
    codebook = load_codebook(path)
    if codebook.hash != expected:
        raise CodebookError(
            f"{path}: changed since it was opened (hash {codebook.hash[:12]}, was {expected[:12]})"
        )
    return codebook
