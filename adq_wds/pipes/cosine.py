"""Scores each variant by its similarity to the image it was made from."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from adq_wds.errors import SampleError, shorten
from adq_wds.pipes.embed import EMBEDDING_FIELD, ENCODER_FIELD, Embed
from adq_wds.samples.fields import FieldSpec, Sample, check_spec, place_error
from adq_wds.samples.label import find_label

_DECIMALS = 6


@dataclass(frozen=True, eq=False)
class CosineScore(Embed):
    """Add to every sample ``cos``, the cosine of its image's embedding with that of its parent, ``emb.npy``.

    It stands behind `Embed`, which embeds the parent, and `Vary`, which replaces it; both embed with one encoder. The
    cosine is rounded to 6 decimals, and equal embeddings give 1 exactly; one without length gives 0. Where the encoder
    gives logits and the label is one of its classes, ``agree`` says whether the largest logit is the label's. Nothing
    is dropped: store both numbers beside the variant, and choose by them when reading (`select_samples`).

    Args:
        encoder, image, batch_size, max_pixels: as in `Embed`.
        label: field with the class, a number: "label" after `Decode`, "cls" before it; None for none.

    Raises (while streaming):
        SampleError: as `Embed`; no label; no embedding of the parent, or one of another encoder.

    Source: Li et al. 2024 (arXiv 2410.17606), cosine filter; scores that are stored in place of a threshold are ours.

    >>> from adq_wds.models.thumbnail import Thumbnail
    >>> from adq_wds.pipes.vary import Vary
    >>> sample = {"__key__": "a", "__url__": "a.tar", "image": np.full((8, 8, 3), 60, np.uint8), "label": 0}
    >>> pipes = Embed(Thumbnail()), Vary(lambda images, labels, noise: -images), CosineScore(Thumbnail())
    >>> samples = [sample]
    >>> for pipe in pipes:
    ...     samples = pipe.apply(samples)
    >>> samples[0]["cos"]
    1.0
    """

    label: FieldSpec | None = field(default="label", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_spec(self.label, "label")

    def _batch(self, samples: list[Sample]) -> list[Sample]:
        cleaned, rows, logits = self._embedded(samples)
        out = []
        for i, (sample, row) in enumerate(zip(cleaned, rows, strict=True)):
            scored = {**sample, "cos": round(_cosine(self._parent(sample), row), _DECIMALS)}
            label = None if logits is None else find_label(sample, self.label)[1]
            if logits is not None and isinstance(label, int) and label < logits.shape[1]:
                scored["agree"] = bool(logits[i].argmax() == label)
            out.append(scored)
        return out

    def _parent(self, sample: Sample) -> NDArray[np.float16]:
        parent, made_by = sample.get(EMBEDDING_FIELD), sample.get(ENCODER_FIELD)
        if not isinstance(parent, np.ndarray) or made_by is None:
            text = "no embedding of the parent image: put adq_wds.Embed(encoder) before Vary"
        elif tuple(made_by) != self._made_by:
            text = f"embedded by {shorten(made_by)}, not by {shorten(self._made_by)}; give both stages one encoder"
        else:
            return parent
        raise place_error(SampleError(text), sample, EMBEDDING_FIELD)


def _cosine(a: NDArray[np.float16], b: NDArray[np.float16]) -> float:
    """The cosine of two float16 rows, which are of length 1 but for their rounding; 0 where one is of length 0."""
    a64, b64 = a.astype(np.float64), b.astype(np.float64)
    length = np.sqrt((a64 @ a64) * (b64 @ b64))  # sums of float16 products are exact: equal rows give 1
    return float(np.clip(a64 @ b64 / length, -1, 1)) if length > 0 else 0.0
