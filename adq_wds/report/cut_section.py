"""Makes the section on cuts: copies side by side, and doubted labels with what their neighbours say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from adq_wds.report.neighbours import nearest_samples
from adq_wds.report.picture import Shown, shown_samples
from adq_wds.report.reasons import TITLES
from adq_wds.report.render import render
from adq_wds.report.samples import Samples
from adq_wds.report.section import Section
from adq_wds.tables.features import Features
from adq_wds.tables.plan_rows import DUPLICATE, LABEL

_GROUPS, _COPIES = 24, 4  # groups of copies shown, and copies in each
_DOUBTED, _NEIGHBOURS, _PICTURED = 24, 8, 3  # labels shown, neighbours asked, and those shown


class Group(NamedTuple):
    """A sample that stays, and its copies; `n` counts these, shown or not, `n_other` those of another label."""

    shown: list[Shown]
    place: str
    n: int
    n_other: int


class Doubted(NamedTuple):
    """A sample whose label is doubted, the classes of its neighbours with their numbers, and the nearest ones."""

    shown: Shown
    place: str
    label: str
    margin: float
    says: list[tuple[str, int]]
    nearest: list[Shown]


@dataclass(frozen=True)
class CutPart:
    """What was cut, the most telling first.

    Attributes:
        groups: of copies: those with unequal labels first, then the largest.
        n_groups, n_copies: of all.
        doubted: the lowest margins.
        n_doubted: labels that were left out.
        measured: whether there are margins at all.
        with_features: whether neighbours are known.
    """

    groups: list[Group]
    n_groups: int
    n_copies: int
    doubted: list[Doubted]
    n_doubted: int
    measured: bool
    with_features: bool

    @classmethod
    def of(cls, samples: Samples, features: Features | None) -> CutPart:
        """Chooses the groups and the labels."""
        n_doubted = int((samples.reason == LABEL).sum())
        stays = samples.stays[samples.stays >= 0]
        measured = samples.margin is not None and not np.isnan(samples.margin).all()
        return cls(
            _groups(samples),
            len(np.unique(stays)),
            int((samples.reason == DUPLICATE).sum()),
            _doubted(samples, features) if measured else [],
            n_doubted,
            measured,
            features is not None,
        )

    @property
    def rows(self) -> list[int]:
        """The samples whose pictures are shown."""
        in_groups = [each.row for group in self.groups for each in group.shown]
        return in_groups + [each.row for one in self.doubted for each in (one.shown, *one.nearest)]

    def section(self, pictures: Mapping[int, str]) -> Section:
        """The section; `pictures` are ``data:`` URIs by row."""
        return Section("Cuts", render("cuts.html", part=self, pictures=pictures, titles=TITLES))


def _groups(samples: Samples) -> list[Group]:
    copies = np.flatnonzero(samples.stays >= 0)
    stays = samples.stays[copies]
    other = samples.class_row[copies] != samples.class_row[stays]
    which, group, n = np.unique(stays, return_inverse=True, return_counts=True)
    n_other = np.bincount(group.reshape(-1), weights=other, minlength=len(which)).astype(np.int64)
    groups = []
    for i in np.lexsort((which, -n, n_other == 0))[:_GROUPS].tolist():
        of_it = copies[stays == which[i]]
        of_it = of_it[np.argsort(~other[stays == which[i]], kind="stable")][:_COPIES]
        shown = shown_samples(samples, [int(which[i]), *of_it.tolist()])
        groups.append(Group(shown, samples.place(int(which[i])), int(n[i]), int(n_other[i])))
    return groups


def _doubted(samples: Samples, features: Features | None) -> list[Doubted]:
    """Of the labels that were left out the lowest margins; where none were, the lowest of all."""
    assert samples.margin is not None
    pool = np.flatnonzero((samples.reason == LABEL) & ~np.isnan(samples.margin))
    if not len(pool):
        pool = np.flatnonzero(~np.isnan(samples.margin))
    rows = pool[np.argsort(samples.margin[pool], kind="stable")][:_DOUBTED].tolist()
    near = nearest_samples(samples, features, rows, _NEIGHBOURS) if features else [[] for _ in rows]
    doubted = []
    for row, nearest in zip(rows, near, strict=True):
        says = Counter(samples.class_name(other) for other, _ in nearest).most_common()
        (shown,) = shown_samples(samples, [row], captions=False)
        pictured = shown_samples(samples, [other for other, _ in nearest[:_PICTURED]])
        margin, label = float(samples.margin[row]), samples.class_name(row)
        doubted.append(Doubted(shown, samples.place(row), label, margin, says, pictured))
    return doubted
