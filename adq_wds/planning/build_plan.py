"""Decides which samples are kept: the stages of a plan, one after another."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, Literal

from adq_wds.checks import Count, Ratio
from adq_wds.core.cells import Balance
from adq_wds.engines.choose import EngineName
from adq_wds.engines.engine import Engine
from adq_wds.errors import PlanError
from adq_wds.files import canonical_json
from adq_wds.planning.bins import bin_samples, check_fit
from adq_wds.planning.class_tasks import Workplace
from adq_wds.planning.importance import Normalise, score_bins
from adq_wds.planning.leave_out import leave_out
from adq_wds.planning.options import Options, plan_options
from adq_wds.planning.output import workplace
from adq_wds.planning.samples import SampleId, Samples, read_samples
from adq_wds.planning.seats import Draw, make_cells, take_seats
from adq_wds.planning.table import PlanTable, check_size, make_table
from adq_wds.protocols import Allocation
from adq_wds.registry import BinsBy, Kernel
from adq_wds.remote.url_path import AnyPath
from adq_wds.score import Score
from adq_wds.tables.bins import Bins
from adq_wds.tables.features import Features, as_features
from adq_wds.tables.plan import Plan, load_plan

logger = logging.getLogger("adq_wds")


def build_plan(
    features: Features | str | os.PathLike[str],
    *,
    bins: Count | Bins = 10,
    bins_by: BinsBy = "graphcut",
    kernel: Kernel = "features",
    keep: Ratio = 0.3,
    seed: int = 0,
    alpha: Ratio = 0.65,
    allocation: str | Allocation = "adaptive",
    balance: Balance | Ratio = "class",
    draw: Draw = "random",
    scores: Iterable[str | Score] | None = None,
    diversity_head: str = "none",
    normalise: Normalise = "sum",
    must_include: Iterable[SampleId] = (),
    exclude: Iterable[SampleId] = (),
    classes: Iterable[int | str] | None = None,
    dedup: Literal["exact"] | Ratio | None = "exact",
    clean: Literal["auto"] | Ratio | None = None,
    memory_bytes: int = 1 << 30,
    out: str | os.PathLike[str] | None = None,
    engine: EngineName | Engine = "threads",
    address: str | None = None,
    progress: bool | None = None,
) -> Plan:
    """Decide for every sample whether it is kept.

    Copies are left out, and doubted labels where asked; the rest is cut into bins, class by class (exact GraphCut); the
    bins are scored; the budget of keep · N samples is split over classes and bins, odd ones by the seed; inside a bin a
    keyed draw ranks the samples. Equal features, settings and seed give an equal plan, and a plan of a smaller `keep`
    lies inside one of a larger (unless a function of yours as `allocation` looks at `keep`).

    Args:
        features: a folder that `embed_shards` wrote, or the `Features` it gave.
        bins: bins per class, K. Or `Bins` made before, from the same features: what a diversity head gives is
            noted in their header, and taken from there the next time.
        bins_by: "graphcut", or "difficulty": each class in strata of equal size by the margins of `clean`, the easiest
            first. These need labels of two or more classes.
        kernel: similarity of two samples: "features", the cosine of their embeddings, or "gradient", the cosine of
            the loss's gradients by the last layer's weights (features made with ``logit_grad=True``).
        keep: ratio of samples kept, in [0, 1]; 0.2 is 20 %.
        seed: of the keyed draw.
        alpha: share of the importance in a bin's rate, in [0, 1]; 0 is uniform, which is DQ.
        allocation: rule for the rates of bins, "adaptive" (ADQ), "published" (the paper's own formula, which differs for
            bins of unequal size) or "uniform" (DQ). Or a function (size (K,), importance (K,), keep) → weights (K,),
            finite and >= 0, called for each class.
        balance: "class" keeps the classes' proportions, "equal" gives each class as many seats while it has samples,
            "none" lets all cells compete. A number g in [0, 1] lies between: a class of n samples weighs n to the
            power of g, so 1 is "class" and 0 is "equal".
        draw: how samples of a bin are ranked: "random" (keyed draw) or "ordered" (GraphCut's pick order, or
            the easiest first).
        scores: what adds up to a bin's importance: "texture" (representativeness), "diversity", "difficulty" (how
            badly labels fit, by the margins of `clean`), scores of yours (`Score`, or the name of an installed one)
            that the features were made with, and numbers from elsewhere (`Column`, or "FILE.parquet:COLUMN").
            By default texture and diversity; diversity alone, which is logged, where the features were made
            without images.
        diversity_head: the space in which diversity is measured: "none" (the embeddings of all samples) or
            "contrastive" (small heads trained on two views of some images; features made with ``views=``).
        normalise: how each score is scaled over the bins: "sum" or "minmax".
        must_include: keys kept in any case; (shard, key) where a key stands in several shards.
        exclude: keys never kept; (shard, key) where a key stands in several shards. None may be must-include too.
        classes: plan these only; other samples are not kept.
        dedup: "exact" leaves out samples whose contents an earlier sample has (by shard name and position; the
            features' digests say so), must-include samples before others; None keeps copies. A cosine in (0, 1],
            such as 0.995, also leaves out samples whose embedding is that near to an earlier one's of their class.
        clean: leaves out samples whose label is doubted, as a fit on the embeddings of all other samples prefers
            another class. "auto" estimates for each class which share is wrong, next to none where labels are right, and
            leaves out none, with a warning, where the fit cannot tell: too few samples, or a weak encoder;
            a number in (0, 1) is the share of every class. One sample of a class stays, and must-includes do.
        memory_bytes: what one class's similarity matrix may take; larger classes need none, and more time. Where the
            rows of a class need more too, they are in a file (not with kernel "gradient").
        out: file to write the plan to; a plan without one stays in memory.
        engine: what does the classes: "threads" (this process), "processes" (more of this machine, each with memory
            for a class), "ray" (a Ray cluster), or "shared" (any number of equal commands that see the folder of
            `out`). The plan does not depend on it.
        address: of the Ray cluster, for `engine` "ray".
        progress: show a bar; only on a terminal by default.

    Returns:
        the plan, opened.

    Raises:
        ValueError: an argument is out of range, or a name unknown.
        FeaturesError: damaged features, or features that do not belong together.
        PlanError: the options cannot be met; the message says by how much.
        AdqError: `out` cannot be written, or another job works in its folder; an engine that cannot run.

    Source: Zhou et al. 2023 (arXiv 2308.10524) for bins, Li et al. 2024 (arXiv 2412.16895) for scores and rates;
    budget, nesting, balance and cleaning are ours (`core.margin`, `core.label_noise`).
    """
    arguments = dict(locals())
    del arguments["features"]
    options = plan_options(**arguments)
    features = as_features(features)
    settings = [
        features.hash,
        options.settings(),
        options.classes,
        _of_bins(options),
        os.path.basename(out or ""),
    ]
    with workplace(options, out, PlanError, job="plan", settings=settings, beside=features) as place:
        if out is None:
            return make_plan(features, options, place=place).plan()
        place.finish(lambda: make_plan(features, options, place=place), lambda table: table.save(out))
        return load_plan(out)


def make_plan(
    features: Features, options: Options, *, place: Workplace | None = None, bins_file: AnyPath | None = None
) -> PlanTable:
    """The plan, to be written: each stage reads its options and stores its result for the next.

    Args:
        features: the set.
        options: the arguments of `build_plan`.
        place: who does the tasks of classes, and where; by default this process.
        bins_file: file that keeps bins for later plans; bins already in it are used where they fit.
    """
    options = options.settled(features)
    samples = read_samples(features, options)
    samples.place, samples.earlier = place or Workplace(), _earlier_bins(options, bins_file)
    if samples.place.is_durable:  # else the plan may stay in memory, where it has no bound
        check_size(
            len(samples.classes), options.bins if isinstance(options.bins, int) else options.bins.n_bins
        )
    leave_out(samples, options)
    bins = _bins(samples, options, bins_file)
    before = canonical_json(bins.header)
    scores = score_bins(samples, bins, options)
    if bins_file is not None and canonical_json(bins.header) != before:
        bins.save(bins_file)  # with what the head gave, which need not be trained again
    cells = make_cells(samples, bins, scores["importance"], options)
    take_seats(samples, bins, cells.quota, options)
    if options.keep > 0 and not samples.kept.any():
        n = sum(file.n_read for file in features)
        logger.warning("keep=%s keeps 0 of %d samples", options.keep, n)
    return make_table(samples, cells, scores, options)


def find_bins(features: Features, **options: Any) -> Bins:
    """The bins of a plan with these options of `build_plan`, to be given to several plans as its `bins`."""
    settled_options = plan_options(**options).settled(features)
    samples = read_samples(features, settled_options)
    leave_out(samples, settled_options)
    return bin_samples(samples, settled_options)


def _of_bins(options: Options) -> Any:
    """The bins that a plan is made with, as JSON has it."""
    return options.bins.header if isinstance(options.bins, Bins) else options.bins


def _earlier_bins(options: Options, bins_file: AnyPath | None) -> Bins | None:
    """Earlier bins: an argument, or read from a file."""
    if isinstance(options.bins, Bins):
        return options.bins
    if bins_file is not None and bins_file.exists():
        try:
            return Bins.load(bins_file)
        except PlanError as error:
            logger.warning("%s; binning again", error)
    return None


def _bins(samples: Samples, options: Options, bins_file: AnyPath | None) -> Bins:
    """The earlier bins where they fit, else new ones."""
    if isinstance(options.bins, Bins):
        check_fit(options.bins, samples, options)
        return options.bins
    if samples.earlier is not None:
        with suppress(PlanError, ValueError):
            check_fit(samples.earlier, samples, options)
            return samples.earlier
    bins = bin_samples(samples, options)
    if bins_file is not None:
        bins.header["asked_classes"] = options.classes
        bins.save(bins_file)
    return bins
