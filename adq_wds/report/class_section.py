"""Makes the section on classes: samples before and after, by reason, the long tail included."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from adq_wds.report.reasons import TITLES
from adq_wds.report.render import render
from adq_wds.report.samples import Samples
from adq_wds.report.section import Section
from adq_wds.tables.plan_rows import KEPT, REASONS

_ALL = 60  # classes up to which each has a row; of more, the largest, the middle and the smallest
_SHOWN = 20
_POINTS = 300  # of the curve


class Row(NamedTuple):
    """One class, or the sum of those that are not shown.

    Attributes:
        name: the class's.
        n, kept: samples before and after.
        parts: reasons and their shares in percent of the widest bar; empty for a sum.
        text: the same as words.
        n_classes: how many classes it stands for.
    """

    name: str
    n: int
    kept: int
    parts: list[tuple[str, float]]
    text: str = ""
    n_classes: int = 1


def class_section(samples: Samples) -> Section:
    """A table of the classes, the largest first, and for many classes the curve of their sizes."""
    counts = samples.reasons_by_class
    n = counts.sum(axis=1)
    order = np.lexsort((samples.classes, -n, ~samples.labelled))
    counts, n = counts[order], n[order]
    names = [samples.names[i] for i in order]
    C = int(samples.labelled.sum())  # without unreadable samples, which come last
    html = render(
        "classes.html",
        rows=_rows(names, counts),
        n_classes=C,
        most=int(n[:C].max(initial=0)),
        least=int(n[:C].min(initial=n.max(initial=0))),
        n_empty=int((counts[:C, KEPT] == 0).sum()),
        titles=TITLES,
        reasons=[word for i, word in enumerate(REASONS) if counts[:, i].any()],
        curve=_curve(n, counts[:, KEPT]) if len(names) > _SHOWN else None,
    )
    return Section("Classes", html)


def _rows(names: list[str], counts: NDArray[np.int64]) -> list[Row]:
    """A row for each class, or for the largest, the middle and the smallest, with sums between."""
    C, widest = len(names), max(1, int(counts.sum(axis=1).max(initial=0)))

    def one(i: int) -> Row:
        by_reason = [(word, k) for word, k in zip(REASONS, counts[i].tolist(), strict=True) if k]
        parts = [(word, 100 * k / widest) for word, k in by_reason]
        text = ", ".join(f"{word} {k:,}" for word, k in by_reason)
        return Row(names[i], int(counts[i].sum()), int(counts[i, KEPT]), parts, text)

    def rest(first: int, stop: int) -> Row:
        some = counts[first:stop]
        return Row("", int(some.sum()), int(some[:, KEPT].sum()), [], n_classes=stop - first)

    if C <= _ALL:
        return [one(i) for i in range(C)]
    middle = (C - _SHOWN) // 2
    ranges = [(0, _SHOWN), (middle, middle + _SHOWN), (C - _SHOWN, C)]
    rows: list[Row] = []
    stop = 0
    for first, end in ranges:
        first = max(first, stop)
        if first > stop:
            rows.append(rest(stop, first))
        rows += [one(i) for i in range(first, end)]
        stop = end
    return rows


def _curve(n: NDArray[np.int64], kept: NDArray[np.int64]) -> tuple[str, str]:
    """The outlines of sizes and kept samples over classes, in a box of 100 × 100, on a logarithmic scale."""
    at = np.unique(np.linspace(0, len(n) - 1, min(len(n), _POINTS)).round().astype(np.int64))
    top = np.log1p(float(n.max(initial=1)))
    x = 100 * at / max(1, len(n) - 1)

    def outline(values: NDArray[np.int64]) -> str:
        y = 100 - 100 * np.log1p(values[at]) / top
        points = " ".join(f"{a:.2f},{b:.2f}" for a, b in zip(x, y, strict=True))
        return f"0,100 {points} 100,100"

    return outline(n), outline(kept)
