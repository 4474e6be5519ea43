"""How do files come to be? Whole or not at all, hashed, and written by one job at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from adq_wds.errors import AdqError


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write to that becomes `path` when the block ends well, and vanishes when it does not.

    The bytes go to a hidden file beside `path`, are flushed to the disk, and take the name with one
    `os.replace`: a reader sees the old file or the new one, never a part. A job that is killed leaves at
    most its hidden file, which the next writer of the same path removes.

    Args:
        path: the final name; its folder must exist.

    Raises:
        AdqError: the folder is missing or read-only, `path` is a folder or a circle of links, or the disk is full;
            names the path.
    """
    path = Path(path)
    if path.is_dir():
        raise AdqError(f"cannot write {path}: it is a folder; give a file name")
    if path.is_symlink():
        path = Path(os.path.realpath(path))  # os.replace would put a file in the link's place
        if path.is_symlink():
            raise AdqError(f"cannot write {path}: a link that leads back to itself; remove it")
    partial = path.with_name(f".{path.name}.partial")
    try:
        with contextlib.suppress(FileNotFoundError):
            partial.unlink()
        yield partial
        with partial.open("rb") as handle:
            os.fsync(handle.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError):
            raise AdqError(f"cannot write {path}: {_reason(error)}") from error
        raise


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut (a no-op where folders cannot be opened)."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _reason(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"no space left ({os.strerror(error.errno)}); the old file, if any, is intact"
    return os.strerror(error.errno) if error.errno else str(error)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` as UTF-8, whole or not at all."""
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")


def make_folder(path: str | os.PathLike[str]) -> Path:
    """Make a folder and its parents, and check that files can be made in it.

    Raises:
        AdqError: a part of the path is a file, or the folder is read-only.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AdqError(f"cannot make the folder {path}: {_reason(error)}") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise AdqError(f"cannot write into the folder {path}: permission denied")
    return path


def canonical_json(value: Any) -> str:
    """The one JSON text of a value: keys sorted, no spaces, UTF-8, no NaN.

    >>> canonical_json({"b": 1, "a": [1.5, None]})
    '{"a":[1.5,null],"b":1}'
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def sha256_text(text: str) -> str:
    """Hexadecimal SHA-256 of a text's UTF-8 bytes."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


@contextlib.contextmanager
def lock(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Hold `folder` for one job: a second one is refused, with the holder's name.

    The operating system drops the lock when its process ends, however it ends, so nothing is ever stale;
    the text in ``.adq.lock`` only says who holds it. The file goes with the lock.

    Raises:
        AdqError: another process holds the folder; names its pid, host, command and start.
    """
    path = Path(folder) / ".adq.lock"
    handle = _locked(path)
    with handle:
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        command = Path(sys.argv[0]).name if sys.argv and sys.argv[0] else "python"
        handle.truncate(0)
        handle.write(f"pid {os.getpid()} on {socket.gethostname()} ({command}, since {started})")
        handle.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # while it is held: `_locked` sees to those who wait with it open


def _locked(path: Path) -> TextIO:
    """The open lock file, locked, and still the one that `path` names."""
    while True:
        try:
            handle = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - the caller closes it, and the lock with it
        except OSError as error:
            raise AdqError(f"cannot lock {path.parent}: {_reason(error)}") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            with handle:
                handle.seek(0)
                holder = handle.read(500).strip() or "a process that has not said its name"
            raise AdqError(
                f"{path.parent} is in use by {holder}; wait for it, or choose another folder"
            ) from error
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle.fileno()), path.stat()):
                return handle
        handle.close()  # its holder removed it between our two calls
