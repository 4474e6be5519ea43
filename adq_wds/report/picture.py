"""Says which sample's picture is shown where, and makes the small pictures."""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from adq_wds.report.reasons import TITLES
from adq_wds.report.samples import Samples

SIDE = 96
"""Longest side of a small picture in pixels; smaller images stay as they are."""
_QUALITY = 70


class Shown(NamedTuple):
    """A picture of a section.

    Attributes:
        row: the sample's.
        text: what it is, for those who do not see it.
        reason: why it is kept or not, a word of `REASONS`.
        caption: beneath it, or "".
    """

    row: int
    text: str
    reason: str
    caption: str = ""


def shown_samples(samples: Samples, rows: Iterable[int], *, captions: bool = True) -> list[Shown]:
    """Samples with what is known of each; captions are their classes."""
    return [
        Shown(
            row,
            f"{samples.place(row)}, {samples.class_name(row)}, {TITLES[reason]}",
            reason,
            samples.class_name(row) if captions and len(samples.classes) > 1 else "",
        )
        for row in rows
        for reason in [samples.reason_name(row)]
    ]


def spread(rows: NDArray[np.int64], n: int) -> list[int]:
    """At most n of some rows, evenly spread over their order.

    >>> spread(np.arange(10), 3)
    [1, 5, 8]
    """
    if len(rows) <= n:
        return [int(row) for row in rows]
    return [int(rows[i]) for i in ((np.arange(n) + 0.5) * len(rows) / n).astype(np.int64)]


def small_picture(image: Image.Image) -> str:
    """A ``data:`` URI of an image, WebP, at most `SIDE` pixels wide and high."""
    image = image.convert("RGB")
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.save(out, "WEBP", quality=_QUALITY, method=4)
    return f"data:image/webp;base64,{b64encode(out.getvalue()).decode()}"
