"""Who holds a lease is judged by heartbeats and one's own clock, whatever lies in the folder."""

import os
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

import adq_wds as adq
from adq_wds.engines import participant
from adq_wds.engines.lease import LocalLeases, lease_bytes, process_file, task_file
from adq_wds.engines.participant import PATIENCE, Participant
from adq_wds.files import lock
from adq_wds.remote.leases import MAX_BYTES

BEAT = 1000.0  # no heart beats by itself in these tests
TASK = "a/train 1.tar"


class Clock:
    """The observer's monotonic clock; sleepers wait for nothing."""

    def __init__(self) -> None:
        self.now = 5.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(participant, "time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


@pytest.fixture
def store(tmp_path: Path) -> LocalLeases:
    return LocalLeases(tmp_path / ".leases")


def taking_part(store: LocalLeases, job: str = "embed 1") -> Participant:
    return Participant(store, job, beat=BEAT)


def killed(store: LocalLeases, *tasks: str, job: str = "embed 1") -> Participant:
    """A process that died with the leases of some tasks."""
    dead = taking_part(store, job)
    store.create(process_file(dead.holder), lease_bytes({"job": job, "beat": 7, "pid": 1, "host": "node"}))
    assert all(dead.claim(task) for task in tasks)
    return dead


def beat(store: LocalLeases, of: Participant, n: int, job: str = "embed 1") -> None:
    store.write(process_file(of.holder), lease_bytes({"job": job, "beat": n, "pid": 1, "host": "node"}))


def test_one_of_two_has_a_lease_until_it_is_released(store: LocalLeases, tmp_path: Path) -> None:
    with taking_part(store) as a, taking_part(store) as b:
        assert a.claim(TASK)
        assert not b.claim(TASK)
        assert b.claim("other")
        a.release(TASK)
        assert b.claim(TASK)
        b.release(TASK)
        assert not (tmp_path / ".leases" / task_file(TASK)).exists()
    assert os.listdir(tmp_path) == []


def test_of_many_threads_one_gets_a_lease(store: LocalLeases) -> None:
    others = [taking_part(store) for _ in range(8)]
    claims: list[bool] = []
    threads = [threading.Thread(target=lambda p=p: claims.append(p.claim(TASK))) for p in others]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claims) == [False] * 7 + [True]


@pytest.mark.parametrize("date", [0, 1e9, 4e9], ids=["1970", "2001", "2096"])
def test_a_dead_holder_is_known_by_my_clock_and_no_date(
    store: LocalLeases, clock: Clock, date: float
) -> None:
    dead = killed(store, TASK, "another")
    folder = Path(str(store))
    for name in store.names():
        os.utime(folder / name, (date, date))
    with taking_part(store) as me:
        assert not me.claim(TASK)
        clock.now += PATIENCE * BEAT - 1
        assert not me.claim(TASK)
        clock.now += 1
        assert me.claim(TASK)
        assert process_file(dead.holder) not in store.names()
        assert me.claim("another")  # one look was enough for all leases of the dead
    assert not folder.exists()


@pytest.mark.parametrize("date", [0, 4e9], ids=["1970", "2096"])
def test_a_living_holder_keeps_its_lease_whatever_its_clock_says(
    store: LocalLeases, clock: Clock, date: float
) -> None:
    other = killed(store, TASK)
    with taking_part(store) as me:
        for n in range(20):
            clock.now += PATIENCE * BEAT
            beat(store, other, n)
            os.utime(Path(str(store)) / process_file(other.holder), (date, date))
            assert not me.claim(TASK)


def test_who_was_taken_for_dead_goes_on_and_takes_no_lease_away(store: LocalLeases, clock: Clock) -> None:
    slow = killed(store, TASK)
    with taking_part(store) as me:
        me.claim(TASK)
        clock.now += PATIENCE * BEAT
        assert me.claim(TASK)
        slow.release(TASK)
        assert not slow.claim(TASK)
        assert slow.claim("another")
        beat(store, slow, 8)
        slow.__exit__(None, None, None)
        assert set(store.names()) == {process_file(me.holder), task_file(TASK)}


def test_what_died_is_swept_up_by_who_looked_long_enough(
    store: LocalLeases, clock: Clock, tmp_path: Path
) -> None:
    killed(store, "a", "b")
    with taking_part(store):
        clock.now += PATIENCE * BEAT
    assert os.listdir(tmp_path) == []


HOSTILE = {
    "nothing": b"",
    "no JSON": b"\x80{",
    "deep": b"[" * 4000,
    "a list": b"[1]",
    "no holder": b'{"holder":7}',
    "a path": b'{"holder":"../../../etc/passwd"}',
    "long": b'{"holder":"0123456789abcdef"}' + b" " * 2**20,
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_damaged_lease_is_waited_for_and_taken_over(store: LocalLeases, clock: Clock, data: bytes) -> None:
    with taking_part(store) as me:
        store.write(task_file(TASK), data)
        assert len(store.read(task_file(TASK)) or b"") <= MAX_BYTES + 1
        assert not me.claim(TASK)
        clock.now += PATIENCE * BEAT
        assert me.claim(TASK)


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_what_is_no_file_is_never_opened(store: LocalLeases, clock: Clock, tmp_path: Path, kind: str) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(lease_bytes({"holder": "0" * 16}))
    with taking_part(store) as me:
        path = tmp_path / ".leases" / task_file(TASK)
        {"link": lambda: path.symlink_to(secret), "pipe": lambda: os.mkfifo(path), "folder": path.mkdir}[
            kind
        ]()
        assert not me.claim(TASK)
        clock.now += PATIENCE * BEAT
        if kind == "folder":
            with pytest.raises(adq.AdqError, match=f"cannot keep leases in {path}: "):
                me.claim(TASK)
            path.rmdir()
        assert me.claim(TASK)
    assert secret.exists()


def test_task_names_make_safe_file_names() -> None:
    names = ["../../etc", "a/b", "a-b", "x" * 300, "é\n\x00", ""]
    files = [task_file(name) for name in names]
    assert len(set(files)) == len(names)
    assert all(
        file.isascii() and file.isprintable() and "/" not in file and len(file) < 140 for file in files
    )


def test_a_living_other_job_is_refused_by_name(
    store: LocalLeases, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = killed(store, TASK, job="embed 2")
    me = taking_part(store)
    beats = iter(range(8, 20))
    monkeypatch.setattr(me, "_end", Waits(lambda: beat(store, other, next(beats), "embed 2")))
    with (
        pytest.raises(
            adq.AdqError, match=r"in use by another job or by other arguments, of pid 1 on 'node': .* folder"
        ),
        me,
    ):
        pass
    assert process_file(me.holder) not in store.names()


def test_a_dead_other_job_is_waited_for_and_removed(
    store: LocalLeases, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed(store, TASK, job="embed 2")
    me = taking_part(store)
    monkeypatch.setattr(me, "_end", Waits(lambda: setattr(clock, "now", clock.now + BEAT)))
    with me:
        assert store.names() == [process_file(me.holder)]
        assert me.claim(TASK)


class Waits:
    """An event for which a heart waits in vain, and at whose other waits something happens."""

    def __init__(self, happens: "object") -> None:
        self._happens, self._event, self._main = happens, threading.Event(), threading.current_thread()

    def wait(self, seconds: float) -> bool:
        if threading.current_thread() is self._main:
            self._happens()  # type: ignore[operator]
            return False
        return self._event.wait()

    def set(self) -> None:
        self._event.set()


class Overwrites(LocalLeases):
    """A store that ignores the condition of a conditional write, as some servers of the S3 API do."""

    def create(self, name: str, data: bytes) -> bool:
        self.write(name, data)
        return True


def test_a_store_without_conditional_writes_is_refused(tmp_path: Path) -> None:
    store = Overwrites(tmp_path / ".leases")
    with (
        pytest.raises(adq.AdqError, match=r"so that two processes could hold one lease: take a store with"),
        taking_part(store),
    ):
        pass
    assert os.listdir(tmp_path) == []


def test_a_link_to_nowhere_is_no_lease_that_another_holds(store: LocalLeases, tmp_path: Path) -> None:
    (tmp_path / ".leases").symlink_to("nowhere")
    with pytest.raises(adq.AdqError, match="cannot keep leases in"):
        store.create("a", b"1")


def test_a_folder_that_takes_no_leases_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".leases").write_bytes(b"")
    store = LocalLeases(tmp_path / ".leases")
    with pytest.raises(adq.AdqError, match=r"cannot keep leases in .*: Not a directory$"), taking_part(store):
        pass
    (tmp_path / ".leases").unlink()

    def refuse(*args: object, **options: object) -> None:
        raise OSError(30, os.strerror(30))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with (
        pytest.raises(adq.AdqError, match=r"cannot keep leases in .*: Read-only file system$"),
        taking_part(store),
    ):
        pass


def test_a_heart_that_cannot_write_goes_on_and_says_so_once(
    store: LocalLeases, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    beats: list[bool] = []
    enough = threading.Event()

    def fail(name: str, data: bytes) -> None:
        beats.append(True)
        if len(beats) == 3:
            enough.set()
        raise adq.AdqError("no space left")

    monkeypatch.setattr(store, "write", fail)
    with Participant(store, "embed 1", beat=0.01) as me:
        assert enough.wait(60)
        assert me.claim(TASK)
    assert caplog.text.count("no space left; other processes may do the same tasks once more") == 1


def test_a_folder_is_locked_by_one_or_shared_by_many(tmp_path: Path) -> None:
    with lock(tmp_path), pytest.raises(adq.AdqError, match="in use by pid"), lock(tmp_path, shared=True):
        pass
    with lock(tmp_path, shared=True):
        with lock(tmp_path, shared=True), pytest.raises(adq.AdqError, match="in use by pid"), lock(tmp_path):
            pass
        assert os.listdir(tmp_path) == [".adq.lock"]
        with pytest.raises(adq.AdqError, match="in use by pid"), lock(tmp_path):
            pass
    assert os.listdir(tmp_path) == []
    with lock(tmp_path):
        pass
