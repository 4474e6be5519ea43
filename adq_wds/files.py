"""Writes files whole or not at all, hashes them, and keeps a folder to one job at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from adq_wds.errors import AdqError

_LIKE_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")
_MAX_WRITERS = 8  # of one path at one time and machine; more wait


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str], *, durable: bool = True) -> Iterator[Path]:
    """A path to write to: renamed to `path` when the block succeeds, removed when it fails.

    The bytes go to a hidden file beside `path`, are flushed to the disk, and take the name with one
    `os.replace`: a reader sees the old file or the new one, never a part. Every writer has a hidden file of its
    own, so several processes may write one path: the last one wins. A writer that is killed leaves at most its
    hidden file, which the next writer of the same path on the same machine uses or removes.

    Args:
        path: the final name; its folder must exist.
        durable: the file survives a power cut. Not needed for one that no later job trusts; flushing takes time.

    Raises:
        AdqError: the folder is missing or read-only, `path` is a folder or a circle of links, or the disk is full;
            names the path.
    """
    path = _local(path)
    if path.is_dir():
        raise AdqError(f"cannot write {path}: it is a folder; give a file name")
    if path.is_symlink():
        path = Path(os.path.realpath(path))  # os.replace would put a file in the link's place
        if path.is_symlink():
            raise AdqError(f"cannot write {path}: a link that leads back to itself; remove it")
    try:
        with _partial_of(path) as (partial, handle):
            try:
                yield partial
                if durable:
                    os.fsync(handle)
                os.replace(partial, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    partial.unlink()
                raise
        if durable:
            _sync_folder(path.parent)
    except OSError as error:
        raise AdqError(f"cannot write {path}: {_reason(error)}") from error


def _partials_of(path: Path) -> list[Path]:
    """The hidden files that writers of `path` on this machine may use, one each.

    Each machine has its own names, since not every shared file system shares locks between machines.
    """
    machine = sha256_text(socket.gethostname())[:6]
    name = os.fsdecode(os.fsencode(path.name)[:200])  # a file's name has at most 255 bytes
    return [path.with_name(f".{name}.{machine}-{i}.partial") for i in range(_MAX_WRITERS)]


@contextlib.contextmanager
def _partial_of(path: Path) -> Iterator[tuple[Path, int]]:
    """An empty hidden file beside `path` and its descriptor, locked for as long as its writer lives.

    Takes the first unlocked one, even a dead writer's, and removes the files of other dead writers.
    When as many writers live as there are names, the next waits for one of them.
    """
    partials = _partials_of(path)
    handle = None
    while handle is None:
        partial = partials.pop(0)
        handle = open_locked(partial, wait=not partials)
    try:
        for other in partials:
            remove_left_over(other)
        os.ftruncate(handle, 0)
        yield partial, handle
    finally:
        os.close(handle)


def open_locked(path: Path, *, wait: bool, mode: int = 0o666) -> int | None:
    """The descriptor of a file, created if missing, locked and still of that name; None where another process
    locks it."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, mode)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if os.path.samestat(os.fstat(handle), path.stat()):
                return handle
        except FileNotFoundError:
            pass  # its holder has just renamed or removed it
        except BlockingIOError:
            os.close(handle)
            return None
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def remove_left_over(partial: Path) -> None:
    """Remove the hidden file of a killed writer; a living one has locked it."""
    if partial.exists() and (left_over := open_locked(partial, wait=False)) is not None:
        partial.unlink()
        os.close(left_over)


def _sync_folder(folder: Path) -> None:
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


def _local(path: str | os.PathLike[str]) -> Path:
    """The path; `AdqError` for a URL, even one that `Path` has taken a slash from."""
    if scheme := _LIKE_URL.match(os.fspath(path)):
        raise AdqError(
            f"cannot write this to a {scheme[1]}:// URL: give a local path (features, plans, codebooks, indexes and "
            "shards may go to a URL, as text)"
        )
    return Path(path)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` as UTF-8, whole or not at all."""
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")


def make_folder(path: str | os.PathLike[str]) -> Path:
    """Make a folder and its parents, and check that files can be made in it.

    Raises:
        AdqError: a part of the path is a file, or the folder is read-only.
    """
    path = _local(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AdqError(f"cannot make the folder {path}: {_reason(error)}") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise AdqError(f"cannot write into the folder {path}: permission denied")
    return path


def canonical_json(value: Any) -> str:
    """The canonical JSON text of a value: keys sorted, no spaces, UTF-8, no NaN.

    >>> canonical_json({"b": 1, "a": [1.5, None]})
    '{"a":[1.5,null],"b":1}'
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def sha256_text(text: str) -> str:
    """Hexadecimal SHA-256 of a text's UTF-8 bytes."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


@contextlib.contextmanager
def lock(folder: str | os.PathLike[str], *, shared: bool = False) -> Iterator[None]:
    """Lock `folder` for one job; a second job is refused, with the holder's name.

    The operating system drops the lock when its process ends, however it ends, so no lock is ever stale; the
    text in ``.adq.lock`` only names the holder. The file is removed with the lock.

    Args:
        folder: that is locked.
        shared: let others share it that lock it alike, and refuse those that do not.

    Raises:
        AdqError: another process has locked the folder; names its pid, host, command and start.
    """
    path = Path(folder) / ".adq.lock"
    try:
        handle = _open_shared(path) if shared else open_locked(path, wait=False)
    except OSError as error:
        raise AdqError(f"cannot lock {path.parent}: {_reason(error)}") from error
    if handle is None:
        holder = ""
        with contextlib.suppress(FileNotFoundError):
            holder = path.read_text(encoding="utf-8", errors="replace").strip()
        raise AdqError(
            f"{path.parent} is in use by {holder or 'an unknown process'}; wait for it, or "
            "choose another folder"
        )
    try:
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        command = Path(sys.argv[0]).name if sys.argv and sys.argv[0] else "python"
        holder = f"pid {os.getpid()} on {socket.gethostname()} ({command}, since {started})"
        try:
            os.ftruncate(handle, 0)
            with open(handle, "wb", closefd=False) as file:
                file.write(holder.encode("utf-8", "backslashreplace"))
        except OSError as error:
            raise AdqError(f"cannot write {path}: {_reason(error)}") from error
        yield
    finally:
        # while it is locked: a waiting process that has it open then sees another file of that name
        if not shared or _is_alone(handle):
            path.unlink(missing_ok=True)
        os.close(handle)


def _open_shared(path: Path) -> int | None:
    """The descriptor of a file, created if missing, locked together with others and still of that name; None where
    a process locks it alone, for longer than the last of some others does that remove it."""
    for _ in range(20):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(handle), path.stat()):
                return handle
        except FileNotFoundError:
            pass  # its last holder has just removed it
        except BlockingIOError:
            time.sleep(0.05)
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
    return None


def _is_alone(handle: int) -> bool:
    """Whether no other process locks the file; if so, it is locked for this one alone."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
