"""Shows plans and features in a notebook, as a small piece of HTML without scripts and without links.

Text and lines take the notebook's own colours, so that both its themes are readable. All that comes from data is escaped.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Any

from adq_wds.errors import printable
from adq_wds.tables.plan_rows import REASONS

_SHOWN_CLASSES = 10
_LONGEST = 60
_HUES = dict(zip(REASONS, ("#0072b2", "#8a9299", "#d9730d", "#b5469a", "#d1332e", "#8c6d46"), strict=True))
_CELL = "style='text-align:start;white-space:nowrap;padding:1px 12px 1px 0'"


def plan_html(header: Any, n_kept: int, n_shards: int, digest: str) -> str:
    """What a plan keeps: a bar of the reasons, the classes that keep most, and the hash."""
    n = header["n_samples"]
    counts = header.get("reasons") or {"kept": n_kept, "not kept": n - n_kept}
    counts = {reason: k for reason, k in counts.items() if k}
    classes = header["classes"]
    title = f"Plan: keeps {n_kept:,} of {n:,} samples in {n_shards:,} shards"
    rows = [[_Swatch(reason), reason, f"{k:,}", _percent(k, n)] for reason, k in counts.items()]
    parts = [_title(title), _bar(counts, n), _table(["", "reason", "samples", ""], rows)]
    if classes and "n" in classes[0]:
        most = sorted(classes, key=lambda entry: -entry["kept"])[:_SHOWN_CLASSES]
        rows = [[*_class(e), f"{e['n']:,}", f"{e['kept']:,}", _percent(e["kept"], e["n"])] for e in most]
        parts.append(_table(["class", "name", "samples", "kept", ""], rows))
        if len(classes) > len(most):
            parts.append(_small(f"the {len(most)} of {len(classes):,} classes that keep most"))
    return _box([*parts, _small(f"hash {digest[:16]}; adq show has all of it")])


def features_html(title: str, facts: Iterable[tuple[str, object]]) -> str:
    """What features hold: a title and facts on them."""
    return _box([_title(title), _table([], [[name, value] for name, value in facts])])


class _Swatch(str):
    """A reason that is shown as its colour in the bar."""


def _class(entry: Any) -> tuple[object, str]:
    """Number and name of a class."""
    return "all" if entry["label"] < 0 else entry["label"], entry.get("name") or ""


def _percent(k: int, n: int) -> str:
    return f"{100 * k / max(1, n):.1f} %"


def _text(value: object) -> str:
    """Escaped, on one line, and without marks that turn the direction of text; a long one is cut."""
    text = printable(str(value)).replace("\n", "\\n").replace("\t", "\\t")
    return html.escape(text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…")


def _title(text: str) -> str:
    return f"<div style='font-weight:600'>{_text(text)}</div>"


def _small(text: str) -> str:
    return f"<div style='opacity:.7;font-size:90%'>{_text(text)}</div>"


def _colour(reason: str) -> str:
    return f"background:{_HUES.get(reason, '#8a9299')}"


def _bar(counts: dict[str, int], n: int) -> str:
    parts = (
        f"<span title='{_text(reason)}' style='width:{100 * k / max(1, n):.3f}%;{_colour(reason)}'></span>"
        for reason, k in counts.items()
    )
    style = "display:flex;height:10px;max-width:480px;margin:6px 0;border:1px solid currentColor"
    return f"<div style='{style}'>{''.join(parts)}</div>"


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [f"<tr>{''.join(f'<td {_CELL}>{_cell(value)}</td>' for value in row)}</tr>" for row in rows]
    names = "".join(f"<th {_CELL}>{_text(name)}</th>" for name in head)
    body = "".join([f"<tr>{names}</tr>" if head else "", *lines])
    return f"<table style='border-collapse:collapse;margin:4px 0;font:inherit;color:inherit'>{body}</table>"


def _cell(value: object) -> str:
    if isinstance(value, _Swatch):
        return f"<span style='display:inline-block;width:10px;height:10px;{_colour(value)}'></span>"
    return f"<bdi>{_text(value)}</bdi>"


def _box(parts: Iterable[str]) -> str:
    return f"<div style='font-family:sans-serif;font-size:13px;overflow-x:auto'>{''.join(parts)}</div>"
