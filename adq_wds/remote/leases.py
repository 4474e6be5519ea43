"""Keeps the leases of a folder at a URL: each is created by a conditional write, which one of several processes wins."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

from adq_wds.errors import AdqError
from adq_wds.remote.backend import Access, NoRanges, Trouble
from adq_wds.remote.url_path import UrlPath
from adq_wds.remote.with_obstore import SCHEMES, Obstore, usable

MAX_BYTES = 4096
"""Bytes of a lease, at most; of a longer file no more are read, and it is no lease."""

_NO_CREATE = (
    "it creates no file only where there is none (a conditional write), so that two processes could hold one lease: "
    "share a folder of a file system, or take another engine"
)


class NoLeases(AdqError):  # noqa: N818 - it says what is
    """A store that cannot keep leases, as it does not write on a condition."""


class RemoteLeases:
    """The files of a folder in an object store; see `LeaseStore`.

    Args:
        folder: its URL; made with the first file, gone with the last.

    Raises:
        AdqError: a store without conditional writes.
    """

    def __init__(self, folder: UrlPath) -> None:
        self._folder = folder
        scheme = str(folder).partition("://")[0]
        if scheme not in SCHEMES or scheme.startswith("http"):
            raise NoLeases(f"cannot keep leases in {folder}: {_NO_CREATE}")
        if importlib.util.find_spec("obstore") is None:
            raise NoLeases(
                f"cannot keep leases in {folder}: conditional writes need pip install 'adq-wds[cloud]'"
            )

    def __str__(self) -> str:
        return str(self._folder)

    def create(self, name: str, data: bytes) -> bool:
        """See `LeaseStore`."""
        with self._errors(name):
            return self._file(name).create(data)

    def write(self, name: str, data: bytes) -> None:
        """See `LeaseStore`."""
        with self._errors(name):
            self._file(name).overwrite(data)

    def read(self, name: str) -> bytes | None:
        """See `LeaseStore`."""
        data = b""
        with self._errors(name):
            try:
                for chunk in self._file(name).chunks():
                    data += chunk
                    if len(data) > MAX_BYTES:
                        break
            except Trouble as trouble:
                if trouble.missing:
                    return None
                raise
        return data[: MAX_BYTES + 1]

    def remove(self, name: str) -> None:
        """See `LeaseStore`."""
        with self._errors(name):
            try:
                self._file(name).remove()
            except Trouble as trouble:
                if not trouble.missing:
                    raise

    def names(self) -> list[str]:
        """See `LeaseStore`."""
        with self._errors(""):
            return self._file("").names()

    def _file(self, name: str) -> Obstore:
        if not usable():
            raise Trouble("this process was forked from one that used the store: start it anew")
        return Obstore(os.fspath(self._folder / name), Access())

    @contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        try:
            yield
        except NotImplementedError:
            raise NoLeases(f"cannot keep leases in {self}: {_NO_CREATE}") from None
        except (Trouble, NoRanges) as trouble:
            raise AdqError(f"cannot keep leases in {self._folder / name}: {trouble}") from None
