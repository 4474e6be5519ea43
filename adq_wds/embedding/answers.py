"""Asks an encoder for the embeddings and logits of images, and names the images that it fails on."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from adq_wds.embedding.shard import unlike
from adq_wds.errors import AdqError, SampleError
from adq_wds.pipes.base import replayed
from adq_wds.protocols import Encoder


def encoder_answers(
    source: Encoder, images: list[Image.Image], failed: Callable[[int, Exception], None], *, shard: str
) -> list[tuple[NDArray[np.float32], NDArray[np.float32] | None]]:
    """Embeddings and logits of images: of all at once or, where the encoder fails on them, of each good one alone.

    Args:
        source: the encoder.
        images: n images.
        failed: called with the number of each image that it fails on alone, and the error.
        shard: the name of theirs.

    Raises:
        AdqError: it fails on all at once and on none alone; or an `AdqError` of its own that is no `SampleError`.
        FeaturesError: embeddings of single images differ in width.
    """
    errors: list[Exception] = []  # of all at once, then of each alone

    def embed(numbers: list[int]) -> list[tuple[NDArray[np.float32], NDArray[np.float32] | None]]:
        return [checked_answer(source([images[k] for k in numbers]), len(numbers))]

    def may_replay(error: Exception) -> bool:
        errors.append(error)
        return isinstance(error, SampleError) or not isinstance(error, AdqError)

    def failed_alone(k: int, error: Exception) -> None:
        errors.append(error)
        failed(k, error)

    numbers = list(range(len(images)))
    answers = list(chain.from_iterable(replayed(numbers, embed, failed_alone, may_replay=may_replay)))
    widths = sorted({rows.shape[1] for rows, _ in answers})
    if len(widths) > 1:
        raise unlike(shard, widths[0], widths[1])
    if len(errors) == 1:
        raise AdqError(
            f"encoder {source.name!r} fails on {len(images)} images at once, and on none of them alone "
            f"({type(errors[0]).__name__}: {one_line(errors[0])}); a smaller batch_size may help"
        ) from errors[0]
    return answers


def one_line(error: Exception) -> str:
    """An error of somebody else's, on one line of ours."""
    return " ".join(str(error).split())[:500]


def checked_answer(answer: Any, n: int) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
    """The embeddings and logits in an encoder's answer."""
    if not isinstance(answer, tuple) or len(answer) != 2:
        raise ValueError(f"gave a {type(answer).__name__}, expected (embeddings, logits or None)")
    with np.errstate(over="ignore"):  # beyond float32 becomes infinity, which is refused by name
        rows = np.asarray(answer[0], dtype=np.float32)
        logits = None if answer[1] is None else np.asarray(answer[1], dtype=np.float32)
    if rows.ndim != 2 or len(rows) != n or rows.shape[1] == 0:
        raise ValueError(f"gave embeddings of shape {rows.shape} for {n} images, expected ({n}, D)")
    if logits is not None and (logits.ndim != 2 or len(logits) != n or logits.shape[1] == 0):
        raise ValueError(f"gave logits of shape {logits.shape} for {n} images, expected ({n}, C)")
    return rows, logits
