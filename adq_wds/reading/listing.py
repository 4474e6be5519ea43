"""Lists the samples that an epoch may read: those of a plan, or all in the shards."""

from __future__ import annotations

import hashlib
import logging
import os
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adq_wds.errors import PlanError, ShardError, shorten
from adq_wds.reading.places import ShardPlaces
from adq_wds.reading.schedule import StreamDraws
from adq_wds.remote.fetch import Fetch, comes_whole
from adq_wds.shards.names import ShardNames, base_name, is_url, shard_names, shown_url
from adq_wds.tables.beside import IndexesBeside
from adq_wds.tables.index import check_source, read_index
from adq_wds.tables.plan import CACHED_SHARDS, Plan
from adq_wds.tables.spans import Spans, is_empty, no_samples, scan_spans, warn_empty

logger = logging.getLogger("adq_wds")


class Listing(ABC):
    """The shards of a stream, and the samples that an epoch keeps of each. Its cache is not pickled.

    Attributes:
        hash: changes with anything that changes the order.
        names: S shard names, sorted.
        urls: S paths, URLs or commands, as the user wrote them.
        checked: whether each sample's crc32 is known.
        scanned: whether the shards were read from end to end to make it.
        fresh: whether epochs keep different samples.
        draws: in place of the plan's fresh draws; None elsewhere.
    """

    draws: StreamDraws | None = None

    def __init__(
        self,
        hash: str,
        names: list[str],
        urls: list[str],
        *,
        checked: bool = True,
        scanned: bool = False,
        fresh: bool = False,
    ) -> None:
        self.hash, self.names, self.urls = hash, names, urls
        self.checked, self.scanned, self.fresh = checked, scanned, fresh
        self._cached_places: OrderedDict[tuple[int, int, int], ShardPlaces] = OrderedDict()

    @abstractmethod
    def n_total(self, epoch: int) -> int:
        """T, samples in an epoch."""

    @abstractmethod
    def counts(self, epoch: int) -> NDArray[np.int64]:
        """(S,) int64, samples that an epoch keeps of each shard."""

    @abstractmethod
    def share(self, shard: int) -> float:
        """The part of a shard's samples that an epoch keeps."""

    @abstractmethod
    def spans(self, shard: int, epoch: int) -> Spans:
        """The samples of a shard that an epoch keeps, in the shard's order."""

    def places(self, shard: int, epoch: int) -> ShardPlaces:
        """The places of the samples that an epoch keeps of a shard; the last `CACHED_SHARDS` are cached."""
        which = shard, epoch if self.fresh else 0, self.draws.generation if self.draws else 0
        if which not in self._cached_places:
            self._cached_places[which] = ShardPlaces.from_spans(self.spans(shard, epoch))
            if len(self._cached_places) > CACHED_SHARDS:
                self._cached_places.popitem(last=False)
        return self._cached_places[which]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cached_places": OrderedDict()}


class Planned(Listing):
    """The samples of a plan; with `fresh`, the next samples of each bin in every epoch, by `draws` or the plan's own."""

    def __init__(self, plan: Plan, urls: list[str], *, fresh: bool, draws: StreamDraws | None = None) -> None:
        super().__init__(plan.hash, plan.shards, urls, fresh=fresh)
        self.plan, self.draws = plan, draws

    def n_total(self, epoch: int) -> int:
        """See `Listing`."""
        return self.draws.n_total(epoch) if self.draws else self.plan.n_kept

    def counts(self, epoch: int) -> NDArray[np.int64]:
        """See `Listing`; with fresh draws every shard's rows are read for it."""
        if not self.fresh:
            return self.plan.shard_kept
        kept = [int(self.plan.kept_in(name, epoch, self.draws).sum()) for name in self.names]
        return np.array(kept, dtype=np.int64)

    def share(self, shard: int) -> float:
        """See `Listing`."""
        return int(self.plan.shard_kept[shard]) / max(1, int(self.plan.shard_sizes[shard]))

    def spans(self, shard: int, epoch: int) -> Spans:
        """See `Listing`."""
        rows = self.plan.shard(self.names[shard], hold=self.fresh)
        kept = self.plan.kept_in(rows.name, epoch, self.draws) if self.fresh else rows.kept
        return rows.spans.take(np.flatnonzero(kept))


class Everything(Listing):
    """All samples, from an index or a scan: spans of S shards."""

    def __init__(
        self, names: list[str], urls: list[str], spans: list[Spans], *, checked: bool, scanned: bool
    ) -> None:
        super().__init__(_hash(names, spans), names, urls, checked=checked, scanned=scanned)
        self._spans = spans

    def n_total(self, epoch: int) -> int:
        """See `Listing`."""
        return sum(map(len, self._spans))

    def counts(self, epoch: int) -> NDArray[np.int64]:
        """See `Listing`."""
        return np.array([len(spans) for spans in self._spans], dtype=np.int64)

    def share(self, shard: int) -> float:
        """All."""
        return 1.0

    def spans(self, shard: int, epoch: int) -> Spans:
        """See `Listing`."""
        return self._spans[shard]


def planned(
    paths: Sequence[str],
    plan: Plan,
    *,
    root: str | None,
    fresh: bool,
    fetch: Fetch,
    draws: StreamDraws | None = None,
) -> Planned:
    """The plan's samples in the shards at `paths`.

    Raises:
        PlanError: a shard of the plan is not among the paths, or a path with samples is not in the plan.
    """
    path_of = _by_name(paths, plan.names(root=root), fetch)
    missing = [name for name in plan.shards if name not in path_of]
    if missing:
        raise PlanError(
            f"shard {shorten(missing[0])} of the plan is not among the {len(paths)} shards given ({len(missing)} "
            "missing in all); name them all"
        )
    return Planned(plan, [path_of[name] for name in plan.shards], fresh=fresh, draws=draws)


def everything(
    paths: Sequence[str], index: str | os.PathLike[str] | None, *, root: str | None, fetch: Fetch
) -> Everything:
    """All samples of the shards at `paths`: from an index, from those beside the shards, or from their headers, read now.

    Remote shards are compared with an index when their samples are read, not here.

    Raises:
        ShardError: a shard is damaged, not in the index, or changed since; or the index is damaged.
    """
    scanned = False
    if index is None:
        path_of = dict(zip(shard_names(paths), paths, strict=True))
        with IndexesBeside(fetch) as beside:
            known = {name: beside.spans(path, shard=name) for name, path in path_of.items()}
        listed = {name: Spans.without_checksums(spans) for name, spans in known.items() if spans is not None}
        scanned = not listed
        listed |= _scan({name: path for name, path in path_of.items() if name not in listed}, fetch)
        checked = scanned and any(map(_is_fetched, paths))
    else:
        indexed = read_index(index)
        try:
            path_of = _by_name(paths, ShardNames(indexed, root=root), fetch)
        except PlanError as error:
            raise ShardError(f"index {os.fspath(index)}: {error}".replace("the plan", "it")) from None
        for name, path in path_of.items():
            if not is_url(path):
                check_source(path, name, indexed[name])
        listed = {name: indexed[name].spans for name in path_of}
        checked = all(indexed[name].checked for name in path_of)
    names = sorted(path_of)
    if not any(map(len, listed.values())):
        raise no_samples(len(paths))
    urls, spans = [path_of[name] for name in names], [listed[name] for name in names]
    return Everything(names, urls, spans, checked=checked, scanned=scanned)


def _by_name(paths: Sequence[str], names: ShardNames, fetch: Fetch) -> dict[str, str]:
    """The path of each shard; unlisted shards without samples are left out."""
    path_of: dict[str, str] = {}
    for path in paths:
        try:
            name = names.find(path)
        except PlanError:
            if not is_empty(path, fetch):
                raise
            warn_empty(base_name(path))
            continue
        if name in path_of:
            raise PlanError(
                f"shards {shown_url(path_of[name])} and {shown_url(path)} both match {name!r} of the plan; name one"
            )
        path_of[name] = path
    return path_of


def _is_fetched(path: str) -> bool:
    return is_url(path) or comes_whole(path)


def _scan(path_of: dict[str, str], fetch: Fetch) -> dict[str, Spans]:
    """The spans of the samples of shards, with crc32 where any of these is fetched whole."""
    distant = [path for path in path_of.values() if _is_fetched(path)]
    if any(map(is_url, distant)):
        logger.warning(
            "ShardDataset: neither plan nor index, so %d remote shards are fetched whole to find their samples; "
            "make an index (adq index)",
            len(distant),
        )
    scan = partial(_scan_fetched, fetch=fetch) if distant else partial(scan_spans, checksums=False)
    return {name: scan(path, shard=name) for name, path in path_of.items()}


def _scan_fetched(path: str, *, shard: str, fetch: Fetch) -> Spans:
    """The spans of a shard's samples with crc32; a damaged copy in the cache is fetched once more."""
    try:
        return scan_spans(path, shard=shard, fetch=fetch)
    except ShardError:
        if fetch.cache is None or not _is_fetched(path):
            raise
    fetch.forget(path, shard=shard)
    return scan_spans(path, shard=shard, fetch=fetch)


def _hash(names: Sequence[str], spans: Sequence[Spans]) -> str:
    """A hash of all that order and reading depend on."""
    digest = hashlib.sha256(b"adq_wds.index\n")
    for name, rows in zip(names, spans, strict=True):
        for part in (name.encode(), "\n".join(rows.keys).encode()):
            digest.update(len(part).to_bytes(8, "little") + part)
        for column in (rows.byte_offset, rows.n_bytes):
            digest.update(np.ascontiguousarray(column, dtype="<i8").tobytes())
    return digest.hexdigest()
