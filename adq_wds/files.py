"""How do files come to be? Whole or not at all, hashed, and written by one job at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import secrets
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from adq_wds.errors import AdqError


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write to that becomes `path` when the block ends well, and vanishes when it does not.

    The bytes go to a hidden file beside `path`, are flushed to the disk, and take the name with one
    `os.replace`: a reader sees the old file or the new one, never a part. Every writer has a hidden file of its
    own, so several processes may write one path: the last one wins. A writer that is killed leaves at most its
    hidden file, which the next writer of the same path on the same machine removes.

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
    try:
        _remove_partials_of_the_dead(path)
        with _partial_of(path) as (partial, handle):
            try:
                yield partial
                os.fsync(handle)
                os.replace(partial, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    partial.unlink()
                raise
        sync_folder(path.parent)
    except OSError as error:
        raise AdqError(f"cannot write {path}: {_reason(error)}") from error


def _partial_prefix(path: Path) -> str:
    """How the hidden files begin that writers of `path` on this machine make.

    Other machines' are left alone: not every shared file system tells one machine of another's locks.
    """
    machine = sha256_text(socket.gethostname())[:6]
    name = os.fsdecode(os.fsencode(path.name)[:200])  # a file's name has at most 255 bytes
    return f".{name}.{machine}-"


@contextlib.contextmanager
def _partial_of(path: Path) -> Iterator[tuple[Path, int]]:
    """A new hidden file beside `path` and its descriptor, locked for as long as its writer lives."""
    while True:
        partial = path.with_name(f"{_partial_prefix(path)}{secrets.token_hex(6)}.partial")
        handle = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            with contextlib.suppress(OSError):  # without locks here, nobody removes partials either
                fcntl.flock(handle, fcntl.LOCK_EX)
            if not partial.exists():  # taken for a dead writer's before it was locked
                continue
            yield partial, handle
        finally:
            os.close(handle)
        return


def _remove_partials_of_the_dead(path: Path) -> None:
    """Remove what killed writers of `path` left; a living one holds the lock of its file."""
    prefix = _partial_prefix(path)
    for name in os.listdir(path.parent):
        if name.startswith(prefix) and name.endswith(".partial"):
            with contextlib.suppress(OSError), open(path.with_name(name), "rb") as partial:
                fcntl.flock(partial, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(partial.name)


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
    try:
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        command = Path(sys.argv[0]).name if sys.argv and sys.argv[0] else "python"
        holder = f"pid {os.getpid()} on {socket.gethostname()} ({command}, since {started})"
        try:
            os.ftruncate(handle, 0)
            with open(handle, "w", encoding="utf-8", errors="backslashreplace", closefd=False) as text:
                text.write(holder)
        except OSError as error:
            raise AdqError(f"cannot write {path}: {_reason(error)}") from error
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: `_locked` sees to those who wait with it open
        os.close(handle)


def _locked(path: Path) -> int:
    """The descriptor of the lock file, locked, and still the one that `path` names."""
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise AdqError(f"cannot lock {path.parent}: {_reason(error)}") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(handle), path.stat()):
                return handle
        except FileNotFoundError:
            pass  # its holder removed it between our two calls
        except OSError as error:
            holder = os.pread(handle, 500, 0).decode("utf-8", "replace").strip()
            os.close(handle)
            raise AdqError(
                f"{path.parent} is in use by {holder or 'a process that has not said its name'}; wait for it, or "
                "choose another folder"
            ) from error
        os.close(handle)
