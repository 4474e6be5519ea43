"""Defines `Codebook`, rules for the bin and rate of any sample; reads and writes its file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from adq_wds.core.allocation import budget_for
from adq_wds.core.balanced_rates import balanced_rates
from adq_wds.core.codebook import QUERY_STEP, Checkpoints, solve_rates
from adq_wds.core.known_copies import KnownCopies
from adq_wds.core.margin_rule import MarginRule
from adq_wds.errors import CodebookError, shorten
from adq_wds.files import canonical_json, sha256_text
from adq_wds.remote.outputs import atomic_path, local_copy
from adq_wds.remote.url_path import AnyPath, as_path
from adq_wds.tables.codebook_header import (
    HEADER_KEY,
    LATER,
    VERSION,
    CodebookHeader,
    CodebookSource,
    check_size,
    class_faults,
    read_header,
)
from adq_wds.tables.features_file import NO_LABEL  # also the pooled row's entry in `label`
from adq_wds.tables.headers import checked, reopened

SUFFIX = ".safetensors"
POOLED = 0  # the row fitted over all classes
COPY_DRAW = "copy"  # the purpose of the draws in `copies`
_TENSORS = {"held_out": "I64", "label": "I32", "query": "F32", "threshold": "F64", "weight": "F64"}
_PARTS: dict[str, tuple[Any, dict[str, str]]] = {
    "margins": (MarginRule, {"mean": "F64", "scale": "F64", "solution": "F32", "least": "F64"}),
    "copies": (KnownCopies, {"digest": "U64", "stays": "U64"}),
}
_OPTIONAL = {f"{part}.{name}": kind for part, (_, kinds) in _PARTS.items() for name, kind in kinds.items()}
_NUMPY = {"I64": np.int64, "I32": np.int32, "F32": np.float32, "F64": np.float64, "U64": np.uint64}


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
            hash), all classes of the fit, with or without a row, their names or None, settings, scores per bin; see
            FORMAT.md.
        margins: how labels of the fit's classes are doubted; None where none are.
        copies: the contents of the fit's samples; None where copies are not looked for.
        path: its file, or None while it is only in memory.
    """

    query: NDArray[np.float32]
    threshold: NDArray[np.float64]
    label: NDArray[np.int32]
    held_out: NDArray[np.int64]
    weight: NDArray[np.float64]
    header: CodebookSource
    margins: MarginRule | None = field(default=None, kw_only=True)
    copies: KnownCopies | None = field(default=None, kw_only=True)
    path: AnyPath | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        for fault in self._faults():
            raise CodebookError(f"{self.path or 'codebook'}: {fault}")

    def _faults(self) -> Iterator[str]:
        """The faults of the codebook, in an order where each check relies on earlier ones."""
        kinds = _TENSORS | _OPTIONAL
        for name, array in self._tensors().items():
            if array.dtype != _NUMPY[kinds[name]]:
                yield f"{name} is {array.dtype}, expected {np.dtype(_NUMPY[kinds[name]])}"
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
        yield from class_faults(self.header)
        yield from self._faults_of_parts()

    def _faults_of_parts(self) -> Iterator[str]:
        """The faults of what not every codebook has."""
        if self.margins is not None:
            yield from self.margins.faults()
            if len(self.margins.mean) != self.width or len(self.margins.least) != len(self.header["classes"]):
                yield f"margins of {len(self.margins.mean)} numbers and {len(self.margins.least)} classes"
            if "clean" not in self.header:
                yield "margins, and nothing of what was doubted"
            if self.margins.layer_hash() != self.header.get("random_layer"):
                yield "this numpy draws other random numbers than the one it was fitted with; fit it again"
        if self.copies is not None:
            yield from self.copies.faults()
            if "image" not in self.header:
                yield "digests, and not of which field"

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
        """Whether labels matter: a class has a row, or a rate, of its own, or labels are doubted."""
        return len(self.label) > 1 or "n" in self.header

    def __repr__(self) -> str:
        return f"<Codebook {self.n_bins} bins, {len(self.label) - 1} classes, {self.header['encoder']}, D = {self.width}>"

    def row(self, label: int | str | None) -> int | None:
        """The row for samples of a class; None for a class that was not in the fit.

        Row 0 for a class of the fit with too few samples for its own row, and for no label.

        Raises:
            CodebookError: a name where classes are numbers, or a number where they have names.
        """
        number = self.class_number(label)
        return None if number is None else int(self.rows[number])

    def class_number(self, label: int | str | None) -> int | None:
        """1 … C for a class of the fit, by its position among `classes`; 0 for no label; None for another class.

        Raises:
            CodebookError: as `row`.
        """
        if label is None:
            return 0
        if isinstance(label, str) != (self.header["names"] is not None):
            has, got = ("numbers", "the name") if isinstance(label, str) else ("names", "the number")
            raise CodebookError(
                f"classes of this codebook are {has}, got {got} {shorten(label)}; read the label as it was read when "
                f"the features were made: label={self.header['label']!r}"
            )
        return self._numbers.get(label)

    @cached_property
    def _numbers(self) -> dict[int | str, int]:
        classes, names = self.header["classes"], self.header["names"]
        return {c if names is None else names[c]: i for i, c in enumerate(classes, 1)}

    @cached_property
    def rows(self) -> NDArray[np.int64]:
        """(1 + C,) int64: the row for no class, and for each class of the fit."""
        row_of = {c: r for r, c in enumerate(self.label.tolist()) if r != POOLED}
        return np.array([POOLED, *(row_of.get(c, POOLED) for c in self.header["classes"])], dtype=np.int64)

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

        `class_rates` are those that a stream is drawn by.

        Raises:
            ValueError: `keep` is not a number in [0, 1].
        """
        budget_for(keep, 0)
        pairs = zip(self.frequency(), self.weight, strict=True)
        return np.stack([solve_rates(frequency, weight, float(keep)) for frequency, weight in pairs])

    def class_rates(self, keep: float) -> NDArray[np.float64]:
        """The probability of keeping a sample of each class and bin: (1 + C, K) float64.

        Row 0 is for no label and classes that were not in the fit, of which `keep` are kept. The others share what
        is left by the balance that was asked for, so that `keep` of a stream like the fit's samples is kept, its copies
        not counted, and doubted labels counted, as in a plan.

        Raises:
            ValueError: `keep` is not a number in [0, 1].
        """
        rates = self.rates(keep)[self.rows]
        if "n" in self.header:
            rows, balance = self.rows[1:], self.header.get("balance", "class")
            n_left_out = sum(self.header["clean"]["left_out"]) if "clean" in self.header else 0
            frequency, weight = self.frequency()[rows], self.weight[rows]
            n = np.array(self.header["n"])
            rates[1:] = balanced_rates(n, n_left_out, frequency, weight, float(keep), balance)
        return rates

    # ---- As a file

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the header with one hash per array: equal hashes, equal codebooks."""
        return sha256_text(canonical_json(self._whole_header()))

    def _tensors(self) -> dict[str, NDArray[Any]]:
        arrays = {name: getattr(self, name) for name in _TENSORS}
        for part, (_, kinds) in _PARTS.items():
            if (of := getattr(self, part)) is not None:
                arrays |= {f"{part}.{name}": getattr(of, name) for name in kinds}
        return {name: np.ascontiguousarray(array) for name, array in arrays.items()}

    def _whole_header(self) -> CodebookHeader:
        tensors = {
            name: [list(array.shape), hashlib.sha256(array.data).hexdigest()]
            for name, array in self._tensors().items()
        }
        version = VERSION if self.header.keys() & LATER or len(tensors) > len(_TENSORS) else 1
        return {**self.header, "format": "adq_wds.codebook", "version": version, "tensors": tensors}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to one safetensors file, whole or not at all.

        Raises:
            ValueError: a name that does not end in .safetensors.
            AdqError: the file cannot be written; the old one, if any, is intact.
        """
        check_codebook_name(path)
        text = canonical_json(self._whole_header())
        metadata = {HEADER_KEY: f"{sha256_text(text)} {text}"}
        with atomic_path(path) as partial:
            partial.write_bytes(safetensors.numpy.save(self._tensors(), metadata))

    def __reduce__(self) -> tuple[Any, ...]:
        if self.path is not None:
            return reopened, (load_codebook, CodebookError, os.fspath(self.path), self.hash)
        make = partial(Codebook, margins=self.margins, copies=self.copies)
        return make, (self.query, self.threshold, self.label, self.held_out, self.weight, self.header)


def check_codebook_name(path: str | os.PathLike[str]) -> None:
    """Raise `ValueError` unless a path ends in .safetensors, by which a codebook is told from a plan."""
    if as_path(path).suffix != SUFFIX:
        raise ValueError(f"{os.fspath(path)}: a codebook's file ends in {SUFFIX}")


def load_codebook(path: str | os.PathLike[str]) -> Codebook:
    """Open a codebook's file; all of it is read and checked.

    Raises:
        CodebookError: missing, damaged, of another kind, or of a newer version.
    """
    path = as_path(path).absolute()
    try:
        check_size(path)
        # holds the arrays' places against the file's size
        with local_copy(path) as local, safetensors.safe_open(local, framework="np") as file:
            header = read_header(file.metadata() or {})
            arrays: dict[str, Any] = {name: _tensor(file, name) for name in _TENSORS}
            for part, (kind, names) in _PARTS.items():
                if any(name.startswith(f"{part}.") for name in file.keys()):  # noqa: SIM118 - no mapping
                    arrays[part] = kind(**{name: _tensor(file, f"{part}.{name}") for name in names})
            if surplus := set(file.keys()) - set(_TENSORS) - set(_OPTIONAL):
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


def _tensor(file: Any, name: str) -> NDArray[Any]:
    if name not in file.keys():  # noqa: SIM118 - no mapping
        raise ValueError(f"no array {name!r}")
    kind, expected = file.get_slice(name).get_dtype(), (_TENSORS | _OPTIONAL)[name]
    if kind != expected:
        raise ValueError(f"array {name!r} is {shorten(kind)}, expected {expected}")
    array: NDArray[Any] = file.get_tensor(name)
    return array
