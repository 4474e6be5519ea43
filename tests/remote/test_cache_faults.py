"""What do killed processes, full disks and damaged counts leave of the cache? Nothing that is ever read. F12."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adq_wds as adq
from adq_wds.remote.cache import Cache
from tests.remote.test_cache import FORK, content, entries, get, n_bytes_of, never, partials

# ---- processes that are killed


def test_an_orphan_goes_when_room_is_made_and_a_living_stays(tmp_path: Path) -> None:
    cache = Cache(tmp_path, max_bytes=1500)
    orphan = tmp_path / (".partial-" + "0" * 64)
    living = tmp_path / (".partial-" + "1" * 64)
    orphan.write_bytes(bytes(100))
    with living.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        get(cache, "a")
        get(cache, "b")
        assert partials(tmp_path) == [living.name]


WRITER = """
import hashlib, sys, time
from adq_wds.remote.cache import Cache
folder, key = sys.argv[1:]
data = hashlib.shake_256(key.encode()).digest(200_000)
def fill(file):
    print("filling", flush=True)
    for at in range(0, len(data), 1000):
        file.write(data[at : at + 1000])
        file.flush()
        time.sleep(0.0003)
with Cache(folder, 1_000_000).open(key, fill) as file:
    assert file.read() == data
print("done", flush=True)
"""


@pytest.mark.parametrize("n_kills", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_a_kill_while_an_entry_is_fetched_costs_only_that(tmp_path: Path, n_kills: int) -> None:
    """F12: whatever stands there afterwards, the bytes are right."""
    rng = np.random.default_rng(n_kills)
    for i in range(n_kills):
        key = f"k{i}"
        command = [sys.executable, "-c", WRITER, str(tmp_path), key]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "filling\n"
        time.sleep(rng.random() * 0.1)
        process.kill()
        finished = "done" in process.stdout.read()
        process.wait()
        process.stdout.close()
        whole = content(key, 200_000)
        for path in tmp_path.glob("[0-9a-f]*"):
            assert path.stat().st_size == 200_000
        if finished:
            Cache(tmp_path, 1_000_000).open(key, never).close()
        assert get(Cache(tmp_path, 1_000_000), key, 200_000) == whole
    assert n_bytes_of(tmp_path) <= 1_000_000


def _is_killed_when_it_has_named_its_entry(folder: str) -> None:
    replace = os.replace

    def last(*paths: Any) -> None:
        replace(*paths)
        os.kill(os.getpid(), signal.SIGKILL)

    os.replace = last  # this process is its own
    get(Cache(folder, 2500), "b")


def test_a_kill_after_an_entry_got_its_name_keeps_the_count(tmp_path: Path) -> None:
    cache = Cache(tmp_path, max_bytes=2500)
    get(cache, "a")
    process = FORK.Process(target=_is_killed_when_it_has_named_its_entry, args=(str(tmp_path),))
    process.start()
    process.join(300)
    assert process.exitcode == -signal.SIGKILL
    cache.open("b", never).close()
    for key in "cdefg":
        get(cache, key)
        assert n_bytes_of(tmp_path) <= 2500


# ---- disks that refuse

FULL = """
import resource, signal, sys
from adq_wds.errors import AdqError
from adq_wds.remote.cache import Cache
folder, at = sys.argv[1], int(sys.argv[2])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
cache = Cache(folder)
cache.open("before", lambda file: file.write(b"x" * 10)).close()
resource.setrlimit(resource.RLIMIT_FSIZE, (at, at))
try:
    cache.open("a", lambda file: file.write(bytes(100_000)))
    print("none")
except AdqError as error:
    print(error)
print(cache.open("before", None).read() == b"x" * 10)
"""


@pytest.mark.parametrize("at", [0, 1, 50_000, 99_999])
def test_a_full_disk_is_said_and_breaks_no_entry(tmp_path: Path, at: int) -> None:
    command = [sys.executable, "-c", FULL, str(tmp_path), str(at)]
    out = subprocess.run(command, capture_output=True, text=True, timeout=900, check=True).stdout
    text = f"cache {tmp_path}: no space left: give another folder, or a cache with a smaller bound"
    assert out.splitlines() == [text, "True"]
    assert list(entries(tmp_path).values()) == [10]
    assert not partials(tmp_path)
    assert get(Cache(tmp_path), "a") == content("a")


@pytest.mark.parametrize(
    ("kind", "text"),
    [("a file", "File exists"), ("below a file", "Not a directory"), ("denied", "Permission denied")],
)
def test_an_unwritable_folder_is_said(
    tmp_path: Path, kind: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "c"
    if kind == "denied":  # by a system that would not refuse its superuser

        def denied(*args: Any, **options: Any) -> int:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(os, "open", denied)
    else:
        folder.write_text("a file")
        folder = folder if kind == "a file" else folder / "below"
    with pytest.raises(adq.AdqError, match=f"cache {folder}: {text}"):
        get(Cache(folder), "a")
