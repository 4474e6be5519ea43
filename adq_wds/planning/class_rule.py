"""Fits the rule of a class that assigns any sample to a bin, on a pilot, and counts the samples outside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adq_wds.core.codebook import Checkpoints, bin_checkpoints
from adq_wds.core.graphcut import graphcut_bins
from adq_wds.core.kernel import unit_rows
from adq_wds.core.scores import EXACT_SUMS, BinSums
from adq_wds.planning.buckets import DiskRows
from adq_wds.planning.class_tasks import Arrays

QueryAndThreshold = tuple[NDArray[np.float32], NDArray[np.float64]]
_COUNT_ROWS = 65_536


@dataclass(frozen=True)
class FitClass:
    """Fits the rule of a class.

    Attributes:
        bins, memory_bytes: as in `fit_codebook`.
        checkpoints: of every bin.
    """

    bins: int
    checkpoints: int
    memory_bytes: int

    def of_class(self, rows: Mapping[str, DiskRows], progress: Callable[[int], object]) -> Arrays:
        """The rule, the counts of `_Rule`, and the sums of `BinSums` over the pilot; each with an axis for the class."""
        embedding, in_pilot = rows["embedding"], rows["in_pilot"][:].ravel()
        held_out = np.zeros(self.bins, dtype=np.int64)
        pilot, texture = [], None
        blocks = [slice(i, i + _COUNT_ROWS) for i in range(0, len(embedding), _COUNT_ROWS)]
        for here in blocks:
            pilot.append(embedding[here][in_pilot[here]])
        sums = BinSums.empty(self.bins, embedding.width, texture="texture" in rows)
        if "texture" in rows:
            texture = rows["texture"][:].ravel()[in_pilot]
        rule = fit_rule(np.concatenate(pilot), texture, sums, self.checkpoints, self.memory_bytes)
        for here in blocks:
            held_out += count_bins(rule, embedding[here][~in_pilot[here]], self.bins)
        progress(len(embedding))
        values: dict[str, Any] = {name: getattr(sums, name) for name in EXACT_SUMS}
        values |= {} if sums.texture is None else {"texture": sums.texture}
        values |= {"query": rule[0], "threshold": rule[1], "held_out": held_out}
        values["pilot"] = np.int64(in_pilot.sum())
        return {name: np.asarray(value)[None] for name, value in values.items()}

    def joined(self, parts: Sequence[Arrays]) -> Arrays:
        """Of some classes: one after another, and the exact sums as one."""
        whole: Arrays = {}
        for name in parts[0]:
            values = np.concatenate([part[name] for part in parts])
            whole[name] = values.sum(axis=0) if name in EXACT_SUMS else values
        return whole


def fit_rule(
    pilot: NDArray[np.float16],
    texture: NDArray[np.float32] | None,
    sums: BinSums,
    checkpoints: int,
    memory_bytes: int,
) -> QueryAndThreshold:
    """The rule of a pilot's bins: query and threshold as `bin_checkpoints` gives them.

    Args:
        pilot: (n, D) float16 embeddings.
        texture: (n,) float32; None where there is none.
        sums: of K bins, to which the pilot is added.
        checkpoints: of every bin.
        memory_bytes: what the similarity matrix may take.
    """
    rows = unit_rows(pilot)
    binning = graphcut_bins(rows, len(sums.n), memory_bytes=memory_bytes)
    sums.add(binning.bin, rows, texture)
    return bin_checkpoints(rows, binning, checkpoints)


def count_bins(rule: QueryAndThreshold, embedding: NDArray[np.float16], bins: int) -> NDArray[np.int64]:
    """(K,) int64: how many of (n, D) samples fall into each of the K bins of a rule."""
    query, threshold = rule
    assigned = Checkpoints(query[None], threshold[None]).assign(embedding, np.zeros(len(embedding), np.int64))
    return np.bincount(assigned, minlength=bins)
