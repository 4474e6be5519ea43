"""Remote shards in the stream: the same samples in the same order, and only the kept bytes."""

import gc
import gzip
import logging
import multiprocessing
import os
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import adq_wds as adq
from adq_wds.reading import ranged
from adq_wds.remote.cache import Cache
from tests.remote.conftest import Server
from tests.stream.conftest import TarSet, ids, write_set

pytest.importorskip("obstore")
Options = dict[str, Any]
CONTENT = "txt", "cls"


@pytest.fixture(scope="module")
def served(running: Server) -> TarSet:
    """Seven shards in the server's folder."""
    return write_set(running.folder / "set", [9, 1, 14, 3, 2, 8, 5])


def urls_of(server: Server, tar_set: TarSet, fault: str = "ok") -> list[str]:
    return [f"{server.url}/{fault}/set/{Path(url).name}" for url in tar_set.urls]


def contents(samples: Any) -> list[tuple[str, ...]]:
    flat = [s for each in samples for s in (each if isinstance(each, list) else [each])]
    return [(s["__key__"], s["txt"], s["cls"]) for s in flat]


@pytest.mark.parametrize("fault", ["ok", "whole"])
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("options", [{}, {"shuffle": True, "seed": 3}, {"batch_size": 4, "shuffle": True}])
def test_a_remote_stream_is_the_local_one(
    server: Server,
    served: TarSet,
    tmp_path: Path,
    fault: str,
    cached: bool,
    options: Options,
) -> None:
    local = adq.ShardDataset(served.urls, plan=served.plan, **options)
    cache = tmp_path / "cache" if cached else None
    remote = adq.ShardDataset(urls_of(server, served, fault), plan=served.plan, cache=cache, **options)
    for _ in range(2):
        assert contents(remote) == contents(local)
    assert remote.epoch == local.epoch == 2


def test_urls_are_the_samples_urls(server: Server, served: TarSet) -> None:
    urls = urls_of(server, served)
    found = list(adq.ShardDataset(urls, plan=served.plan))
    assert {sample["__url__"] for sample in found} <= set(urls)
    assert ids(found) == served.kept


def test_without_a_cache_each_kept_sample_is_one_request(server: Server, served: TarSet) -> None:
    list(adq.ShardDataset(urls_of(server, served), plan=served.plan))
    plan = adq.load_plan(served.plan)
    expected = Counter(
        (shard.name, f"bytes={start}-{start + n - 1}")
        for shard in plan
        for _, _, start, n, _ in shard.spans.take(shard.kept.nonzero()[0]).rows()
    )
    assert Counter(server.asked()) == expected


def test_with_a_cache_ranges_are_merged_over_small_gaps_and_asked_for_once(
    server: Server,
    served: TarSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ranged, "MAX_GAP", 1024)
    dataset = adq.ShardDataset(
        urls_of(server, served), plan=served.plan, shuffle=True, cache=tmp_path / "cache"
    )
    first = contents(dataset)
    asked = Counter(server.asked())
    expected: Counter[tuple[str, str]] = Counter()
    for shard in adq.load_plan(served.plan):
        ends = -10_000
        ranges: list[list[int]] = []  # the slow way, span by span
        for _, _, start, n, _ in shard.spans.take(shard.kept.nonzero()[0]).rows():
            if start - ends > 1024:
                ranges.append([start, start + n])
            ends = ranges[-1][1] = start + n
        expected.update((shard.name, f"bytes={a}-{b - 1}") for a, b in ranges)
    assert asked == expected
    assert set(asked.values()) == {1}
    assert Counter(contents(dataset)) == Counter(first)
    assert server.asked() == []


@pytest.mark.parametrize(
    ("context", "used_before"),
    [("fork", False), ("fork", True), ("spawn", True), ("forkserver", True)],
)
def test_workers_read_remote_shards(
    server: Server,
    served: TarSet,
    tmp_path: Path,
    context: str,
    used_before: bool,
) -> None:
    """Forked workers too, also where this process has read remote shards itself."""
    dataset = adq.ShardDataset(
        urls_of(server, served), plan=served.plan, shuffle=True, batch_size=4, cache=tmp_path / "cache"
    )
    local = adq.ShardDataset(served.urls, plan=served.plan, shuffle=True, batch_size=4)
    if used_before:
        list(adq.ShardDataset(urls_of(server, served), plan=served.plan))
    loader = adq.Loader(dataset, num_workers=2, multiprocessing_context=multiprocessing.get_context(context))
    assert contents(loader) == contents(local)


def test_workers_share_the_cache(server: Server, served: TarSet, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    dataset = adq.ShardDataset(
        urls_of(server, served), plan=served.plan, shuffle=True, batch_size=2, cache=cache
    )
    list(adq.Loader(dataset, num_workers=2))
    asked = [each for each in server.asked() if each[1]]  # fsspec asks for sizes besides
    assert max(Counter(asked).values()) == 1


def test_a_damaged_entry_is_fetched_again_once(server: Server, served: TarSet, tmp_path: Path) -> None:
    """F12."""
    for fault in ("ok", "whole"):
        cache = tmp_path / fault
        dataset = adq.ShardDataset(urls_of(server, served, fault), plan=served.plan, cache=cache)
        expected = contents(dataset)
        n_requests = len(server.asked())
        for entry in cache.iterdir():
            if not entry.name.startswith("."):
                data = entry.read_bytes()
                entry.write_bytes(bytes(len(data)) if entry.name[0] < "8" else data[: len(data) // 2])
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
    urls, cache = urls_of(server, served, fault), tmp_path / "cache"
    options: Options = {"plan": served.plan, "batch_size": 2, "shuffle": True, "seed": 1}
    expected = contents(adq.ShardDataset(served.urls, **options))
    kept: Options = {"prefetch_factor": 1} if n_workers else {}
    batches = iter(adq.Loader(adq.ShardDataset(urls, cache=cache, **options), num_workers=n_workers, **kept))
    got = contents([next(batches)])
    for entry in cache.iterdir():
        if not entry.name.startswith("."):
            os.truncate(entry, int(entry.stat().st_size * keep))
    assert got + contents(batches) == expected


@pytest.mark.parametrize("packed", [False, True])
def test_a_damaged_whole_copy_is_fetched_again_when_samples_are_looked_for(
    server: Server, served: TarSet, tmp_path: Path, packed: bool
) -> None:
    """F12, without plan and index."""
    urls = urls_of(server, served)
    if packed:
        urls = [f"{tmp_path}/{Path(url).name}.gz" for url in served.urls]
        for url, plain in zip(urls, served.urls, strict=True):
            Path(url).write_bytes(gzip.compress(Path(plain).read_bytes()))
    cache = tmp_path / "cache"
    expected = contents(adq.ShardDataset(urls, cache=cache))
    assert len(expected) == 42
    for entry in cache.iterdir():
        if not entry.name.startswith("."):
            entry.write_bytes(entry.read_bytes()[:-2000])
    assert contents(adq.ShardDataset(urls, cache=cache)) == expected


def test_a_shard_that_changed_on_the_server_is_an_error_with_shard_and_key(
    server: Server,
    tmp_path: Path,
) -> None:
    tar_set = write_set(server.folder / "changing", [12])
    data = bytearray(Path(tar_set.urls[0]).read_bytes())
    url = f"{server.url}/ok/changing/{Path(tar_set.urls[0]).name}"
    at = data.index(b"text of k00003")
    data[at] ^= 1
    Path(tar_set.urls[0]).write_bytes(data)
    for cache in (None, tmp_path / "cache"):
        with pytest.raises(adq.ShardError, match=r"shard t-000.tar, key 'k00003': bytes differ: found key"):
            list(adq.ShardDataset([url], plan=tar_set.plan, cache=cache))


@pytest.mark.parametrize(
    ("fault", "text", "n_workers"),
    [
        ("404", r"shard t-000.tar: not found \(404\)", 0),
        ("403", r"shard t-000.tar: refused", 2),
        ("page", r"shard t-000.tar, byte 0: not a tar file \(starts with b'<html>", 0),
        ("cut", r"shard t-000.tar: the answer broke off", 0),
    ],
)
def test_what_cannot_be_read_ends_the_stream_without_the_url(
    server: Server,
    served: TarSet,
    fault: str,
    text: str,
    n_workers: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """F11, S4."""
    server.cut = 10
    urls = [f"{url}?token=s3cret" for url in urls_of(server, served, fault)]
    dataset = adq.ShardDataset(urls, plan=served.plan, on_error="skip")
    loader = adq.Loader(dataset, num_workers=n_workers)
    samples = iter(loader)
    with caplog.at_level(logging.DEBUG), pytest.raises(adq.ShardError, match=text) as error:
        list(samples)
    assert "s3cret" not in str(error.value)
    assert "s3cret" not in caplog.text
    with pytest.raises(adq.LoaderClosed):
        next(samples)


def test_no_thread_and_no_file_is_left_behind(server: Server, served: TarSet, tmp_path: Path) -> None:
    dataset = adq.ShardDataset(urls_of(server, served), plan=served.plan, shuffle=True, cache=tmp_path / "c")
    list(dataset)
    before = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
    for _ in range(3):
        list(dataset)
        stream = iter(dataset)
        next(stream)
        del stream
    gc.collect()  # a stream that is broken off is freed as any object is
    for thread in threading.enumerate():
        if thread.name.startswith("adq-fetch"):
            thread.join(5)
            assert not thread.is_alive()
    if before:
        assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_all_samples_of_remote_shards_are_read_by_an_index_or_else_whole(
    server: Server,
    served: TarSet,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from adq_wds.jobs.index import index_shards

    urls = urls_of(server, served)
    report = index_shards(urls, tmp_path / "i.parquet")
    assert (report.shards, report.samples, report.scanned) == (7, 42, 7)
    assert report.bytes == sum(os.path.getsize(url) for url in served.urls)
    assert index_shards(urls, tmp_path / "i.parquet").scanned == 0
    expected = contents(adq.ShardDataset(served.urls))
    server.asked()
    assert contents(adq.ShardDataset(urls, index=tmp_path / "i.parquet")) == expected
    assert len(server.asked()) == 42
    for cache in (None, tmp_path / "cache"):
        with caplog.at_level(logging.WARNING, logger="adq_wds"):
            dataset = adq.ShardDataset(urls, cache=cache)
        assert "7 remote shards are fetched whole to find their samples; make an index" in caplog.text
        assert contents(dataset) == expected
        server.asked()
        assert contents(dataset) == expected
        assert (
            len([name for name, each in server.asked() if each is None]) == 0
        )  # none is fetched whole again


def test_resuming_near_the_end_fetches_little(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F21, of a cache that starts empty."""
    monkeypatch.setattr("adq_wds.core.order.BLOCK_BYTES", 8 << 10)
    tar_set = write_set(server.folder / "long", [300] * 4, keep=lambda i: i % 2 == 0)
    urls = [f"{server.url}/ok/long/{Path(url).name}" for url in tar_set.urls]

    def fetched() -> int:
        pairs = [each.removeprefix("bytes=").split("-") for _, each in server.asked() if each]
        return sum(int(last) + 1 - int(first) for first, last in pairs)

    monkeypatch.setattr("adq_wds.stream.epoch_order.LANES", 4)
    options: Options = {"plan": tar_set.plan, "shuffle": True, "batch_size": 1}
    dataset = adq.ShardDataset(urls, cache=tmp_path / "a", **options)
    loader = adq.Loader(dataset)
    batches = iter(loader)
    first = [next(batches) for _ in range(540)]
    state = loader.state_dict()
    rest = list(batches)
    whole = fetched()
    again = adq.Loader(adq.ShardDataset(urls, cache=tmp_path / "b", **options))
    again.load_state_dict(state)
    assert contents(again) == contents(rest)
    assert len(first) + len(rest) == 600
    assert fetched() <= 0.15 * whole


def test_a_stall_is_an_error_at_the_timeout(server: Server, served: TarSet) -> None:
    dataset = adq.ShardDataset(urls_of(server, served, "stall"), plan=served.plan, timeout=0.5)
    with pytest.raises(adq.ShardError, match=r"shard t-000.tar: no answer in time"):
        next(iter(dataset))


def test_random_access_reads_remote_shards(server: Server, served: TarSet, tmp_path: Path) -> None:
    for cache in (None, tmp_path / "cache"):
        view = adq.ShardDataset(urls_of(server, served), plan=served.plan, cache=cache).as_map()
        local = adq.ShardDataset(served.urls, plan=served.plan).as_map()
        assert contents(view.__getitems__([27, 3, 3, -1])) == contents(local.__getitems__([27, 3, 3, -1]))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"cache": 3}, "cache must be a folder or a Cache, got a int"),
        ({"timeout": 0}, r"timeout must be a number of seconds > 0, got 0"),
        ({"storage_options": "x"}, "storage_options must be a dict, got a str"),
    ],
)
def test_wrong_options_are_refused(served: TarSet, options: Options, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        adq.ShardDataset(served.urls, plan=served.plan, **options)
