"""Ranges and wholes of URLs, from servers that behave and that do not."""

import base64
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

import adq_wds as adq
from adq_wds.remote.backend import Access, NoRanges
from adq_wds.remote.store import Remote
from adq_wds.remote.with_fsspec import Fsspec
from tests.remote.conftest import Server

pytest.importorskip("obstore")
SIZE = 50_000
Open = Callable[..., Remote]


@pytest.fixture(scope="session")
def data(running: Server) -> bytes:
    content = random.Random(0).randbytes(SIZE)
    (running.folder / "f.bin").write_bytes(content)
    return content


@pytest.fixture(params=["obstore", "fsspec"])
def remote(
    request: pytest.FixtureRequest, server: Server, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> Open:
    """remote("fault"): f.bin of the server, through each library."""
    if request.param == "fsspec":
        monkeypatch.setattr("adq_wds.remote.store.importlib.util.find_spec", lambda name: None)

    def opened(fault: str, *, query: str = "", timeout: float = 5.0) -> Remote:
        url = f"{server.url}/{fault}/f.bin{query}"
        made = Remote(url, shard="f.bin", access=Access(timeout))
        assert isinstance(made._backend, Fsspec) == (request.param == "fsspec")
        return made

    return opened


def test_ranges_are_what_a_slice_of_the_file_is(remote: Open, server: Server, data: bytes) -> None:
    opened = remote("ok")
    rng = random.Random(1)
    ranges = [(a, a + rng.randrange(1, 900)) for a in rng.sample(range(SIZE - 900), 20)]
    assert opened.read_ranges(ranges) == [data[a:b] for a, b in ranges]
    assert opened.read_ranges([(SIZE - 5, SIZE)])[0] == data[-5:]
    assert b"".join(opened.chunks()) == data
    assert opened.stamp()["bytes"] == SIZE
    assert (
        abs(opened.stamp()["mtime_ns"] - os.stat(server.folder / "f.bin").st_mtime_ns) < 2e9
    )  # whole seconds


def test_each_range_is_one_request_and_nothing_else_is_asked_for(server: Server, data: bytes) -> None:
    opened = Remote(f"{server.url}/ok/f.bin", shard="f.bin", access=Access())
    opened.read_ranges([(5, 20)])[0]
    assert server.asked() == [("f.bin", "bytes=5-19")]
    opened.read_ranges([(0, 10), (20, 30), (40, 50)])
    assert sorted(str(each) for _, each in server.asked()) == ["bytes=0-9", "bytes=20-29", "bytes=40-49"]


def test_a_query_is_part_of_the_url_and_a_user_becomes_a_header(server: Server, data: bytes) -> None:
    url = f"{server.url}/ok/f.bin?token=t0ken&x=1".replace("http://", "http://me:p%40ss@")
    assert Remote(url, shard="f.bin", access=Access()).read_ranges([(0, 3)])[0] == data[:3]
    expected = "Basic " + base64.b64encode(b"me:p@ss").decode()
    assert server.requests == [("/ok/f.bin?token=t0ken&x=1", "bytes=0-2", expected)]


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("404", r"shard f.bin: not found \(404\): check its URL"),
        ("403", r"shard f.bin: refused .*: check credentials"),
        ("401", r"shard f.bin: refused .*: check credentials"),
    ],
)
def test_a_refusal_is_one_request_and_an_error_without_the_url(
    remote: Open, server: Server, fault: str, text: str
) -> None:
    """F11."""
    begin = time.monotonic()
    opened = remote(fault, query="?token=s3cret")
    with pytest.raises(adq.ShardError, match=text) as error:
        opened.read_ranges([(0, 10)])[0]
    assert time.monotonic() - begin < 1
    most = 2 if isinstance(opened._backend, Fsspec) else 1  # fsspec asks by HEAD and by GET
    assert 1 <= server.n_of[f"/{fault}/f.bin"] <= most
    assert "s3cret" not in str(error.value)
    assert "secret words" not in str(error.value)
    assert error.value.__suppress_context__


def test_a_server_that_fails_is_asked_again_and_then_named(server: Server, data: bytes) -> None:
    """F11."""
    assert (
        Remote(f"{server.url}/busy/f.bin", shard="f.bin", access=Access()).read_ranges([(5, 9)])[0]
        == data[5:9]
    )
    assert server.n_of["/busy/f.bin"] == 3
    with pytest.raises(adq.ShardError, match=r"shard f.bin: the server fails \(500\): try again later"):
        Remote(f"{server.url}/500/f.bin", shard="f.bin", access=Access(1.0)).read_ranges([(0, 10)])[0]
    assert 1 < server.n_of["/500/f.bin"] < 10


def test_a_server_without_ranges_is_told_apart(remote: Open, data: bytes) -> None:
    for fault in ("whole", "page"):
        with pytest.raises(NoRanges):
            remote(fault).read_ranges([(2000, 2010)])[0]
    assert b"".join(remote("whole").chunks()) == data


def test_a_stall_ends_at_the_timeout(remote: Open) -> None:
    """F11."""
    opened = remote("stall", timeout=0.5)
    begin = time.monotonic()
    with pytest.raises(adq.ShardError, match=r"shard f.bin: no answer in time \(timeout=\)"):
        opened.read_ranges([(0, 10)])[0]
    asked = 2 if isinstance(opened._backend, Fsspec) else 1  # fsspec asks by HEAD and by GET
    assert 0.4 < time.monotonic() - begin < 0.5 * asked + 1


def test_a_slow_server_is_waited_for(remote: Open, data: bytes) -> None:
    assert remote("slow").read_ranges([(0, 10)])[0] == data[:10]


def test_a_redirect_to_a_file_reads_no_file(remote: Open) -> None:
    """F11."""
    with pytest.raises((adq.ShardError, NoRanges)):
        remote("tofile").read_ranges([(0, 10)])[0]
    with pytest.raises(adq.ShardError, match=r"shard f.bin"):
        b"".join(remote("tofile").chunks())


@pytest.mark.parametrize("fault", ["cut", "nolength", "reset"])
def test_answers_that_break_off_are_continued_or_detected(server: Server, data: bytes, fault: str) -> None:
    """F11: 40 cuts with a length, 40 without, 40 resets; identical bytes, or an error."""
    rng = random.Random(fault)
    for _ in range(40):
        server.cut = rng.randrange(0, 4000)
        text = "shard f.bin: (the answer broke off|the server does not say how long)"
        with pytest.raises(adq.ShardError, match=text):
            Remote(f"{server.url}/{fault}/f.bin", shard="f.bin", access=Access(5.0)).read_ranges([(7, 4007)])[
                0
            ]
        if fault == "nolength":  # never taken at all
            continue
        server.n_of.clear()
        opened = Remote(f"{server.url}/{fault}once/f.bin", shard="f.bin", access=Access(5.0))
        assert opened.read_ranges([(7, 4007)])[0] == data[7:4007]


def test_a_wrong_length_is_seen(server: Server, data: bytes) -> None:
    """F11."""
    with pytest.raises(adq.ShardError, match=r"shard f.bin: 1,000 of 4,000 bytes came"):
        Remote(f"{server.url}/short/f.bin", shard="f.bin", access=Access()).read_ranges([(0, 4000)])[0]


def test_bytes_behind_the_end_are_an_error(remote: Open) -> None:
    with pytest.raises(adq.ShardError, match=r"shard f.bin: "):
        remote("ok").read_ranges([(SIZE - 10, SIZE + 10)])[0]
    with pytest.raises(adq.ShardError, match=r"shard f.bin: "):
        remote("ok").read_ranges([(SIZE + 10, SIZE + 20)])[0]


def test_nobody_listening_is_said(remote: Open) -> None:
    with pytest.raises(adq.ShardError, match=r"shard x: no connection: check host and port"):
        Remote("http://127.0.0.1:1/x?t=s3cret", shard="x", access=Access(2.0)).read_ranges([(0, 10)])[0]


def test_urls_that_nothing_reads_are_refused() -> None:
    with pytest.raises(adq.ShardError, match=r"shard x: nothing here reads nonsense:// URLs"):
        Remote("nonsense://a/x", shard="x", access=Access())


def test_any_file_system_of_fsspec_is_read(data: bytes) -> None:
    import fsspec

    fsspec.filesystem("memory").pipe("/a/f.bin", data)
    opened = Remote("memory://a/f.bin", shard="f.bin", access=Access())
    assert opened.read_ranges([(3, 9), (100, 300)]) == [data[3:9], data[100:300]]
    assert b"".join(opened.chunks()) == data
    assert opened.stamp()["bytes"] == SIZE
    with pytest.raises(adq.ShardError, match=r"shard g: not found"):
        Remote("memory://a/g", shard="g", access=Access()).read_ranges([(0, 1)])[0]


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), "5", True, None])
def test_a_timeout_is_a_number_of_seconds(timeout: object) -> None:
    with pytest.raises(ValueError, match=r"timeout must be a number of seconds > 0, got"):
        Access(timeout)  # type: ignore[arg-type]


def test_a_wrong_storage_option_is_said_without_its_value(server: Server) -> None:
    with pytest.raises(
        adq.ShardError, match="storage_options hold a name that this kind of URL does not"
    ) as error:
        Remote("s3://bucket/a.tar", shard="a.tar", access=Access(storage_options={"nonsense": "s3cret"}))
    assert "s3cret" not in str(error.value)
    assert "s3cret" not in repr(Access(storage_options={"secret_access_key": "s3cret"}))


FORKED = """
import os, sys
from adq_wds.remote.store import Access, Remote
url, how = sys.argv[1:]
def read():
    return Remote(url, shard="f.bin", access=Access(5.0)).read_ranges([(3, 9)])[0]
first = read()
if how == "alone":
    import importlib
    importlib.import_module("adq_wds.remote.with_fsspec").installed = lambda scheme: False
if os.fork() == 0:
    try:
        print("same" if read() == first else "other", flush=True)
    except Exception as error:
        print(error, flush=True)
    os._exit(0)
os.wait()
"""


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("both", "same\n"),
        ("alone", "which obstore does not survive: start workers with multiprocessing_context="),
    ],
)
def test_a_forked_process_reads_too_or_is_told_what_to_do(
    server: Server, data: bytes, how: str, text: str
) -> None:
    """obstore's threads stay behind in a fork, where its next request would hang."""
    command = [sys.executable, "-c", FORKED, f"{server.url}/ok/f.bin", how]
    out = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert text in out


def test_gcs_and_azure_urls_are_read_by_their_own_apis(server: Server, data: bytes) -> None:
    """Both ask for objects by plain HTTP paths: /bucket/object, and /account's container/object."""
    gcs = Access(
        storage_options={
            "base_url": server.url, "skip_signature": True, "client_options": {"allow_http": True},
        }
    )  # fmt: skip
    assert Remote("gs://ok/f.bin", shard="f.bin", access=gcs).read_ranges([(5, 20)])[0] == data[5:20]
    azure = Access(storage_options={"endpoint": server.url, "account_name": "me", "skip_signature": True})
    assert Remote("az://ok/f.bin", shard="f.bin", access=azure).read_ranges([(5, 20)])[0] == data[5:20]
    assert [each for _, each, _ in server.requests] == ["bytes=5-19"] * 2
