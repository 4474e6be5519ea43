"""Draws views of an image, a crop and a flip each, and chooses the samples that are viewed."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

DEFINITION = "1"
"""Version of the box, its draws and the resizing; rises when an equal seed would give another view."""
AREA = (0.2, 1.0)  # of a crop, as a part of the image's
ASPECT = (3 / 4, 4 / 3)  # width / height of a crop
CHOOSING = "choose views"  # purpose of the draw that chooses samples
CROPPING = "view"  # purpose of the draws of a crop; the number of the view stands in the epoch's place
_TRIES = 10


def choose(draw: NDArray[np.uint64], n: int) -> NDArray[np.int64]:
    """The n samples with the smallest draws: a larger n contains a smaller one.

    Args:
        draw: (N,) uint64, a keyed draw for each sample.
        n: how many, >= 0; all of them when there are fewer.

    Returns:
        (min(n, N),) int64 positions, ascending; of equal draws the lower position comes first.

    >>> choose(np.array([7, 1, 9, 1], dtype=np.uint64), 2)
    array([1, 3])
    """
    return np.sort(np.argsort(draw, kind="stable")[:n]).astype(np.int64)


def crop_box(width: int, height: int, rng: np.random.Generator) -> tuple[tuple[int, int, int, int], bool]:
    """A random box inside an image, and whether the view is mirrored.

    The box has 0.2 to 1 of the image's area and an aspect of 3/4 to 4/3, both up to the rounding of its sides to
    whole pixels, at least one. Where an image is so long that ten draws give no box inside it, the box is the largest
    whose aspect is allowed, somewhere along the image: it may then have less than 0.2 of the area.

    Args:
        width, height: of the image in pixels, >= 1.
        rng: the view's own generator.

    Returns:
        (left, top, right, bottom) in pixels, 0 <= left < right <= width, 0 <= top < bottom <= height; and the flip.

    Raises:
        ValueError: an image without pixels.

    Source: random resized crop as in Chen et al. 2020 (SimCLR, arXiv 2002.05709), area from 0.2 as is usual for
    pretrained encoders; a crop of any image, however small or long, is ours.

    >>> crop_box(1, 1, np.random.default_rng(0))[0]
    (0, 0, 1, 1)
    """
    if width < 1 or height < 1:
        raise ValueError(f"an image of {width} x {height} pixels has no crop; expected at least 1 x 1")
    w, h = _crop_size(width, height, rng)
    # only `random` is drawn: its stream is the same in every NumPy
    left, top = int(rng.random() * (width - w + 1)), int(rng.random() * (height - h + 1))
    return (left, top, left + w, top + h), bool(rng.random() < 0.5)


def _crop_size(width: int, height: int, rng: np.random.Generator) -> tuple[int, int]:
    log_aspect = (math.log(ASPECT[0]), math.log(ASPECT[1]))
    for _ in range(_TRIES):
        area = width * height * _uniform(AREA, rng)
        aspect = math.exp(_uniform(log_aspect, rng))
        w, h = max(1, round(math.sqrt(area * aspect))), max(1, round(math.sqrt(area / aspect)))
        if w <= width and h <= height:
            return w, h
    return min(width, round(height * ASPECT[1])), min(height, round(width / ASPECT[0]))


def _uniform(between: tuple[float, float], rng: np.random.Generator) -> float:
    return between[0] + (between[1] - between[0]) * float(rng.random())
