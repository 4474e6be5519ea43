"""Reads only the kept bytes of a remote shard: by range, ahead of use, through the cache if there is one.

Without a cache each sample is one request. With one, neighbouring kept samples form a block: its ranges, merged
across small gaps, are requested together and stored as one file, which all workers and ranks of the machine share.
The order of an epoch takes block after block (`core.order.row_order`), so few are in use at a time. A server without
ranges shows that in its first response, and its shards are fetched whole.
"""

from __future__ import annotations

import logging
import weakref
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from adq_wds.core.order import blocks_of
from adq_wds.reading.local import SpanReader, WrongBytes
from adq_wds.reading.places import Place
from adq_wds.reading.whole import FetchedShard
from adq_wds.remote.backend import NoRanges, Range
from adq_wds.remote.fetch import Fetch
from adq_wds.samples.fields import Sample
from adq_wds.shards.shard_file import ShardFile

logger = logging.getLogger("adq_wds")

MAX_GAP = 16 << 10
"""Bytes between kept samples that are read along: a further request costs more than these."""

_Block = bytes | ShardFile


class Kept:
    """The offsets of a shard's kept samples, and the ranges to request.

    Args:
        byte_offset: (n,) int64, ascending.
        n_bytes: (n,) int64.
        grouped: whether samples share blocks; else each is its own.
    """

    def __init__(self, byte_offset: NDArray[np.int64], n_bytes: NDArray[np.int64], *, grouped: bool) -> None:
        block = blocks_of(n_bytes) if grouped else np.arange(len(n_bytes))
        ends = byte_offset + n_bytes
        gap = byte_offset[1:] - ends[:-1]
        new_range = np.ones(len(block), dtype=bool)
        new_range[1:] = (np.diff(block) > 0) | (gap > (MAX_GAP if grouped else -1))
        first = np.flatnonzero(new_range)
        self._starts = byte_offset[first]
        self._ends = np.append(ends[first[1:] - 1], ends[-1:])
        length = self._ends - self._starts
        n_before = np.cumsum(length) - length  # bytes of all earlier ranges
        range_block = block[first]
        self._first_range = np.searchsorted(range_block, np.arange(block[-1] + 2 if len(block) else 1))
        row_range = np.cumsum(new_range) - 1
        in_block = n_before[row_range] - n_before[self._first_range[block]]
        place = in_block + byte_offset - self._starts[row_range]
        self._place = dict(
            zip(byte_offset.tolist(), zip(block.tolist(), place.tolist(), strict=True), strict=True)
        )

    @property
    def n_requests(self) -> int:
        """Requests needed to read everything."""
        return len(self._starts)

    @property
    def n_bytes_requested(self) -> int:
        """Bytes requested to read everything."""
        return int((self._ends - self._starts).sum())

    def find(self, offset: int) -> tuple[int, int]:
        """The block of a sample, and its offset in the block's bytes."""
        block_and_offset: tuple[int, int] = self._place[offset]
        return block_and_offset

    def ranges(self, block: int) -> list[Range]:
        """The ranges of a block."""
        part = slice(*self._first_range[block : block + 2].tolist())
        return list(zip(self._starts[part].tolist(), self._ends[part].tolist(), strict=True))


class RangedShard(SpanReader):
    """A remote shard, read by ranges of its kept samples.

    Args:
        url: see `SpanReader`.
        name: see `SpanReader`.
        kept: the offsets of the samples that this epoch keeps.
        fetch: options of fetching, and the cache.
        pool: threads that fetch ahead.
        blocks: the blocks in use of all shards of a stream; filled here.
    """

    def __init__(
        self,
        url: str,
        name: str,
        *,
        kept: Kept,
        fetch: Fetch,
        pool: ThreadPoolExecutor,
        blocks: Blocks,
    ) -> None:
        super().__init__(url, name)
        self._kept, self._fetch, self._pool, self._blocks = kept, fetch, pool, blocks
        self._remote = fetch.remote(url, shard=name)
        self._whole: FetchedShard | None = None

    def close(self) -> None:
        """Remove its blocks."""
        self._blocks.forget(self._url)
        if self._whole is not None:
            self._whole.close()

    def expect(self, offset: int) -> None:
        """Start fetching the sample at an offset, which will be read soon."""
        if self._whole is None:
            block, _ = self._kept.find(offset)
            if not self._blocks.has((self._url, block)):
                self._blocks.put((self._url, block), self._pool.submit(self._get, block))

    def read_sample(self, place: Place) -> Sample:
        """The sample at a place; see `SpanReader.parse`. Wrong bytes are fetched once more."""
        for left in (1, 0):
            if self._whole is not None:
                break
            block, start = self._kept.find(place.byte_offset)
            try:
                data = self._block_of(place.byte_offset, block)
                stop = start + place.n_bytes
                return self.parse(
                    data[start:stop] if isinstance(data, bytes) else data.read_some(start, place.n_bytes),
                    place,
                )
            except NoRanges:
                self._take_whole()
            except WrongBytes:
                if not left:
                    raise
                self._blocks.drop((self._url, block))
                if self._fetch.cache is not None:
                    self._fetch.cache.drop(self._key(block))
        assert self._whole is not None
        return self._whole.read_sample(place)

    def _block_of(self, offset: int, block: int) -> _Block:
        self.expect(offset)
        data = self._blocks.get((self._url, block))
        if self._fetch.cache is None:
            self._blocks.drop((self._url, block))  # nobody else's
        return data

    def _take_whole(self) -> None:
        logger.warning(
            "shard %s: its server gives whole files only, so all of it is fetched%s",
            self._name,
            "" if self._fetch.cache is not None else ", by every worker: give cache= to do it once",
        )
        self._whole = FetchedShard(self._url, self._name, fetch=self._fetch, pool=self._pool)

    def _key(self, block: int) -> str:
        return f"ranges\n{self._url}\n{self._kept.ranges(block)}"

    def _get(self, block: int) -> _Block:
        ranges = self._kept.ranges(block)
        if self._fetch.cache is None:
            return b"".join(self._remote.read_ranges(ranges))

        def fill(file: BinaryIO) -> None:
            file.writelines(self._remote.read_ranges(ranges))

        file = self._fetch.cache.open(self._key(block), fill)
        block_file = ShardFile(file, self._name)
        weakref.finalize(block_file, file.close)
        return block_file


BlockId = tuple[str, int]
"""A shard's URL and the number of a block in it."""


class Blocks:
    """Blocks being fetched or in use.

    Args:
        most: how many; the least recently used is dropped.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._blocks: OrderedDict[BlockId, Future[_Block]] = OrderedDict()

    def has(self, block_id: BlockId) -> bool:
        """Whether the block is fetched or being fetched."""
        return block_id in self._blocks

    def put(self, block_id: BlockId, block: Future[_Block]) -> None:
        """Add a block."""
        self._blocks[block_id] = block
        while len(self._blocks) > self._most:
            self._blocks.popitem(last=False)[1].cancel()

    def get(self, block_id: BlockId) -> _Block:
        """The bytes of a block in use; waits for its fetch."""
        self._blocks.move_to_end(block_id)
        return self._blocks[block_id].result()

    def drop(self, block_id: BlockId) -> None:
        """Remove a block."""
        if block_id in self._blocks:
            self._blocks.pop(block_id).cancel()

    def forget(self, url: str) -> None:
        """Remove all blocks of a shard."""
        for block_id in [block_id for block_id in self._blocks if block_id[0] == url]:
            self.drop(block_id)
