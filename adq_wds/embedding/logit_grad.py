"""Computes the columns of kernel "gradient" from the logits of a classifier head."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from adq_wds.core.gradient import logit_gradients
from adq_wds.errors import FeaturesError, shorten
from adq_wds.protocols import Label
from adq_wds.tables.features_file import FeaturesFile


def gradient_columns(
    shard: str, encoder: str, logits: NDArray[np.float32], labels: list[Label]
) -> dict[str, NDArray[np.float32]]:
    """The columns of some samples: "logit_grad" (n, C) unit rows, and "head_right" (n,), 1 where the head is right.

    A head of one class, or a label that is no class of the head, is a `FeaturesError`.
    """
    C = logits.shape[1]
    if C < 2:
        raise FeaturesError(
            f"shard {shard}: the head of encoder {encoder!r} has {C} class, whose loss has no gradient; take a head "
            "trained on these labels"
        )
    strange = next((y for y in labels if not isinstance(y, int) or y >= C), None)
    if strange is not None:
        raise FeaturesError(
            f"shard {shard}: label {shorten(strange)}, but the encoder's head has {C} classes, 0 to {C - 1}: logit "
            "gradients need a head trained on these labels (a function as label= may map names to its classes)"
        )
    y = np.array(labels, dtype=np.int64)
    right = (logits.argmax(axis=1) == y).astype(np.float32)
    return {"logit_grad": logit_gradients(logits, y), "head_right": right}


def gradients_of_shard(
    columns: dict[str, NDArray[Any]], old: FeaturesFile | None
) -> tuple[NDArray[np.float16] | None, dict[str, Any]]:
    """A shard's logit gradients, new or from earlier features of the same samples and labels, and their header. None
    and an empty header without any.
    """
    if "logit_grad" in columns:
        return columns["logit_grad"].astype(np.float16), {"head_right": int(columns["head_right"].sum())}
    if old is None or old.n_classes is None:
        return None, {}
    return old.logit_grad(), {name: old.header[name] for name in ("logit_grad", "head_right")}
