"""The engine `ray` on a cluster of two nodes: equal files, errors in one line, nodes that do not fit or die."""

import importlib
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from adq_wds.engines import ray_engine
from adq_wds.engines.choose import choose_engine
from adq_wds.engines.engine import Resources
from adq_wds.errors import AdqError
from tests.conftest import NOBODY, Caplog, MonkeyPatch
from tests.engines.works import PickyError, Write, tasks_of


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


def test_an_address_that_nobody_answers_is_one_line_within_ten_seconds(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="needs ray", exc_type=ImportError)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for address in (NOBODY, f"127.0.0.1:{silent.getsockname()[1]}"):
            start = time.monotonic()
            with pytest.raises(AdqError, match=f"no Ray cluster at {address}.*ray start") as raised:
                list(
                    choose_engine("ray", address=address, folder=tmp_path).run(
                        tasks_of(1), Write(tmp_path), Resources()
                    )
                )
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
