"""Reads classes, keys and keyed draws of the samples of a set, and holds the results of a plan's stages."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from adq_wds.checks import listed
from adq_wds.core.margin import RidgeFit
from adq_wds.core.rng import draws
from adq_wds.errors import FeaturesError, shorten
from adq_wds.planning.class_tasks import Workplace
from adq_wds.planning.options import Options
from adq_wds.shards.names import base_name
from adq_wds.tables.bins import Bins, MarginsSource
from adq_wds.tables.features import Features
from adq_wds.tables.features_file import NO_LABEL, FeaturesFile
from adq_wds.tables.plan_rows import KEPT
from adq_wds.tables.spans import find_ids

_DIGEST_ROWS = 1 << 20

SampleId = str | tuple[str, str]  # a key, or (shard, key) where the key stands in several shards


@dataclass
class Samples:
    """The N usable samples of a set, by (shard name, index), and what the stages of a plan decide about them.

    Attributes:
        features: where they are stored.
        label: (N,) int32, class over the whole set; -1 for unlabelled data.
        names: of the classes, where labels are strings.
        classes: those that are planned, ascending.
        must: (N,) bool, must-includes.
        reason: (N,) uint8, why a sample is left out, a position in `REASONS`; else KEPT.
        stays: (N,) int64, for a copy the position of the sample that stays, else the sample's own position.
        binned: (N,) bool, whether the bins hold a sample; does not depend on must-includes, so that plans
            share bins.
        settings: entries of the plan's header that replace an option's value.
        bin, pick, rank, kept: (N,) each, as in `PlanShard`, once the seats are taken.
        margin: (N,) float32, how well each label fits, NaN for samples left out earlier; None where not
            measured.
        margins: their summary in the bins' header; None where not measured.
        doubts: the summary of doubted labels in the plan's header; None where not measured.
        ridge: the fit that margins were measured by; None where they were not, or come from earlier bins.
        earlier: earlier bins; their margins are reused where they are of these samples.
        place: who does the tasks of classes, and where.
    """

    features: Features
    label: NDArray[np.int32]
    names: list[str] | None
    classes: list[int]
    must: NDArray[np.bool_]
    reason: NDArray[np.uint8]
    stays: NDArray[np.int64]
    binned: NDArray[np.bool_]
    settings: dict[str, Any] = field(default_factory=dict)
    margin: NDArray[np.float32] | None = None
    margins: MarginsSource | None = None
    doubts: dict[str, Any] | None = None
    ridge: RidgeFit | None = None
    earlier: Bins | None = None
    place: Workplace = field(default_factory=Workplace)
    bin: NDArray[np.int16] = field(init=False)
    pick: NDArray[np.int32] = field(init=False)
    rank: NDArray[np.int32] = field(init=False)
    kept: NDArray[np.bool_] = field(init=False)

    def __len__(self) -> int:
        return len(self.label)

    def row_of(self, label: NDArray[np.int32]) -> NDArray[np.int64]:
        """(n,) int64: classes as positions among those planned; valid for these only."""
        return np.searchsorted(np.array(self.classes, dtype=np.int32), label)

    def by_class(self, among: NDArray[np.bool_]) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """The samples of one class after another.

        Args:
            among: (N,) bool, the samples wanted; all are of planned classes.

        Yields:
            the class as a position among those planned, and (n,) int64 positions of its samples, ascending, n > 0.
        """
        positions = np.flatnonzero(among)
        label = self.label[positions]
        positions = positions[np.argsort(label, kind="stable")]
        n_class = np.bincount(self.row_of(label), minlength=len(self.classes))
        ends = np.cumsum(n_class)
        for i in np.flatnonzero(n_class).tolist():
            yield i, positions[ends[i] - n_class[i] : ends[i]]

    @property
    def free(self) -> NDArray[np.bool_]:
        """(N,) bool: in a bin, and to be drawn from it."""
        free: NDArray[np.bool_] = (self.reason == KEPT) & ~self.must
        return free


def read_samples(features: Features, options: Options) -> Samples:
    """The samples of a set, none left out yet.

    Raises:
        ValueError: a class that is asked for has no samples.
        FeaturesError: damaged features, or none usable.
        PlanError: a must-include sample is not there, or in several shards.
    """
    n = len(features)
    if n == 0:
        raise FeaturesError(f"{features.folder}: no usable samples in {len(features.files)} shards")
    label, names = global_labels(features)
    if isinstance(options.bins, Bins):
        classes = options.bins.classes
    else:
        classes = _choose_classes(np.unique(label).tolist(), names, options.classes)
    must = np.zeros(n, dtype=bool)
    must[find_samples(features, options.must_include, kind="must-include")] = True
    samples = Samples(
        features, label, names, classes, must,
        reason=np.full(n, KEPT, dtype=np.uint8), stays=np.arange(n), binned=np.ones(n, dtype=bool),
    )  # fmt: skip
    samples.settings["must_include"] = digest_of(must)
    return samples


def digest_of(mask: NDArray[np.bool_]) -> str | None:
    """For a header: the SHA-256 of the positions in an (N,) bool mask, as JSON; None where there are none."""
    digest, comma = hashlib.sha256(b"["), b""
    for start in range(0, len(mask), _DIGEST_ROWS):
        if positions := (start + np.flatnonzero(mask[start : start + _DIGEST_ROWS])).tolist():
            digest.update(comma + ",".join(map(str, positions)).encode())
            comma = b","
    digest.update(b"]")
    return digest.hexdigest() if comma else None


def find_samples(features: Features, ids: Iterable[SampleId], *, kind: str) -> list[int]:
    """The positions of samples of features; see `find_ids`."""
    keys = ((file.shard, file.read_columns(["key"])["key"].to_pylist()) for file in features)
    return find_ids(keys, ids, kind=f"{kind} ")


class NamesOfSamples:
    """SHARD/KEY of some samples, as Arrow text: a Python dictionary of many would take ten times as much.

    Args:
        features: the set.
        positions: of the samples, in any order.
    """

    def __init__(self, features: Features, positions: NDArray[np.int64]) -> None:
        self._positions = np.unique(positions)
        parts, first = [], 0
        for file in features:
            begin, end = np.searchsorted(self._positions, [first, first + file.n])
            if end > begin:
                keys = file.read_columns(["key"])["key"].take(self._positions[begin:end] - first)
                names = pc.binary_join_element_wise(f"{file.shard}/", keys.combine_chunks(), "")
                parts.append(names.cast(pa.large_string()))
            first += file.n
        # one array, as `take` would join the chunks anew in every call
        self._names = pa.chunked_array(parts, type=pa.large_string()).combine_chunks()

    def of(self, positions: NDArray[np.int64]) -> list[str]:
        """The names of samples that are among those, in the order of `positions`."""
        names: list[str] = self._names.take(pa.array(np.searchsorted(self._positions, positions))).to_pylist()
        return names


def name_samples(features: Features, positions: list[int]) -> dict[int, str]:
    """SHARD/KEY of a few samples, by position."""
    names = NamesOfSamples(features, np.array(positions, dtype=np.int64))
    return dict(zip(positions, names.of(np.array(positions, dtype=np.int64)), strict=True))


def keyed_draws(features: Features, seed: int, *, purpose: str = "rank") -> NDArray[np.uint64]:
    """(N,) uint64: a draw for each sample."""
    return features.column(
        lambda file: draws(
            seed, 0, base_name(file.shard), file.read_columns(["key"])["key"].to_pylist(), purpose=purpose
        ),
        np.uint64,
    )


def global_labels(features: Features) -> tuple[NDArray[np.int32], list[str] | None]:
    """(N,) int32 class of every sample over the whole set, and the names of string labels, sorted."""
    kinds = {file.names is None for file in features if file.n}
    if len(kinds) > 1:
        raise FeaturesError(f"{features.folder}: some shards have integer labels and some string labels")
    names, number = None, {}
    if kinds == {False}:
        names = sorted({name for file in features for name in file.names or []})
        number = {name: i for i, name in enumerate(names)}

    def labels_of(file: FeaturesFile) -> NDArray[np.int32]:
        label: NDArray[np.int32] = file.read_columns(["label"])["label"].to_numpy()
        if names is None or not file.n:
            return label
        known = np.array([number[name] for name in file.names or []], dtype=np.int32)
        if not 0 <= label.min() <= label.max() < len(known):
            raise FeaturesError(f"{file.path}: a label is not one of its {len(known)} names")
        return known[label]

    label = features.column(labels_of, np.int32)
    if len(label) and label.min() == NO_LABEL and label.max() != NO_LABEL:
        raise FeaturesError(
            f"{features.folder}: some samples have labels and some have none; give all of them one"
        )
    return label, names


def _choose_classes(
    present: list[int], names: list[str] | None, classes: Iterable[int | str] | None
) -> list[int]:
    """The classes `present` that are in `classes`, ascending."""
    if classes is None:
        return present
    by_name = {names[c] if names is not None else str(c): c for c in present}  # "7" is class 7 without names
    known, chosen = set(present), set()
    for c in listed("classes", classes):
        number = by_name.get(c) if isinstance(c, str) else c
        if isinstance(number, bool) or not isinstance(number, (int, np.integer)) or number not in known:
            raise ValueError(
                f"class {c!r} has no samples here; the classes are {shorten(list(by_name) if names else present, 200)}"
            )
        chosen.add(int(number))
    if not chosen:
        raise ValueError("classes must name one or more, got none")
    return sorted(chosen)
