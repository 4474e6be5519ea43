"""Which reader does each shard of a stream get, which are open, and what is fetched ahead?"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import chain, repeat
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from adq_wds.core.order import LANES
from adq_wds.errors import AdqError
from adq_wds.reading.listing import Listing
from adq_wds.reading.local import LocalShard
from adq_wds.reading.local_many import MAX_BYTES, Group, Layouts, Samples, cut
from adq_wds.reading.places import HELD_SHARDS, Place, Places, each_place
from adq_wds.reading.ranged import Held, Kept, RangedShard
from adq_wds.reading.whole import FetchedShard
from adq_wds.remote.fetch import Fetch, comes_whole
from adq_wds.samples.fields import Sample
from adq_wds.shards.names import is_url

logger = logging.getLogger("adq_wds")

_SPARSE = 0.5  # below, reading around a sample fetches more that is dropped than kept
_THREADS = 32  # requests at one time; a block's ranges are several more
_ENOUGH = 16  # samples of a shard among those looked up together: for fewer, laying out costs what it saves
_AHEAD = 64  # samples fetched before they are asked for, each on its own
_AHEAD_CACHED = 512  # samples whose blocks are: in steady state few of them are new
_HELD_BLOCKS = 3 * LANES  # a block for each lane, what is on its way, and what was just left


class Reader(Protocol):
    """One open shard."""

    def expect(self, offset: int) -> None:
        """The sample at this byte will be read soon."""
        ...

    def read(self, offset: int, n_bytes: int, key: str, crc: int | None) -> Sample:
        """The sample of a span; see `SpanReader.parse`."""
        ...

    def close(self) -> None:
        """Give it back."""
        ...


class Readers:
    """The open shards of one pass over an epoch.

    Args:
        listing: what the shards hold, and where they are.
        fetch: how what is not a plain local tar is got.
        layouts: of small samples, kept from epoch to epoch.
        epoch: >= 0.
        verify: compare samples with the listing's crc32.

    Attributes:
        held: open ones, by number.
    """

    def __init__(self, listing: Listing, fetch: Fetch, layouts: Layouts, epoch: int, *, verify: bool) -> None:
        self._listing, self._fetch, self._layouts = listing, fetch, layouts
        self._epoch, self._verify = epoch, verify
        self.held: dict[int, Reader] = {}
        self._fields: dict[bytes, str] = {}
        self._cached = fetch.cache is not None
        self._blocks = Held(_HELD_BLOCKS if self._cached else 4 * _AHEAD)
        self._pool: ThreadPoolExecutor | None = None
        self._distant = [is_url(url) or comes_whole(url) for url in listing.urls]
        self._said = False

    def open(self, shard: int) -> Reader:
        """One more; the one opened first is closed when they are many."""
        if len(self.held) == HELD_SHARDS:
            self.held.pop(next(iter(self.held))).close()
        self.held[shard] = self._made(shard)
        return self.held[shard]

    def each(self, blocks: Iterator[Places]) -> Iterator[Place]:
        """The place of each sample in the order of its position, announced to its reader some time before it is given out."""
        places = chain.from_iterable(map(self._each, blocks))
        return self._announced(places) if any(self._distant) else places

    def read(self, places: Iterable[Place]) -> list[Sample]:
        """The samples; see `SpanReader.parse`, which reads all but those laid out and as they must be."""
        held, opened, urls = self.held, self.open, self._listing.urls
        samples: list[Sample] = []
        for shard, offset, n_bytes, key, crc, fields, cuts, data in places:
            if fields is not None and data is not None:
                sample = cut(data, urls[shard], key, crc, fields, cuts)
                if sample is not None:
                    samples.append(sample)
                    continue
            samples.append((held.get(shard) or opened(shard)).read(offset, n_bytes, key, crc))
        return samples

    def close(self) -> None:
        """Close all, and stop fetching."""
        for reader in self.held.values():
            reader.close()
        self.held.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None

    def _each(self, places: Places) -> Iterator[Place]:
        by_shard, numbers, keys, at = places
        shard = np.empty(len(keys), np.int64)
        for number, _, start, stop in by_shard:
            shard[start:stop] = number
        columns = shard[at].tolist(), *numbers[:2, at].tolist(), keys[at].tolist()
        nothing = repeat(None), repeat(()), repeat(None)
        if not self._verify:
            return each_place(zip(*columns, repeat(None), *nothing, strict=False))
        columns = (*columns, numbers[2, at].tolist())
        groups, data = self._read_ahead(places)
        row = numbers[3]
        laid = self._layouts.find(Samples(groups, row, numbers[1], keys, data)) if groups else None
        if laid is None:
            return each_place(zip(*columns, *nothing, strict=False))
        cuts = zip(*laid.cuts[:, at].tolist(), strict=True)
        columns = (*columns, laid.fields[at].tolist(), cuts, data[at].tolist())
        return each_place(zip(*columns, strict=True))

    def _read_ahead(self, places: Places) -> tuple[list[Group], NDArray[np.object_]]:
        """The small samples of local shards of which enough is read now: which, and the bytes of each."""
        groups: list[Group] = []
        offset, n_bytes = places.numbers[:2]
        small = (n_bytes > 0) & (n_bytes <= MAX_BYTES) & (offset >= 0)
        data = np.full(len(small), None, dtype=object)
        for shard, n_listed, start, stop in places.groups:
            here = start + np.flatnonzero(small[start:stop])
            if len(here) >= _ENOUGH and not self._distant[shard]:
                with suppress(AdqError):  # said when the first of its samples is read
                    reader = self.held.get(shard) or self.open(shard)
                    assert isinstance(reader, LocalShard)  # as no distant shard is
                    data[here] = reader.read_spans(offset[here].tolist(), n_bytes[here].tolist())
                    groups.append(Group(shard, n_listed, reader.stamp, start, stop))
        return groups, data

    def _announced(self, places: Iterator[Place]) -> Iterator[Place]:
        waiting: deque[Place] = deque()
        most = _AHEAD_CACHED if self._cached else _AHEAD
        for place in places:
            if self._distant[place.shard]:
                (self.held.get(place.shard) or self.open(place.shard)).expect(place.byte_offset)
            waiting.append(place)
            if len(waiting) > most:
                yield waiting.popleft()
        yield from waiting

    def _made(self, shard: int) -> Reader:
        listing, fetch, fields = self._listing, self._fetch, self._fields
        url, name = listing.urls[shard], listing.names[shard]
        if not self._distant[shard]:
            return LocalShard(url, name, fields, fetch=fetch, sparse=listing.share(shard) < _SPARSE)
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="adq-fetch")
        if comes_whole(url) or (listing.scanned and self._cached):
            return FetchedShard(url, name, fields, fetch=fetch, pool=self._pool)
        spans, rows = listing.rows(shard, self._epoch)
        rows = np.sort(rows)
        kept = Kept(spans.byte_offset[rows], spans.n_bytes[rows], grouped=self._cached)
        if not self._said:
            self._say(name, kept, int(spans.byte_offset[-1] + spans.n_bytes[-1]) if len(spans) else 0)
        return RangedShard(url, name, fields, kept=kept, fetch=fetch, pool=self._pool, held=self._blocks)

    def _say(self, name: str, kept: Kept, n_bytes: int) -> None:
        """How remote shards are read, once."""
        self._said = True
        logger.info(
            "ShardDataset: remote shards are read by range, %s: of %s %s of %s bytes in %s requests",
            "into the cache" if self._cached else "a request for each sample, without a cache",
            name,
            f"{kept.n_asked:,}",
            f"{n_bytes:,}",
            f"{kept.n_requests:,}",
        )
