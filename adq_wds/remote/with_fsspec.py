"""How does fsspec read one URL?"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any

from adq_wds.remote.backend import N_AT_ONCE, Access, Answer, NoRanges, Pace, Range, Stamp, Trouble, Version

_CHUNK = 4 << 20


def installed(scheme: str) -> bool:
    """Whether fsspec has a file system for such URLs, with what that needs."""
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

        options = dict(access.storage_options)
        self._timeout, self._version = access.timeout, Version()
        self._http = url.lower().startswith(("http://", "https://"))
        if self._http:
            import aiohttp

            patience = aiohttp.ClientTimeout(
                total=None, sock_connect=access.timeout, sock_read=access.timeout
            )
            options["client_kwargs"] = {
                "timeout": patience,
                "auto_decompress": False,  # a packed answer is refused, or unpacked within limits (`expand`)
                **dict(options.get("client_kwargs", {})),
            }
        with _words():
            self._fs, self._path = fsspec.core.url_to_fs(url, **options)
        self._info: dict[str, Any] | None = None

    def _known(self) -> dict[str, Any]:
        if self._info is None:
            with _words():
                self._info = dict(self._fs.info(self._path))
        return self._info

    def stamp(self) -> Stamp:
        """See `Backend`."""
        info = self._known()
        if not isinstance(info.get("size"), int):
            return {"bytes": 0, "mtime_ns": 0}
        return {"bytes": info["size"], "mtime_ns": _date(info)}

    def ranges(self, ranges: Sequence[Range]) -> list[bytes]:
        """See `Backend`."""
        with _words():
            if self._http:
                from fsspec.asyn import sync

                answers: list[bytes] = sync(self._fs.loop, self._all_by_http, ranges)
                return answers
            starts, ends = zip(*ranges, strict=True)
            found = self._fs.cat_ranges(
                [self._path] * len(ranges), list(starts), list(ends), on_error="raise"
            )
        return [bytes(data) for data in found]

    async def _all_by_http(self, ranges: Sequence[Range]) -> list[bytes]:
        """Our own requests: fsspec's take all that a server sends into memory, however slowly it comes."""
        turns = asyncio.Semaphore(N_AT_ONCE)

        async def one(asked: Range) -> bytes:
            async with turns:
                return await self._by_http(asked)

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(asked)) for asked in ranges]
        return [task.result() for task in tasks]

    async def _by_http(self, asked: Range) -> bytes:
        start, end = asked
        options = dict(self._fs.kwargs)
        headers = {**options.pop("headers", {}), "Range": f"bytes={start}-{end - 1}"}
        answer, pace = Answer(start, end), Pace(self._timeout)
        session = await self._fs.set_session()
        try:
            async with asyncio.timeout(pace.limit(end - start)):
                url = self._fs.encode_url(self._path)
                async with session.get(
                    url, headers={**headers, "Accept-Encoding": "identity"}, **options
                ) as got:
                    got.raise_for_status()
                    if got.status != 206:
                        raise NoRanges
                    where, _, size = got.headers.get("Content-Range", "").partition("/")
                    if not where.startswith(f"bytes {start}-"):
                        raise Trouble("the server answers with other bytes than those asked for")
                    self._version.see(int(size) if size.isdigit() else None, got.headers.get("ETag"))
                    if got.headers.get("Content-Encoding", "identity") != "identity":
                        raise Trouble(
                            "the server packs its answers (Content-Encoding): let it send shards as they are"
                        )
                    async for chunk in got.content.iter_any():
                        pace.n_bytes += len(chunk)
                        answer.add(chunk)
        except TimeoutError:
            if not pace.n_bytes:
                raise
            raise pace.trouble() from None
        return answer.all()

    def chunks(self) -> Iterator[bytes]:
        """See `Backend`."""
        with _words(), self._fs.open(self._path, "rb", block_size=0 if self._http else None) as file:
            yield from Pace(self._timeout).timed(iter(lambda: file.read(_CHUNK), b""), len)


def _date(info: dict[str, Any]) -> int:
    """When a file was changed last, in nanoseconds, as the file systems say it; 0 where they do not."""
    for name in ("mtime", "LastModified", "last_modified", "updated", "created"):
        value = info.get(name)
        if isinstance(value, datetime):
            return round(value.timestamp() * 1e9)
        if isinstance(value, int | float):
            return round(value * 1e9)
    if isinstance(info.get("Last-Modified"), str):
        with suppress(ValueError):
            return round(parsedate_to_datetime(info["Last-Modified"]).timestamp() * 1e9)
    return 0


@contextmanager
def _words() -> Iterator[None]:
    """Errors of any file system in our words."""
    try:
        yield
    except (NoRanges, Trouble, GeneratorExit):
        raise
    except ExceptionGroup as group:  # of requests made together: the first that failed
        with _words():
            raise group.exceptions[0] from None
    except Exception as error:  # file systems raise what the libraries below them raise
        cause = error.__cause__
        nobody = isinstance(error, FileNotFoundError) and (
            isinstance(cause, OSError) or hasattr(cause, "status")
        )
        raise _trouble(cause if nobody and cause is not None else error) from None


def _trouble(error: BaseException) -> Trouble:
    kind = type(error).__name__
    status = getattr(error, "status", None)
    if isinstance(error, FileNotFoundError) or status == 404:
        return Trouble("not found (404): check its URL")
    if isinstance(error, PermissionError) or status in (401, 403):
        return Trouble(f"refused ({status or kind}): check credentials, or that the URL has not expired")
    if isinstance(status, int):
        return Trouble(f"the server fails ({status}): try again later", again=status >= 500)
    if isinstance(error, TimeoutError):
        return Trouble("no answer in time (timeout=): the server stalls")
    if "Connector" in kind or isinstance(error, ConnectionRefusedError):
        return Trouble("no connection: check host and port")
    broken = isinstance(error, ConnectionError) or "Payload" in kind or "Disconnected" in kind
    return Trouble(f"the answer broke off ({kind})" if broken else f"cannot be read ({kind})", again=broken)
