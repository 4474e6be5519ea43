"""Fits a codebook: bins and rates for samples that no plan has seen."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from adq_wds.checks import Count, Ratio, integer, listed, no_bar
from adq_wds.core.cells import Balance
from adq_wds.core.scores import BinSums, bin_scores, importance, rounded
from adq_wds.engines.choose import EngineName
from adq_wds.engines.engine import Engine
from adq_wds.errors import CodebookError, FeaturesError, shorten
from adq_wds.planning.buckets import LEFT_OUT, Column, embedding_column
from adq_wds.planning.class_rule import FitClass, count_bins, fit_rule
from adq_wds.planning.class_tasks import Workplace, run_classes
from adq_wds.planning.codebook_parts import check_digests, codebook_parts, samples_to_fit
from adq_wds.planning.importance import Normalise
from adq_wds.planning.options import Options, plan_options
from adq_wds.planning.output import workplace
from adq_wds.planning.samples import keyed_draws
from adq_wds.planning.seats import weigh_bins
from adq_wds.protocols import Allocation
from adq_wds.registry import SCORES, look_up
from adq_wds.tables.codebook import Codebook, check_codebook_name, load_codebook
from adq_wds.tables.codebook_header import CodebookSource
from adq_wds.tables.features import Features, as_features
from adq_wds.tables.features_file import NO_LABEL
from adq_wds.tables.plan_rows import KEPT

PILOT = 5_000  # rows at most, unless more are asked for: a similarity matrix of 200 MB
HELD_OUT = 1_000
CHECKPOINTS = 8
MIN_PILOT = 500
_CROWDED = 2.0  # times its share, from which on the last bin is warned of

logger = logging.getLogger("adq_wds")


def fit_codebook(
    features: Features | str | os.PathLike[str],
    *,
    bins: Count = 10,
    pilot: int | None = None,
    checkpoints: int = CHECKPOINTS,
    min_pilot: int = MIN_PILOT,
    keep: Ratio = 0.3,
    seed: int = 0,
    alpha: Ratio = 0.65,
    allocation: str | Allocation = "adaptive",
    balance: Balance | Ratio = "class",
    scores: Iterable[str] | None = None,
    normalise: Normalise = "sum",
    dedup: Literal["exact"] | None = None,
    clean: Literal["auto"] | Ratio | None = None,
    memory_bytes: int = 1 << 30,
    out: str | os.PathLike[str] | None = None,
    engine: EngineName | Engine = "threads",
    address: str | None = None,
    progress: bool | None = None,
) -> Codebook:
    """Fit rules that assign any sample, also a new one, to a bin, and the counts that its keep rate follows from.

    The exact greedy bins a pilot of every class, and one of all classes together, by the cosine of the
    embeddings. Checkpoints of every bin store the vector that ranks candidates. New samples do not fill bins
    evenly, so samples outside the pilot are assigned and counted; the rates for any later `keep` are solved
    from these counts. Equal features, settings and seed give an equal codebook. Copies and doubted labels are left out
    before where asked, and the codebook recognises them in a stream.

    Args:
        features: a folder that `embed_shards` wrote, or the `Features` it gave.
        bins: bins per class, K.
        pilot: samples that each class's rule is fitted on, by keyed draw; 5,000 by default. Half of a class,
            or 1,000 of its samples where that is less, are always held out. A larger pilot is closer to exact
            bins.
        checkpoints: checkpoints kept for each bin, M; more are closer to exact bins and take more time to assign.
        min_pilot: a class with a smaller pilot has no rule and uses the one over all classes.
        keep: keep ratio passed to an allocation function of yours; ours ignore it.
        seed: of the keyed draw.
        alpha: share of the importance in a bin's rate, in [0, 1]; 0 is uniform, which is DQ.
        allocation: rule for the rates of bins, "adaptive" (ADQ), "published" (the paper's own formula, which differs for
            bins of unequal size) or "uniform" (DQ). Or a function (size (K,), importance (K,), keep) → weights (K,),
            finite and >= 0, called for each class with its held-out counts.
        balance: "class" keeps the classes' proportions, "equal" keeps as many of each class while it has samples, by
            the parts that classes are of these samples; "none" lets all cells compete. A number g in [0, 1] lies
            between: a class of n samples weighs n to the power of g. Other classes, and samples without a label, are
            kept at the ratio asked for.
        scores: what adds up to a bin's importance, of "texture" (representativeness) and "diversity"; both unless
            said, diversity alone where the features were made without images.
        normalise: how each score is scaled over the bins: "sum" or "minmax".
        dedup: "exact" drops a sample of a stream whose contents a sample of these features has, unless it is itself the
            one that stays: the first by shard name and position, recognised by its shard's base name and its key. New
            samples are not compared with each other. Takes 16 bytes for each distinct sample.
        clean: leaves out samples whose label is doubted, as a fit on the embeddings prefers another class. "auto"
            estimates for each class which share is wrong, next to none where labels are right; a number in (0, 1) is
            the share of every class. A sample of a stream is doubted below the lowest margin of its class that is left.
            Samples of these features then seem to fit better than new ones, since the fit knows their labels. Takes
            at most 4·C·(D + 1,027) + 16·D bytes.
        memory_bytes: what one pilot's similarity matrix may take; larger pilots need none, and more time.
        out: file to write to, ending in .safetensors; a codebook without one stays in memory.
        engine: what fits the classes' rules: "threads" (this process), "processes" (more of this machine), "ray" (a Ray
            cluster), or "shared" (any number of equal commands that see the folder of `out`). The codebook does not
            depend on it.
        address: of the Ray cluster, for `engine` "ray".
        progress: show a bar; only on a terminal by default.

    Returns:
        the codebook, opened.

    Raises:
        ValueError: an argument is out of range, or a name unknown.
        FeaturesError: damaged features, features that do not belong together, or too few of them; or what they lack for
            `balance`, `dedup` or `clean`.
        AdqError: `out` cannot be written, or another job works in its folder.

    Source: ours. Bins: Zhou et al. 2023 (arXiv 2308.10524); scores and rates: Li et al. 2024 (arXiv 2412.16895).
    Balance, copies and cleaning are ours, as in `build_plan`.
    """
    pilot = integer("pilot", PILOT if pilot is None else pilot, least=1, most=2**31 - 1)
    checkpoints = integer("checkpoints", checkpoints, least=1, most=2**15 - 1)
    min_pilot = integer("min_pilot", min_pilot, least=1, most=2**31 - 1)
    for score in [] if scores is None else listed("scores", scores):
        look_up("score of a codebook", score, dict.fromkeys(SCORES))
    options = plan_options(
        bins=bins, keep=keep, seed=seed, alpha=alpha, allocation=allocation, scores=scores, normalise=normalise,
        memory_bytes=memory_bytes, balance=balance, dedup=dedup, clean=clean, engine=engine, address=address,
    )  # fmt: skip
    if options.dedup not in (None, "exact"):
        raise ValueError(f"dedup must be 'exact' or None for a codebook, got {shorten(dedup)}")
    if out is not None:
        check_codebook_name(out)
    features = as_features(features)
    check_digests(features, options)
    options = options.settled(features)
    more = {"checkpoints": checkpoints, "min_pilot": min_pilot}

    def fit(place: Workplace) -> Codebook:
        fit = _Fit(features, options, pilot, checkpoints)
        classes = fit.classes_with_rules(max(min_pilot, options.bins))
        codebook = _codebook(fit, fit.rules(classes, place, progress), more)
        _warn_of_crowds(codebook)
        return codebook

    settings = [features.hash, options.settings(), options.bins, pilot, more, os.path.basename(out or "")]
    with workplace(options, out, CodebookError, job="codebook", settings=settings) as place:
        if out is None:
            return fit(place)
        place.finish(lambda: fit(place), lambda codebook: codebook.save(out))
    return load_codebook(out)


@dataclass(frozen=True)
class _Rule:
    """The rule of one class, or of all together.

    Attributes:
        label: the class; NO_LABEL for all together.
        pilot: samples that it was fitted on.
        query, threshold: as `fit_rule` gives them.
        held_out: (K,) int64, samples outside the pilot that fall into each bin.
    """

    label: int
    pilot: int
    query: NDArray[np.float32]
    threshold: NDArray[np.float64]
    held_out: NDArray[np.int64]


class _Fit:
    """The samples of a set, which of them are pilots, and the sums over the pilots' bins."""

    def __init__(self, features: Features, options: Options, pilot: int, checkpoints: int) -> None:
        self.features, self.options, self.checkpoints = features, options, checkpoints
        self._pilot = pilot
        self._samples = samples = samples_to_fit(features, options)
        self.parts, self.header = codebook_parts(samples, options)
        self._kept = samples.reason == KEPT
        n = int(self._kept.sum())
        if self.n_pilot(n) < options.bins or n < 2:
            raise FeaturesError(
                f"{features.folder}: {n} usable samples, too few for a codebook of {options.bins} bins, "
                "half of which are held out; embed more, or ask for fewer bins"
            )
        self.label, self.names = np.where(self._kept, samples.label, np.int32(LEFT_OUT)), samples.names
        self.classes = [c for c in samples.classes if c != NO_LABEL]
        self._draw = keyed_draws(features, options.seed, purpose="pilot")
        self._texture = features.texture()
        self.sums = {
            kind: BinSums.empty(options.bins, features.width, texture=self._texture is not None)
            for kind in ("classes", "pooled")
        }

    def n_pilot(self, n: int) -> int:
        """Pilot samples of a class of n."""
        return min(self._pilot, n - min(n // 2, HELD_OUT))

    def classes_with_rules(self, min_pilot: int) -> list[int]:
        """The classes with large enough pilots; the others are logged."""
        counts = dict(zip(*(a.tolist() for a in np.unique(self.label, return_counts=True)), strict=True))
        fit = [c for c in self.classes if self.n_pilot(counts.get(c, 0)) >= min_pilot]
        few = sorted({*self.classes} - {*fit})
        if few:
            c = few[0]
            name = str(c) if self.names is None else shorten(self.names[c])
            logger.warning(
                "%d of %d classes have pilots of fewer than %d samples (class %s: %d of its %d): they go by one rule "
                "over all classes", len(few), len(self.classes), min_pilot, name, self.n_pilot(counts.get(c, 0)), counts.get(c, 0),
            )  # fmt: skip
        if not self.classes:
            logger.info("no labels: one rule for all samples")
        return fit

    def rules(self, classes: list[int], place: Workplace, progress: bool | None) -> list[_Rule]:
        """The rule over all classes, and those of the classes that have one."""
        with tqdm(total=1 + len(classes), unit=" rows", desc="codebook", disable=no_bar(progress)) as bar:
            rules = [self._pooled()]
            bar.update()
            in_pilot = np.zeros(len(self.label), dtype=bool)
            here = np.isin(self.label, classes)
            label = np.where(here, self.label, np.int32(LEFT_OUT))
            for _, where in self._samples.by_class(here):
                in_pilot[where[self._choose(where)]] = True
            columns = [embedding_column(self.features), Column.of_array("in_pilot", in_pilot)]
            if self._texture is not None:
                columns.append(Column.of_array("texture", self._texture))
            options = self.options
            job = FitClass(options.bins, self.checkpoints, options.memory_bytes)
            depends = [options.bins, self.checkpoints, self._pilot, int(options.seed)]
            parts = run_classes(
                place, "codebook", job, features=self.features, label=label, classes=classes, names=self.names,
                columns=columns, depends=depends,
            )  # fmt: skip
            sums = self.sums["classes"]
            for _, part in parts:
                for query, threshold, held_out, n in zip(
                    part["query"], part["threshold"], part["held_out"], part["pilot"], strict=True
                ):
                    c = classes[len(rules) - 1]
                    rules.append(_Rule(c, int(n), query, threshold, held_out))
                    bar.update()
                sums.add_sums(part)
                if sums.texture is not None:
                    for of_class in part[
                        "texture"
                    ]:  # (K,) each, in the order of classes: these sums are rounded
                        sums.texture += of_class
        return rules

    def _pooled(self) -> _Rule:
        """The rule over all classes, from pilots of all shards; no more than one shard is in memory beside them."""
        where = np.flatnonzero(self._kept)
        chosen = np.zeros(len(self.label), dtype=bool)
        chosen[where[self._choose(where)]] = True
        ends = np.cumsum([file.n for file in self.features])[:-1]
        triples = list(zip(self.features, np.split(chosen, ends), np.split(self._kept, ends), strict=True))
        pilot = np.concatenate(
            [file.embedding()[in_pilot] for file, in_pilot, _ in triples if in_pilot.any()]
        )
        texture = None if self._texture is None else self._texture[np.flatnonzero(chosen)]
        sums = self.sums["pooled"]
        rule = fit_rule(pilot, texture, sums, self.checkpoints, self.options.memory_bytes)
        held_out = np.zeros(self.options.bins, dtype=np.int64)
        for file, in_pilot, kept in triples:
            held_out += count_bins(rule, file.embedding()[kept & ~in_pilot], self.options.bins)
        return _Rule(NO_LABEL, len(pilot), *rule, held_out)

    def _choose(self, where: NDArray[np.int64]) -> NDArray[np.bool_]:
        """(n,) bool: the pilot, the samples with the smallest draws."""
        chosen = np.zeros(len(where), dtype=bool)
        chosen[np.argsort(self._draw[where], kind="stable")[: self.n_pilot(len(where))]] = True
        return chosen


def _codebook(fit: _Fit, rules: list[_Rule], more: dict[str, int]) -> Codebook:
    """The codebook of these rules: their weights, and a header with settings and counts."""
    options, features = fit.options, fit.features
    scores = {kind: bin_scores(sums) for kind, sums in fit.sums.items() if sums.n.any()}
    for of_bins in scores.values():
        chosen = [of_bins[name] for name in options.scores]
        of_bins["importance"] = importance(chosen, normalise=options.normalise)
    kinds = ["pooled", *["classes"] * (len(rules) - 1)]
    weight = []
    for rule, kind in zip(rules, kinds, strict=True):
        n = np.maximum(rule.held_out, 1)  # a bin that nothing fell into would have no rate
        weight.append(weigh_bins(options, n, scores[kind]["importance"]) / n)
    settings, by = options.settings(), features.header
    named = ["allocation", "alpha", "keep", "normalise", "scores", "seed"]
    named += [name for name in ("clean", "dedup") if settings.get(name) is not None]
    header: CodebookSource = {
        "encoder": by["encoder"],
        "revision": by["revision"],
        "preprocessing_hash": by["preprocessing_hash"],
        "label": by["label"],
        "features": features.hash,
        "classes": fit.classes,
        "names": fit.names,
        "settings": {
            **{name: settings[name] for name in named},
            "pilot": [rule.pilot for rule in rules],
            **more,
        },
        "scores": {
            kind: {name: rounded(value) for name, value in of_bins.items()}
            for kind, of_bins in scores.items()
        },
        **fit.header,  # type: ignore[typeddict-item]
    }
    return Codebook(
        query=np.stack([rule.query for rule in rules]),
        threshold=np.stack([rule.threshold for rule in rules]),
        label=np.array([rule.label for rule in rules], dtype=np.int32),
        held_out=np.stack([rule.held_out for rule in rules]),
        weight=np.stack(weight),
        header=header,
        **fit.parts,
    )


def _warn_of_crowds(codebook: Codebook) -> None:
    """Warn where the last bin takes far more than its share, as with a small pilot."""
    times = codebook.frequency()[:, -1] * codebook.n_bins
    crowded = np.flatnonzero(times > _CROWDED)
    if len(crowded):
        r = int(times.argmax())
        names, label = codebook.header["names"], int(codebook.label[r])
        who = "all classes together" if r == 0 else f"class {shorten(names[label]) if names else label}"
        logger.warning(
            "of %d rules, %d put more than %g times its share into the last bin (%s: %.1f times): a larger pilot (here %d) "
            "would tell samples apart better; rates allow for it", len(times), len(crowded), _CROWDED, who,
            times[r], codebook.header["settings"]["pilot"][r],
        )  # fmt: skip
