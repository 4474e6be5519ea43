"""Makes the section on bins: size, scores and rate of each, with examples of what it keeps and drops."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from adq_wds.report.picture import Shown, shown_samples, spread
from adq_wds.report.render import render
from adq_wds.report.samples import Samples
from adq_wds.report.section import Section
from adq_wds.tables.plan_rows import KEPT, QUOTA

_EXAMPLES = 8  # of what is kept, and as many of what is not
_WITH_EXAMPLES = 20  # bins; of more, these are spread over their order
_NOT_SCORES = {"size", "kept", "rate"}


@dataclass(frozen=True)
class BinStrip:
    """The examples of one bin."""

    bin: int
    size: int
    n_kept: int
    kept: list[Shown]
    dropped: list[Shown]


@dataclass(frozen=True)
class BinPart:
    """The bins of a plan.

    Attributes:
        samples: the plan's.
        strips: the bins that have examples.
    """

    samples: Samples
    strips: list[BinStrip]

    @classmethod
    def of(cls, samples: Samples) -> BinPart:
        """Chooses the examples, evenly over the classes."""
        n_bins = len(samples.header["bins"])
        chosen = spread(np.arange(n_bins), _WITH_EXAMPLES)
        order = np.lexsort((samples.rank, samples.class_row))  # those nearest to being kept first
        strips = []
        for bin in chosen:
            rows = order[samples.bin[order] == bin]
            kept, dropped = (rows[samples.reason[rows] == reason] for reason in (KEPT, QUOTA))
            examples = (shown_samples(samples, spread(some, _EXAMPLES)) for some in (kept, dropped))
            strips.append(BinStrip(bin, len(rows), len(kept), *examples))
        return cls(samples, strips)

    @property
    def rows(self) -> list[int]:
        """The samples whose pictures are shown."""
        return [each.row for strip in self.strips for each in (*strip.kept, *strip.dropped)]

    def section(self, pictures: Mapping[int, str]) -> Section:
        """The section; `pictures` are ``data:`` URIs by row."""
        header = self.samples.header
        bins: list[dict[str, Any]] = header["bins"]
        scores = (
            sorted(set(bins[0]) - _NOT_SCORES, key=lambda name: (name == "importance", name)) if bins else []
        )
        uniform = sum(e["kept"] for e in bins) / max(1, sum(e["size"] for e in bins))
        html = render(
            "bins.html",
            bins=bins,
            scores=scores,
            strata=header["settings"].get("bins_by") == "difficulty",
            uniform=uniform,
            widest=max([1e-9, *(entry["rate"] for entry in bins)]),
            strips=self.strips,
            pictures=pictures,
            why_none=None if bins else _why_none(header["settings"]),
        )
        return Section("Bins", html)


def _why_none(settings: Mapping[str, Any]) -> str:
    return (
        "the samples were chosen by a number of each"
        if "by" in settings
        else "the samples were named one by one"
    )
