"""Puts each sample of a stream into the bin that a codebook gives its embedding and class."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from adq_wds.core.rng import draw as sample_draw
from adq_wds.core.unit_rows import unit_rows
from adq_wds.errors import CodebookError, SampleError, shorten
from adq_wds.pipes.base import Pipe
from adq_wds.pipes.embed import EMBEDDING_FIELD, ENCODER_FIELD
from adq_wds.samples.fields import (
    FieldSpec,
    Sample,
    check_absent,
    check_spec,
    clean_fields,
    content_digest,
    place_error,
)
from adq_wds.samples.label import read_label
from adq_wds.samples.npy import FIELD_PREFIX, NpyError, read_vector
from adq_wds.shards.names import base_name
from adq_wds.tables.codebook import COPY_DRAW, Codebook, as_codebook
from adq_wds.tables.plan_rows import DUPLICATE, LABEL, REASONS

BIN_FIELD = "bin.cls"
REASON_FIELD = "reason.txt"
MARGIN_FIELD = "margin.json"
RULE_FIELD = "__adq_bin__"  # (hash of the codebook, number of the class) that the bin is by

logger = logging.getLogger("adq_wds")


@dataclass(frozen=True, eq=False)
class AssignBins(Pipe):
    """Put every sample's bin into a new field, ``bin.cls``: an integer from 0, in the order in which bins were filled.

    The embedding is in ``emb.npy``, from `Embed` or from the shard itself (an npy file of one vector, decoded or
    not). A class that the codebook has not seen, and every sample with ``label=None``, uses the rule over all classes;
    the first such class is logged.

    Where the codebook looks for copies or doubted labels, ``reason.txt`` says why `Subsample` drops a sample:
    "duplicate", "label", or "" for none. Where it doubts labels, ``margin.json`` is how well the label fits: its
    prediction less the best other one; None for a class that the fit has not seen, which is never doubted. Copies are
    told by the bytes of the image, so this stage stands before decoding; where the features were made without images, by
    the bytes of all fields but the embedding's, which counts only where it is the field that the fit's embeddings were in.

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
        SampleError: no embedding, one that is damaged, not finite or of another width, no label where labels matter,
            a field that is to be added is there already (``reason.txt``, ``margin.json``), or, where copies are looked
            for, no image's bytes.
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
        _, *of_cleaning = added_fields(self._codebook)
        for sample in cleaned:
            check_absent(sample, of_cleaning, "AssignBins")
        numbers = np.array([self._class_number(sample) for sample in cleaned])
        vectors = np.stack([self._vector(sample) for sample in cleaned])
        bins = self._codebook.checkpoints.assign(vectors, self._codebook.rows[numbers])
        columns = {BIN_FIELD: bins.tolist(), **self._left_out(cleaned, vectors, numbers - 1)}
        columns[RULE_FIELD] = [(self._codebook.hash, number) for number in numbers.tolist()]
        return [
            sample | dict(zip(columns, added, strict=True))
            for sample, *added in zip(cleaned, *columns.values(), strict=True)
        ]

    def _left_out(
        self, samples: list[Sample], vectors: NDArray[np.float16], label: NDArray[np.int64]
    ) -> dict[str, list[Any]]:
        """Reason and margin of each sample, by field; `label` is (N,) positions among the classes, -1 for others."""
        margins, copies = self._codebook.margins, self._codebook.copies
        reason = np.full(len(samples), "", dtype=object)
        columns: dict[str, list[Any]] = {}
        if margins is not None:
            margin = margins.margins(vectors, label)
            reason[margins.doubted(margin, label)] = REASONS[LABEL]
            columns[MARGIN_FIELD] = [None if np.isnan(m) else m for m in margin.tolist()]
        if copies is not None:
            digests = [self._digest(sample) for sample in samples]
            digest = np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(len(samples), -1)
            draw = [
                sample_draw(0, 0, base_name(s["__url__"]), s["__key__"], purpose=COPY_DRAW) for s in samples
            ]
            reason[copies.are_copies(digest, np.array(draw, dtype=np.uint64))] = REASONS[DUPLICATE]
        if margins is not None or copies is not None:
            columns[REASON_FIELD] = reason.tolist()
        return columns

    def _digest(self, sample: Sample) -> bytes:
        """The digest that `embed_shards` takes of the sample, without embeddings that the shards did not bring."""
        image = self._codebook.header["image"]
        if image != "none":
            return content_digest(sample, image)
        if self._codebook.encoder[0] != FIELD_PREFIX + self.embedding:
            sample = {name: value for name, value in sample.items() if name != self.embedding}
        return content_digest(sample)

    def _class_number(self, sample: Sample) -> int:
        if not self._codebook.needs_label:
            return 0
        label = read_label(sample, self.label)
        number = self._codebook.class_number(label)
        if number is None and not self._warned:
            object.__setattr__(self, "_warned", True)
            logger.warning(
                "class %s is new to the codebook: such samples go by the rule over all", shorten(label)
            )
        return number or 0

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


def added_fields(codebook: Codebook) -> tuple[str, ...]:
    """The fields that `AssignBins` adds by a codebook, beside `RULE_FIELD`."""
    margin = () if codebook.margins is None else (MARGIN_FIELD,)
    reason = (REASON_FIELD,) if margin or codebook.copies is not None else ()
    return BIN_FIELD, *margin, *reason


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
