"""Leaves samples out before bins are made, each for a reason that the plan records.

A stage is a function (samples, options): it sets `samples.reason` of those that it leaves out, and looks only at
samples whose reason is still KEPT. A new one is such a function, and its name in `STAGES`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from adq_wds.core.copies import first_of, who_stays
from adq_wds.core.kernel import unit_rows
from adq_wds.core.near_copies import near_copies
from adq_wds.errors import PlanError, shorten
from adq_wds.planning.buckets import LEFT_OUT, DiskRows, embedding_column
from adq_wds.planning.class_rows import fits, mapped_unit_rows
from adq_wds.planning.class_tasks import Arrays, run_classes
from adq_wds.planning.doubts import leave_out_doubted
from adq_wds.planning.options import Options
from adq_wds.planning.samples import Samples, digest_of, find_samples, name_samples
from adq_wds.tables.plan_rows import DUPLICATE, EXCLUDED, KEPT

logger = logging.getLogger("adq_wds")


def leave_out_classes(samples: Samples, options: Options) -> None:
    """Leave out samples of classes that are not planned."""
    samples.reason[~np.isin(samples.label, samples.classes)] = EXCLUDED


def leave_out_named(samples: Samples, options: Options) -> None:
    """Leave out the samples that `exclude` names.

    Raises:
        PlanError: a sample is missing, in several shards, or must-include too.
    """
    named = find_samples(samples.features, options.exclude, kind="exclude")
    both = [i for i in named if samples.must[i]]
    if both:
        name = name_samples(samples.features, both[:1])[both[0]]
        raise PlanError(f"sample {shorten(name)} is both must-include and exclude; take it off one list")
    samples.reason[named] = EXCLUDED
    if named:
        excluded = np.zeros(len(samples), dtype=bool)
        excluded[named] = True
        samples.settings["exclude"] = digest_of(excluded)


def leave_out_copies(samples: Samples, options: Options) -> None:
    """Leave out copies of an earlier sample: equal contents or, with a cosine as `dedup`, a similar embedding."""
    digest = None if options.dedup is None else samples.features.digests()
    if digest is not None:
        samples.stays = first_of(digest, samples.reason == KEPT)
        samples.reason[samples.stays != np.arange(len(samples))] = DUPLICATE
        _warn_of_other_labels(samples)
    if isinstance(options.dedup, float):
        _leave_out_near_copies(samples, options)


def _warn_of_other_labels(samples: Samples) -> None:
    """Count equal contents with unequal labels, and name two."""
    label, stays = samples.label, samples.stays
    other = np.flatnonzero(label != label[stays])
    if len(other):
        i, j = int(other[0]), int(stays[other[0]])
        names = name_samples(samples.features, [i, j])
        logger.warning(
            "%d copies have another label than the sample that stays, such as %s (class %d) of %s (class %d); "
            "`adq show --left-out` lists them",
            len(other), shorten(names[i]), label[i], shorten(names[j]), label[j],
        )  # fmt: skip


def _leave_out_near_copies(samples: Samples, options: Options) -> None:
    assert isinstance(options.dedup, float)
    parts = run_classes(
        samples.place, "copies", NearCopies(options.dedup, options.memory_bytes), features=samples.features,
        label=np.where(samples.reason == KEPT, samples.label, np.int32(LEFT_OUT)), classes=samples.classes,
        names=samples.names, columns=[embedding_column(samples.features)], depends=options.dedup,
    )  # fmt: skip
    for where, part in parts:
        samples.stays[where] = where[part["stays"]]
    samples.stays = samples.stays[samples.stays]  # of a copy of a near copy
    samples.reason[samples.stays != np.arange(len(samples))] = DUPLICATE


@dataclass(frozen=True)
class NearCopies:
    """Finds the near copies in a class; the options are those of `build_plan`."""

    dedup: float
    memory_bytes: int

    def of_class(self, rows: Mapping[str, DiskRows], progress: Callable[[int], object]) -> Arrays:
        """stays (n,) int64, the row of the class that stays; see `near_copies`."""
        embedding = rows["embedding"]
        in_memory = fits(embedding, self.memory_bytes)
        unit = unit_rows(embedding[:]) if in_memory else mapped_unit_rows(embedding)
        return {"stays": near_copies(unit, self.dedup, progress=progress)}

    def joined(self, parts: Sequence[Arrays]) -> Arrays:
        """Of some classes: rows of all of them."""
        first = np.cumsum([0, *(len(part["stays"]) for part in parts)]).tolist()
        stays = [part["stays"] + i for part, i in zip(parts, first, strict=False)]
        return {"stays": np.concatenate(stays)}


STAGES: tuple[Callable[[Samples, Options], None], ...] = (
    leave_out_classes, leave_out_named, leave_out_copies, leave_out_doubted,
)  # fmt: skip


def leave_out(samples: Samples, options: Options) -> None:
    """Run the stages in order, then restore must-includes: of copies, they stay in place of the first.

    Raises:
        PlanError: a must-include sample is excluded.
    """
    for stage in STAGES:
        stage(samples, options)
    samples.binned = samples.reason == KEPT
    excluded = np.flatnonzero(samples.must & (samples.reason == EXCLUDED))
    if len(excluded):
        (i,) = excluded[:1].tolist()
        name = name_samples(samples.features, [i])[i]
        raise PlanError(
            f"must-include sample {shorten(name)} is of class {samples.label[i]}, which is left out; add its class"
        )
    samples.stays = who_stays(samples.stays, samples.must)
    samples.reason[samples.stays != np.arange(len(samples))] = DUPLICATE
    samples.reason[samples.must] = KEPT
