"""How is a shard read that can only be had as a whole? Fetched and unpacked ahead of its use, then read like any."""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor

from adq_wds.reading.local import LocalShard, WrongBytes
from adq_wds.remote.fetch import Fetch
from adq_wds.samples.fields import Sample

logger = logging.getLogger("adq_wds")


class FetchedShard:
    """One packed shard, command's output, or shard of a server that knows no ranges; begun to be fetched when made.

    Args:
        url: see `LocalShard`.
        name: see `LocalShard`.
        fields: see `LocalShard`.
        fetch: see `LocalShard`.
        pool: threads that fetch.
    """

    def __init__(
        self, url: str, name: str, fields: dict[bytes, str], *, fetch: Fetch, pool: ThreadPoolExecutor
    ) -> None:
        self._url, self._name, self._fields, self._fetch, self._pool = url, name, fields, fetch, pool
        self._again = fetch.cache is not None  # a cached copy may be damaged: then it is fetched once more
        self._local = self._begin()

    def _begin(self) -> Future[LocalShard]:
        return self._pool.submit(LocalShard, self._url, self._name, self._fields, fetch=self._fetch)

    def close(self) -> None:
        """Give it back, when it has come if it is on its way: nobody waits for that."""
        self._local.cancel()
        self._local.add_done_callback(_give_back)

    def expect(self, offset: int) -> None:
        """Nothing: all of it is on its way."""

    def read(self, offset: int, n_bytes: int, key: str, crc: int | None) -> Sample:
        """The sample of a span; see `SpanReader.parse`."""
        try:
            return self._local.result().read(offset, n_bytes, key, crc)
        except WrongBytes as error:
            if not self._again:
                raise
            logger.debug("%s; fetched again", error)
        self._again = False
        self.close()
        self._fetch.forget(self._url, shard=self._name)
        self._local = self._begin()
        return self._local.result().read(offset, n_bytes, key, crc)


def _give_back(local: Future[LocalShard]) -> None:
    if not local.cancelled() and local.exception() is None:
        local.result().close()
