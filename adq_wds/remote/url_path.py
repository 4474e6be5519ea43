"""Paths that may be URLs: what the package uses of `pathlib.Path`, for a file or folder at a URL."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import total_ordering
from pathlib import Path, PurePosixPath
from typing import BinaryIO, TypeAlias, cast
from urllib.parse import unquote

from adq_wds.errors import AdqError
from adq_wds.remote.ranged_file import RangedFile
from adq_wds.remote.store import RemoteFile
from adq_wds.shards.names import is_pipe, is_url, without_secrets

MAX_BYTES = 1 << 26
"""Bytes of a file that `UrlPath.read_bytes` reads."""

_OTHERWISE = "reads otherwise in a URL: rename it, or write to a folder"


@dataclass(frozen=True)
class Size:
    """What `UrlPath.stat` says of a file: its bytes."""

    st_size: int


@total_ordering
class UrlPath(os.PathLike[str]):
    """A file or folder at a URL. Errors are `OSError`s, as those of `pathlib.Path`.

    A folder is there while it holds files, and is never made. `str` shows the URL without user, password and query;
    `os.fspath` gives all of it.
    """

    def __init__(self, url: str) -> None:
        address, mark, query = url.partition("?")
        scheme, _, path = address.partition("://")
        self._start, self._query = f"{scheme.lower()}://", mark + query
        host, *parts = path.split("/")
        self._parts = [host, *(part for part in parts if part)]

    def __fspath__(self) -> str:
        return self._start + "/".join(self._parts) + self._query

    def __str__(self) -> str:
        return without_secrets(os.fspath(self))

    def __repr__(self) -> str:
        return f"UrlPath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, UrlPath) and os.fspath(self) == os.fspath(other)

    def __lt__(self, other: UrlPath) -> bool:
        return os.fspath(self) < os.fspath(other)

    def __hash__(self) -> int:
        return hash(os.fspath(self))

    def _with(self, parts: list[str]) -> UrlPath:
        return UrlPath(self._start + "/".join(parts) + self._query)

    def __truediv__(self, name: str) -> UrlPath:
        return self._with([*self._parts, *name.split("/")])

    @property
    def name(self) -> str:
        """The last part."""
        return self._parts[-1] if len(self._parts) > 1 else ""

    @property
    def suffix(self) -> str:
        """The name's ending with its dot, or nothing."""
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> UrlPath:
        """The folder that it is in; of a bucket itself."""
        return self._with(self._parts[:-1] or self._parts) if len(self._parts) > 1 else self

    def with_suffix(self, suffix: str) -> UrlPath:
        """The same with another ending."""
        return self.parent / PurePosixPath(self.name).with_suffix(suffix).name

    def absolute(self) -> UrlPath:
        """Itself."""
        return self

    def exists(self) -> bool:
        """Whether there is a file, or a folder with files."""
        return self.is_file() or self.is_dir()

    def is_file(self) -> bool:
        """Whether there is a file."""
        try:
            self.stat()
        except FileNotFoundError:
            return False
        return True

    def is_dir(self) -> bool:
        """Whether it is a folder with files in it or below it."""
        return RemoteFile(os.fspath(self)).is_folder()

    def stat(self) -> Size:
        """The file's size in bytes, by one request."""
        return Size(RemoteFile(os.fspath(self)).stamp()["bytes"])

    def glob(self, pattern: str) -> list[UrlPath]:
        """The files of the folder whose name fits a pattern, sorted."""
        return [path for path in self.iterdir() if fnmatchcase(path.name, pattern)]

    def iterdir(self) -> Iterator[UrlPath]:
        """The files of the folder, sorted; not its folders."""
        return (self / name for name in RemoteFile(os.fspath(self)).names())

    def open(self, mode: str = "rb") -> BinaryIO:
        """The file, for reading by ranges."""
        assert mode == "rb"
        return cast(BinaryIO, RangedFile(os.fspath(self)))

    def read_bytes(self) -> bytes:
        """All of a small file."""
        with RangedFile(os.fspath(self)) as file:
            if file.size > MAX_BYTES:
                raise OSError(f"{file.size:,} bytes, at most {MAX_BYTES:,} are read at once")
            return file.read()

    def read_text(self, encoding: str = "utf-8") -> str:
        """All of a small file, as text."""
        return self.read_bytes().decode(encoding)

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove the file."""
        try:
            RemoteFile(os.fspath(self)).remove()
        except FileNotFoundError:
            if not missing_ok:
                raise

    def check_writable(self) -> None:
        """Raise `OSError` for a URL that is only read."""
        if self._start in ("http://", "https://") or self._query:
            raise OSError("an http URL is for reading: give a folder, or the URL of a store such as s3://")
        for part in self._parts:
            if "#" in part:  # what follows it is no part of a URL's path: all files would be one
                raise OSError(f"the name {part!r} {_OTHERWISE}")

    def put(self, path: Path) -> None:
        """Write a local file there: whole, or not at all."""
        self.check_writable()
        if unquote(self.name) != self.name:
            raise OSError(f"the name {self.name!r} {_OTHERWISE}")
        RemoteFile(os.fspath(self)).put(path)


AnyPath: TypeAlias = Path | UrlPath


def as_path(path: str | os.PathLike[str]) -> AnyPath:
    """A local path or a URL, to be used alike; a ``file://`` URL is a local path.

    Raises:
        AdqError: a command.

    >>> as_path("run/plan.parquet"), as_path("s3://me:s3cret@bucket/run")
    (PosixPath('run/plan.parquet'), UrlPath('s3://bucket/run'))
    """
    if isinstance(path, (Path, UrlPath)):
        return path
    text = os.fspath(path)
    if not is_url(text):
        return Path(text)
    if is_pipe(text):
        raise AdqError("a 'pipe:' command is no place for a file: give a path or a URL")
    if text.lower().startswith("file://"):
        return Path(unquote(text[7:].removeprefix("localhost")))
    return UrlPath(text)
