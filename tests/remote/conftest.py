"""An HTTP server on loopback that serves files well, or badly in one of many ways, as its path says."""

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from adq_wds.remote.backend import Access
from adq_wds.remote.store import Remote
from adq_wds.remote.with_fsspec import Fsspec

Open = Callable[..., Remote]
web = pytest.importorskip("aiohttp.web")


@dataclass
class Server:
    """A running server.

    ``/ok/a.tar`` serves ``folder/a.tar`` with ranges; another first part of the path names a fault, see `_answer`.

    Attributes:
        folder: what it serves.
        url: "http://127.0.0.1:PORT".
        requests: (path and query, Range header, Authorization header) of each request.
        cut: bytes of an answer after which faulty ones break off.
    """

    folder: Path
    url: str = ""
    requests: list[tuple[str, str | None, str | None]] = field(default_factory=list)
    cut: int = 1000
    n_of: Counter[str] = field(default_factory=Counter)

    def asked(self) -> list[tuple[str, str | None]]:
        """(file, Range header) of the requests so far, which are forgotten."""
        pairs = [(path.partition("?")[0].rpartition("/")[2], part) for path, part, _ in self.requests]
        self.requests.clear()
        return pairs


async def _answer(server: Server, request: "web.Request") -> "web.StreamResponse":
    """Each fault is a path's first part."""
    fault, name = request.match_info["fault"], request.match_info["name"]
    asked = request.headers.get("Range")
    server.requests.append((request.path_qs, asked, request.headers.get("Authorization")))
    server.n_of[request.path] += 1
    path = server.folder / name
    if fault.isdigit():  # a status
        return web.Response(status=int(fault), text="secret words of the server")
    if fault == "busy" and server.n_of[request.path] <= 2:
        return web.Response(status=503)
    if fault == "page":
        return web.Response(text="<html>please log in</html>" * 100, content_type="text/html")
    if fault == "tofile":
        raise web.HTTPFound("file:///etc/passwd")
    if fault == "moved":
        raise web.HTTPFound(f"/ok/{name}")
    if fault == "stall":
        await asyncio.sleep(30)
    if fault == "whole":  # a server that knows no ranges
        return web.Response(body=path.read_bytes())
    if fault == "slow":
        await asyncio.sleep(0.3)
    if fault in ("ok", "busy", "slow"):
        return web.FileResponse(path)
    return await _broken(server, request, fault, path.read_bytes(), asked)


async def _broken(
    server: Server, request: "web.Request", fault: str, data: bytes, asked: str | None
) -> "web.StreamResponse":
    """An answer that breaks off after `server.cut` bytes: every time, or ("…once") the first time only."""
    status, part = 200, data
    headers = {}
    if asked:
        first, last = asked.removeprefix("bytes=").split("-")
        part = data[int(first) : int(last) + 1]
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        status = 206
    once = fault.endswith("once")
    if once and server.n_of[request.path] > 1:
        server.cut = len(part)
    response = web.StreamResponse(status=status, headers=headers)
    if fault.startswith("short"):  # says that less comes, and ends as said
        part = part[: server.cut]
        response.content_length = len(part)
    elif fault.startswith("nolength"):
        response.headers["Connection"] = "close"
        response.force_close()
    else:
        response.content_length = len(part)
    await response.prepare(request)
    await response.write(part[: server.cut])
    if server.cut < len(part):
        transport = request.transport
        assert transport is not None
        if fault.startswith("reset"):
            await asyncio.sleep(0.01)  # what was written leaves first
            transport.abort()
        else:
            transport.close()
    return response


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests."""
    server = Server(tmp_path_factory.mktemp("served"))
    loop = asyncio.new_event_loop()
    ready = threading.Event()

    def run() -> None:
        asyncio.set_event_loop(loop)
        app = web.Application()

        async def answer(request: "web.Request") -> "web.StreamResponse":
            return await _answer(server, request)

        app.router.add_get("/{fault}/{name:.*}", answer)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        loop.run_until_complete(runner.setup())
        site = web.TCPSite(runner, "127.0.0.1", 0)
        loop.run_until_complete(site.start())
        server.url = "http://{}:{}".format(*runner.addresses[0][:2])
        ready.set()
        loop.run_forever()
        stalling = asyncio.all_tasks(loop)
        for task in stalling:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*stalling, return_exceptions=True))
        loop.run_until_complete(runner.cleanup())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(300)
    yield server
    loop.call_soon_threadsafe(loop.stop)
    thread.join(60)


@pytest.fixture
def server(running: Server) -> Server:
    """The server, with nothing remembered."""
    running.requests.clear()
    running.n_of.clear()
    running.cut = 1000
    return running


def opened(url: str, timeout: float = 30.0) -> Remote:
    return Remote(url, shard="f.bin", access=Access(timeout))


@pytest.fixture(params=["obstore", "fsspec"])
def open_url(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Open:
    """`opened`, through each library."""
    pytest.importorskip("obstore")
    if request.param == "fsspec":
        monkeypatch.setattr("adq_wds.remote.store.importlib.util.find_spec", lambda name: None)

    def through(url: str, timeout: float = 30.0) -> Remote:
        remote = opened(url, timeout)
        assert isinstance(remote._backend, Fsspec) == (request.param == "fsspec")
        return remote

    return through


@pytest.fixture(scope="session")
def endpoint() -> Iterator[str]:
    """The URL of an S3 API on loopback."""
    moto_server = pytest.importorskip("moto.server")
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()
