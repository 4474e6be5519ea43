"""Is every entry whole, fetched once, its own, and gone when the bound says so, whatever processes and disks do? F12."""

import contextlib
import hashlib
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest

import adq_wds as adq
from adq_wds.remote.cache import Cache, as_cache
from tests.remote.conftest import Server
from tests.stream.conftest import write_set

FORK = multiprocessing.get_context("fork")


def content(key: str, n_bytes: int = 1000) -> bytes:
    """Bytes that only this key has."""
    return hashlib.shake_256(key.encode()).digest(n_bytes)


def writes(data: bytes) -> Callable[[BinaryIO], None]:
    def fill(file: BinaryIO) -> None:
        file.write(data)

    return fill


def get(cache: Cache, key: str, n_bytes: int = 1000) -> bytes:
    """The entry of a key, written if it is not there."""
    with cache.open(key, writes(content(key, n_bytes))) as file:
        return file.read()


def never(file: BinaryIO) -> None:
    raise AssertionError("filled again")


def entries(folder: Path) -> dict[str, int]:
    """Sizes of what is not hidden."""
    return {path.name: path.stat().st_size for path in folder.iterdir() if not path.name.startswith(".")}


def partials(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".partial-")]


def test_an_entry_is_filled_once_and_then_read(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "deep" / "folder")
    assert get(cache, "a") == content("a")
    with cache.open("a", never) as file:
        assert file.read() == content("a")
        assert not file.writable()
    assert list(entries(cache.path).values()) == [1000]
    assert not partials(cache.path)


def test_the_folder_and_its_files_are_the_owners_only(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c")
    get(cache, "a")
    assert cache.path.stat().st_mode & 0o077 == 0
    assert all((cache.path / name).stat().st_mode & 0o077 == 0 for name in entries(cache.path))


def test_names_hold_nothing_of_the_key(tmp_path: Path) -> None:
    get(Cache(tmp_path), "https://me:s3cret@host/a.tar?token=s3cret")
    for path in tmp_path.iterdir():
        assert "s3cret" not in path.name
        assert b"s3cret" not in path.read_bytes()


@pytest.mark.parametrize("fault", ["ok", "whole"])
def test_urls_with_one_base_name_never_meet(server: Server, tmp_path: Path, fault: str) -> None:
    """F12: other folder, other query, other user, other server's fault: each gets its own bytes."""
    sets = {name: write_set(server.folder / "one" / name, [5 + i]) for i, name in enumerate(("a", "b"))}
    wrong = 0
    for _ in range(2):
        for name, tar_set in sets.items():
            url = f"{server.url}/{fault}/one/{name}/t-000.tar"
            for each in (url, f"{url}?v=1", url.replace("http://", "http://me:pw@")):
                remote = list(adq.ShardDataset([each], plan=tar_set.plan, cache=tmp_path / "c", verify=False))
                local = list(adq.ShardDataset(tar_set.urls, plan=tar_set.plan))
                wrong += [s["txt"] for s in remote] != [s["txt"] for s in local]
    assert wrong == 0
    assert len(entries(tmp_path / "c")) == 6


def test_a_fill_that_raises_leaves_nothing_and_the_next_one_succeeds(tmp_path: Path) -> None:
    cache = Cache(tmp_path)

    def broken(file: BinaryIO) -> None:
        file.write(b"half")
        raise adq.ShardError("the answer broke off")

    for _ in range(2):
        with pytest.raises(adq.ShardError, match="the answer broke off"):
            cache.open("a", broken)
        assert not entries(tmp_path)
        assert not partials(tmp_path)
    assert get(cache, "a") == content("a")


def test_what_is_left_of_a_longer_partial_file_is_not_read(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    get(cache, "a")
    (name,) = entries(tmp_path)
    cache.drop("a")
    (tmp_path / f".partial-{name}").write_bytes(bytes(5000))
    assert get(cache, "a") == content("a")


def test_a_dropped_entry_is_filled_anew(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    get(cache, "a")
    cache.drop("a")
    cache.drop("never there")
    with cache.open("a", writes(b"other")) as file:
        assert file.read() == b"other"


def test_an_entry_without_bytes_is_filled_anew(tmp_path: Path) -> None:
    """A name may reach the disk before its bytes do when the machine fails."""
    cache = Cache(tmp_path)
    get(cache, "a")
    (name,) = entries(tmp_path)
    os.truncate(tmp_path / name, 0)
    assert get(cache, "a") == content("a")


def _slowly(folder: str, key: str, log: str, start: Any) -> None:
    """A process that wants an entry and notes if it had to fill it."""

    def fill(file: BinaryIO) -> None:
        with open(log, "a") as handle:
            handle.write(f"{os.getpid()}\n")
        for at in range(0, 1000, 100):
            file.write(content(key)[at : at + 100])
            file.flush()
            time.sleep(0.01)

    start.wait()
    with Cache(folder).open(key, fill) as file:
        assert file.read() == content(key)


def test_of_many_processes_that_want_an_entry_one_fills_it(tmp_path: Path) -> None:
    log, start = tmp_path / "log", FORK.Event()
    work = [
        FORK.Process(target=_slowly, args=(str(tmp_path / "c"), f"k{i % 2}", str(log), start))
        for i in range(12)
    ]
    for process in work:
        process.start()
    start.set()
    for process in work:
        process.join(30)
    assert [process.exitcode for process in work] == [0] * 12
    assert len(log.read_text().split()) == 2
    assert len(entries(tmp_path / "c")) == 2
    assert not partials(tmp_path / "c")


def test_of_many_threads_that_want_an_entry_one_fills_it(tmp_path: Path) -> None:
    filled: list[int] = []
    wrong: list[bool] = []
    cache = Cache(tmp_path)

    def fill(file: BinaryIO) -> None:
        filled.append(1)
        time.sleep(0.05)
        file.write(content("a"))

    def want() -> None:
        with cache.open("a", fill) as file:
            wrong.append(file.read() != content("a"))

    threads = [threading.Thread(target=want) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert (wrong, filled) == ([False] * 10, [1])


def test_one_that_waits_fills_when_the_one_it_waited_for_fails(tmp_path: Path) -> None:
    cache, begun, got = Cache(tmp_path), threading.Event(), []

    def broken(file: BinaryIO) -> None:
        file.write(b"half")
        begun.set()
        time.sleep(0.1)
        raise adq.ShardError("broke off")

    def want() -> None:
        begun.wait()
        got.append(get(cache, "a"))

    thread = threading.Thread(target=want)
    thread.start()
    with pytest.raises(adq.ShardError, match="broke off"):
        cache.open("a", broken)
    thread.join(20)
    assert got == [content("a")]


def test_a_process_forked_meanwhile_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the locks' files open too, for as long as it lives."""
    cache, children = Cache(tmp_path, 2500), []

    def fork(*ignored: Any) -> None:
        children.append(os.fork())
        if not children[-1]:
            time.sleep(60)
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

    waiting = threading.Thread(target=lambda: get(Cache(tmp_path), "a"), daemon=True)
    try:
        monkeypatch.setattr(os, "replace", replace_and_fork)
        cache.open("a", fill).close()
        monkeypatch.undo()
        other = threading.Thread(target=lambda: get(Cache(tmp_path), "b"), daemon=True)
        other.start()
        other.join(10)
        waiting.join(10)
        assert not other.is_alive()
        assert not waiting.is_alive()
        assert len(children) == 2
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


# ---- the bound


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    cache = Cache(tmp_path, max_bytes=10_000)
    for key in "abcdefghij":
        get(cache, key)
        time.sleep(0.005)
    get(cache, "a")  # used again
    time.sleep(0.005)
    get(cache, "k")
    filled = Counter()

    def fill(key: str) -> Callable[[BinaryIO], None]:
        def write(file: BinaryIO) -> None:
            filled[key] += 1
            raise adq.ShardError("not there")

        return write

    for key in "abcdefghijk":
        with contextlib.suppress(adq.ShardError):
            cache.open(key, fill(key)).close()
    assert sorted(filled) == ["b", "c"]  # to nine tenths of the bound
    assert sum(entries(tmp_path).values()) == 9000


def test_the_bound_itself_is_used(tmp_path: Path) -> None:
    cache = Cache(tmp_path, max_bytes=10_000)
    for key in "abcdefghij":
        get(cache, key)
    assert sum(entries(tmp_path).values()) == 10_000


def test_an_open_entry_stays_readable_when_it_goes(tmp_path: Path) -> None:
    cache = Cache(tmp_path, max_bytes=1500)
    with cache.open("a", writes(content("a"))) as file:
        get(cache, "b")
        assert list(entries(tmp_path).values()) == [1000]
        assert file.read() == content("a")
    assert get(cache, "b") == content("b")


def test_an_entry_beyond_the_bound_is_read_but_takes_nobodys_place(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = Cache(tmp_path, max_bytes=1500)
    get(cache, "a")
    assert get(cache, "large", 2000) == content("large", 2000)
    assert "2,000 bytes are not kept: more than max_bytes, 1,500" in caplog.text
    assert list(entries(tmp_path).values()) == [1000]
    assert not partials(tmp_path)
    cache.open("a", never).close()
    assert get(Cache(tmp_path, 2000), "large", 2000) == content("large", 2000)
    assert list(entries(tmp_path).values()) == [2000]


def test_an_entry_that_goes_at_once_is_read_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may need the room before this one has opened what it wrote."""
    replace = os.replace

    def replace_and_lose(old: Any, new: Any) -> None:
        replace(old, new)
        os.unlink(new)

    monkeypatch.setattr(os, "replace", replace_and_lose)
    assert get(Cache(tmp_path), "a") == content("a")


def test_files_that_are_not_the_caches_stay_and_do_not_count(tmp_path: Path) -> None:
    (tmp_path / "train-000.tar").write_bytes(bytes(5000))
    (tmp_path / "folder").mkdir()
    (tmp_path / ("0" * 63)).write_bytes(b"x")
    cache = Cache(tmp_path, max_bytes=2500)
    for key in "abcde":
        assert get(cache, key) == content(key)
    assert (tmp_path / "train-000.tar").stat().st_size == 5000
    assert (tmp_path / "folder").is_dir()
    assert (tmp_path / ("0" * 63)).exists()
    assert sum(path.stat().st_size for path in tmp_path.glob("[0-9a-f]" * 64)) == 2000


@pytest.mark.parametrize("count", [b"", b"nonsense", b"-5", b"1e9", b"\xff" * 40, b"9" * 40, b"12 34"])
def test_a_damaged_count_is_counted_anew(tmp_path: Path, count: bytes) -> None:
    cache = Cache(tmp_path, max_bytes=3000)
    for key in "abc":
        get(cache, key)
    (tmp_path / ".bytes").write_bytes(count)
    get(cache, "d")
    assert sum(entries(tmp_path).values()) == 2000
    assert (tmp_path / ".bytes").read_bytes() == b"2000"


def test_a_smaller_bound_holds_from_the_next_entry_on(tmp_path: Path) -> None:
    for key in "abcdefgh":
        get(Cache(tmp_path), key)
    get(Cache(tmp_path, max_bytes=2000), "i")
    assert sum(entries(tmp_path).values()) <= 2000


def _inserts(folder: str, seed: int, max_bytes: int) -> None:
    """Random entries of one process, of a set that all share."""
    rng = np.random.default_rng(seed)
    cache = Cache(folder, max_bytes)
    for _ in range(60):
        key = f"k{rng.integers(40)}"
        n_bytes = 200 + number_of(key) % 3000
        assert get(cache, key, n_bytes) == content(key, n_bytes)


def number_of(key: str) -> int:
    return int.from_bytes(content(key, 4), "big")


def test_the_bound_holds_with_many_processes_and_the_bytes_are_right(tmp_path: Path) -> None:
    work = [FORK.Process(target=_inserts, args=(str(tmp_path), seed, 20_000)) for seed in range(6)]
    for process in work:
        process.start()
    most = 0
    while any(process.is_alive() for process in work):
        most = max(most, sum(entries_now(tmp_path)))
        time.sleep(0.002)
    assert [process.exitcode for process in work] == [0] * 6
    assert 5000 < sum(entries(tmp_path).values()) <= 20_000
    assert most <= 20_000 + 3200  # the names are not read in one instant
    assert int((tmp_path / ".bytes").read_text()) >= sum(entries(tmp_path).values())
    assert not partials(tmp_path)


def entries_now(folder: Path) -> list[int]:
    """Sizes, while others write."""
    found = []
    for path in folder.glob("[0-9a-f]*"):
        with contextlib.suppress(FileNotFoundError):
            found.append(path.stat().st_size)
    return found


# ---- arguments


@pytest.mark.parametrize("max_bytes", [0, -1, True, 1.5, "1 GB", None])
def test_a_bound_is_a_number_of_bytes(max_bytes: Any) -> None:
    with pytest.raises(ValueError, match="max_bytes must be an integer >= 1, got"):
        Cache("c", max_bytes)


@pytest.mark.parametrize("folder", ["", None, 3, b"c"])
def test_a_folder_is_a_path(folder: Any) -> None:
    with pytest.raises(ValueError, match="the cache's folder must be a path, got"):
        Cache(folder)


def test_a_cache_is_named_by_its_folder_too(tmp_path: Path) -> None:
    assert as_cache(None) is None
    assert as_cache(str(tmp_path)) == Cache(str(tmp_path))
    assert as_cache(Cache(tmp_path, 5)) == Cache(tmp_path, 5)
    with pytest.raises(ValueError, match="cache must be a folder or a Cache, got a int"):
        as_cache(5)  # type: ignore[arg-type]


def test_a_cache_goes_to_a_worker(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 123)
    assert pickle.loads(pickle.dumps(cache)) == cache  # noqa: S301
