"""Ranges and wholes of URLs, from servers that behave and that do not."""

import base64
import os
import random
import subprocess
import sys

import pytest

import adq_wds as adq
from adq_wds.remote.backend import Access, NoRanges
from adq_wds.remote.store import Remote
from adq_wds.remote.with_fsspec import Fsspec
from tests.conftest import NOBODY
from tests.remote.conftest import Open, Server, opened

pytest.importorskip("obstore")
SIZE = 50_000


@pytest.fixture(scope="session")
def data(running: Server) -> bytes:
    content = random.Random(0).randbytes(SIZE)
    (running.folder / "f.bin").write_bytes(content)
    return content


@pytest.fixture
def remote(open_url: Open, server: Server, data: bytes) -> Open:
    """remote("fault"): f.bin of the server, through each library."""
    return lambda fault, timeout=30.0: open_url(f"{server.url}/{fault}/f.bin?token=s3cret", timeout)


def read(remote: Remote, start: int, end: int) -> bytes:
    return remote.read_ranges([(start, end)])[0]


def test_ranges_are_what_a_slice_of_the_file_is(remote: Open, server: Server, data: bytes) -> None:
    url = remote("ok")
    rng = random.Random(1)
    ranges = [(a, a + rng.randrange(1, 900)) for a in rng.sample(range(SIZE - 900), 20)]
    assert url.read_ranges(ranges) == [data[a:b] for a, b in ranges]
    assert read(url, SIZE - 5, SIZE) == data[-5:]
    assert b"".join(url.chunks()) == data
    stamp, true = url.stamp(), os.stat(server.folder / "f.bin").st_mtime_ns
    assert stamp["bytes"] == SIZE
    assert abs(stamp["mtime_ns"] - true) < 2e9  # whole seconds


def test_each_range_is_one_request_and_nothing_else(server: Server, data: bytes) -> None:
    url = opened(f"{server.url}/ok/f.bin")
    read(url, 5, 20)
    assert server.asked() == [("f.bin", "bytes=5-19")]
    url.read_ranges([(0, 10), (20, 30), (40, 50)])
    assert sorted(str(each) for _, each in server.asked()) == ["bytes=0-9", "bytes=20-29", "bytes=40-49"]


def test_a_query_stays_and_a_user_becomes_a_header(server: Server, data: bytes) -> None:
    url = f"{server.url}/ok/f.bin?token=t0ken&x=1".replace("http://", "http://me:p%40ss@")
    assert read(opened(url), 0, 3) == data[:3]
    expected = "Basic " + base64.b64encode(b"me:p@ss").decode()
    assert server.requests == [("/ok/f.bin?token=t0ken&x=1", "bytes=0-2", expected)]


@pytest.mark.parametrize(
    ("fault", "text"), [("404", r"not found \(404\)"), ("403", "refused"), ("401", "refused")]
)
def test_a_refusal_is_one_request_without_url(remote: Open, server: Server, fault: str, text: str) -> None:
    """F11."""
    url = remote(fault)
    with pytest.raises(adq.ShardError, match=f"shard f.bin: {text}.*: check ") as error:
        read(url, 0, 10)
    most = 2 if isinstance(url._backend, Fsspec) else 1  # fsspec asks by HEAD and by GET
    assert 1 <= server.n_of[f"/{fault}/f.bin"] <= most
    assert "s3cret" not in str(error.value)
    assert "secret words" not in str(error.value)
    assert error.value.__suppress_context__


def test_a_server_that_fails_is_asked_again_and_then_named(server: Server, data: bytes) -> None:
    """F11."""
    assert read(opened(f"{server.url}/busy/f.bin"), 5, 9) == data[5:9]
    assert server.n_of["/busy/f.bin"] == 3
    with pytest.raises(adq.ShardError, match=r"shard f.bin: the server fails \(500\): try again later"):
        read(opened(f"{server.url}/500/f.bin"), 0, 10)
    assert 1 < server.n_of["/500/f.bin"] < 10


def test_a_server_without_ranges_is_told_apart(remote: Open, data: bytes) -> None:
    for fault in ("whole", "page"):
        with pytest.raises(NoRanges):
            read(remote(fault), 2000, 2010)
    assert b"".join(remote("whole").chunks()) == data


def test_a_stall_ends_at_the_timeout(remote: Open) -> None:
    """F11: the server would answer after half a minute."""
    with pytest.raises(adq.ShardError, match=r"shard f.bin: no answer in time \(timeout=\)"):
        read(remote("stall", 0.5), 0, 10)


def test_a_slow_server_is_waited_for(remote: Open, data: bytes) -> None:
    assert read(remote("slow"), 0, 10) == data[:10]


def test_a_redirect_to_a_file_reads_no_file(remote: Open) -> None:
    """F11."""
    with pytest.raises((adq.ShardError, NoRanges)):
        read(remote("tofile"), 0, 10)
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
            read(opened(f"{server.url}/{fault}/f.bin"), 7, 4007)
        if fault != "nolength":  # which is never taken at all
            server.n_of.clear()
            assert read(opened(f"{server.url}/{fault}once/f.bin"), 7, 4007) == data[7:4007]


def test_a_wrong_length_is_seen(server: Server, data: bytes) -> None:
    """F11."""
    with pytest.raises(adq.ShardError, match=r"shard f.bin: 1,000 of 4,000 bytes came"):
        read(opened(f"{server.url}/short/f.bin"), 0, 4000)


@pytest.mark.parametrize("part", [(SIZE - 10, SIZE + 10), (SIZE + 10, SIZE + 20)])
def test_bytes_behind_the_end_are_an_error(remote: Open, part: tuple[int, int]) -> None:
    with pytest.raises(adq.ShardError, match=r"shard f.bin: "):
        read(remote("ok"), *part)


def test_nobody_listening_is_said(open_url: Open) -> None:
    with pytest.raises(adq.ShardError, match=r"shard f.bin: no connection: check host and port"):
        read(open_url(f"http://{NOBODY}/x?t=s3cret", 2.0), 0, 10)


def test_urls_that_nothing_reads_are_refused() -> None:
    with pytest.raises(adq.ShardError, match=r"shard f.bin: nothing here reads nonsense:// URLs"):
        opened("nonsense://a/x")


def test_any_file_system_of_fsspec_is_read(data: bytes) -> None:
    import fsspec

    fsspec.filesystem("memory").pipe("/a/f.bin", data)
    url = opened("memory://a/f.bin")
    assert url.read_ranges([(3, 9), (100, 300)]) == [data[3:9], data[100:300]]
    assert b"".join(url.chunks()) == data
    assert url.stamp()["bytes"] == SIZE
    with pytest.raises(adq.ShardError, match=r"shard f.bin: not found"):
        read(opened("memory://a/g"), 0, 1)


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), "5", True, None])
def test_a_timeout_is_a_number_of_seconds(timeout: object) -> None:
    with pytest.raises(ValueError, match=r"timeout must be a number of seconds > 0, got"):
        Access(timeout)  # type: ignore[arg-type]


def test_a_wrong_storage_option_is_said_without_its_value() -> None:
    access = Access(storage_options={"nonsense": "s3cret"})
    with pytest.raises(adq.ShardError, match="storage_options hold a name that this kind of U") as error:
        Remote("s3://bucket/a.tar", shard="a.tar", access=access)
    assert "s3cret" not in str(error.value) + repr(access)


FORKED = """
import os, sys
from adq_wds.remote.store import Access, Remote
url, how = sys.argv[1:]
def read():
    return Remote(url, shard="f.bin", access=Access(30.0)).read_ranges([(3, 9)])
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
    [("both", "same\n"), ("alone", "which obstore does not survive: start workers with multiprocessing_")],
)
def test_a_forked_process_reads_or_says_what_to_do(server: Server, data: bytes, how: str, text: str) -> None:
    """obstore's threads stay behind in a fork, where its next request would hang."""
    command = [sys.executable, "-c", FORKED, f"{server.url}/ok/f.bin", how]
    out = subprocess.run(command, capture_output=True, text=True, timeout=900, check=True).stdout
    assert text in out


def test_gcs_and_azure_are_read_by_their_own_apis(server: Server, data: bytes) -> None:
    """Both ask for objects by plain HTTP paths: /bucket/object, and /account's container/object."""
    plain = {"client_options": {"allow_http": True}}
    gcs = Access(storage_options={"base_url": server.url, "skip_signature": True, **plain})
    azure = Access(storage_options={"endpoint": server.url, "account_name": "me", "skip_signature": True})
    for url, access in (("gs://ok/f.bin", gcs), ("az://ok/f.bin", azure)):
        assert read(Remote(url, shard="f.bin", access=access), 5, 20) == data[5:20]
    assert [each for _, each, _ in server.requests] == ["bytes=5-19"] * 2
