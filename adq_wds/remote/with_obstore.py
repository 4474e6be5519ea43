"""Reads and writes one URL through obstore."""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from adq_wds.remote.backend import N_AT_ONCE, Access, Answer, Checks, NoRanges, Range, Stamp, Trouble, explain

SCHEMES = frozenset({"http", "https", "s3", "s3a", "gs", "az", "azure", "adl", "abfs", "abfss"})
_STATUS = re.compile(r"status code: (\d{3})")
_first_process: list[int] = []  # obstore's threads are its own: in a fork of it, requests would hang


def usable() -> bool:
    """Whether this process may use obstore; not if it was forked from one that did."""
    return not _first_process or _first_process[0] == os.getpid()


def was_used() -> bool:
    """Whether this process has used obstore, so that those it forks cannot."""
    return bool(_first_process)


class Obstore:
    """One URL through obstore, which retries on busy servers (5xx, 429) for `timeout` seconds."""

    def __init__(self, url: str, access: Access) -> None:
        import obstore

        if not _first_process:
            _first_process.append(os.getpid())
        self._obstore, self._checks = obstore, Checks(access.timeout)
        self._http = url.lower().startswith(("http://", "https://"))
        with self._our_errors():
            if self._http:  # its query may be a signature
                self._store, self._key = _store(url, access), ""
                return
            parts = urlsplit(url)
            root, self._key = f"{parts.scheme}://{parts.netloc}", unquote(parts.path).strip("/")
            if access.storage_options:
                self._store = _store(root, access)
            else:
                environment = frozenset(os.environ.items())
                self._store = _shared_store(root, access.timeout, environment, os.getpid())

    def stamp(self) -> Stamp:
        """See `Backend`; for http by a GET of one byte, since signed URLs often allow no HEAD."""
        with self._our_errors():
            if not self._http:
                meta = self._obstore.head(self._store, self._key)
            else:
                try:
                    meta = self._get((0, 1)).meta
                except self._obstore.exceptions.NotSupportedError:
                    meta = self._get().meta
            self._checks.version(meta["size"], meta["e_tag"])
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
        answer = Answer(asked)
        with self._our_errors():
            response = self._get(asked)
            self._checks.version(response.meta["size"], response.meta["e_tag"])
            for chunk in self._checks.timed(response.stream(min_chunk_size=1)):
                answer.add(chunk)
        return answer.all()

    def chunks(self) -> Iterator[bytes]:
        """See `Backend`."""
        with self._our_errors():
            yield from self._checks.timed(self._get().stream(min_chunk_size=1))

    def put(self, path: Path) -> None:
        """See `Backend`: an object store shows an object when its last byte has come, so no temporary key is needed."""
        with self._our_errors():
            self._obstore.put(self._store, self._key, path)

    def create(self, data: bytes) -> bool:
        """Write a few bytes unless a file is there; whether they were written. Of several writers at once one wins.

        Raises:
            NotImplementedError: the store does not write on a condition.
        """
        with self._our_errors():
            try:
                self._obstore.put(self._store, self._key, data, mode="create")
            except self._obstore.exceptions.AlreadyExistsError:
                return False
        return True

    def overwrite(self, data: bytes) -> None:
        """Write a few bytes, in the place of an earlier file."""
        with self._our_errors():
            self._obstore.put(self._store, self._key, data)

    def remove(self) -> None:
        """See `Backend`."""
        with self._our_errors():
            self._obstore.delete(self._store, self._key)

    def names(self) -> list[str]:
        """See `Backend`."""
        with self._our_errors():
            listed = self._obstore.list_with_delimiter(self._store, self._key or None)
        return [PurePosixPath(meta["path"]).name for meta in listed["objects"]]

    def is_folder(self) -> bool:
        """See `Backend`."""
        with self._our_errors():
            return any(len(chunk) > 0 for chunk in self._obstore.list(self._store, self._key or None))

    def _get(self, asked: Range | None = None) -> Any:
        return self._obstore.get(self._store, self._key, options=None if asked is None else {"range": asked})

    @contextmanager
    def _our_errors(self) -> Iterator[None]:
        try:
            yield
        except self._obstore.exceptions.NotSupportedError:
            raise NoRanges from None
        except (self._obstore.exceptions.BaseError, OSError, ValueError) as error:
            raise _trouble(error) from None


def _store(url: str, access: Access) -> Any:
    """obstore's store of a bucket, or of a whole http URL."""
    import obstore

    url, headers = _without_user(url)
    options, timeout = dict(access.storage_options), timedelta(seconds=access.timeout)
    client: dict[str, Any] = {
        "read_timeout": timeout,
        "connect_timeout": timeout,
        "timeout": timedelta(days=1),  # of a whole answer: `Checks` says when one has stalled
        **dict(options.pop("client_options", {})),
    }
    if _plain_http(url, options):
        client.setdefault("allow_http", True)
    if headers:
        client["default_headers"] = {**headers, **client.get("default_headers", {})}
    retries = options.pop("retry_config", {"max_retries": 5, "retry_timeout": timeout})
    from_url: Any = obstore.store.from_url
    return from_url(url, client_options=client, retry_config=retries, **options)


@lru_cache(maxsize=8)
def _shared_store(root: str, timeout: float, environment: frozenset[tuple[str, str]], process: int) -> Any:
    """The store of a bucket by the environment, made once, since that takes as long as some requests."""
    return _store(root, Access(timeout))


def _plain_http(url: str, options: Mapping[str, Any]) -> bool:
    """Whether the user's options or the environment allow unencrypted requests.

    obstore reads the environment for that itself, but not when it gets client options.
    """
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
    endpoints = [url, str(options.get("endpoint", "")), *(os.environ.get(name, "") for name in names)]
    allowed = os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true")
    return allowed or any(text.lower().startswith("http://") for text in endpoints)


def _trouble(error: BaseException) -> Trouble:
    text = str(error)

    def says(*words: str) -> bool:
        return any(word in text for word in words)

    if "Configuration" in type(error).__name__:
        return Trouble("storage_options hold a name that this kind of URL does not take")
    status = _STATUS.search(text)
    if status is None and says("MissingContentLength"):
        return Trouble("the server does not say how long its answer is: a file server is needed")
    if status is None and says("builder error"):
        return Trouble("not a URL that can be asked for (plain http must be in the endpoint)")
    trouble = explain(
        error,
        int(status[1]) if status else None,
        late=says("TimedOut", "Timeout", "timed out"),
        unconnected=says("kind: Connect", "ConnectError", "dns error"),
        broken=says("Interrupted", "kind: Body", "IncompleteMessage", "kind: Request"),
    )
    trouble.again = trouble.again and status is None  # obstore itself has tried a busy server again
    return trouble


def _without_user(url: str) -> tuple[str, dict[str, str]]:
    """An http URL without user and password, and the header that holds them instead."""
    scheme, _, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    user, sign, host = host.rpartition("@")
    if not sign or scheme.lower() not in ("http", "https"):
        return url, {}
    token = base64.b64encode(unquote(user).encode()).decode()
    return f"{scheme}://{host}{slash}{path}", {"authorization": f"Basic {token}"}
