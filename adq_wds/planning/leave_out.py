"""Leaves samples out before bins are made, each for a reason that the plan records.

A stage is a function (samples, options): it sets `samples.reason` of those that it leaves out, and looks only at
samples whose reason is still KEPT. A new one is such a function, and its name in `STAGES`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from adq_wds.core.copies import first_of, who_stays
from adq_wds.errors import PlanError, shorten
from adq_wds.planning.options import Options
from adq_wds.planning.samples import Samples, name_samples
from adq_wds.tables.plan_rows import DUPLICATE, EXCLUDED, KEPT


def leave_out_classes(samples: Samples, options: Options) -> None:
    """Samples of classes that are not planned."""
    samples.reason[~np.isin(samples.label, samples.classes)] = EXCLUDED


def leave_out_copies(samples: Samples, options: Options) -> None:
    """Samples whose contents an earlier one has; the first stays."""
    if options.dedup == "exact":
        digests = [rows for file in samples.features if (rows := file.digest()) is not None]
        samples.stays = first_of(np.concatenate(digests), samples.reason == KEPT)
        samples.reason[samples.stays != np.arange(len(samples))] = DUPLICATE


STAGES: tuple[Callable[[Samples, Options], None], ...] = (leave_out_classes, leave_out_copies)


def leave_out(samples: Samples, options: Options) -> None:
    """Run the stages in their order, then take must-includes back: of copies they stay, and the first one goes.

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
