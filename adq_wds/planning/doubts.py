"""Leaves out samples whose labels are doubted: a fit on the embeddings of all others prefers another class."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from adq_wds.core.label_noise import wrong_shares
from adq_wds.core.margin import fit_ridge, ridge_margins
from adq_wds.errors import PlanError
from adq_wds.files import canonical_json, sha256_text
from adq_wds.planning.options import Options
from adq_wds.planning.samples import Samples, digest_of
from adq_wds.tables.bins import MarginsSource
from adq_wds.tables.features_file import NO_LABEL
from adq_wds.tables.plan_rows import KEPT, LABEL

DECIMALS = 4
_WEAK = 0.5  # of what a perfect fit would predict beyond chance: a fit must predict more,
_CERTAIN = 3.0  # by so many standard errors
_TOO_MANY = 0.45  # above this share of wrong labels, the encoder is more likely to be wrong

logger = logging.getLogger("adq_wds")


def leave_out_doubted(samples: Samples, options: Options) -> None:
    """Leave out the samples of the lowest margins in each class: a given share, or with "auto" an estimated one.

    "auto" leaves out none where the fit is too weak to tell wrong labels from hard samples. Margins are
    stored in `samples.margin`, NaN for samples left out earlier. One sample of a class stays.

    Raises:
        PlanError: there are no labels, or fewer than two classes.
    """
    asked = {
        f"clean={options.clean!r}": options.clean is not None,
        "the score 'difficulty'": "difficulty" in options.scores,
        "bins_by='difficulty'": options.bins_by == "difficulty",
    }
    if not any(asked.values()):
        return
    what = next(name for name, is_asked in asked.items() if is_asked)
    here = np.flatnonzero(samples.reason == KEPT)
    row = samples.row_of(samples.label[here])
    if NO_LABEL in samples.classes:
        raise PlanError(f"{what} needs labels, and these features have none; leave it out")
    if len(np.unique(row)) < 2:
        raise PlanError(
            f"{what} needs samples of two or more classes; the {len(here):,} that earlier reasons leave in are of one: "
            "leave it out"
        )
    margin, summary = _earlier_margins(samples) or _measure(samples, here, row)
    samples.margin, samples.margins = margin, summary
    n, estimate = np.bincount(row, minlength=len(samples.classes)), np.array(summary["wrong"])
    wrong = float((estimate * n).sum() / n.sum())
    weak = _is_weak(summary["accuracy"], wrong, n)
    if weak:
        _warn_of_weak_fit(summary["accuracy"], wrong, n, auto=options.clean == "auto")
    if options.clean is None:
        return
    share, most = options.clean, np.maximum(n - 1, 0)
    if share == "auto":  # no label that the fit predicts, though the estimate is rounded
        n_negative = np.bincount(row[margin[here] < 0], minlength=len(n))
        share, most = estimate * (not weak), np.minimum(most, n_negative)
    out = _lowest(margin[here], row, np.minimum(np.rint(share * n).astype(np.int64), most))
    samples.reason[here[out]] = LABEL
    samples.doubts = {
        "accuracy": summary["accuracy"],
        "wrong": summary["wrong"],
        "left_out": np.bincount(row[out], minlength=len(n)).tolist(),
        "of": n.tolist(),
    }


def _earlier_margins(samples: Samples) -> tuple[NDArray[np.float32], MarginsSource] | None:
    """Margins of the same samples from earlier bins, if these hold them."""
    bins = samples.earlier
    if bins is None or bins.margin is None or bins.header["margins"].get("fit") != _fit_of(samples):
        return None
    return bins.margin, bins.header["margins"]


def _measure(
    samples: Samples, here: NDArray[np.int64], row: NDArray[np.int64]
) -> tuple[NDArray[np.float32], MarginsSource]:
    """(N,) margins, and their summary for a header.

    Args:
        samples: N of them.
        here: positions of those that are not left out.
        row: the class of each of those, as a position among `samples.classes`.
    """
    logger.info("checking %d labels by a fit on the embeddings", len(here))
    samples.ridge = fit_ridge(lambda: _embeddings(samples), row)
    margins = ridge_margins(lambda: _embeddings(samples), row, fit=samples.ridge)
    margin = np.full(len(samples), np.nan, dtype=np.float32)
    margin[here] = margins.margin
    wrong = np.zeros(len(samples.classes))
    estimate = wrong_shares(margins, row)
    wrong[: len(estimate)] = np.round(estimate, DECIMALS)
    accuracy = round(margins.accuracy, DECIMALS)
    return margin, {"fit": _fit_of(samples), "accuracy": accuracy, "wrong": wrong.tolist()}


def _fit_of(samples: Samples) -> str:
    """A hash that identifies the samples that margins were measured on."""
    return sha256_text(canonical_json([samples.features.hash, digest_of(samples.reason == KEPT)]))


def _embeddings(samples: Samples) -> Iterator[NDArray[np.float16]]:
    """The embeddings of samples that are not left out yet, shard by shard."""
    first = 0
    for file in samples.features:
        yield file.embedding()[samples.reason[first : first + file.n] == KEPT]
        first += file.n


def _lowest(
    margin: NDArray[np.float32], row: NDArray[np.int64], n_out: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Positions of the lowest margins, so many of each class, ties by position."""
    order = np.lexsort((margin, row))  # stable
    n = np.bincount(row, minlength=len(n_out))
    place = np.arange(len(row)) - np.repeat(np.cumsum(n) - n, n)  # of each in its class
    lowest: NDArray[np.int64] = order[place < np.repeat(n_out, n)]
    return lowest


def _is_weak(accuracy: float, wrong: float, n: NDArray[np.int64]) -> bool:
    """Whether a fit that predicts so many labels, of classes of `n` samples, so many of which seem wrong, tells little."""
    chance = 1 / np.count_nonzero(n)  # of a fit whose classes weigh the same
    least = chance + _WEAK * (1 - wrong - chance)
    return wrong > _TOO_MANY or accuracy - _CERTAIN * np.sqrt(accuracy * (1 - accuracy) / n.sum()) < least


def _warn_of_weak_fit(accuracy: float, wrong: float, n: NDArray[np.int64], *, auto: bool) -> None:
    """Warn that margins are unreliable: the fit does not predict right labels, or too many labels seem wrong."""
    remedy = (
        "nothing is left out; embed with a better encoder, or give a share"
        if auto
        else "embed with a better encoder"
    )
    logger.warning(
        "the leave-one-out fit on %d samples predicts only %.0f %% of the labels (%.0f %% by chance), and %.0f %% of the "
        "labels seem wrong: too few samples, or an encoder that tells these classes badly apart, so margins say little "
        "of labels: %s",
        n.sum(), 100 * accuracy, 100 / np.count_nonzero(n), 100 * wrong, remedy,
    )  # fmt: skip
