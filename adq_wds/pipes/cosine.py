"""Scores each variant by its similarity to the image it was made from."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from adq_wds.errors import SampleError, shorten
from adq_wds.pipes.embed import EMBEDDING_FIELD, ENCODER_FIELD, Embed
from adq_wds.samples.fields import FieldSpec, Sample, check_spec, place_error
from adq_wds.samples.label import find_label


@dataclass(frozen=True, eq=False)
class CosineScore(Embed):
    """Add to every sample ``cos``, the cosine of its image's embedding with that of its parent, ``emb.npy``.

    It stands behind `Embed`, which embeds the parent, and `Vary`, which replaces it; both embed with one encoder. Where
    the encoder gives logits and a label is read, ``agree`` says whether the largest logit is the label's. Nothing is
    dropped: store both numbers beside the variant, and choose by them when reading (`select_samples`).

    Args:
        encoder, image, batch_size, max_pixels: as in `Embed`.
        label: field with the class, a number: "label" after `Decode`, "cls" before it; None for none.

    Raises (while streaming):
        SampleError: as `Embed`; no embedding of the parent, or one of another encoder; a label that is a word or not
            one of the encoder's classes.

    Source: Li et al. 2024 (arXiv 2410.17606), cosine filter; scores that are stored in place of a threshold are ours.

    >>> from adq_wds.models.thumbnail import Thumbnail
    >>> from adq_wds.pipes.vary import Vary
    >>> sample = {"__key__": "a", "__url__": "a.tar", "image": np.full((8, 8, 3), 60, np.uint8), "label": 0}
    >>> pipes = Embed(Thumbnail()), Vary(lambda images, labels, noise: -images), CosineScore(Thumbnail())
    >>> samples = [sample]
    >>> for pipe in pipes:
    ...     samples = pipe.apply(samples)
    >>> round(samples[0]["cos"], 2)
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
            cos = float(self._parent(sample).astype(np.float64) @ row.astype(np.float64))
            scored = {**sample, "cos": cos}
            label = None if logits is None or self.label is None else self._class(sample, logits.shape[1])
            if logits is not None and label is not None:
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

    def _class(self, sample: Sample, n_classes: int) -> int | None:
        name, label = find_label(sample, self.label)
        if isinstance(label, str) or (label is not None and label >= n_classes):
            text = f"label {shorten(label)} is none of the encoder's {n_classes} classes; label=None scores cos alone"
            raise place_error(SampleError(text), sample, name)
        return label
