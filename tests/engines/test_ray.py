"""The engine `ray` on a cluster of two nodes: equal files, errors in one line, nodes that do not fit or die."""

import importlib
import os
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from adq_wds.engines import ray_engine
from adq_wds.engines.choose import choose_engine
from adq_wds.engines.engine import Resources
from adq_wds.errors import AdqError
from tests.conftest import NOBODY, Caplog, MonkeyPatch
from tests.engines.clusters import OPTIONS, kill_node, node_of
from tests.engines.marks import Marked, Marks, ended, pid_of
from tests.engines.works import PickyError, Write, tasks_of
from tests.programs import soon


@pytest.fixture
def connected(nodes: Any) -> Iterator[Any]:
    """Ray, connected to the cluster by the program itself."""
    ray = importlib.import_module("ray")
    ray.init(address=nodes.address, log_to_driver=False)
    yield ray
    ray.shutdown()


def test_actors_do_every_task_and_their_logs_and_errors_come_back(
    nodes: Any, tmp_path: Path, caplog: Caplog
) -> None:
    ray = importlib.import_module("ray")
    ray.init(address=nodes.address, log_to_driver=False)  # the program's own connection is used, and stays
    try:
        engine = choose_engine("ray", address=nodes.address, folder=tmp_path)
        tasks = tasks_of(1, "log", 3)
        results = dict(engine.run(tasks, Write(tmp_path), Resources()))
        assert set(results) == set(tasks)
        assert os.getpid() not in {result["pid"] for result in results.values()}
        assert "a line of t001" in caplog.messages
        for what, kind, text in (
            ("picky", PickyError, "shard a.tar, key 'k': no good"),
            ("value", ValueError, "no such thing"),
            ("strange", AdqError, "StrangeError: one two"),
        ):
            with pytest.raises(kind) as raised:
                list(engine.run(tasks_of(what), Write(tmp_path), Resources()))
            assert type(raised.value) is kind
            assert str(raised.value) == text
        with pytest.raises(AdqError, match="no node of the Ray cluster has 64 CPUs"):
            list(engine.run(tasks_of(1), Write(tmp_path), Resources(workers=64)))
        with pytest.raises(AdqError, match=r"connected to the Ray cluster at .*ray.shutdown"):
            list(
                choose_engine("ray", address=NOBODY, folder=tmp_path).run(
                    tasks_of(1), Write(tmp_path), Resources()
                )
            )
        assert ray.is_initialized()
    finally:
        ray.shutdown()
    assert not list(tmp_path.glob(".adq-probe*"))


def test_a_node_that_dies_with_the_last_task_leaves_it_to_another(
    nodes: Any, tmp_path: Path, connected: Any
) -> None:
    marks = Marks(tmp_path / "marks")
    marks.folder.mkdir()

    def pids() -> list[int]:
        return [pid_of(mark) for mark in marks.running()]

    engine = choose_engine("ray", address=nodes.address, folder=tmp_path)
    with ThreadPoolExecutor(1) as pool:
        results = pool.submit(
            lambda: list(engine.run(tasks_of(1, 2), Marked(Write(tmp_path), marks), Resources()))
        )
        try:
            assert soon(lambda: len(pids()) == 2)
            (first,) = [mark for mark in marks.running() if node_of(nodes, pid_of(mark)) is None]
            marks.let_go(first)
            assert soon(lambda: not first.exists())
            (last,) = pids()
            kill_node(nodes, node_of(nodes, last))
            assert soon(lambda: ended(last))
            assert marks.remove_of(last) == 1
        finally:
            marks.let_all_go()
        done = dict(results.result())
    assert {task.name for task in done} == {"t000", "t001"}
    assert last not in {result["pid"] for result in done.values()}
    nodes.add_node(**OPTIONS)


def test_actors_with_other_versions_or_without_the_folder_do_nothing(
    nodes: Any, tmp_path: Path, connected: Any, monkeypatch: MonkeyPatch
) -> None:
    engine, here = choose_engine("ray", address=nodes.address, folder=tmp_path), ray_engine.versions()
    for name, other, text in (
        ("versions", lambda: here | {"numpy": "0.9"}, f"Ray node .* has numpy {here['numpy']}, the job's process has 0.9"),
        ("write_text", lambda path, text: None, f"Ray node .* does not see the folder {tmp_path}.* all nodes share"),
    ):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(ray_engine, name, other)
            with pytest.raises(AdqError, match=text) as raised:
                list(engine.run(tasks_of(1), Write(tmp_path), Resources()))
        assert "\n" not in str(raised.value)
    assert os.listdir(tmp_path) == []


def test_an_address_that_nobody_answers_is_one_line_within_ten_seconds(
    tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    pytest.importorskip("ray", reason="needs ray", exc_type=ImportError)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent_address = f"127.0.0.1:{silent.getsockname()[1]}"
        for address, variable in ((NOBODY, ""), (silent_address, ""), (None, NOBODY)):
            monkeypatch.setenv("RAY_ADDRESS", variable)
            engine, start = choose_engine("ray", address=address, folder=tmp_path), time.monotonic()
            with pytest.raises(
                AdqError, match=f"no Ray cluster at {address or variable}.*ray start"
            ) as raised:
                list(engine.run(tasks_of(1), Write(tmp_path), Resources()))
            assert time.monotonic() - start < 10
            assert "\n" not in str(raised.value)


def test_without_ray_the_error_names_the_extra(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setitem(importlib.import_module("sys").modules, "ray", None)
    with pytest.raises(AdqError, match=r'pip install "adq-wds\[ray\]"'):
        choose_engine("ray", folder=tmp_path)


def test_a_node_with_other_versions_or_without_the_folder_says_so(
    tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    with ray_engine._driver(str(tmp_path)) as driver:
        assert driver.fault() is None
        Path(str(driver.probe)).write_text("another folder's")
        assert f"does not see the folder {tmp_path}" in str(driver.fault())
        Path(str(driver.probe)).unlink()
        assert "does not see the folder" in str(driver.fault())
        assert ray_engine.RayWorker(driver).do([], tasks_of(1)[0]).error is not None, (
            "nothing is unpickled then"
        )
        here = ray_engine.versions()
        monkeypatch.setattr(ray_engine, "versions", lambda: here | {"torch": "9.9"})
        assert f"has torch 9.9, the job's process has {here['torch']}" in str(driver.fault())
