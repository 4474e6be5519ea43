"""Keeps a folder at a URL to one job, by the leases that commands share it by."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache

from adq_wds.engines.lease import FOLDER, new_holder
from adq_wds.engines.participant import BEAT, Participant
from adq_wds.remote.leases import NoLeases, RemoteLeases
from adq_wds.remote.url_path import UrlPath, as_path

logger = logging.getLogger("adq_wds")


@contextmanager
def alone_at_url(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Keep other jobs out of a folder at a URL; local folders have a lock of the operating system.

    A store without conditional writes keeps nobody out, which a warning says once.

    Raises:
        AdqError: another job works in the folder, or the store refuses leases.
    """
    path = as_path(folder)
    with ExitStack() as close:
        if isinstance(path, UrlPath):
            try:
                leases = RemoteLeases(path / FOLDER)
                close.enter_context(Participant(leases, f"alone {new_holder()}", beat=BEAT))
            except NoLeases as error:
                _warn_once(f"no lock keeps two jobs apart here, so start one at a time: {error}")
        yield


@cache
def _warn_once(text: str) -> None:
    logger.warning("%s", text)
