"""Leases: small files by which processes that share a folder divide its tasks, and see which of them live."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import stat
from pathlib import Path
from typing import Any, Protocol

from adq_wds.errors import AdqError, shorten
from adq_wds.files import canonical_json, sha256_text
from adq_wds.remote.leases import MAX_BYTES

FOLDER = ".leases"
"""The folder of the leases, in the folder that is shared."""

_HOLDER = re.compile("[0-9a-f]{16}")


class LeaseStore(Protocol):
    """The files of one folder, each of at most `MAX_BYTES` and known by its name. Errors are `AdqError`s."""

    def create(self, name: str, data: bytes) -> bool:
        """Write a file unless there is one of that name; whether it was written. Of several at once one wins."""

    def write(self, name: str, data: bytes) -> None:
        """Write a file, in the place of an earlier one."""

    def read(self, name: str) -> bytes | None:
        """At most `MAX_BYTES` + 1 bytes of a file; None where there is none."""

    def remove(self, name: str) -> None:
        """Remove a file, if there is one."""

    def names(self) -> list[str]:
        """The names of all files."""


class LocalLeases:
    """Leases in a folder of a file system that all processes see; made with the first, removed with the last."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __str__(self) -> str:
        return str(self._folder)

    def create(self, name: str, data: bytes) -> bool:
        """See `LeaseStore`."""
        try:
            self._open_and_write(name, os.O_EXCL, data)
        except FileExistsError:
            return False
        except OSError as error:
            raise self._error(name, error) from error
        return True

    def write(self, name: str, data: bytes) -> None:
        """See `LeaseStore`; a reader may see it empty, which is another content too."""
        try:
            self._open_and_write(name, os.O_TRUNC, data)
        except OSError as error:
            raise self._error(name, error) from error

    def _open_and_write(self, name: str, flag: int, data: bytes) -> None:
        for _ in range(100):
            try:
                handle = os.open(
                    self._folder / name, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | flag, 0o666
                )
            except FileNotFoundError:  # another process has removed the folder with its last lease
                with contextlib.suppress(FileExistsError):  # or its name is that of a link to nowhere
                    self._folder.mkdir()
                continue
            try:
                os.write(handle, data)
            finally:
                os.close(handle)
            return
        raise FileNotFoundError(f"{self._folder} is removed again and again")

    def read(self, name: str) -> bytes | None:
        """See `LeaseStore`; what is no plain file has no bytes."""
        try:
            handle = os.open(self._folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError:
            return b""
        try:
            return os.read(handle, MAX_BYTES + 1) if stat.S_ISREG(os.fstat(handle).st_mode) else b""
        finally:
            os.close(handle)

    def remove(self, name: str) -> None:
        """See `LeaseStore`."""
        try:
            (self._folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise self._error(name, error) from error
        with contextlib.suppress(OSError):
            self._folder.rmdir()  # fails while others are in it

    def names(self) -> list[str]:
        """See `LeaseStore`."""
        try:
            return os.listdir(self._folder)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise self._error("", error) from error

    def _error(self, name: str, error: OSError) -> AdqError:
        reason = os.strerror(error.errno) if error.errno else str(error)
        return AdqError(f"cannot keep leases in {self._folder / name}: {reason}")


def new_holder() -> str:
    """The random name of a process that takes leases."""
    return secrets.token_hex(8)


def task_file(task: str) -> str:
    """The name of a task's lease: legible, safe as a file name, and unique.

    >>> task_file("a/train 1.tar")
    'task-a-train-1.tar-14de0432ba8a.json'
    """
    return f"task-{re.sub('[^A-Za-z0-9._-]', '-', task)[:100]}-{sha256_text(task)[:12]}.json"


def process_file(holder: str) -> str:
    """The name of the file in which a process counts its heartbeats."""
    return f"process-{holder}.json"


def holder_of_file(name: str) -> str | None:
    """The holder whose heartbeats a file of this name has; None for other files."""
    holder = name.removeprefix("process-").removesuffix(".json")
    return holder if _HOLDER.fullmatch(holder) and name == process_file(holder) else None


def lease_bytes(content: dict[str, Any]) -> bytes:
    """A lease as it is stored."""
    return canonical_json(content).encode("utf-8", "backslashreplace")


def parse(data: bytes | None) -> dict[str, Any]:
    """What is written in a lease; nothing where it is missing, damaged or too long."""
    if data is None or len(data) > MAX_BYTES:
        return {}
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def holder_of(lease: dict[str, Any]) -> str | None:
    """The holder that a lease names; None where it names none."""
    holder = lease.get("holder")
    return holder if isinstance(holder, str) and _HOLDER.fullmatch(holder) else None


def shown(process: dict[str, Any]) -> str:
    """A process for people, by what it wrote of itself."""
    return f"pid {shorten(process.get('pid'), 20)} on {shorten(process.get('host'), 80)}"
