"""Adds to each sample of a stream its soft label, a blend of stored probabilities and its own label."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from adq_wds.core.allocation import check_ratio
from adq_wds.errors import FeaturesError, SampleError, located, shorten
from adq_wds.pipes.base import Pipe
from adq_wds.samples.fields import FieldSpec, Sample, check_absent, check_spec, clean_fields, place_error
from adq_wds.samples.label import find_label
from adq_wds.tables.soft_labels import SoftTable

SOFT_FIELD = "soft.npy"


@dataclass(frozen=True, eq=False)
class SoftLabels(Pipe):
    """Add to every sample its soft label in a new field, ``soft.npy``: (C,) float32, its entries sum to 1.

    It is `share` of the probabilities that `soften_labels` stored and the rest of the sample's own label, as
    ``torch.nn.functional.cross_entropy`` takes it for a target. Samples are found by shard and key; shards' rows are
    read when first needed, in workers too. It stands before or after decoding.

    Args:
        path: the file that `soften_labels` wrote.
        share: share of the probabilities, in [0, 1].
        label: field with the label, as in `Decode`; not read where `share` is 1. A number is a class; a name is one of
            `names`.

    Raises:
        TypeError: `path` is no path.
        ValueError: `share` is not in [0, 1], or the field spec is malformed.
        FeaturesError: the file is missing, damaged or of another kind.

    Raises (while streaming):
        FeaturesError: a sample's shard or key has no soft label, or a shard's rows are damaged.
        SampleError: no label, one that is none of the C classes, or a field ``soft.npy`` that is there already.

    Source: Hinton et al. 2015 (arXiv 1503.02531), with labels in place of logits.
    """

    chunk: ClassVar[int] = 64
    one_to_one: ClassVar[bool] = True
    path: str | os.PathLike[str]
    share: float = 0.5
    label: FieldSpec = field(default="cls;label", kw_only=True)
    _table: SoftTable = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.path, str | os.PathLike):
            raise TypeError(f"SoftLabels needs the path of a file of soft labels, got {shorten(self.path)}")
        check_ratio("share", self.share)
        check_spec(self.label, "label")
        object.__setattr__(self, "_table", SoftTable(self.path))

    @property
    def n_classes(self) -> int:
        """C, the length of a soft label."""
        return self._table.header["n_classes"]

    @property
    def names(self) -> list[str] | None:
        """The classes' names in their order, for ``Decode(classes=…)``; None where labels are numbers."""
        return self._table.header["names"]

    def apply(self, samples: list[Sample]) -> list[Sample]:
        """Each sample with ``soft.npy``."""
        return [self._softened(sample) for sample in samples]

    def _softened(self, sample: Sample) -> Sample:
        out = clean_fields(sample)
        check_absent(out, [SOFT_FIELD], "SoftLabels")
        shard = self._table.find(out["__url__"])
        row = shard.row_of.get(out["__key__"])
        if row is None:
            trouble = f"no soft label in {self._table.path}; make them from features of these shards"
            raise located(FeaturesError(trouble), shard=shard.shard, key=out["__key__"])
        soft = np.zeros(self.n_classes, dtype=np.float32)
        soft[shard.top[row]] = self.share * shard.probability[row]
        if self.share < 1:
            soft[self._class(out)] += 1.0 - self.share
        out[SOFT_FIELD] = soft
        return out

    def _class(self, sample: Sample) -> int:
        """The number of a sample's class."""
        name, label = find_label(sample, self.label)
        number: Any = self._table.class_of.get(label) if isinstance(label, str) else label
        if number is None or number >= self.n_classes:
            text = f"label {shorten(label)} is none of the {self.n_classes:,} classes of {self._table.path}"
            raise place_error(
                SampleError(f"{text}; make soft labels from features with these labels"), sample, name
            )
        return int(number)
