"""Fetches and unpacks a whole shard ahead of use, then reads it like a local one."""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor

from adq_wds.reading.local import LocalShard, WrongBytes
from adq_wds.reading.places import Place
from adq_wds.remote.fetch import Fetch
from adq_wds.samples.fields import Sample

logger = logging.getLogger("adq_wds")


class FetchedShard:
    """A packed shard, a command's output, or a shard of a server without ranges; the fetch starts at construction.

    Args:
        url: see `LocalShard`.
        name: see `LocalShard`.
        fetch: see `LocalShard`.
        pool: threads that fetch.
    """

    def __init__(self, url: str, name: str, *, fetch: Fetch, pool: ThreadPoolExecutor) -> None:
        self._url, self._name, self._fetch, self._pool = url, name, fetch, pool
        self._again = fetch.cache is not None  # a cached copy may be damaged: then it is fetched once more
        self._local = self._start_fetch()

    def _start_fetch(self) -> Future[LocalShard]:
        return self._pool.submit(LocalShard, self._url, self._name, fetch=self._fetch)

    def close(self) -> None:
        """Cancel the fetch, or close the file once it has arrived; does not wait."""
        self._local.cancel()
        self._local.add_done_callback(_close)

    def expect(self, offset: int) -> None:
        """Does nothing: the whole shard is being fetched."""

    def read_sample(self, place: Place) -> Sample:
        """The sample at a place; see `SpanReader.parse`."""
        try:
            return self._local.result().read_sample(place)
        except WrongBytes as error:
            if not self._again:
                raise
            logger.debug("%s; fetched again", error)
        self._again = False
        self.close()
        self._fetch.forget(self._url, shard=self._name)
        self._local = self._start_fetch()
        return self._local.result().read_sample(place)


def _close(local: Future[LocalShard]) -> None:
    if not local.cancelled() and local.exception() is None:
        local.result().close()
