"""Servers that answer with too much, too slowly, from elsewhere, or packed: memory and time stay bounded. F45."""

import gzip
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import adq_wds as adq
from adq_wds.remote.store import Remote
from tests.remote.conftest import Open

pytest.importorskip("obstore")
DATA = bytes(range(256)) * 64
RANGE = (512, 3584)
MIB = 1 << 20
BOMB = gzip.compress(bytes(128 * MIB), compresslevel=1)


@dataclass
class Hostile:
    """A server on loopback, each fault the first part of a path.

    Attributes:
        port: its port.
        elsewhere: where ``/away/`` redirects to.
        seen: (path, Authorization header) of each request.
    """

    port: int = 0
    elsewhere: str = ""
    seen: list[tuple[str, str]] = field(default_factory=list)

    def answer(self, connection: socket.socket) -> None:
        """Requests of one connection, until it is closed."""
        with connection, connection.makefile("rb") as lines:
            try:
                while line := lines.readline():
                    headers = {}
                    while text := lines.readline().decode().strip():
                        name, _, value = text.partition(":")
                        headers[name.lower()] = value.strip()
                    method, path = line.decode().split()[:2]
                    self.seen.append((path, headers.get("authorization", "")))
                    self._send(connection, path.split("/")[1], headers.get("range"), body=method != "HEAD")
            except OSError:
                return

    def _send(self, connection: socket.socket, fault: str, asked: str | None, *, body: bool) -> None:
        first, last = (
            (int(n) for n in asked.removeprefix("bytes=").split("-")) if asked else (0, len(DATA) - 1)
        )
        status = "206 Partial Content" if asked else "200 OK"
        where = f"Content-Range: bytes {first}-{last}/{len(DATA)}\r\n" if asked else ""
        data, extra, length = DATA[first : last + 1], "", last + 1 - first
        if fault == "away":
            status, where, data, length = "302 Found", "", b"", 0
            extra = f"Location: {self.elsewhere}\r\n"
        elif fault == "changed":
            extra = f'ETag: "{len(self.seen)}"\r\n'
        elif fault == "grown" and asked:
            where = f"Content-Range: bytes {first}-{last}/{len(DATA) + len(self.seen)}\r\n"
        elif fault == "long":
            length = 4 << 30
        elif fault == "gzip":
            data = gzip.compress(data)
            extra, length = "Content-Encoding: gzip\r\n", len(data)
        elif fault == "bomb":
            data = BOMB
            extra, length = "Content-Encoding: gzip\r\n", len(data)
        head = f"HTTP/1.1 {status}\r\n{where}{extra}Content-Length: {length}\r\n\r\n"
        connection.sendall(head.encode())
        if not body:  # what came after an answer to HEAD would be taken for the next answer's head
            return
        if fault == "long":
            for _ in range(4 << 10):
                connection.sendall(bytes(MIB))
        elif fault == "trickle":
            for i in range(len(data)):
                connection.sendall(data[i : i + 1])
                time.sleep(0.05)
        else:
            connection.sendall(data)


@pytest.fixture
def hostile() -> Iterator[Hostile]:
    server = Hostile()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server.port = listening.getsockname()[1]
        server.elsewhere = f"http://localhost:{server.port}/ok/f.bin"  # another host's name

        def accept() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                threading.Thread(target=server.answer, args=(connection,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield server


@pytest.fixture
def remote(open_url: Open, hostile: Hostile) -> Open:
    """remote("fault"): the file of the server, through each library."""
    return lambda fault, user="": open_url(
        f"http://{user}127.0.0.1:{hostile.port}/{fault}/f.bin", 2.0 if fault == "trickle" else 200.0
    )


def peak_growth(work: Callable[[], object]) -> int:
    """Bytes of memory that `work` takes at most, beyond what was there."""

    def line(name: str) -> int:
        text = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(name))
        return int(text.split()[1]) << 10

    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now
    except OSError:
        pytest.skip("memory is measured on Linux")
    before = line("VmRSS")
    work()
    return line("VmHWM") - before


READS: dict[str, Callable[[Remote], bytes]] = {
    "range": lambda opened: opened.read_ranges([RANGE])[0],
    "ranges": lambda opened: b"".join(opened.read_ranges([RANGE, (4096, 5000), (6000, 7000)])),
    "whole": lambda opened: b"".join(chunk[:1] for chunk in opened.chunks()),
}


def check_refused(work: Callable[[], object], text: str) -> None:
    """An error, and little memory until then."""

    def read() -> None:
        with pytest.raises(adq.ShardError, match=rf"f\.bin: {text}"):
            work()

    assert peak_growth(read) <= 2 * (RANGE[1] - RANGE[0]) + 64 * MIB


@pytest.mark.parametrize("how", ["range", "ranges"])
def test_a_longer_answer_is_refused_before_it_fills_memory(remote: Open, how: str) -> None:
    opened = remote("long")
    check_refused(lambda: READS[how](opened), r"the server sends more than the [\d,]+ bytes asked for")


@pytest.mark.parametrize("fault", ["gzip", "bomb"])
def test_a_packed_answer_is_refused(remote: Open, fault: str) -> None:
    opened = remote(fault)
    text = "(the server packs its answers|.* bytes came|.*more than)"
    check_refused(lambda: READS["range"](opened), text)


@pytest.mark.parametrize("how", sorted(READS))
def test_an_answer_slower_than_the_least_rate_ends(remote: Open, how: str) -> None:
    """After two seconds, its timeout; all of it would take minutes."""
    opened = remote("trickle")
    start = time.monotonic()
    with pytest.raises(adq.ShardError, match=r"f\.bin: (too slow: \d+ bytes came|no answer in time)"):
        READS[how](opened)
    assert 2 <= time.monotonic() - start < len(DATA) * 0.05


def test_another_host_is_asked_without_the_password(remote: Open, hostile: Hostile) -> None:
    assert READS["range"](remote("away", "user:secret@")) == DATA[slice(*RANGE)]
    first, second = hostile.seen[-2:]
    assert first[0].startswith("/away/")
    assert first[1].startswith("Basic ")
    assert second == ("/ok/f.bin", "")


@pytest.mark.parametrize("fault", ["changed", "grown"])
def test_ranges_of_two_versions_of_a_file_are_not_mixed(remote: Open, fault: str) -> None:
    opened = remote(fault)
    assert READS["range"](opened) == DATA[slice(*RANGE)]
    with pytest.raises(adq.ShardError, match=r"shard f\.bin: changed on the server while it was read"):
        READS["range"](opened)
