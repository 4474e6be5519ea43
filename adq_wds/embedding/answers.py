"""Runs an encoder on images, and names the images that it fails on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from adq_wds.errors import AdqError, FeaturesError, SampleError, reason_of
from adq_wds.pipes.base import replayed
from adq_wds.protocols import Answer, Encoder


def encoder_answer(
    encoder: Encoder, images: list[Image.Image], failed: Callable[[int, Exception], None], *, shard: str
) -> Answer:
    """Embeddings and logits of images; if the encoder fails on the batch, each image is run alone.

    `failed` is called with the number of each image that it fails on alone, and the error; these have no row. An encoder
    that fails on all at once and on none alone is an `AdqError`.
    """
    errors: list[Exception] = []  # of all at once, then of each alone

    def embed(numbers: list[int]) -> list[Answer]:
        return [_checked(encoder([images[k] for k in numbers]), len(numbers))]

    def may_replay(error: Exception) -> bool:
        errors.append(error)
        return isinstance(error, SampleError) or not isinstance(error, AdqError)

    def failed_alone(k: int, error: Exception) -> None:
        errors.append(error)
        failed(k, error)

    numbers = list(range(len(images)))
    answers = list(chain.from_iterable(replayed(numbers, embed, failed_alone, may_replay=may_replay)))
    h = joined(shard, [rows for rows, _ in answers])
    if len(errors) == 1:
        raise AdqError(
            f"encoder {encoder.name!r} fails on {len(images)} images at once, and on none of them alone "
            f"({reason_of(errors[0])}); a smaller batch_size may help"
        ) from errors[0]
    logits = [rows for _, rows in answers if rows is not None]
    return h, joined(shard, logits) if logits and len(logits) == len(answers) else None


def joined(shard: str, parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Rows of several parts of a shard, of one width, one after another; (0, 0) where there is none."""
    for part in parts:
        if part.shape[1:] != parts[0].shape[1:]:
            raise FeaturesError(
                f"shard {shard}: embeddings of {parts[0].shape[1]} and of {part.shape[1]} numbers; they must be alike"
            )
    return np.concatenate(parts) if parts else np.empty((0, 0), np.float32)


def _checked(answer: Any, n: int) -> Answer:
    if not isinstance(answer, tuple) or len(answer) != 2:
        raise ValueError(f"gave a {type(answer).__name__}, expected (embeddings, logits or None)")
    with np.errstate(over="ignore"):  # beyond float32 becomes infinity, which is refused by name
        rows = np.asarray(answer[0], dtype=np.float32)
        logits = None if answer[1] is None else np.asarray(answer[1], dtype=np.float32)
    for what, each, letter in (("embeddings", rows, "D"), ("logits", logits, "C")):
        if each is not None and (each.ndim != 2 or len(each) != n or each.shape[1] == 0):
            raise ValueError(f"gave {what} of shape {each.shape} for {n} images, expected ({n}, {letter})")
    return rows, logits
