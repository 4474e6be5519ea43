"""Writes and locks files and folders that may be at a URL; for local ones as `files` does.

A file for a URL is made in the temporary folder of this machine, and sent whole when it is complete.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from adq_wds import files
from adq_wds.errors import AdqError
from adq_wds.remote.store import RemoteFile
from adq_wds.remote.url_path import AnyPath, UrlPath, as_path


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A local path to write to, which takes the name `path` when the block succeeds: see `files.atomic_path`.

    Object stores show an object when its last byte has come, so what is at a URL is the old file or the new one.

    Raises:
        AdqError: the file cannot be written, or not be sent; names the path.
    """
    target = as_path(path)
    if isinstance(target, Path):
        with files.atomic_path(target) as partial:
            yield partial
        return
    with _errors("write", target), tempfile.TemporaryDirectory(prefix="adq-") as folder:
        partial = Path(folder) / "partial"
        partial.touch()
        yield partial
        target.put(partial)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` as UTF-8, whole or not at all."""
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")


def make_folder(path: str | os.PathLike[str]) -> AnyPath:
    """Make a folder; at a URL there is nothing to make, and its store is asked whether it answers.

    Raises:
        AdqError: the folder cannot be made or written into; no store or bucket is there, or it refuses.
    """
    folder = as_path(path)
    if isinstance(folder, Path):
        return files.make_folder(folder)
    with _errors("write into", folder):
        folder.check_writable()
        folder.is_dir()
    return folder


@contextlib.contextmanager
def lock(folder: str | os.PathLike[str], *, shared: bool = False) -> Iterator[None]:
    """Lock a folder for one job: see `files.lock`."""
    path = as_path(folder)
    with files.lock(path, shared=shared) if isinstance(path, Path) else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def local_copy(path: AnyPath) -> Iterator[Path]:
    """A file on this machine's disk, for libraries that open nothing else; what is at a URL is fetched whole.

    Raises:
        OSError: it cannot be fetched.
    """
    if isinstance(path, Path):
        yield path
        return
    with tempfile.NamedTemporaryFile(prefix="adq-", suffix=path.suffix) as file:
        for chunk in RemoteFile(os.fspath(path)).chunks():
            file.write(chunk)
        file.flush()
        yield Path(file.name)


def local_folder(folder: AnyPath | None) -> Path | None:
    """The folder for scratch files; None for one at a URL, which stands for this machine's temporary folder."""
    return folder if isinstance(folder, Path) else None


@contextlib.contextmanager
def _errors(what: str, path: UrlPath) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        where = f" (made in {tempfile.gettempdir()}; TMPDIR= names another folder)" if error.errno else ""
        raise AdqError(f"cannot {what} {path}: {reason}{where}") from error
