"""Draws the report's map as a small picture, for readers without scripts."""

from __future__ import annotations

import io
from base64 import b64encode

import numpy as np
from numpy.typing import NDArray
from PIL import Image

WIDTH, HEIGHT = 720, 480
_KEPT, _DROPPED = (0, 114, 178), (138, 146, 153)
_LEVELS = 16  # of opacity, by how many points lie on a pixel
_FEW = 20_000  # points; so few are drawn larger


def map_picture(places: NDArray[np.uint16], kept: NDArray[np.bool_]) -> str:
    """A ``data:`` URI of a PNG with a transparent ground: dropped samples in grey, kept ones over them in blue.

    Args:
        places: (n, 2) uint16, from `quantise`; y grows upwards.
        kept: (n,) bool.
    """
    side = min(WIDTH, HEIGHT) - 8
    corner = np.array([(WIDTH - side) // 2, (HEIGHT - side) // 2])
    pixel = corner + places.astype(np.int64) * (side - 1) // 65535
    flat = (HEIGHT - 1 - pixel[:, 1]) * WIDTH + pixel[:, 0]
    index = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)  # 0: nothing there
    for first, rows in ((1, ~kept), (1 + _LEVELS, kept)):
        count = np.bincount(flat[rows], minlength=WIDTH * HEIGHT).reshape(HEIGHT, WIDTH)
        if len(places) <= _FEW:
            count = _grown(count)
        most = max(1, int(count.max()))
        level = np.ceil(np.log1p(count) / np.log1p(most) * (_LEVELS - 1)).astype(np.uint8)
        index = np.where(count > 0, first + level, index)
    image = Image.fromarray(index, mode="P")
    image.putpalette([*(0, 0, 0), *_DROPPED * _LEVELS, *_KEPT * _LEVELS])
    opacity = np.linspace(110, 255, _LEVELS).astype(np.uint8).tobytes()
    out = io.BytesIO()
    image.save(out, "PNG", transparency=b"\0" + opacity + opacity, optimize=True)
    return f"data:image/png;base64,{b64encode(out.getvalue()).decode('ascii')}"


def _grown(count: NDArray[np.int64]) -> NDArray[np.int64]:
    """Each point as a square of three pixels."""
    padded = np.pad(count, 1)
    shifts = [padded[i : i + HEIGHT, j : j + WIDTH] for i in range(3) for j in range(3)]
    grown: NDArray[np.int64] = np.max(shifts, axis=0)
    return grown
