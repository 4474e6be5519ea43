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
_CELL = "style='text-align:left;padding:1px 12px 1px 0'"


def plan_html(header: Any, n_kept: int, digest: str) -> str:
    """What a plan keeps: a bar of the reasons, the classes that keep most, and the hash."""
    n = header["n_samples"]
    counts = header.get("reasons") or {"kept": n_kept, "not kept": n - n_kept}
    counts = {reason: k for reason, k in counts.items() if k}
    classes = header["classes"]
    title = f"Plan: keeps {n_kept:,} of {n:,} samples in {len(header['shards']):,} shards"
    rows = [[reason, f"{k:,}", _percent(k, n)] for reason, k in counts.items()]
    parts = [_title(title), _bar(counts, n), _table(["reason", "samples", ""], rows)]
    if classes and "n" in classes[0]:
        most = sorted(classes, key=lambda entry: -entry["kept"])[:_SHOWN_CLASSES]
        rows = [[_class(e), f"{e['n']:,}", f"{e['kept']:,}", _percent(e["kept"], e["n"])] for e in most]
        more = f"; of {len(classes):,}, those that keep most" if len(classes) > _SHOWN_CLASSES else ""
        parts.append(_table([f"class{more}", "samples", "kept", ""], rows))
    return _box([*parts, _small(f"hash {digest[:16]}; adq show has all of it")])


def features_html(title: str, facts: Iterable[tuple[str, object]]) -> str:
    """What features hold: a title and facts on them."""
    return _box([_title(title), _table([], [[name, value] for name, value in facts])])


def _class(entry: Any) -> str:
    if entry["label"] < 0:
        return "all"
    return str(entry["label"]) if entry.get("name") is None else f"{entry['label']} {entry['name']}"


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


def _bar(counts: dict[str, int], n: int) -> str:
    parts = (
        f"<span title='{_text(reason)}' style='width:{100 * k / max(1, n):.3f}%;"
        f"background:{_HUES.get(reason, '#8a9299')}'></span>"
        for reason, k in counts.items()
    )
    style = "display:flex;height:10px;max-width:480px;margin:6px 0;border:1px solid currentColor"
    return f"<div style='{style}'>{''.join(parts)}</div>"


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    cells = [f"<tr>{''.join(f'<td {_CELL}><bdi>{_text(v)}</bdi></td>' for v in row)}</tr>" for row in rows]
    names = "".join(f"<th {_CELL}>{_text(name)}</th>" for name in head)
    body = "".join([f"<tr>{names}</tr>" if head else "", *cells])
    return f"<table style='border-collapse:collapse;margin:4px 0'>{body}</table>"


def _box(parts: Iterable[str]) -> str:
    return f"<div style='font-family:sans-serif;font-size:13px;overflow-x:auto'>{''.join(parts)}</div>"
