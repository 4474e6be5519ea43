"""Leases in an object store: S3 on loopback, where a conditional write is won by one."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import adq_wds as adq
from adq_wds.engines.engine import Resources
from adq_wds.engines.lease import lease_bytes, process_file, task_file
from adq_wds.engines.participant import Participant
from adq_wds.engines.shared import Shared, leases_in
from adq_wds.remote.leases import MAX_BYTES, RemoteLeases
from adq_wds.remote.url_path import UrlPath
from tests.engines.stand_in import WriteFiles, tasks_of

moto_server = pytest.importorskip("moto.server")
boto3 = pytest.importorskip("boto3")
pytest.importorskip("obstore")


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    keys = {"aws_access_key_id": "me", "aws_secret_access_key": "s3cret", "region_name": "us-east-1"}
    boto3.client("s3", endpoint_url=endpoint, **keys).create_bucket(Bucket="bucket")
    yield endpoint
    server.stop()


@pytest.fixture
def folder(endpoint: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """A folder of the test's own; the store is found by the environment."""
    settings = {
        "ACCESS_KEY_ID": "me",
        "SECRET_ACCESS_KEY": "s3cret",
        "REGION": "us-east-1",
        "ENDPOINT": endpoint,
    }
    for name, value in settings.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    return f"s3://bucket/{request.node.name}/run"


def test_a_store_of_objects_keeps_leases_as_a_folder_does(folder: str) -> None:
    store = leases_in(folder)
    assert isinstance(store, RemoteLeases)
    assert str(store) == f"{folder}/.leases"
    assert store.names() == []
    assert store.read("a") is None
    store.remove("a")
    assert store.create("a", b"1")
    assert not store.create("a", b"2")
    assert store.read("a") == b"1"
    store.write("a", b"3")
    assert store.read("a") == b"3"
    store.write("long", b"x" * (2 * MAX_BYTES))
    assert store.read("long") == b"x" * (MAX_BYTES + 1)
    assert sorted(store.names()) == ["a", "long"]
    store.remove("a")
    store.remove("long")
    assert store.names() == []


def test_of_many_at_once_one_creates_a_lease(folder: str) -> None:
    store, created = leases_in(folder), []
    threads = [
        threading.Thread(target=lambda i=i: created.append(store.create("a", b"%d" % i))) for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(created) == [False] * 7 + [True]


def test_two_processes_share_tasks_by_leases_in_a_store(folder: str, tmp_path: Path) -> None:
    works = [WriteFiles(tmp_path, 0.0, []) for _ in range(2)]
    counts: list[int] = []

    def take_part(work: WriteFiles) -> None:
        counts.append(len(list(Shared(folder, beat=10.0).run(tasks_of(4), work, Resources()))))

    threads = [threading.Thread(target=take_part, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert counts == [4, 4]
    assert sorted(works[0].done + works[1].done) == sorted(task.name for task in tasks_of(4))
    assert leases_in(folder).names() == []


def test_a_killed_holder_s_lease_in_a_store_is_taken_over(folder: str) -> None:
    store = leases_in(folder)
    holder = "0123456789abcdef"
    store.create(process_file(holder), lease_bytes({"job": "embed 1", "beat": 7}))
    store.create(task_file("a"), lease_bytes({"holder": holder}))
    with Participant(store, "embed 1", beat=0.1) as me:
        waits = threading.Event()
        while not me.claim("a"):
            waits.wait(0.05)
    assert store.names() == []


def test_a_store_without_conditional_writes_is_refused_in_one_line(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    unsafe = r"a conditional write\), so that two processes could hold one lease: share a folder"
    with pytest.raises(adq.AdqError, match=rf"^cannot keep leases in memory://run/.leases: .*{unsafe}"):
        leases_in("memory://run")
    with pytest.raises(adq.AdqError, match=unsafe):
        RemoteLeases(UrlPath("https://me:s3cret@host/run?token=s3cret"))
    monkeypatch.setenv("AWS_CONDITIONAL_PUT", "disabled")
    with pytest.raises(adq.AdqError, match=unsafe) as error, Participant(leases_in(folder), "embed 1"):
        pass
    assert "\n" not in str(error.value)


def test_what_a_store_refuses_is_one_line_without_secrets(folder: str) -> None:
    with (
        pytest.raises(
            adq.AdqError, match=r"^cannot keep leases in s3://nowhere/.leases/process-.*: not found"
        ) as error,
        Participant(leases_in("s3://nowhere"), "embed 1"),
    ):
        pass
    assert "s3cret" not in str(error.value)
