"""Passes samples by a codebook: drops what it leaves out, and draws the others by the rates of their bins."""

from __future__ import annotations

from dataclasses import dataclass

from adq_wds.core.rng import draws
from adq_wds.errors import CodebookError, located
from adq_wds.pipes.assign_bins import BIN_FIELD, REASON_FIELD, RULE_FIELD, added_fields
from adq_wds.pipes.embed import EMBEDDING_FIELD, ENCODER_FIELD
from adq_wds.pipes.epochs import runs
from adq_wds.samples.fields import Sample, clean_fields
from adq_wds.shards.names import base_name
from adq_wds.tables.codebook import Codebook


@dataclass(frozen=True)
class ByCodebook:
    """Passes the samples that are not left out and whose draws lie below the rates of their bins."""

    codebook: str  # its hash
    limits: list[list[int]]  # (1 + C, K) rates, times 2^64
    added: tuple[str, ...]  # the fields that `AssignBins` added
    seed: int
    keep_fields: bool

    @classmethod
    def of(cls, codebook: Codebook, keep: float, seed: int, keep_fields: bool) -> ByCodebook:
        """With the rates that keep a part of a stream."""
        # whole numbers, since a draw near 2^64 would round to 1 as a float
        limits = [
            [int(rate * 2.0**64) for rate in of_class] for of_class in codebook.class_rates(keep).tolist()
        ]
        return cls(codebook.hash, limits, added_fields(codebook), seed, keep_fields)

    def __call__(self, samples: list[Sample], epoch: int | str | None) -> list[Sample]:
        out = []
        for url, number, neighbours in runs(samples, epoch):
            run = list(neighbours)
            keys = [sample["__key__"] for sample in run]
            drawn = draws(self.seed, number or 0, base_name(url), keys, purpose="keep").tolist()
            out += [
                self._stripped(sample)
                for sample, u in zip(run, drawn, strict=True)
                if u < self._limit(sample)
            ]
        return out

    def reasons(self, samples: list[Sample]) -> list[str]:
        """Why samples are left out, for each one that is."""
        if REASON_FIELD not in self.added:
            return []
        return [sample[REASON_FIELD] for sample in samples if sample.get(REASON_FIELD)]

    def _limit(self, sample: Sample) -> int:
        rule, bin = sample.get(RULE_FIELD), sample.get(BIN_FIELD)
        if isinstance(rule, tuple) and isinstance(bin, int):
            codebook, number = rule
            if codebook == self.codebook:
                left_out = self.reasons([sample])
                return 0 if left_out else self.limits[number][bin]
            trouble = f"its bin is by another codebook ({codebook[:12]}, here {self.codebook[:12]}): use one for both"
        else:
            trouble = "no bin here: put adq_wds.AssignBins(codebook) before Subsample(codebook)"
        raise located(CodebookError(trouble), shard=base_name(sample["__url__"]), key=sample["__key__"])

    def _stripped(self, sample: Sample) -> Sample:
        out = clean_fields(sample)
        ours = {RULE_FIELD, ENCODER_FIELD}
        if not self.keep_fields:
            ours.update(self.added)
            if ENCODER_FIELD in out:  # else it came with the sample
                ours.add(EMBEDDING_FIELD)
        for name in ours:
            out.pop(name, None)
        return out
