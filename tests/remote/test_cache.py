"""Is every entry whole, fetched once, its own, and gone when the bound says so, whatever processes and disks do? F12."""

import contextlib
import hashlib
import multiprocessing
import os
import pickle
import signal
import threading
import time
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest

import adq_wds as adq
from adq_wds.remote.cache import Cache, as_cache
from tests.conftest import Caplog, MonkeyPatch
from tests.remote.conftest import Server
from tests.stream.conftest import contents, write_set

FORK = multiprocessing.get_context("fork")


def content(key: str, n_bytes: int = 1000) -> bytes:
    """Bytes that only this key has."""
    return hashlib.shake_256(key.encode()).digest(n_bytes)


def get(cache: Cache, key: str, n_bytes: int = 1000) -> bytes:
    """The entry of a key, written if it is not there."""
    with cache.open(key, lambda file: file.write(content(key, n_bytes))) as file:
        return file.read()


def never(file: BinaryIO) -> None:
    raise AssertionError("filled again")


def fails(file: BinaryIO) -> None:
    file.write(b"half")
    raise adq.ShardError("the answer broke off")


def entries(folder: Path) -> dict[str, int]:
    """Sizes of the entries there, while others may write."""
    sizes = {}
    for path in folder.glob("[0-9a-f]" * 64):
        with contextlib.suppress(FileNotFoundError):
            sizes[path.name] = path.stat().st_size
    return sizes


def n_bytes_of(folder: Path) -> int:
    return sum(entries(folder).values())


def partials(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".partial-")]


def join(work: list[Any]) -> None:
    """Wait for processes, which must end well, or threads."""
    for each in work:
        each.join(300)
        assert not each.is_alive()
        assert getattr(each, "exitcode", 0) == 0


def test_an_entry_is_filled_once_and_then_read(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "deep" / "folder")
    assert get(cache, "a") == content("a")
    with cache.open("a", never) as file:
        assert file.read() == content("a")
        assert not file.writable()
    assert list(entries(cache.path).values()) == [1000]
    assert not partials(cache.path)


def test_the_folder_is_the_owners_only_and_names_no_key(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c")
    get(cache, "https://me:s3cret@host/a.tar?token=s3cret")
    for path in (cache.path, *cache.path.iterdir()):
        assert path.name.startswith(".bytes") or path.stat().st_mode & 0o077 == 0
        assert "s3cret" not in path.name
        assert path.is_dir() or b"s3cret" not in path.read_bytes()


@pytest.mark.parametrize("fault", ["ok", "whole"])
def test_urls_with_one_base_name_never_meet(server: Server, tmp_path: Path, fault: str) -> None:
    """F12: other folder, other query, other user, other server's fault: each gets its own bytes."""
    sets = {name: write_set(server.folder / "one" / name, [5 + i]) for i, name in enumerate(("a", "b"))}
    for _ in range(2):
        for name, tar_set in sets.items():
            url = f"{server.url}/{fault}/one/{name}/t-000.tar"
            local = contents(adq.ShardDataset(tar_set.urls, plan=tar_set.plan))
            for each in (url, f"{url}?v=1", url.replace("http://", "http://me:pw@")):
                remote = adq.ShardDataset([each], plan=tar_set.plan, cache=tmp_path / "c", verify=False)
                assert contents(remote) == local
    assert len(entries(tmp_path / "c")) == 6


def test_a_fill_that_raises_leaves_nothing(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    for _ in range(2):
        with pytest.raises(adq.ShardError, match="the answer broke off"):
            cache.open("a", fails)
        assert not entries(tmp_path)
        assert not partials(tmp_path)
    assert get(cache, "a") == content("a")


@pytest.mark.parametrize("left", ["a longer partial file", "nothing", "an entry without bytes"])
def test_an_entry_that_is_not_whole_is_filled_anew(tmp_path: Path, left: str) -> None:
    """A name may reach the disk before its bytes do when the machine fails."""
    cache = Cache(tmp_path)
    get(cache, "a")
    (name,) = entries(tmp_path)
    if left == "an entry without bytes":
        os.truncate(tmp_path / name, 0)
    else:
        cache.drop("a")
        cache.drop("never there")
    if left == "a longer partial file":
        (tmp_path / f".partial-{name}").write_bytes(bytes(5000))
    with cache.open("a", lambda file: file.write(b"other")) as file:
        assert file.read() == b"other"


def _slowly(folder: str, key: str, log: str, start: Any) -> None:
    """Want an entry, and note if it had to be filled."""

    def fill(file: BinaryIO) -> None:
        with open(log, "a") as handle:
            handle.write(f"{os.getpid()}\n")
        for i in range(0, 1000, 100):
            file.write(content(key)[i : i + 100])
            file.flush()
            time.sleep(0.01)

    start.wait()
    with Cache(folder).open(key, fill) as file:
        assert file.read() == content(key)


@pytest.mark.parametrize("kind", [FORK.Process, threading.Thread])
def test_of_many_that_want_an_entry_one_fills_it(tmp_path: Path, kind: Any) -> None:
    log, start, folder = tmp_path / "log", FORK.Event(), tmp_path / "c"
    work = [kind(target=_slowly, args=(str(folder), f"k{i % 2}", str(log), start)) for i in range(12)]
    for each in work:
        each.start()
    start.set()
    join(work)
    assert len(log.read_text().split()) == 2
    assert len(entries(folder)) == 2
    assert not partials(folder)


def test_one_that_waits_fills_when_the_other_fails(tmp_path: Path) -> None:
    cache, begun, got = Cache(tmp_path), threading.Event(), []

    def broken(file: BinaryIO) -> None:
        begun.set()
        time.sleep(0.1)
        fails(file)

    def want() -> None:
        begun.wait()
        got.append(get(cache, "a"))

    thread = threading.Thread(target=want)
    thread.start()
    with pytest.raises(adq.ShardError, match="broke off"):
        cache.open("a", broken)
    join([thread])
    assert got == [content("a")]


def test_a_process_forked_meanwhile_holds_nobody_up(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    """It has the locks' files open too, for as long as it lives."""
    cache, children = Cache(tmp_path, 2500), []

    def fork() -> None:
        children.append(os.fork())
        if not children[-1]:
            time.sleep(600)
            os._exit(0)

    def fill(file: BinaryIO) -> None:
        fork()  # while the entry is locked
        waiting.start()
        time.sleep(0.3)
        file.write(content("a"))

    replace = os.replace

    def replace_and_fork(*paths: Any) -> None:
        fork()  # while the count is
        replace(*paths)

    waiting, other = (
        threading.Thread(target=lambda key=key: get(Cache(tmp_path), key), daemon=True) for key in "ab"
    )
    try:
        monkeypatch.setattr(os, "replace", replace_and_fork)
        cache.open("a", fill).close()
        monkeypatch.undo()
        other.start()
        join([other, waiting])
        assert len(children) == 2
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


# ---- the bound


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    cache = Cache(tmp_path, max_bytes=10_000)
    names = {}
    for i, key in enumerate("abcdefghij"):
        before = set(entries(tmp_path))
        get(cache, key)
        (names[key],) = set(entries(tmp_path)) - before
        os.utime(tmp_path / names[key], (i, i))
    assert n_bytes_of(tmp_path) == 10_000, "the bound itself is used"
    get(cache, "a")  # used again
    get(cache, "k")
    assert {names[key] for key in "bc"} == set(names.values()) - set(entries(tmp_path))
    assert n_bytes_of(tmp_path) == 9000, "to nine tenths of the bound"


def test_an_open_entry_stays_readable_when_it_goes(tmp_path: Path) -> None:
    cache = Cache(tmp_path, max_bytes=1500)
    get(cache, "a")
    with cache.open("a", never) as file:
        get(cache, "b")
        assert list(entries(tmp_path).values()) == [1000]
        assert file.read() == content("a")
    assert get(cache, "b") == content("b")


def test_an_entry_beyond_the_bound_is_read_and_not_kept(tmp_path: Path, caplog: Caplog) -> None:
    cache = Cache(tmp_path, max_bytes=1500)
    get(cache, "a")
    assert get(cache, "large", 2000) == content("large", 2000)
    assert "2,000 bytes are not kept: more than max_bytes, 1,500" in caplog.text
    assert list(entries(tmp_path).values()) == [1000]
    assert not partials(tmp_path)
    cache.open("a", never).close()
    assert get(Cache(tmp_path, 2000), "large", 2000) == content("large", 2000)
    assert list(entries(tmp_path).values()) == [2000]


def test_an_entry_that_goes_at_once_is_read_all_the_same(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    """Another process may need the room before this one has opened what it wrote."""
    replace = os.replace

    def replace_and_lose(old: Any, new: Any) -> None:
        replace(old, new)
        os.unlink(new)

    monkeypatch.setattr(os, "replace", replace_and_lose)
    assert get(Cache(tmp_path), "a") == content("a")


def test_files_that_are_not_the_caches_stay_and_do_not_count(tmp_path: Path) -> None:
    others = [tmp_path / name for name in ("train-000.tar", "0" * 63)]
    for path in others:
        path.write_bytes(bytes(5000))
    (tmp_path / "folder").mkdir()
    cache = Cache(tmp_path, max_bytes=2500)
    for key in "abcde":
        assert get(cache, key) == content(key)
    assert [path.stat().st_size for path in others] == [5000] * 2
    assert (tmp_path / "folder").is_dir()
    assert n_bytes_of(tmp_path) == 2000


@pytest.mark.parametrize("count", [b"", b"nonsense", b"-5", b"1e9", b"\xff" * 40, b"9" * 40, b"12 34"])
def test_a_damaged_count_is_counted_anew(tmp_path: Path, count: bytes) -> None:
    cache = Cache(tmp_path, max_bytes=3000)
    for key in "abc":
        get(cache, key)
    (tmp_path / ".bytes").write_bytes(count)
    get(cache, "d")
    assert n_bytes_of(tmp_path) == 2000
    assert (tmp_path / ".bytes").read_bytes() == b"2000"


def test_a_smaller_bound_holds_from_the_next_entry_on(tmp_path: Path) -> None:
    for key in "abcdefgh":
        get(Cache(tmp_path), key)
    get(Cache(tmp_path, max_bytes=2000), "i")
    assert n_bytes_of(tmp_path) <= 2000


def _inserts(folder: str, seed: int, max_bytes: int) -> None:
    """Random entries of one process, of a set that all share."""
    rng = np.random.default_rng(seed)
    cache = Cache(folder, max_bytes)
    for _ in range(60):
        key = f"k{rng.integers(40)}"
        n_bytes = 200 + int.from_bytes(content(key, 4), "big") % 3000
        assert get(cache, key, n_bytes) == content(key, n_bytes)


def test_the_bound_holds_with_many_processes(tmp_path: Path) -> None:
    work = [FORK.Process(target=_inserts, args=(str(tmp_path), seed, 20_000)) for seed in range(6)]
    for process in work:
        process.start()
    most = 0
    while any(process.is_alive() for process in work):
        most = max(most, n_bytes_of(tmp_path))
        time.sleep(0.002)
    join(work)
    assert 5000 < n_bytes_of(tmp_path) <= 20_000
    assert most <= 20_000 + 3200  # the names are not read in one instant
    assert int((tmp_path / ".bytes").read_text()) >= n_bytes_of(tmp_path)
    assert not partials(tmp_path)


# ---- arguments


@pytest.mark.parametrize("max_bytes", [0, -1, True, 1.5, "1 GB", None])
def test_a_bound_is_a_number_of_bytes(max_bytes: Any) -> None:
    with pytest.raises(ValueError, match="max_bytes must be an integer >= 1, got"):
        Cache("c", max_bytes)


@pytest.mark.parametrize("folder", ["", None, 3, b"c"])
def test_a_folder_is_a_path(folder: Any) -> None:
    with pytest.raises(ValueError, match="the cache's folder must be a path, got"):
        Cache(folder)


def test_a_cache_is_named_by_its_folder_and_goes_to_a_worker(tmp_path: Path) -> None:
    assert as_cache(None) is None
    assert as_cache(str(tmp_path)) == Cache(str(tmp_path))
    cache = Cache(tmp_path, 5)
    assert as_cache(cache) == pickle.loads(pickle.dumps(cache)) == cache  # noqa: S301 - our own bytes
