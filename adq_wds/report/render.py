"""Renders the page's templates; jinja2 escapes every value."""

from __future__ import annotations

import math
import pkgutil
from functools import cache
from typing import TYPE_CHECKING, Any

from adq_wds.errors import AdqError
from adq_wds.report.escaped import shown

if TYPE_CHECKING:
    from jinja2 import Environment


def render(template: str, **values: Any) -> str:
    """A template of the folder ``templates`` with these values, all escaped.

    Raises:
        AdqError: jinja2 is missing.
    """
    return environment().get_template(template).render(**values)


@cache
def environment() -> Environment:
    """The templates, with the filters that they use.

    Raises:
        AdqError: jinja2 is missing.
    """
    try:
        from jinja2 import Environment, FunctionLoader, StrictUndefined
    except ImportError as error:
        raise AdqError(f'the report needs jinja2 ({error}): pip install "adq-wds[report]"') from error
    made = Environment(
        loader=FunctionLoader(asset),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"shown": shown, "count": count, "percent": percent, "size": size, "decimal": decimal}
    return made


def asset(name: str) -> str:
    """A file of the folder ``templates``."""
    return (pkgutil.get_data("adq_wds.report", f"templates/{name}") or b"").decode("utf-8")


def count(n: int) -> str:
    """A number with separators: 50,000."""
    return f"{n:,}"


def percent(part: float, whole: float = 1) -> str:
    """A share of a whole.

    >>> percent(1, 8), percent(1, 100_000), percent(99_999, 100_000), percent(0, 0)
    ('12.5 %', '< 0.1 %', '> 99.9 %', '0 %')
    """
    share = part / whole if whole else 0.0
    if 0 < share < 0.001:
        return "< 0.1 %"
    if 0.999 < share < 1:
        return "> 99.9 %"
    return f"{100 * share:.1f} %".replace(".0 %", " %")


def size(n_bytes: float) -> str:
    """Bytes in the unit that suits them.

    >>> size(999), size(2_567_168)
    ('999 B', '2.6 MB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} B" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:,.1f} TB"


def decimal(value: float | None, digits: int = 3) -> str:
    """A number with so many decimals, a dash where there is none."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"
