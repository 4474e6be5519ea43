"""Draws a sheet of pictures: a row per image, a column per step of dropping patches, numbers beneath."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from adq_wds.core.patches import Grid

CELL = 224
_GAP, _TEXT, _LINE = 10, 13, 17
_DROPPED = (255, 205, 220)
_COLD, _HOT = (24, 28, 66), (255, 214, 96)

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Panel:
    """One picture with lines of text beneath.

    Attributes:
        pixels: (h, w, 3) uint8; enlarged by whole factors to fit its cell, or made smaller.
        lines: the text beneath.
    """

    pixels: Pixels
    lines: tuple[str, ...]


def draw_sheet(rows: Sequence[Sequence[Panel]], titles: Sequence[str]) -> Image.Image:
    """All panels on white, a title above each column.

    Args:
        rows: the panels of each image, one per title.
        titles: of the columns.
    """
    n_lines = max(len(panel.lines) for row in rows for panel in row)
    height = CELL + n_lines * _LINE + _GAP
    sheet = Image.new(
        "RGB", (len(titles) * (CELL + _GAP) + _GAP, 2 * _GAP + _LINE + len(rows) * (height + _GAP)), "white"
    )
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_TEXT)
    for column, title in enumerate(titles):
        left = _GAP + column * (CELL + _GAP)
        draw.text((left, _GAP), title, fill="black", font=font)
        for i, row in enumerate(rows):
            top = 2 * _GAP + _LINE + i * (height + _GAP)
            sheet.paste(_fitted(row[column].pixels), (left, top))
            for j, line in enumerate(row[column].lines):
                draw.text((left, top + CELL + 2 + j * _LINE), line, fill=(60, 60, 60), font=font)
    return sheet


def _fitted(pixels: Pixels) -> Image.Image:
    """On a light cell: pixels stay squares where they are enlarged."""
    image = Image.fromarray(pixels)
    factor = CELL // max(image.size)
    if factor >= 1:
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    else:
        image.thumbnail((CELL, CELL), Image.Resampling.LANCZOS)
    cell = Image.new("RGB", (CELL, CELL), (238, 238, 238))
    cell.paste(image, ((CELL - image.width) // 2, (CELL - image.height) // 2))
    return cell


def heat(importance: NDArray[np.floating], grid: Grid, patch: int, image: Pixels) -> Pixels:
    """Importance as colour over the image in grey.

    Args:
        importance: (L,) of each patch; from its least to its largest value, dark to bright.
        grid: rows and columns of patches.
        patch: side of a patch in pixels.
        image: (H, W, 3) uint8.
    """
    values = importance.astype(np.float64).reshape(grid)
    span = float(values.max() - values.min())
    level = (values - values.min()) / span if span > 0 else np.full(grid, 0.5)
    level = np.kron(level, np.ones((patch, patch)))[..., None]  # (H, W, 1)
    colour = level * np.array(_HOT) + (1 - level) * np.array(_COLD)
    grey = image.astype(np.float64).mean(axis=2, keepdims=True)
    mixed: Pixels = np.clip(0.65 * colour + 0.35 * grey, 0, 255).astype(np.uint8)
    return mixed


def holes(image: Pixels, kept: NDArray[np.int64], grid: Grid, patch: int) -> Pixels:
    """The image with its dropped patches in pink, which few images hold."""
    mask = np.zeros(grid[0] * grid[1], dtype=bool)
    mask[kept] = True
    keep = np.kron(mask.reshape(grid), np.ones((patch, patch))).astype(bool)[..., None]
    return np.where(keep, image, np.array(_DROPPED, dtype=np.uint8))


def psnr(image: Pixels, other: Pixels, where: NDArray[np.bool_] | None = None) -> float:
    """Peak signal-to-noise ratio in dB, of all pixels or those of a mask (H, W); infinite for equal ones."""
    error = (image.astype(np.float64) - other.astype(np.float64)) ** 2
    if where is not None:
        error = error[where]
    mean = float(error.mean()) if error.size else 0.0
    return float("inf") if mean == 0 else float(10 * np.log10(255**2 / mean))
