"""Defines a section of the report page."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        title: its heading, plain text.
        html: its content; everything from data is escaped in it.
        script: JavaScript of its own, run once after the page has loaded, or "".
        style: CSS of its own, or "".
    """

    title: str
    html: str
    script: str = ""
    style: str = ""
