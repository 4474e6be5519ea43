"""Puts each sample of a stream into the bin that a codebook gives its embedding and class."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from adq_wds.core.unit_rows import unit_rows
from adq_wds.errors import CodebookError, SampleError, shorten
from adq_wds.pipes.base import Pipe
from adq_wds.pipes.embed import EMBEDDING_FIELD, ENCODER_FIELD
from adq_wds.samples.fields import FieldSpec, Sample, check_spec, clean_fields, place_error
from adq_wds.samples.label import read_label
from adq_wds.samples.npy import NpyError, read_vector
from adq_wds.tables.codebook import POOLED, Codebook, as_codebook

BIN_FIELD = "bin.cls"
RULE_FIELD = "__adq_bin__"  # (hash of the codebook, row) that the bin is by

logger = logging.getLogger("adq_wds")


@dataclass(frozen=True, eq=False)
class AssignBins(Pipe):
    """Put every sample's bin into a new field, ``bin.cls``: an integer from 0, in the order that bins were filled.

    The embedding is in ``emb.npy``, from `Embed` or from the shard itself (an npy file of one vector, or what a decoder
    made of it). A class that the codebook has not seen, and a sample without a label, uses the rule over all
    classes; the first such class is logged.

    Args:
        codebook: a codebook, or its path.
        label: field with the label, read as when the features were made; None for no label. Not read when the codebook
            has one rule for all. After `Decode`, ``operator.itemgetter("label")``.
        embedding: field with the embedding.

    Raises:
        TypeError: `codebook` is no codebook and no path.
        ValueError: a field spec is malformed.
        CodebookError: the codebook's file is missing or damaged.

    Raises (while streaming):
        CodebookError: embeddings of another encoder than the codebook's, or labels of another kind.
        SampleError: no embedding, one that is damaged, not finite or of another width, or no label.
    """

    chunk: ClassVar[int] = 64
    one_to_one: ClassVar[bool] = True
    codebook: Codebook | str | os.PathLike[str]
    label: FieldSpec | None = "cls"
    embedding: str = field(default=EMBEDDING_FIELD, kw_only=True)
    _codebook: Codebook = field(init=False, repr=False)
    _warned: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.codebook, Codebook | str | os.PathLike):
            kind = type(self.codebook).__name__
            raise TypeError(
                f"AssignBins needs a codebook: .compose(adq_wds.AssignBins(codebook)); got a {kind}"
            )
        check_spec(self.label, "label")
        if not isinstance(self.embedding, str):
            raise ValueError(f"embedding must name a field, got {shorten(self.embedding)}")
        object.__setattr__(self, "_codebook", as_codebook(self.codebook))
        object.__setattr__(self, "codebook", self._codebook)

    def apply(self, samples: list[Sample]) -> list[Sample]:
        """Each sample with its bin."""
        if not samples:
            return []
        cleaned = [clean_fields(sample) for sample in samples]
        rows = [self._row(sample) for sample in cleaned]
        vectors = np.stack([self._vector(sample) for sample in cleaned])
        bins = self._codebook.checkpoints.assign(vectors, np.array(rows, dtype=np.int64))
        return [
            {**sample, BIN_FIELD: bin, RULE_FIELD: (self._codebook.hash, row)}
            for sample, bin, row in zip(cleaned, bins.tolist(), rows, strict=True)
        ]

    def _row(self, sample: Sample) -> int:
        if not self._codebook.needs_label:
            return POOLED
        label = read_label(sample, self.label)
        row = self._codebook.row(label)
        if row is None and not self._warned:
            object.__setattr__(self, "_warned", True)
            logger.warning(
                "class %s is new to the codebook: such samples go by the rule over all", shorten(label)
            )
        return POOLED if row is None else row

    def _vector(self, sample: Sample) -> NDArray[np.float16]:
        """(D,) float16, the embedding as `embed_shards` would have stored it."""
        made_by = sample.get(ENCODER_FIELD)
        if made_by is not None and tuple(made_by) != self._codebook.encoder:
            raise CodebookError(
                f"embeddings of the encoder {_named(made_by)}, and the codebook was fitted on those of "
                f"{_named(self._codebook.encoder)}: take that encoder, or fit a codebook on features of this one"
            )
        try:
            if self.embedding not in sample:
                raise SampleError("no embedding: put adq_wds.Embed(encoder) before AssignBins")
            vector = _vector(sample[self.embedding])
            if len(vector) != self._codebook.width:
                raise SampleError(
                    f"an embedding of {len(vector)} numbers, the codebook's have {self._codebook.width}"
                )
            if made_by is None:
                with np.errstate(over="ignore"):  # as `embed_shards` reads it: beyond float32 is infinity
                    vector = unit_rows(vector.astype(np.float32)[None])[0][0]
            half = vector.astype(np.float16)
            if not np.isfinite(half).all():
                raise SampleError("the embedding holds NaN or infinity")
        except SampleError as error:
            raise place_error(error, sample, self.embedding) from error.__cause__
        return half


def _named(encoder: Any) -> str:
    name, revision, preprocessing = encoder
    return f"{name!r} ({revision}, preprocessing {preprocessing[:12] or 'none'})"


def _vector(value: Any) -> NDArray[np.floating[Any]]:
    """(D,) floats of a decoded field, or of an npy file's bytes."""
    if isinstance(value, bytes | bytearray | memoryview):
        try:
            return read_vector(bytes(value))
        except NpyError as error:
            raise SampleError(str(error)) from error
    if not isinstance(value, np.ndarray) or value.dtype.kind != "f" or value.dtype.itemsize > 8:
        kind = value.dtype if isinstance(value, np.ndarray) else type(value).__name__
        raise SampleError(f"holds {str(kind)[:80]}, expected float16, float32 or float64 numbers")
    array = value[0] if value.ndim == 2 and len(value) == 1 else value
    if array.ndim != 1 or not len(array):
        raise SampleError(f"numbers of shape {shorten(array.shape)}, expected one vector, (D,) or (1, D)")
    return array
