"""Makes the section that shows the most and the least typical samples of classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from adq_wds.report.neighbours import typicality
from adq_wds.report.picture import Shown, shown_samples, spread
from adq_wds.report.render import render
from adq_wds.report.samples import Samples
from adq_wds.report.section import Section
from adq_wds.tables.features import Features

_CLASSES, _EXAMPLES = 12, 8


class Ends(NamedTuple):
    """A class with its most and least typical samples, or all of a small one in order."""

    name: str
    n: int
    most: list[Shown]
    least: list[Shown]


@dataclass(frozen=True)
class TypicalPart:
    """Classes, the largest first; of many, some spread over their sizes."""

    classes: list[Ends]
    n_classes: int

    @classmethod
    def of(cls, samples: Samples, features: Features) -> TypicalPart:
        """Chooses the classes and their samples."""
        n = np.bincount(samples.class_row, minlength=len(samples.classes))
        order = np.lexsort((samples.classes, -n))
        order = order[samples.labelled[order]]
        chosen = spread(order, _CLASSES)
        typical = typicality(samples, features, chosen)
        ends = []
        for c in chosen:
            rows = np.flatnonzero((samples.class_row == c) & ~np.isnan(typical))
            rows = rows[np.argsort(-typical[rows], kind="stable")]
            least = rows[max(_EXAMPLES, len(rows) - _EXAMPLES) :][::-1]
            parts = (
                shown_samples(samples, part.tolist(), captions=False) for part in (rows[:_EXAMPLES], least)
            )
            ends.append(Ends(samples.names[c], len(rows), *parts))
        return cls([one for one in ends if one.n], len(order))

    @property
    def rows(self) -> list[int]:
        """The samples whose pictures are shown."""
        return [each.row for one in self.classes for each in (*one.most, *one.least)]

    def section(self, pictures: Mapping[int, str]) -> Section:
        """The section; `pictures` are ``data:`` URIs by row."""
        return Section("Typical", render("typical.html", part=self, pictures=pictures))
