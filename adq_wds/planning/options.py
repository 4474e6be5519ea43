"""Checks the options of a plan against the signature of `build_plan`, their one definition."""

from __future__ import annotations

import logging
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np

from adq_wds.checks import check_memory, integer, listed
from adq_wds.core.allocation import adaptive, check_ratio, published
from adq_wds.core.graphcut import MAX_BINS
from adq_wds.core.rng import check_seed
from adq_wds.registry import ALLOCATIONS, BUILT_IN_SCORES, HEADS, SCORES, look_up
from adq_wds.registry import score as named_score
from adq_wds.signatures import PLAN, Option, options_of
from adq_wds.tables.bins import Bins
from adq_wds.tables.features import Features

# What no plan's header says among its settings: the bins and classes stand beside them, the others change no plan.
_NO_SETTINGS = ("bins", "classes", "memory_bytes", "out", "engine", "address", "progress")
# Said only where they were asked for, so that plans without them are those of earlier versions.
_LATER_SETTINGS: dict[str, Any] = {"bins_by": "graphcut", "clean": None, "exclude": []}

logger = logging.getLogger("adq_wds")


class Options(SimpleNamespace):
    """The options of `build_plan` by name; a stage reads those that it needs.

    Further: `rule`, the function that `allocation` names; `user_scores`, the users' `Score`s. `scores` holds
        names, None while it depends on the features; `allocation` is a name.
    """

    def settled(self, features: Features) -> Options:
        """The options as these features allow them: what they lack is left out, and logged.

        Raises:
            FeaturesError: texture is an option, and the features lack it.
        """
        settled = Options(**vars(self))
        if self.dedup == "exact" and not all(file.has_digest for file in features):
            settled.dedup = None
            logger.info(
                "copies are not looked for: %s holds no digests; embed again, which reads the bytes and embeds "
                "nothing anew", features.folder,
            )  # fmt: skip
        lacking = [file for file in features if not file.has_texture]
        if self.scores is None:
            settled.scores = ["diversity"] if lacking else sorted(SCORES)
            if lacking:
                logger.info(
                    "%s: made without images, so there is no texture: scored by diversity alone",
                    features.folder,
                )
        elif lacking and "texture" in self.scores:
            lacking[0].texture()  # raises
        return settled

    def settings(self) -> dict[str, Any]:
        """The options for a plan's header, as plain numbers, so that 1 and 1.0 make one plan."""
        values = {name: getattr(self, name) for name in options_of(PLAN) if name not in _NO_SETTINGS}
        values = {
            name: value
            for name, value in values.items()
            if name not in _LATER_SETTINGS or value != _LATER_SETTINGS[name]
        }
        return {name: _plain(value, options_of(PLAN)[name].type) for name, value in values.items()}


def plan_options(**named: Any) -> Options:
    """The options of `build_plan`: those named, and the others as its signature has them.

    Raises:
        ValueError: one is out of range for any features, or a name is unknown.
        TypeError: a name is no option of `build_plan`.
    """
    known = options_of(PLAN)
    if surplus := sorted(named.keys() - known.keys()):
        raise TypeError(f"build_plan has no option {surplus[0]!r}")
    options = Options(**{name: option.default for name, option in known.items()} | named)
    for option in known.values():
        if option.name == "engine":  # `choose_engine` checks it: it may be an object
            continue
        _check(option, getattr(options, option.name))
    if not isinstance(options.bins, Bins):
        options.bins = integer("bins", options.bins, least=1, most=MAX_BINS)
    elif options.classes is not None:
        raise ValueError("classes= is chosen when bins are made; leave it out, or give bins= as a number")
    if options.bins_by == "difficulty" and options.kernel != "features":
        raise ValueError(f"bins_by='difficulty' compares no samples: leave kernel={options.kernel!r} out")
    check_seed(options.seed)
    check_memory(options.memory_bytes)
    options.must_include = listed("must_include", options.must_include)
    options.exclude = listed("exclude", options.exclude)
    for name in ("balance", "dedup", "clean"):
        _settle_number(options, name)
    _resolve_allocation(options)
    _resolve_scores(options)
    return options


def _check(option: Option, value: Any) -> None:
    """Raise `ValueError` unless a value is one of the option's choices, or a ratio where its type is `Ratio`."""
    words = (*option.choices, *[None] * option.none)
    if any(value is word or (isinstance(value, str) and value == word) for word in words):
        return
    if option.type == "Ratio" and not (option.choices and isinstance(value, str)):
        check_ratio(option.name, value)
    elif option.choices:
        number = " or a number in [0, 1]" if option.type == "Ratio" else ""
        raise ValueError(f"{option.name} must be one of {words}{number}, got {value!r}")


def _settle_number(options: Options, name: str) -> None:
    """A number in place of a word, as a Python number; `ValueError` for those that would mean all or nothing."""
    value = getattr(options, name)
    if value is None or isinstance(value, str):
        return
    if (name == "dedup" and value == 0) or (name == "clean" and value in (0, 1)):
        bounds = "above 0" if name == "dedup" else "above 0 and below 1"
        raise ValueError(f"{name} must be {bounds}, got {value!r}")
    setattr(options, name, float(value))


def _plain(value: Any, kind: str) -> Any:
    """A number as a Python number; 1 becomes 1.0 where ratios are meant."""
    if isinstance(value, (int, float, np.number)) and kind in ("int", "float", "Ratio"):
        return int(value) if kind == "int" else float(value)
    return value


def _resolve_allocation(options: Options) -> None:
    rule = options.allocation
    if callable(rule):
        options.rule = rule
        options.allocation = f"function:{getattr(rule, '__qualname__', type(rule).__qualname__)}"
    else:
        named = look_up("allocation", rule, ALLOCATIONS)
        options.rule = partial(named, alpha=options.alpha) if named in (adaptive, published) else named


def _resolve_scores(options: Options) -> None:
    chosen = listed("scores", SCORES if options.scores is None else options.scores)
    options.user_scores = [named_score(score) for score in chosen if score not in BUILT_IN_SCORES]
    built_in = [score for score in chosen if score in BUILT_IN_SCORES]
    names = (*built_in, *(score.name for score in options.user_scores))
    if not names or len(set(names)) != len(names):
        raise ValueError(f"scores must name one or more, each once, got {names}")
    look_up("diversity head", options.diversity_head, dict.fromkeys(HEADS))
    if options.diversity_head != "none" and "diversity" not in names:
        raise ValueError(
            f"diversity_head={options.diversity_head!r} without 'diversity' among the scores {names}"
        )
    if options.scores is not None:
        options.scores = sorted(names)
