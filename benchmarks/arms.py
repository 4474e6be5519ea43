"""The arms of `benchmarks.accuracy`: rules of selection by name, and variants of each part of a rule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Arm:
    """A rule of selection.

    Attributes:
        options: of `build_plan` and `embed_shards`.
        fresh: whether every epoch draws anew.
        encoder, keep: the arm's own, in place of what the command asks for.
        times: multiplies the epochs.
        k_centre: whether the k-centre rule picks, which is no plan's.
        images: how the images kept are altered (`benchmarks.altered.WAYS`), or None.
        schedule: how the ratio changes over the epochs of fresh draws, around its mean (`keep_in`), or None.
        rates: whether the seats of classes follow their losses (`ClassRates`).
        soft: whose probabilities are half of each target (`benchmarks.soft.SOURCES`), or None for labels alone.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    fresh: bool = False
    encoder: str | None = None
    keep: float | None = None
    times: int = 1
    k_centre: bool = False
    images: str | None = None
    schedule: Literal["rising", "falling"] | None = None
    rates: bool = False
    soft: str | None = None


def keep_in(epoch: int, epochs: int, keep: float, schedule: str) -> float:
    """The ratio of an epoch: a straight line up or down, whose mean over the epochs is `keep`.

    >>> [keep_in(epoch, 3, 0.2, "rising") for epoch in range(3)], keep_in(0, 3, 0.2, "falling")
    ([0.1, 0.2, 0.3], 0.3)
    """
    place = epoch + 1 if schedule == "rising" else epochs - epoch
    return round(min(1.0, 2 * keep * place / (epochs + 1)), 12)


def without_easiest(
    size: NDArray[np.int64], importance: NDArray[np.float64], keep: float
) -> NDArray[np.float64]:
    """Rates by size, none for the first bin: with `bins_by="difficulty"`, the easiest."""
    return np.where(np.arange(len(size)) > 0, size, 0).astype(np.float64)


# One bin, copies and all: a keyed draw. Where embeddings play no part, the cheapest encoder does.
ONE_BIN: dict[str, Any] = {"bins": 1, "allocation": "uniform", "scores": ("texture",), "dedup": None}
RANDOM = Arm(ONE_BIN, encoder="thumbnail")
DQ = {"allocation": "uniform", "dedup": None}
ADQ = {"dedup": None}
CHOSEN = {"dedup": "exact", "clean": "auto", "balance": "equal"}  # what `adq run` is asked for on dirty sets
STRATA = {**CHOSEN, "bins_by": "difficulty"}
HARDEST_OUT = {**CHOSEN, "clean": 0.2}

_RULES: dict[str, Arm] = {
    "full": replace(RANDOM, keep=1.0),
    "random": RANDOM,  # each class in its proportion
    "equal": replace(RANDOM, options={**ONE_BIN, "balance": "equal"}),  # as many of each class
    "k-centre": Arm(k_centre=True),
    "dq": Arm(DQ),
    "adq": Arm(ADQ),  # as published
    "adq-minmax": Arm({**ADQ, "normalise": "minmax"}),
    "adq-contrastive": Arm({**ADQ, "diversity_head": "contrastive", "views": 20_000}),
    "adq-builtin": Arm(ADQ, encoder="builtin"),  # what adq-gradient is to be compared with
    "adq-gradient": Arm({**ADQ, "kernel": "gradient", "logit_grad": True}, encoder="builtin"),
    "dedup": replace(RANDOM, options={**ONE_BIN, "dedup": "exact"}),
    "clean": Arm({**ONE_BIN, "clean": "auto"}),
    "dedup-clean": Arm({**ONE_BIN, "dedup": "exact", "clean": "auto"}),
    "clean-20": Arm({**ONE_BIN, "clean": 0.2}),  # the hardest fifth left out
    "clean-30": Arm({**ONE_BIN, "clean": 0.3}),
    "clean-50": Arm({**ONE_BIN, "clean": 0.5}),
    "easiest-20": Arm({"bins": 5, "bins_by": "difficulty", "allocation": without_easiest, "dedup": None}),
    "chosen-one-bin": Arm({**ONE_BIN, **CHOSEN}),
    "chosen": Arm(CHOSEN),
    "soft-ridge": Arm(ONE_BIN, soft="ridge"),  # the selection of `random`, other targets
    "soft-proxy": replace(RANDOM, soft="proxy"),  # the proxy's own training comes on top of the compute
    "chosen-soft": Arm(CHOSEN, soft="ridge"),
}

ABLATIONS: dict[str, Arm] = {
    "chosen-texture": Arm({**CHOSEN, "scores": ("texture",)}),  # representativeness alone
    "chosen-diversity": Arm({**CHOSEN, "scores": ("diversity",)}),
    "chosen-difficulty": Arm({**CHOSEN, "scores": ("texture", "diversity", "difficulty")}),
    "chosen-alpha-0": Arm({**CHOSEN, "alpha": 0.0}),  # the allocation "uniform"
    "chosen-alpha-0.35": Arm({**CHOSEN, "alpha": 0.35}),
    "chosen-alpha-1": Arm({**CHOSEN, "alpha": 1.0}),
    "chosen-bins-5": Arm({**CHOSEN, "bins": 5}),
    "chosen-bins-20": Arm({**CHOSEN, "bins": 20}),
    "chosen-bins-50": Arm({**CHOSEN, "bins": 50}),
    "chosen-published": Arm({**CHOSEN, "allocation": "published"}),
    "chosen-strata": Arm(STRATA),
    "chosen-strata-uniform": Arm({**STRATA, "allocation": "uniform"}),
    "chosen-strata-published": Arm({**STRATA, "allocation": "published"}),
    "chosen-20": Arm(HARDEST_OUT),
    "chosen-20-uniform": Arm({**HARDEST_OUT, "allocation": "uniform"}),
    "chosen-20-published": Arm({**HARDEST_OUT, "allocation": "published"}),
    "chosen-builtin": Arm(CHOSEN, encoder="builtin"),  # what chosen-gradient is to be compared with
    "chosen-gradient": Arm({**CHOSEN, "kernel": "gradient", "logit_grad": True}, encoder="builtin"),
    **{
        f"{rule}-{encoder}": Arm(options, encoder=encoder)
        for encoder in ("thumbnail", "random-weights")
        # the first by margins alone, at a share, as `auto` may not trust a weak encoder's; then the whole rule
        for rule, options in (("clean-20", {**ONE_BIN, "clean": 0.2}), ("chosen", CHOSEN))
    },
}
"""`chosen`, each with one part changed. `chosen` itself (α 0.65, K 10, both scores, `builtin-free`), `chosen-one-bin`
(K 1) and `clean-20` belong to them."""

PATCHES: dict[str, Arm] = {
    name: replace(RANDOM, images=name)
    for name in ("recompressed", "gradcam-rebuilt", "gradcam-grey", "chance-rebuilt", "chance-grey")
}
"""The images of `random` at three quarters of their bytes."""

_FRESH = (
    "random",
    "equal",
    "dq",
    "adq",
    "clean",
    "chosen-one-bin",
    "chosen",
    "chosen-soft",
    "chosen-strata",
    "chosen-20",
)

ARMS: dict[str, Arm] = {
    **_RULES,
    **ABLATIONS,
    **{f"fresh-{name}": replace({**_RULES, **ABLATIONS}[name], fresh=True) for name in _FRESH},
    "fresh-random-rates": replace(RANDOM, fresh=True, rates=True),
    "fresh-chosen-rates": Arm(CHOSEN, fresh=True, rates=True),
    "fresh-chosen-rising": Arm(CHOSEN, fresh=True, schedule="rising"),
    "fresh-chosen-falling": Arm(CHOSEN, fresh=True, schedule="falling"),
    "full-chosen": Arm(CHOSEN, fresh=True, keep=0.1, times=10),  # the compute of `full`, cleaned and balanced
    **PATCHES,
}
"""All arms, in the order of tables."""
