"""How does a folder of features become a plan file?"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from adq_wds.checks import Count, Ratio, check_memory, listed, positive
from adq_wds.core.allocation import adaptive
from adq_wds.errors import PlanError
from adq_wds.files import lock, make_folder
from adq_wds.planning.bins import bin_features, check_dedup, possible_dedup
from adq_wds.planning.diversity import diversity_behind
from adq_wds.planning.plan import Balance, Draw, Normalise, PlanSettings, SampleId, plan_bins
from adq_wds.protocols import Allocation
from adq_wds.registry import HEADS, SCORES, Kernel, look_up
from adq_wds.registry import allocation as named_allocation
from adq_wds.registry import score as named_score
from adq_wds.score import Score, bin_values
from adq_wds.tables.bins import Bins
from adq_wds.tables.features import Features
from adq_wds.tables.plan import Plan, load_plan

logger = logging.getLogger("adq_wds")


def build_plan(
    features: Features | str | os.PathLike[str],
    *,
    bins: Count | Bins = 10,
    kernel: Kernel = "features",
    keep: Ratio = 0.3,
    seed: int = 0,
    alpha: Ratio = 0.65,
    allocation: str | Allocation = "adaptive",
    balance: Balance = "class",
    draw: Draw = "random",
    scores: Iterable[str | Score] | None = None,
    diversity_head: str = "none",
    normalise: Normalise = "sum",
    must_include: Iterable[SampleId] = (),
    classes: Iterable[int | str] | None = None,
    dedup: Literal["exact"] | None = "exact",
    memory_bytes: int = 1 << 30,
    out: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> Plan:
    """Decide for every sample whether it is kept.

    Copies are left out; the rest is cut into bins, class by class (exact GraphCut); the bins are scored; the budget of
    keep · N samples is split over classes and bins, odd ones by the seed; inside a bin a keyed draw ranks the samples.
    Equal features, settings and seed give an equal plan, and a plan of a smaller `keep` lies inside one of a larger
    (unless a function of yours as `allocation` looks at `keep`).

    Args:
        features: a folder that `embed_shards` wrote, or the `Features` it gave.
        bins: bins per class, K. Or `Bins` made before, from the same features: what a diversity head gives is
            noted in their header, and taken from there the next time.
        kernel: similarity of two samples: "features", the cosine of their embeddings, or "gradient", the cosine of
            the loss's gradients by the last layer's weights (features made with ``logit_grad=True``).
        keep: ratio of samples kept, in [0, 1]; 0.2 is 20 %.
        seed: of the keyed draw.
        alpha: share of the importance in a bin's rate, in [0, 1]; 0 is uniform, which is DQ.
        allocation: rule for the rates of bins, "adaptive" (ADQ) or "uniform" (DQ). Or a function (size (K,),
            importance (K,), keep) → weights (K,), finite and >= 0, called for each class.
        balance: "class" keeps the classes' proportions; "none" lets all cells compete.
        draw: how samples of a bin are ranked: "random" (keyed draw) or "ordered" (GraphCut's pick order).
        scores: what adds up to a bin's importance: "texture" (representativeness), "diversity", and scores of
            yours (`Score`, or the name of an installed one) that the features were made with. Texture and diversity
            unless said; diversity alone, which is logged, where the features were made without images.
        diversity_head: what the diversity is measured behind: "none" (the embeddings of all samples) or
            "contrastive" (small heads trained on two views of some images; features made with ``views=``).
        normalise: how each score is scaled over the bins: "sum" or "minmax".
        must_include: keys kept in any case; (shard, key) where a key stands in several shards.
        classes: plan these only; other samples are not kept.
        dedup: "exact" leaves out samples whose contents an earlier sample has (by shard name and position; the
            features' digests say so), must-include samples before others; None keeps copies.
        memory_bytes: what one class's similarity matrix may take; larger classes need none, and more time.
        out: file to write the plan to; a plan without one stays in memory.
        progress: show a bar; only on a terminal by default.

    Returns:
        the plan, opened.

    Raises:
        ValueError: an argument is out of range, or a name unknown.
        FeaturesError: damaged features, or features that do not belong together.
        PlanError: what is asked for cannot be met; the message says by how much.
        AdqError: `out` cannot be written, or another job works in its folder.

    Source: Zhou et al. 2023 (arXiv 2308.10524) for bins, Li et al. 2024 (arXiv 2412.16895) for scores and rates;
    budget, nesting and balance are ours.
    """
    settings, rule, own = plan_settings(
        keep=keep,
        seed=seed,
        alpha=alpha,
        allocation=allocation,
        balance=balance,
        draw=draw,
        scores=scores,
        diversity_head=diversity_head,
        normalise=normalise,
    )
    _check_bins(kernel=kernel, dedup=dedup)
    must = listed("must_include", must_include)
    if out is not None and Path(out).is_dir():
        raise PlanError(f"{out}: a folder; give the plan a file name, such as {Path(out) / 'plan.parquet'}")
    if not isinstance(features, Features):
        features = Features(features)
    settings = with_usual_scores(settings, features, scores)
    if out is not None and Path(os.path.realpath(out)).parent == Path(os.path.realpath(features.folder)):
        raise PlanError(
            f"{out}: lies among the features, where every file is one shard's; write it elsewhere"
        )
    if isinstance(bins, Bins) and classes is not None:
        raise ValueError("classes= is chosen when bins are made; leave it out, or give bins= as a number")
    if isinstance(bins, Bins) and bins.header["kernel"] != kernel:
        raise ValueError(f"the bins were made with kernel {bins.header['kernel']!r}, not {kernel!r}")
    possible = possible_dedup(features, dedup)
    if possible != dedup:
        logger.info(
            "copies are not looked for: %s holds no digests; embed again, which reads the bytes and embeds nothing anew",
            features.folder,
        )
    if isinstance(bins, Bins) and bins.header.get("dedup") != possible:
        raise ValueError(f"the bins were made with dedup={bins.header.get('dedup')!r}, not {possible!r}")
    folder = None if out is None else make_folder(Path(out).parent)
    # locked before the work, so that of two jobs one learns it at once
    with nullcontext() if folder is None else lock(folder):
        if not isinstance(bins, Bins):
            bins = find_bins(
                features,
                bins=bins,
                kernel=kernel,
                classes=classes,
                dedup=dedup,
                memory_bytes=memory_bytes,
                scratch=folder,
                progress=progress,
            )
        values = _more_scores(features, bins, own, diversity_head, progress)
        plan = plan_bins(features, bins, settings, rule, values=values, must_include=must)
        if out is None:
            return plan
        plan.save(out)
    return load_plan(out)


def plan_settings(
    *,
    alpha: float,
    allocation: str | Allocation,
    scores: Iterable[str | Score] | None,
    diversity_head: str = "none",
    **more: Any,
) -> tuple[PlanSettings, Allocation, list[Score]]:
    """The checked settings that arguments of `build_plan` stand for, the allocation rule, and the scores of users.

    Args:
        alpha, allocation, scores, diversity_head: as in `build_plan`.
        more: what `PlanSettings` takes as it is.

    Raises:
        ValueError: an argument is out of range, or a name unknown.
    """
    chosen = listed("scores", SCORES if scores is None else scores)
    own = own_scores(chosen)
    names = tuple(score for score in chosen if score in SCORES) + tuple(score.name for score in own)
    look_up("diversity head", diversity_head, dict.fromkeys(HEADS))
    if diversity_head != "none" and "diversity" not in names:
        raise ValueError(f"diversity_head={diversity_head!r} without 'diversity' among the scores {names}")
    rule, rule_name = _allocation(allocation, alpha)
    settings = PlanSettings(
        alpha=alpha, allocation=rule_name, scores=names, diversity_head=diversity_head, **more
    )
    return settings, rule, own


def check_options(*, bins: int, memory_bytes: int, **options: Any) -> None:
    """Raise `ValueError` when arguments of `build_plan` are out of range, as far as they alone can tell.

    Args:
        bins, memory_bytes: as in `build_plan`.
        options: the others, all of them.
    """
    plan_settings(**{field.name: options[field.name] for field in fields(PlanSettings)})
    _check_bins(kernel=options["kernel"], dedup=options["dedup"])
    positive("bins", bins)
    check_memory(memory_bytes)


def _check_bins(*, kernel: str, dedup: str | None) -> None:
    look_up("kernel", kernel, dict.fromkeys(get_args(Kernel)))
    check_dedup(dedup)


def with_usual_scores(
    settings: PlanSettings, features: Features, asked: Iterable[str | Score] | None
) -> PlanSettings:
    """The settings with diversity alone where no scores were asked for, and there were no images to measure texture on.

    Raises:
        FeaturesError: texture was asked for, and is not there.
    """
    lacking = [file for file in features if not file.has_texture]
    if not lacking or "texture" not in settings.scores:
        return settings
    if asked is not None:
        lacking[0].texture()  # raises
    logger.info("%s: made without images, so there is no texture: scored by diversity alone", features.folder)
    return replace(settings, scores=("diversity",))


def own_scores(scores: Iterable[str | Score]) -> list[Score]:
    """Those among `scores` that are not in every plan's bins: scores of users, by object or installed name."""
    return [named_score(score) for score in scores if score not in SCORES]


def _more_scores(
    features: Features, bins: Bins, own: list[Score], head: str, progress: bool | None
) -> dict[str, NDArray[np.float64]]:
    """(K,) float64 of each score that bins do not hold from the start."""
    values = {}
    for score in own:
        made_with = features.files[0].scores.get(score.name)
        numbers = features.score(score.name)
        if made_with != score.revision:
            raise ValueError(
                f"score {score.name!r} has revision {score.revision!r}, the features hold {made_with!r}; embed again"
            )
        values[score.name] = bin_values(score, numbers, bins.bin, bins.n_bins)
    if head != "none":
        value, spread = diversity_behind(features, bins, head, progress=progress)
        values |= {"diversity": value, "diversity_spread": spread}
    return values


def find_bins(
    features: Features,
    *,
    bins: int,
    kernel: str = "features",
    classes: Iterable[int | str] | None = None,
    dedup: str | None = "exact",
    memory_bytes: int = 1 << 30,
    scratch: Path | None = None,
    progress: bool | None = None,
) -> Bins:
    """`binning.bin_features` with a progress bar: half of it reading, half picking."""
    total = 2 * len(features)
    with tqdm(
        total=total, unit=" samples", desc="bins", disable=None if progress is None else not progress
    ) as bar:
        return bin_features(
            features,
            bins=bins,
            kernel=kernel,
            classes=classes,
            dedup=dedup,
            memory_bytes=memory_bytes,
            scratch=scratch,
            progress=bar.update,
        )


def _allocation(allocation: str | Allocation, alpha: float) -> tuple[Allocation, str]:
    if callable(allocation):
        return allocation, f"function:{getattr(allocation, '__qualname__', type(allocation).__qualname__)}"
    rule = named_allocation(allocation)
    return (partial(adaptive, alpha=alpha) if rule is adaptive else rule), allocation
