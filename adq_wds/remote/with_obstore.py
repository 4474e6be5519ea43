"""How does obstore read one URL?"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from urllib.parse import unquote

from adq_wds.remote.backend import N_AT_ONCE, Access, Answer, NoRanges, Pace, Range, Stamp, Trouble, Version

SCHEMES = frozenset({"http", "https", "s3", "s3a", "gs", "az", "azure", "adl", "abfs", "abfss"})
_STATUS = re.compile(r"status code: (\d{3})")
_first_process: list[
    int
] = []  # whose threads obstore runs on: a process forked from it has none and would hang


def usable() -> bool:
    """Whether this process may use obstore: not when it was forked from one that did."""
    return not _first_process or _first_process[0] == os.getpid()


class Obstore:
    """One URL through obstore, which tries again on busy servers (5xx, 429) for `timeout` seconds."""

    def __init__(self, url: str, access: Access) -> None:
        import obstore

        if not _first_process:
            _first_process.append(os.getpid())
        self._obstore, self._timeout, self._version = obstore, access.timeout, Version()
        url, headers = _without_user(url)
        options = dict(access.storage_options)
        client: dict[str, Any] = {
            "read_timeout": timedelta(seconds=access.timeout),
            "connect_timeout": timedelta(seconds=access.timeout),
            "timeout": timedelta(days=1),  # of a whole answer: `Pace` says when one has stalled
            **dict(options.pop("client_options", {})),
        }
        if _plain_http(url, options):
            client.setdefault("allow_http", True)
        if headers:
            client["default_headers"] = {**headers, **client.get("default_headers", {})}
        patience = {"max_retries": 5, "retry_timeout": timedelta(seconds=access.timeout)}
        with self._words():
            from_url: Any = obstore.store.from_url
            self._store = from_url(
                url, client_options=client, retry_config=options.pop("retry_config", patience), **options
            )

    def stamp(self) -> Stamp:
        """See `Backend`; by a GET of one byte, since signed URLs often allow no HEAD."""
        with self._words():
            try:
                meta = self._obstore.get(self._store, "", options={"range": (0, 1)}).meta
            except self._obstore.exceptions.NotSupportedError:
                meta = self._obstore.get(self._store, "").meta
        return {"bytes": int(meta["size"]), "mtime_ns": round(meta["last_modified"].timestamp() * 1e9)}

    def ranges(self, ranges: Sequence[Range]) -> list[bytes]:
        """See `Backend`."""
        if len(ranges) == 1:
            return [self._range(ranges[0])]
        pool = ThreadPoolExecutor(N_AT_ONCE, thread_name_prefix="adq-ranges")
        try:
            return list(pool.map(self._range, ranges))
        finally:
            pool.shutdown(cancel_futures=True)

    def _range(self, asked: Range) -> bytes:
        answer = Answer(*asked)
        with self._words():
            got = self._obstore.get(self._store, "", options={"range": asked})
            self._version.see(got.meta["size"], got.meta["e_tag"])
            for chunk in Pace(self._timeout).timed(got.stream(min_chunk_size=1), len):
                answer.add(bytes(chunk))
        return answer.all()

    def chunks(self) -> Iterator[bytes]:
        """See `Backend`."""
        with self._words():
            stream = self._obstore.get(self._store, "").stream(min_chunk_size=1)
            for chunk in Pace(self._timeout).timed(stream, len):
                yield bytes(chunk)

    @contextmanager
    def _words(self) -> Iterator[None]:
        """obstore's errors in our words."""
        try:
            yield
        except self._obstore.exceptions.NotSupportedError:
            raise NoRanges from None
        except (self._obstore.exceptions.BaseError, OSError, ValueError) as error:
            raise _trouble(error) from None


def _plain_http(url: str, options: Mapping[str, Any]) -> bool:
    """Whether the user says, in one of these places, that requests go unencrypted.

    obstore looks into the environment for that itself, but not once it is given any client options.
    """
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
    said = [url, str(options.get("endpoint", "")), *(os.environ.get(name, "") for name in names)]
    allowed = os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true")
    return allowed or any(text.lower().startswith("http://") for text in said)


def _trouble(error: BaseException) -> Trouble:
    text = str(error)
    if "Configuration" in type(error).__name__:
        return Trouble("storage_options hold a name that this kind of URL does not take")
    status = _STATUS.search(text)
    kind = type(error).__name__
    if isinstance(error, FileNotFoundError) or kind == "NotFoundError" or (status and status[1] == "404"):
        return Trouble("not found (404): check its URL")
    if status and status[1] == "416":
        return Trouble("ends before the bytes asked for (416): truncated, or not the file that was indexed")
    if kind in ("PermissionDeniedError", "UnauthenticatedError") or (status and status[1] in ("401", "403")):
        return Trouble(
            f"refused ({status[1] if status else kind}): check credentials, or that the URL has not expired"
        )
    if status and status[1][0] == "3":
        return Trouble(f"moved ({status[1]}) to a place that is not read: give its new URL")
    if status:
        return Trouble(f"the server fails ({status[1]}): try again later")
    if "MissingContentLength" in text:
        return Trouble("the server does not say how long its answer is: a file server is needed")
    if "builder error" in text:
        return Trouble("not a URL that can be asked for (plain http must be said in the endpoint)")
    if "TimedOut" in text or "Timeout" in text or "timed out" in text:
        return Trouble("no answer in time (timeout=): the server stalls")
    if "kind: Connect" in text or "ConnectError" in text or "dns error" in text:
        return Trouble("no connection: check host and port")
    broken = any(word in text for word in ("Interrupted", "kind: Body", "IncompleteMessage", "kind: Request"))
    return Trouble(f"the answer broke off ({kind})" if broken else f"cannot be read ({kind})", again=broken)


def _without_user(url: str) -> tuple[str, dict[str, str]]:
    """An http URL without user and password, and the header that says them instead."""
    scheme, _, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    user, at, host = host.rpartition("@")
    if not at or scheme.lower() not in ("http", "https"):
        return url, {}
    token = base64.b64encode(unquote(user).encode()).decode()
    return f"{scheme}://{host}{slash}{path}", {"authorization": f"Basic {token}"}
