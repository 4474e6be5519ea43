"""Leaves samples out before a codebook is fitted, and learns to leave the like out of a stream."""

from __future__ import annotations

from typing import Any

import numpy as np

from adq_wds.core.known_copies import KnownCopies
from adq_wds.core.margin_rule import MarginRule, least_margins
from adq_wds.errors import FeaturesError, PlanError
from adq_wds.planning.leave_out import leave_out
from adq_wds.planning.options import Options
from adq_wds.planning.samples import Samples, keyed_draws, read_samples
from adq_wds.tables.codebook import COPY_DRAW
from adq_wds.tables.features import Features
from adq_wds.tables.features_file import NO_LABEL
from adq_wds.tables.plan_rows import KEPT, LABEL


def check_digests(features: Features, options: Options) -> None:
    """Raise `FeaturesError` where copies are asked for and features cannot tell them."""
    if options.dedup is None:
        return
    for file in features:
        if not file.has_digest:
            raise FeaturesError(
                f"{file.path}: dedup='exact' needs digests, and there are none here; embed again, which reads the bytes "
                "and embeds nothing anew"
            )
    if features.header["image"].startswith("function:"):
        raise FeaturesError(
            f"{features.folder}: dedup='exact' needs an image field with a name, and a function gave these images; "
            "leave it out, or embed with image='jpg' (--image jpg)"
        )


def samples_to_fit(features: Features, options: Options) -> Samples:
    """The samples of a set, with a reason for each that is left out.

    Raises:
        FeaturesError: there are no labels, or too few classes, for what is asked.
    """
    samples = read_samples(features, options)
    try:
        if options.balance != "class" and NO_LABEL in samples.classes:
            raise PlanError(
                f"balance={options.balance!r} needs labels, and these features have none; leave it out"
            )
        leave_out(samples, options)
    except PlanError as error:
        raise FeaturesError(f"{features.folder}: {error}") from error
    return samples


def codebook_parts(samples: Samples, options: Options) -> tuple[dict[str, Any], dict[str, Any]]:
    """`margins` and `copies` of a codebook, and the entries of its header on these; only what was asked for."""
    parts: dict[str, Any] = {}
    header: dict[str, Any] = {}
    kept, n_classes = samples.reason == KEPT, len(samples.classes)
    if options.balance != "class" or options.clean is not None:
        header["n"] = np.bincount(samples.row_of(samples.label[kept]), minlength=n_classes).tolist()
        header["balance"] = options.balance
    if samples.ridge is not None and samples.margin is not None:
        fitted = kept | (samples.reason == LABEL)
        doubted = samples.reason[fitted] == LABEL
        row = samples.row_of(samples.label[fitted])
        least = least_margins(samples.margin[fitted], row, doubted, n_classes)
        parts["margins"] = rule = MarginRule.of(samples.ridge, least)
        header |= {"clean": samples.doubts, "random_layer": rule.layer_hash()}
    if options.dedup is not None:
        digest = samples.features.digests()
        assert digest is not None  # `check_digests`
        draw = keyed_draws(samples.features, 0, purpose=COPY_DRAW)
        parts["copies"] = KnownCopies.of(digest, samples.stays, draw)
        header["image"] = samples.features.header["image"]
    return parts, header
