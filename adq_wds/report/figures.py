"""Draws figures of a plan for papers: classes before and after, bins, and reasons; SVG and PNG, light and dark."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from adq_wds.errors import AdqError
from adq_wds.files import atomic_path, make_folder
from adq_wds.report.reasons import TITLES
from adq_wds.report.samples import Samples
from adq_wds.tables.plan_rows import KEPT, REASONS

_NAMED = 30  # classes up to which each has its name
_DPI = 200
_LEGEND = {
    "frameon": False,
    "loc": "lower left",
    "bbox_to_anchor": (0, 1),
    "ncols": 6,
    "handlelength": 1,
    "columnspacing": 1,
}
_COLOURS = {  # those of the page: ink, paper, and one for each reason
    "light": ("#1b1f23", "#ffffff", ("#0a66a8", "#c3c9ce", "#e69f00", "#c4410c", "#30363b", "#b3669a")),
    "dark": ("#e8eaec", "#14171a", ("#56b4e9", "#515a62", "#f0b429", "#ef7a45", "#f2f4f5", "#d58fc0")),
}


def draw_figures(samples: Samples, folder: str | os.PathLike[str]) -> list[str]:
    """Draw ``reasons``, ``classes`` and ``bins``, each as ``NAME-light.svg``, ``.png`` and ``NAME-dark``; give their paths.

    Raises:
        AdqError: matplotlib is missing, or the folder cannot be written.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise AdqError(f'the figures need matplotlib ({error}): pip install "adq-wds[report]"') from error
    out, paths = make_folder(folder), []
    drawings: dict[str, Callable[[Any, Samples, Any], None]] = {"reasons": _reasons, "classes": _classes}
    if samples.header["bins"]:
        drawings["bins"] = _bins
    for name, draw in drawings.items():
        for scheme, (ink, paper, colours) in _COLOURS.items():
            look: Any = dict.fromkeys(  # its keys are literals to a type checker
                ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), ink
            )
            look |= {"axes.facecolor": paper, "figure.facecolor": paper, "text.parse_math": False}
            look |= {"svg.hashsalt": "adq", "axes.spines.top": False, "axes.spines.right": False}
            with rc_context(look), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of glyphs that the font lacks
                figure = Figure(figsize=(6.4, 3.6), layout="constrained")
                draw(axes := figure.add_subplot(), samples, colours)
                if axes.get_legend_handles_labels()[0]:
                    axes.legend(**_LEGEND)
                for kind, about in (("svg", {"Date": None}), ("png", {"Software": None})):
                    path = out / f"{name}-{scheme}.{kind}"
                    with atomic_path(path) as partial:
                        figure.savefig(partial, format=kind, dpi=_DPI, metadata=about)
                    paths.append(str(path))
    return paths


def _reasons(axes: Any, samples: Samples, colours: Any) -> None:
    counts = np.array(samples.counts)
    here = np.flatnonzero(counts)[::-1]
    bars = axes.barh([TITLES[REASONS[i]] for i in here], counts[here], color=[colours[i] for i in here])
    axes.bar_label(
        bars, labels=[f"{n:,} ({100 * n / max(1, len(samples)):.1f} %)" for n in counts[here]], padding=3
    )
    axes.set(xlabel="samples", xmargin=0.25)


def _classes(axes: Any, samples: Samples, colours: Any) -> None:
    """The largest first; each of a few with its name, more as steps on a logarithmic scale."""
    counts = samples.reasons_by_class
    order = np.lexsort((samples.classes, -counts.sum(axis=1)))
    counts, x = counts[order], np.arange(len(order))
    if len(x) <= _NAMED:
        bottom = np.zeros(len(x), dtype=np.int64)
        for i in np.flatnonzero(counts.any(axis=0)):
            axes.bar(x, counts[:, i], bottom=bottom, color=colours[i], label=TITLES[REASONS[i]], width=0.8)
            bottom += counts[:, i]
        axes.set_xticks(
            x,
            [samples.names[i] for i in order],
            rotation=45 if len(x) > 5 else 0,
            ha="right" if len(x) > 5 else "center",
        )
    else:
        axes.fill_between(x, counts.sum(axis=1), color=colours[1], label="before", step="mid")
        axes.fill_between(x, counts[:, KEPT], color=colours[KEPT], label="kept", step="mid")
        axes.set_yscale("symlog", linthresh=1)
        axes.set(xlabel="classes, the largest first")
    axes.set(ylabel="samples")


def _bins(axes: Any, samples: Samples, colours: Any) -> None:
    bins = samples.header["bins"]
    x = np.arange(len(bins))
    axes.bar(x, [100 * entry["rate"] for entry in bins], color=colours[KEPT], width=0.8)
    uniform = 100 * sum(e["kept"] for e in bins) / max(1, sum(e["size"] for e in bins))
    axes.axhline(uniform, color=colours[2], linestyle="--", label=f"random: {uniform:.1f} %")
    axes.set(xlabel="bin, in the order filled", ylabel="kept, %")
    if len(bins) <= _NAMED:
        axes.set_xticks(x)
