"""Puts sections together to one HTML file that loads nothing and runs only its own scripts."""

from __future__ import annotations

import hashlib
from base64 import b64encode
from collections.abc import Sequence

from adq_wds.report.render import asset, render
from adq_wds.report.section import Section


def page(title: str, sections: Sequence[Section]) -> str:
    """The whole page, under a policy that allows data: images and these styles and scripts only.

    Args:
        title: of the page, plain text.
        sections: the first has no heading of its own above it: the page's title is.
    """
    style = "\n".join([asset("page.css"), *(section.style for section in sections if section.style)])
    scripts = [asset("page.js"), *(section.script for section in sections if section.script)]
    policy = {
        "default-src": ["'none'"],
        "img-src": ["data:"],
        "style-src": [_hash(style)],
        "script-src": [_hash(script) for script in scripts],
        "base-uri": ["'none'"],
        "form-action": ["'none'"],
    }
    return render(
        "page.html",
        title=title,
        sections=sections,
        style=style,
        scripts=scripts,
        policy="; ".join(f"{name} {' '.join(values)}" for name, values in policy.items()),
    )


def _hash(text: str) -> str:
    """The source expression that allows one inline style or script."""
    return f"'sha256-{b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode()}'"
