"""Opens each shard with the reader for its kind, keeps few open, and fetches remote samples ahead."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Protocol

from adq_wds.core.order import LANES
from adq_wds.reading.listing import Listing
from adq_wds.reading.local import LocalShard
from adq_wds.reading.places import Place, are_neighbours
from adq_wds.reading.ranged import Blocks, Kept, RangedShard
from adq_wds.reading.whole import FetchedShard
from adq_wds.remote.fetch import Fetch, comes_whole
from adq_wds.samples.fields import Sample
from adq_wds.shards.names import is_url
from adq_wds.tables.plan import CACHED_SHARDS

logger = logging.getLogger("adq_wds")

_SPARSE = 0.5  # below, reading around a sample fetches more that is dropped than kept
_THREADS = 32  # requests at one time; a block's ranges are several more
_AHEAD = 64  # samples fetched ahead, each on its own
_AHEAD_CACHED = 512  # samples whose blocks are: in steady state few of them are new
_MAX_BLOCKS = 3 * LANES  # a block for each lane, what is on its way, and what was just left


class Reader(Protocol):
    """One open shard."""

    def expect(self, offset: int) -> None:
        """The sample at this byte will be read soon."""

    def read_sample(self, place: Place) -> Sample:
        """The sample at a place; see `SpanReader.parse`."""

    def close(self) -> None:
        """Close it."""


class Readers:
    """The open shards of one pass over an epoch.

    Args:
        listing: the shards, and their samples.
        fetch: fetches shards that are no plain local tars.
        epoch: >= 0.
    """

    def __init__(self, listing: Listing, fetch: Fetch, epoch: int) -> None:
        self._listing, self._fetch, self._epoch = listing, fetch, epoch
        self._readers: dict[int, Reader] = {}
        self._cached = fetch.cache is not None
        self._blocks = Blocks(_MAX_BLOCKS if self._cached else 4 * _AHEAD)
        self._pool: ThreadPoolExecutor | None = None
        self._distant = [is_url(url) or comes_whole(url) for url in listing.urls]
        self._logged = False

    def _open(self, shard: int) -> Reader:
        """Open a shard; close the one opened first when there are too many."""
        if len(self._readers) == CACHED_SHARDS:
            self._readers.pop(next(iter(self._readers))).close()
        self._readers[shard] = reader = self._made(shard)
        return reader

    def each(self, blocks: Iterator[Iterator[Place]]) -> Iterator[Place]:
        """The places in some blocks; each is announced to its reader some samples ahead."""
        places = chain.from_iterable(blocks)
        return self._announced(places) if any(self._distant) else places

    def read_samples(self, places: Sequence[Place]) -> list[Sample]:
        """The sample at each place; see `SpanReader.parse`."""
        readers, open_ = self._readers, self._open
        if are_neighbours(places):
            reader = readers.get(places[0][0]) or open_(places[0][0])
            if isinstance(reader, LocalShard):
                return reader.read_neighbours(places)
        return [(readers.get(place[0]) or open_(place[0])).read_sample(place) for place in places]

    def close(self) -> None:
        """Close all, and stop fetching."""
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None

    def _announced(self, places: Iterator[Place]) -> Iterator[Place]:
        waiting: deque[Place] = deque()
        most = _AHEAD_CACHED if self._cached else _AHEAD
        for place in places:
            if self._distant[place.shard]:
                (self._readers.get(place.shard) or self._open(place.shard)).expect(place.byte_offset)
            waiting.append(place)
            if len(waiting) > most:
                yield waiting.popleft()
        yield from waiting

    def _made(self, shard: int) -> Reader:
        listing, fetch = self._listing, self._fetch
        url, name = listing.urls[shard], listing.names[shard]
        if not self._distant[shard]:
            return LocalShard(url, name, fetch=fetch, sparse=listing.share(shard) < _SPARSE)
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="adq-fetch")
        if comes_whole(url) or (listing.scanned and self._cached):
            return FetchedShard(url, name, fetch=fetch, pool=self._pool)
        kept = Kept(*listing.places(shard, self._epoch).numbers[:2], grouped=self._cached)
        if not self._logged:
            self._logged = True
            logger.info(
                "ShardDataset: remote shards are read by range, %s: of %s %s bytes in %s requests",
                "into the cache" if self._cached else "a request for each sample, without a cache",
                name,
                f"{kept.n_bytes_requested:,}",
                f"{kept.n_requests:,}",
            )
        return RangedShard(url, name, kept=kept, fetch=fetch, pool=self._pool, blocks=self._blocks)
