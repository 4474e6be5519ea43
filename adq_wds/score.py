"""Defines scores: a number per sample, made while embedding, and from those a number per bin."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from adq_wds.errors import SampleError, reason_of, shorten

_NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")
# columns of our tables and of `adq show`, which a user's score must not hide
RESERVED = frozenset([
    "bin", "byte_offset", "crc32", "difficulty", "digest", "diversity", "diversity_spread", "embedding", "importance",
    "index", "kept", "key", "label", "logit_grad", "members", "n_bytes", "norm", "pick", "rank", "rate", "shard", "size",
    "texture", "views",
])  # fmt: skip


class Score(ABC):
    """Base class of your own scores: set `name` and write `per_sample`; by default a bin's score is the mean
    of its samples.

    ``embed_shards(..., scores=[MyScore()])`` calls `per_sample` and keeps its numbers in the features, in a column of
    the score's name; ``build_plan(..., scores=["texture", "diversity", MyScore()])`` calls `per_bin` on them.

    Attributes:
        name: lower-case letters, digits and ``_``, at most 40; the column's name.
        revision: change it when `per_sample` changes, so that old and new numbers are never mixed.
        needs_image: False for a score of `h` alone: it gets None for the image, so samples without one, such
            as text with stored embeddings, can be scored too.

    >>> class Brightness(Score):
    ...     name = "brightness"
    ...     def per_sample(self, image, h):
    ...         return float(np.asarray(image).mean())
    >>> Brightness().per_sample(Image.new("RGB", (4, 4), (30, 60, 90)), np.zeros(8))
    60.0
    """

    name: str
    revision: str = "1"
    needs_image: bool = True

    @abstractmethod
    def per_sample(self, image: Any, h: NDArray[np.float32]) -> float:
        """The score of one sample: a finite number. Called from several threads.

        Args:
            image: PIL, upright, RGB, of its own size; None for a score with ``needs_image = False``.
            h: (D,) float32, its embedding as the encoder gave it.
        """

    def per_bin(self, values: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
        """The score of each bin; by default the mean of its samples.

        Args:
            values: of each bin that holds samples, their numbers: (n,) float64, n >= 1.

        Returns:
            one number per entry of `values`, finite and >= 0; only their proportions count.
        """
        return np.array([each.mean() for each in values], dtype=np.float64)


def check_score(score: object) -> Score:
    """`score`, checked.

    Raises:
        TypeError: not a `Score`.
        ValueError: its name is no valid column name, or reserved.
    """
    if not isinstance(score, Score):
        raise TypeError(f"a score must be a name or derive from adq_wds.Score, got {shorten(score)}")
    check_score_name(getattr(score, "name", None))
    if not isinstance(score.revision, str):
        raise ValueError(f"score {score.name!r}: revision must be text, got {score.revision!r}")
    return score


def check_score_name(name: object) -> str:
    """`name`, if a score of a user may have it; a `ValueError` otherwise."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            f"score name {shorten(name)}: expected lower-case letters, digits and _, starting with a letter"
        )
    if name in RESERVED:
        raise ValueError(f"score name {name!r} is one of ours; choose another")
    return name


def sample_value(score: Score, image: Image.Image | None, h: NDArray[np.float32]) -> float:
    """`score.per_sample`, checked.

    Raises:
        SampleError: it raised, or did not return a finite float32.
    """
    try:
        given = score.per_sample(image if score.needs_image else None, h)
        number = float(given) if np.ndim(given) == 0 else None
    except Exception as error:
        raise SampleError(f"score {score.name!r} fails on it: {reason_of(error)}") from error
    if number is None or not abs(number) <= float(np.finfo(np.float32).max):
        shape = "" if number is not None else f" of shape {np.shape(given)}"
        raise SampleError(
            f"score {score.name!r} gave {shorten(given)}{shape}, expected one finite number (float32)"
        )
    return number


def bin_values(
    score: Score, values: NDArray[np.float32], bin: NDArray[np.int16], n_bins: int
) -> NDArray[np.float64]:
    """`score.per_bin` over the samples that are in a bin, checked.

    Args:
        score: the score.
        values: (N,) float32, its number of each sample.
        bin: (N,) int16, each sample's bin; -1 for one left out.
        n_bins: K.

    Returns:
        (K,) float64, NaN for an empty bin.

    Raises:
        ValueError: `per_bin` raised, gave another shape, or a value that is not finite or below 0.
    """
    order = np.argsort(bin, kind="stable")
    ends = np.searchsorted(bin[order], np.arange(n_bins + 1))
    numbers = values.astype(np.float64)[order]
    parts = [numbers[ends[k] : ends[k + 1]] for k in range(n_bins)]
    filled = np.array([len(part) > 0 for part in parts])
    try:
        given = np.asarray(score.per_bin([part for part in parts if len(part)]))
    except Exception as error:
        raise ValueError(f"score {score.name!r}: per_bin fails: {reason_of(error)}") from error
    if given.shape != (int(filled.sum()),) or given.dtype.kind not in "iuf":
        raise ValueError(
            f"score {score.name!r}: per_bin must give ({int(filled.sum())},) numbers, one per bin that holds samples, "
            f"got {given.dtype} of shape {given.shape}"
        )
    if not np.isfinite(given).all() or (given < 0).any():
        raise ValueError(
            f"score {score.name!r}: a bin's value must be finite and >= 0, got {shorten(given.tolist(), 200)}"
        )
    out = np.full(n_bins, np.nan)
    out[filled] = given
    return out
