"""Reads and writes one URL through fsspec."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path, PurePosixPath
from typing import Any

from adq_wds.remote.backend import N_AT_ONCE, Access, Answer, Checks, NoRanges, Range, Stamp, Trouble, explain

_CHUNK = 4 << 20
_WITHOUT_FOLDERS = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "memory"})


def installed(scheme: str) -> bool:
    """Whether fsspec's file system for such URLs and its dependencies are installed."""
    import fsspec

    try:
        fsspec.get_filesystem_class(scheme)
    except (ImportError, ValueError):
        return False
    return True


class Fsspec:
    """One URL through fsspec's file system for it."""

    def __init__(self, url: str, access: Access) -> None:
        import fsspec

        options, timeout = dict(access.storage_options), access.timeout
        self._checks = Checks(timeout)
        self._scheme = url.partition("://")[0].lower()
        self._http = self._scheme in ("http", "https")
        if self._http:
            import aiohttp

            options["client_kwargs"] = {
                "timeout": aiohttp.ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout),
                "auto_decompress": False,  # a packed answer is refused, or unpacked within limits (`expand`)
                **dict(options.get("client_kwargs", {})),
            }
        with _our_errors():
            self._fs, self._path = fsspec.core.url_to_fs(url, **options)

    def stamp(self) -> Stamp:
        """See `Backend`."""
        with _our_errors():
            self._fs.invalidate_cache()  # others write too
            info = self._fs.info(self._path)
        known = isinstance(info.get("size"), int)
        return {"bytes": info["size"] if known else 0, "mtime_ns": _date(info) if known else 0}

    def ranges(self, ranges: Sequence[Range]) -> list[bytes]:
        """See `Backend`."""
        with _our_errors():
            if self._http:
                from fsspec.asyn import sync

                answers: list[bytes] = sync(self._fs.loop, self._all_by_http, ranges)
                return answers
            paths, (starts, ends) = [self._path] * len(ranges), map(list, zip(*ranges, strict=True))
            return list(map(bytes, self._fs.cat_ranges(paths, starts, ends, on_error="raise")))

    async def _all_by_http(self, ranges: Sequence[Range]) -> list[bytes]:
        """Send the requests ourselves: fsspec reads any amount into memory, at any speed."""
        turns = asyncio.Semaphore(N_AT_ONCE)

        async def one(byte_range: Range) -> bytes:
            async with turns:
                return await self._by_http(byte_range)

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(byte_range)) for byte_range in ranges]
        return [task.result() for task in tasks]

    async def _by_http(self, byte_range: Range) -> bytes:
        start, end = byte_range
        options = dict(self._fs.kwargs)
        headers = {**options.pop("headers", {}), "Range": f"bytes={start}-{end - 1}"}
        headers["Accept-Encoding"] = "identity"
        url, answer = self._fs.encode_url(self._path), Answer(byte_range)
        session = await self._fs.set_session()
        try:
            async with (
                asyncio.timeout(self._checks.limit(end - start)),
                session.get(url, headers=headers, **options) as response,
            ):
                response.raise_for_status()
                if response.status != 206:
                    raise NoRanges
                where, _, size = response.headers.get("Content-Range", "").partition("/")
                if not where.startswith(f"bytes {start}-"):
                    raise Trouble("the server answers with other bytes than those asked for")
                self._checks.version(int(size) if size.isdigit() else None, response.headers.get("ETag"))
                if response.headers.get("Content-Encoding", "identity") != "identity":
                    text = "the server packs its answers (Content-Encoding): let it send shards as they are"
                    raise Trouble(text)
                async for chunk in response.content.iter_any():
                    answer.add(chunk)
        except TimeoutError:
            if not answer.n_bytes:
                raise
            raise self._checks.too_slow(answer.n_bytes) from None
        return answer.all()

    def chunks(self) -> Iterator[bytes]:
        """See `Backend`."""
        block_size = 0 if self._http else None
        with _our_errors(), self._fs.open(self._path, "rb", block_size=block_size) as file:
            yield from self._checks.timed(iter(lambda: file.read(_CHUNK), b""))

    def put(self, path: Path) -> None:
        """See `Backend`; by a transaction, which is fsspec's word for a file whole or not at all."""
        with _our_errors():
            if self._scheme not in _WITHOUT_FOLDERS:
                self._fs.makedirs(self._fs._parent(self._path), exist_ok=True)
            with (
                self._fs.transaction,
                self._fs.open(self._path, "wb") as out,
                path.open("rb") as file,
            ):
                shutil.copyfileobj(file, out, _CHUNK)

    def remove(self) -> None:
        """See `Backend`."""
        with _our_errors():
            self._fs.rm_file(self._path)

    def names(self) -> list[str]:
        """See `Backend`."""
        return [PurePosixPath(entry["name"]).name for entry in self._entries() if entry.get("type") == "file"]

    def is_folder(self) -> bool:
        """See `Backend`."""
        entries = self._entries()
        return len(entries) > 1 or any(entry["name"].strip("/") != self._path.strip("/") for entry in entries)

    def _entries(self) -> list[dict[str, Any]]:
        """What is directly below the path; a file is an entry of itself, and what is missing has none."""
        with _our_errors():
            self._fs.invalidate_cache()
            try:
                return list(self._fs.ls(self._path, detail=True))
            except FileNotFoundError:
                return []


def _date(info: dict[str, Any]) -> int:
    """A file's modification time in nanoseconds; 0 where the file system gives none."""
    for name in ("mtime", "LastModified", "last_modified", "updated", "created", "Last-Modified"):
        value = info.get(name)
        if name == "Last-Modified" and isinstance(value, str):
            with suppress(ValueError):
                value = parsedate_to_datetime(value)
        if isinstance(value, datetime):
            value = value.timestamp()
        if isinstance(value, int | float):
            return round(value * 1e9)
    return 0


@contextmanager
def _our_errors() -> Iterator[None]:
    """Turn errors of any file system into `Trouble`."""
    try:
        yield
    except (NoRanges, Trouble, GeneratorExit):
        raise
    except ExceptionGroup as group:  # of requests made together: the first that failed
        with _our_errors():
            raise group.exceptions[0] from None
    except Exception as error:  # file systems raise what the libraries below them raise
        cause = error.__cause__  # a FileNotFoundError may stand for any failed request
        if isinstance(error, FileNotFoundError) and (isinstance(cause, OSError) or hasattr(cause, "status")):
            raise _trouble(cause or error) from None
        raise _trouble(error) from None


def _trouble(error: BaseException) -> Trouble:
    kind = type(error).__name__
    status = getattr(error, "status", None)
    return explain(
        error,
        status if isinstance(status, int) else None,
        late=isinstance(error, TimeoutError),
        unconnected="Connector" in kind or isinstance(error, ConnectionRefusedError),
        broken=isinstance(error, ConnectionError) or "Payload" in kind or "Disconnected" in kind,
    )
