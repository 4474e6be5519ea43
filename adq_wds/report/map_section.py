"""Makes the section with the map: every sample as a point, close to those with similar embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from adq_wds.report.map_picture import HEIGHT, WIDTH, map_picture
from adq_wds.report.map_points import PackedPoints, pack_points
from adq_wds.report.render import asset
from adq_wds.report.section import Section

TITLE = "Map"


def map_section(
    table: pa.Table,
    xy: NDArray[np.floating[Any]],
    pictures: Mapping[int, str],
    nearest: Mapping[int, int],
) -> Section:
    """The map as a section: a picture, which the script replaces by points that can be looked at one by one.

    Args:
        table: n rows, from `report_table`.
        xy: (n, 2), a place for each row; NaN for rows without one.
        pictures: ``data:`` URIs by row.
        nearest: by row, the row of the nearest kept sample of the same class.
    """
    points = pack_points(table, xy, pictures, nearest)
    if not points.n:
        return Section(TITLE, "<p>No sample has an embedding, so there is no map.</p>")
    picture = map_picture(points.places, points.kept)
    words = f"Map of {points.n:,} samples, {int(points.kept.sum()):,} of them kept"
    html = (
        "<p>Samples with similar embeddings lie close together. Those that lie apart differ; those that lie together may "
        "differ in a way that a plane cannot show.</p>\n"
        f'<p class="hint">{" ".join(_notes(points, len(table)))}</p>\n'
        f'<div class="map" id="adq-map"><img src="{picture}" alt="{words}" width="{WIDTH}" height="{HEIGHT}">'
        '<p class="hint">Blue: kept. Grey: not kept.</p></div>\n'
        f'<script type="text/plain" id="adq-map-data">{points.text}</script>'
    )
    return Section(TITLE, html, asset("map.js"), asset("map.css"))


def _notes(points: PackedPoints, n: int) -> list[str]:
    """What is not drawn or not named."""
    notes = []
    if n > points.n_placed:
        notes.append(f"{n - points.n_placed:,} samples have no embedding and are not drawn.")
    if points.n_placed > points.n:
        notes.append(f"{points.n:,} of {points.n_placed:,} samples are drawn, chosen at random.")
    if points.n > points.n_named:
        notes.append(
            f"{points.n_named:,} points name their keys, kept ones first; all keys are in the report's table."
        )
    return notes or [f"All {n:,} samples are drawn."]
