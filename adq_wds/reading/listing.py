"""Which samples may an epoch read, and where do they lie? As a plan says, or all that the shards hold."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from adq_wds.errors import PlanError, ShardError, shorten
from adq_wds.remote.fetch import Fetch, comes_whole
from adq_wds.shards.names import ShardNames, base_name, is_url, shard_names, shown_url
from adq_wds.tables.plan import Plan
from adq_wds.tables.spans import Spans, check_source, is_empty, no_samples, read_index, scan_spans, warn_empty

logger = logging.getLogger("adq_wds")


class Listing(Protocol):
    """The shards of a stream, sorted by name, and what an epoch keeps of each.

    Attributes:
        hash: changes with anything that changes the order.
        names: S shard names, sorted.
        urls: S paths, URLs or commands, as the user wrote them.
        checked: whether `rows` knows each sample's crc32.
        scanned: whether the shards were read from end to end to make it.
        n_total: T, samples in any epoch.
    """

    @property
    def hash(self) -> str: ...
    @property
    def names(self) -> list[str]: ...
    @property
    def urls(self) -> list[str]: ...
    @property
    def checked(self) -> bool: ...
    @property
    def scanned(self) -> bool: ...
    @property
    def n_total(self) -> int: ...
    def counts(self, epoch: int) -> NDArray[np.int64]:
        """(S,) int64, samples that an epoch keeps of each shard."""
        ...

    def share(self, shard: int) -> float:
        """The part of a shard's samples that an epoch keeps."""
        ...

    def rows(self, shard: int, epoch: int) -> tuple[Spans, NDArray[np.int64]]:
        """Where the samples of a shard lie, and which of them an epoch keeps, ascending: (k,) int64."""
        ...


@dataclass(frozen=True)
class Planned:
    """What a plan keeps; with `fresh`, the next samples of each bin in every epoch."""

    plan: Plan
    urls: list[str]
    fresh: bool
    checked: bool = True
    scanned: bool = False

    @property
    def hash(self) -> str:
        """The plan's."""
        return self.plan.hash

    @property
    def names(self) -> list[str]:
        """The plan's."""
        return self.plan.shards

    @property
    def n_total(self) -> int:
        """What the plan keeps; fresh draws keep as many."""
        return self.plan.n_kept

    def counts(self, epoch: int) -> NDArray[np.int64]:
        """See `Listing`; with fresh draws every shard's rows are read for it."""
        if self.fresh:
            kept = [int(self.plan.kept_in(name, epoch).sum()) for name in self.names]
        else:
            kept = [entry["kept"] for entry in self.plan.header["shards"]]
        return np.array(kept, dtype=np.int64)

    def share(self, shard: int) -> float:
        """See `Listing`."""
        entry = self.plan.header["shards"][shard]
        return float(entry["kept"] / max(1, entry["n"]))

    def rows(self, shard: int, epoch: int) -> tuple[Spans, NDArray[np.int64]]:
        """See `Listing`."""
        rows = self.plan.shard(self.names[shard])
        kept = self.plan.kept_in(rows.name, epoch) if self.fresh else rows.kept
        return rows.spans, np.flatnonzero(kept)


@dataclass(frozen=True)
class Everything:
    """All samples, from an index or a scan."""

    hash: str
    names: list[str]
    urls: list[str]
    spans: list[Spans]
    checked: bool
    scanned: bool

    @property
    def n_total(self) -> int:
        """All."""
        return sum(len(spans) for spans in self.spans)

    def counts(self, epoch: int) -> NDArray[np.int64]:
        """See `Listing`."""
        return np.array([len(spans) for spans in self.spans], dtype=np.int64)

    def share(self, shard: int) -> float:
        """All."""
        return 1.0

    def rows(self, shard: int, epoch: int) -> tuple[Spans, NDArray[np.int64]]:
        """See `Listing`."""
        return self.spans[shard], np.arange(len(self.spans[shard]))


def planned(paths: Sequence[str], plan: Plan, *, root: str | None, fresh: bool, fetch: Fetch) -> Planned:
    """The plan's samples in the shards at `paths`.

    Raises:
        PlanError: a shard of the plan is not among the paths, or one with samples not in the plan.
    """
    found = _by_name(paths, plan.names(root=root), fetch)
    missing = [name for name in plan.shards if name not in found]
    if missing:
        raise PlanError(
            f"shard {shorten(missing[0])} of the plan is not among the {len(paths)} shards given ({len(missing)} "
            "missing in all); name them all"
        )
    return Planned(plan, [found[name] for name in plan.shards], fresh)


def everything(
    paths: Sequence[str], index: str | os.PathLike[str] | None, *, root: str | None, fetch: Fetch
) -> Everything:
    """All samples of the shards at `paths`, from an index, else by walking the tars' headers now.

    Remote shards are held against an index as their samples are read, not here.

    Raises:
        ShardError: a shard is damaged, not in the index, or changed since; or the index is damaged.
    """
    checked = True
    if index is None:
        names = shard_names(paths)
        distant = [path for path in paths if is_url(path) or comes_whole(path)]
        if any(map(is_url, distant)):
            logger.warning(
                "ShardDataset: neither plan nor index, so %d remote shards are fetched whole to find their samples; "
                "make an index (adq index)",
                len(distant),
            )
        scan = partial(_scan_fetched, fetch=fetch) if distant else partial(scan_spans, checksums=False)
        listed = {name: scan(path, shard=name) for name, path in zip(names, paths, strict=True)}
        found = dict(zip(names, paths, strict=True))
        checked = bool(distant)
    else:
        indexed = read_index(index)
        try:
            found = _by_name(paths, ShardNames(indexed, root=root), fetch)
        except PlanError as error:
            raise ShardError(f"index {os.fspath(index)}: {error}".replace("the plan", "it")) from None
        for name, path in found.items():
            if not is_url(path):
                check_source(path, name, indexed[name])
        listed = {name: indexed[name].spans for name in found}
    order = sorted(found)
    spans = [listed[name] for name in order]
    if not any(map(len, spans)):
        raise no_samples(len(paths))
    urls = [found[name] for name in order]
    return Everything(_hash(order, spans), order, urls, spans, checked, scanned=index is None)


def _by_name(paths: Sequence[str], names: ShardNames, fetch: Fetch) -> dict[str, str]:
    """The path of each shard; one that is not listed and holds no sample is left out."""
    found: dict[str, str] = {}
    for path in paths:
        try:
            name = names.find(path)
        except PlanError:
            if not is_empty(path, fetch):
                raise
            warn_empty(base_name(path))
            continue
        if name in found:
            raise PlanError(
                f"shards {shown_url(found[name])} and {shown_url(path)} both match {name!r} of the plan; name one"
            )
        found[name] = path
    return found


def _scan_fetched(path: str, *, shard: str, fetch: Fetch) -> Spans:
    """Where a shard's samples lie, with their crc32; what is damaged in the cache is fetched once more."""
    try:
        return scan_spans(path, shard=shard, fetch=fetch)
    except ShardError:
        if fetch.cache is None or not (is_url(path) or comes_whole(path)):
            raise
    fetch.forget(path, shard=shard)
    return scan_spans(path, shard=shard, fetch=fetch)


def _hash(names: Sequence[str], spans: Sequence[Spans]) -> str:
    """Over what the order and the reading depend on."""
    digest = hashlib.sha256(b"adq_wds.index\n")
    for name, found in zip(names, spans, strict=True):
        for part in (name.encode(), "\n".join(found.keys).encode()):
            digest.update(len(part).to_bytes(8, "little") + part)
        for column in (found.byte_offset, found.n_bytes):
            digest.update(np.ascontiguousarray(column, dtype="<i8").tobytes())
    return digest.hexdigest()
