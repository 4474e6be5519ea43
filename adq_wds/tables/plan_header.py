"""Defines a plan's header, and the fresh draws that follow from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NotRequired, TypedDict

import numpy as np
from numpy.typing import NDArray

from adq_wds.core.fresh import ONE, FreshDraws
from adq_wds.core.rng import check_seed, draw
from adq_wds.tables.headers import Natural, ShardEntry, TableHeader


class PlanEntry(ShardEntry):
    """The header's entry for one shard, with the number of its kept samples."""

    kept: Natural


class ClassEntry(TypedDict):
    """The header's entry for one class; plans of features have more."""

    label: int


class Cells(TypedDict):
    """For each class and bin: its samples, those kept, and since version 2 the exact shares."""

    size: list[list[Natural]]
    quota: list[list[Natural]]
    share: NotRequired[list[list[float]]]


class PlanHeader(TableHeader):
    """The header of a plan, see FORMAT.md; plans from keys lack the entries on features."""

    shards: list[PlanEntry]  # type: ignore[misc]  # each says more
    n_samples: Natural
    n_kept: Natural
    settings: dict[str, Any]
    classes: list[ClassEntry]
    cells: Cells
    bins: list[dict[str, Any]]
    features: NotRequired[dict[str, Any]]
    names: NotRequired[list[str] | None]
    bytes: NotRequired[dict[str, int]]
    texture: NotRequired[dict[str, float] | None]
    bad: NotRequired[int]
    reasons: NotRequired[dict[str, int]]
    copies_of_other_label: NotRequired[int]
    equal_to_alpha_0: NotRequired[bool | None]
    clean: NotRequired[dict[str, Any]]


def header_without_bins(settings: dict[str, Any]) -> dict[str, Any]:
    """The entries of a plan whose samples were chosen one by one; `settings` say how."""
    cells: Cells = {"size": [], "quota": [], "share": []}
    return {"settings": settings, "classes": [], "cells": cells, "bins": []}


def fresh_draws(header: PlanHeader, size: NDArray[np.int64], quota: NDArray[np.int64]) -> FreshDraws | None:
    """The draws of a plan of version 2, checked against its sizes and quotas; None for a plan without bins.

    Raises:
        KeyError, TypeError, ValueError: the header lacks shares, or they contradict it.
    """
    share = np.array(header["cells"]["share"], dtype=np.float64).reshape(size.shape)
    if not size.size:
        return None
    units = np.rint(share * ONE)
    fits = (units == share * ONE) & (share >= 0) & (share <= size)
    # 2⁴² samples: below it all sums of units are exact, as integers and as floats
    if not fits.all() or not share.sum() == quota.sum() < 2**42:
        raise ValueError("shares that contradict the sizes and quotas")
    return FreshDraws(size.ravel(), quota.ravel(), units.astype(np.int64).ravel(), fresh_start(header))


def fresh_start(header: Mapping[str, Any]) -> int:
    """Where the fresh draws of a plan's seed start, in units of 2⁻⁶⁴."""
    return draw(check_seed(header["settings"]["seed"]), 0, "", "", purpose="fresh")
