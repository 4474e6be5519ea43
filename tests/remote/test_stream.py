"""Remote shards in the stream: the same samples in the same order, and only the kept bytes."""

import contextlib
import gc
import gzip
import logging
import os
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import adq_wds as adq
from adq_wds.jobs.index import index_shards
from adq_wds.reading import ranged
from tests.programs import soon
from tests.remote.conftest import Server
from tests.stream.conftest import Options, TarSet, contents, made, slow, write_set

pytest.importorskip("obstore")


@pytest.fixture(scope="module")
def served(running: Server) -> TarSet:
    """Seven shards in the server's folder."""
    return write_set(running.folder / "set", [9, 1, 14, 3, 2, 8, 5])


def urls_of(server: Server, tar_set: TarSet, fault: str = "ok", folder: str = "set") -> list[str]:
    return [f"{server.url}/{fault}/{folder}/{Path(url).name}" for url in tar_set.urls]


def remote(server: Server, served: TarSet, fault: str = "ok", **options: Any) -> adq.ShardDataset:
    """As `made`, from the server."""
    return made(TarSet(urls_of(server, served, fault), served.plan, [], {}), **options)


def kept_spans(plan: str) -> list[tuple[str, list[tuple[int, int]]]]:
    """Of each shard, first byte and the byte behind the last of each kept sample."""
    return [
        (shard.name, [(a, a + n) for _, _, a, n, _ in shard.spans.take(shard.kept.nonzero()[0]).rows()])
        for shard in adq.load_plan(plan)
    ]


def cut_entries(cache: Path, keep: float) -> None:
    """What the cache holds, while others use it: a file without any byte would be an error for who just opens it."""
    for entry in cache.glob("[0-9a-f]*"):
        with contextlib.suppress(FileNotFoundError):
            os.truncate(entry, max(1, int(entry.stat().st_size * keep)))


@pytest.mark.parametrize("fault", ["ok", "whole"])
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("options", [{"shuffle": False, "batch_size": None}, {"batch_size": None}, {}])
def test_a_remote_stream_is_the_local_one(
    server: Server, served: TarSet, tmp_path: Path, fault: str, cached: bool, options: Options
) -> None:
    local = made(served, **options)
    dataset = remote(server, served, fault, cache=tmp_path / "cache" if cached else None, **options)
    for _ in range(2):
        assert contents(dataset) == contents(local)
    assert dataset.epoch == local.epoch == 2


def test_urls_are_the_samples_urls(server: Server, served: TarSet) -> None:
    samples = list(remote(server, served, batch_size=None))
    assert {sample["__url__"] for sample in samples} <= set(urls_of(server, served))


def test_without_a_cache_each_kept_sample_is_one_request(server: Server, served: TarSet) -> None:
    list(remote(server, served))
    expected = [(name, f"bytes={a}-{b - 1}") for name, spans in kept_spans(served.plan) for a, b in spans]
    assert Counter(server.asked()) == Counter(expected)


def test_with_a_cache_ranges_are_merged_and_asked_for_once(
    server: Server, served: TarSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranged, "MAX_GAP", 1024)
    dataset = remote(server, served, cache=tmp_path / "cache")
    first = contents(dataset)
    expected = []
    for name, spans in kept_spans(served.plan):
        merged: list[list[int]] = []  # the slow way, span by span
        for a, b in spans:
            if not merged or a - merged[-1][1] > 1024:
                merged.append([a, b])
            merged[-1][1] = b
        expected += [(name, f"bytes={a}-{b - 1}") for a, b in merged]
    assert Counter(server.asked()) == Counter(expected)
    assert Counter(contents(dataset)) == Counter(first)
    assert server.asked() == []


@pytest.mark.parametrize(
    ("context", "used_before"), [("fork", False), ("fork", True), ("spawn", True), slow("forkserver", True)]
)
def test_workers_read_remote_shards_and_share_the_cache(
    server: Server, served: TarSet, tmp_path: Path, context: str, used_before: bool
) -> None:
    """Forked workers too, also where this process has read remote shards itself."""
    if used_before:
        list(remote(server, served))
    server.asked()
    dataset = remote(server, served, cache=tmp_path / "cache")
    loader = adq.Loader(dataset, num_workers=2, multiprocessing_context=context)
    assert contents(loader) == contents(made(served))
    requests = [(name, part) for name, part in server.asked() if part]  # fsspec asks for sizes besides
    assert max(Counter(requests).values()) == 1


@pytest.mark.parametrize("fault", ["ok", "whole"])
@pytest.mark.parametrize("keep", [0.0, 0.5])
def test_a_damaged_entry_is_fetched_again_once(
    server: Server, served: TarSet, tmp_path: Path, fault: str, keep: float
) -> None:
    """F12."""
    dataset = remote(server, served, fault, cache=tmp_path, shuffle=False)
    expected = contents(dataset)
    n_requests = len(server.asked())
    for entry in tmp_path.glob("[0-9a-f]*"):
        data = entry.read_bytes()
        entry.write_bytes(data[: int(len(data) * keep)] or bytes(len(data)))
    assert contents(dataset) == expected
    assert 0 < len(server.asked()) <= 3 * n_requests
    assert contents(dataset) == expected


@pytest.mark.parametrize("keep", [0.0, 0.5])
@pytest.mark.parametrize("fault", ["ok", "whole"])
@pytest.mark.parametrize("n_workers", [0, 2])
def test_an_entry_cut_short_while_it_is_read_is_fetched_again(
    server: Server, served: TarSet, tmp_path: Path, fault: str, keep: float, n_workers: int
) -> None:
    """F41: cut in place while it is open."""
    dataset = remote(server, served, fault, cache=tmp_path, batch_size=2)
    options = {"prefetch_factor": 1} if n_workers else {}
    batches = iter(adq.Loader(dataset, num_workers=n_workers, **options))
    first = contents([next(batches)])
    cut_entries(tmp_path, keep)
    assert first + contents(batches) == contents(made(served, batch_size=2))


@pytest.mark.parametrize("packed", [False, True])
def test_a_damaged_whole_copy_is_fetched_again_in_a_scan(
    server: Server, served: TarSet, tmp_path: Path, packed: bool
) -> None:
    """F12, without plan and index."""
    urls, cache = urls_of(server, served), tmp_path / "cache"
    if packed:
        urls = [f"{tmp_path}/{Path(url).name}.gz" for url in served.urls]
        for url, plain in zip(urls, served.urls, strict=True):
            Path(url).write_bytes(gzip.compress(Path(plain).read_bytes()))
    expected = contents(adq.ShardDataset(urls, cache=cache))
    assert len(expected) == 42
    for entry in cache.glob("[0-9a-f]*"):
        entry.write_bytes(entry.read_bytes()[:-2000])
    assert contents(adq.ShardDataset(urls, cache=cache)) == expected


@pytest.mark.parametrize("cached", [False, True])
def test_a_shard_that_changed_on_the_server_is_an_error(server: Server, tmp_path: Path, cached: bool) -> None:
    tar_set = write_set(server.folder / "changing", [12])
    data = Path(tar_set.urls[0]).read_bytes()
    Path(tar_set.urls[0]).write_bytes(data.replace(b"text of k00003", b"test of k00003", 1))
    urls = urls_of(server, tar_set, folder="changing")
    with pytest.raises(adq.ShardError, match=r"shard t-000.tar, key 'k00003': bytes differ: found key"):
        list(adq.ShardDataset(urls, plan=tar_set.plan, cache=tmp_path if cached else None))


@pytest.mark.parametrize(
    ("fault", "text", "n_workers"),
    [
        ("404", r": not found \(404\)", 0),
        ("403", ": refused", 2),
        ("page", r", byte 0: not a tar file \(starts with b'<html>", 0),
        ("cut", ": the answer broke off", 0),
        ("stall", ": no answer in time", 0),
    ],
)
def test_what_cannot_be_read_ends_the_stream_without_the_url(
    server: Server, served: TarSet, fault: str, text: str, n_workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    """F11, S4."""
    server.cut = 10
    urls = [f"{url}?token=s3cret" for url in urls_of(server, served, fault)]
    timeout = 0.5 if fault == "stall" else 30.0
    dataset = adq.ShardDataset(urls, plan=served.plan, on_error="skip", timeout=timeout)
    samples = iter(adq.Loader(dataset, num_workers=n_workers))
    refused = pytest.raises(adq.ShardError, match=f"shard t-000.tar{text}")
    with caplog.at_level(logging.DEBUG), refused as error:
        list(samples)
    assert "s3cret" not in str(error.value) + caplog.text
    with pytest.raises(adq.LoaderClosed):
        next(samples)


def test_no_thread_and_no_file_is_left_behind(server: Server, served: TarSet, tmp_path: Path) -> None:
    def n_files() -> int:
        return len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0

    dataset = remote(server, served, cache=tmp_path / "c")
    list(dataset)
    before = n_files()
    for _ in range(3):
        list(dataset)
        stream = iter(dataset)
        next(stream)
        del stream
    gc.collect()  # a stream that is broken off is freed as any object is
    for thread in threading.enumerate():
        if thread.name.startswith("adq-fetch"):
            thread.join(300)
            assert not thread.is_alive()
    assert soon(lambda: n_files() <= before + 2)  # a library closes its connections when it comes to it


def test_all_samples_are_read_by_an_index_or_else_whole(
    server: Server, served: TarSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    urls, index = urls_of(server, served), tmp_path / "i.parquet"
    report = index_shards(urls, index)
    assert (report.shards, report.samples, report.scanned) == (7, 42, 7)
    assert report.bytes == sum(os.path.getsize(url) for url in served.urls)
    assert index_shards(urls, index).scanned == 0
    expected = contents(adq.ShardDataset(served.urls))
    server.asked()
    assert contents(adq.ShardDataset(urls, index=index)) == expected
    assert len(server.asked()) == 42
    for cache in (None, tmp_path / "cache"):
        dataset = adq.ShardDataset(urls, cache=cache)
        assert "7 remote shards are fetched whole to find their samples; make an index" in caplog.text
        assert contents(dataset) == expected
        server.asked()
        assert contents(dataset) == expected
        assert None not in [part for _, part in server.asked()], "none is fetched whole again"
        caplog.clear()


def test_resuming_near_the_end_reads_little(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F21, of a cache that starts empty."""
    monkeypatch.setattr("adq_wds.core.order.BLOCK_BYTES", 8 << 10)
    monkeypatch.setattr("adq_wds.stream.epoch_order.LANES", 4)
    tar_set = write_set(server.folder / "long", [300] * 4, keep=lambda i: i % 2 == 0)
    options: Options = {"plan": tar_set.plan, "shuffle": True, "batch_size": 1}
    urls = urls_of(server, tar_set, folder="long")

    def fetched() -> int:
        parts = [part.removeprefix("bytes=").split("-") for _, part in server.asked() if part]
        return sum(int(last) + 1 - int(first) for first, last in parts)

    loader = adq.Loader(adq.ShardDataset(urls, cache=tmp_path / "a", **options))
    batches = iter(loader)
    for _ in range(540):
        next(batches)
    state = loader.state_dict()
    rest = list(batches)
    whole = fetched()
    again = adq.Loader(adq.ShardDataset(urls, cache=tmp_path / "b", **options))
    again.load_state_dict(state)
    assert contents(again) == contents(rest)
    assert len(rest) == 60
    assert fetched() <= 0.15 * whole


@pytest.mark.parametrize("cached", [False, True])
def test_random_access_reads_remote_shards(
    server: Server, served: TarSet, tmp_path: Path, cached: bool
) -> None:
    view = remote(server, served, cache=tmp_path if cached else None).as_map()
    local = made(served).as_map()
    assert contents(view.__getitems__([27, 3, 3, -1])) == contents(local.__getitems__([27, 3, 3, -1]))
