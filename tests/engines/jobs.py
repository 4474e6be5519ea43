"""Jobs of several commands, whose processes are killed while their tasks run."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

from tests.engines.clusters import OPTIONS, kill_node, node_of
from tests.engines.marks import Marks, ended, pid_of
from tests.programs import Program, soon

DRIVER = """
import importlib, json, sys, threading
import ray
from adq_wds.cli.main import main
from adq_wds.engines.ray_engine import RayEngine
from tests.engines.marks import mark_tasks

def kill_actors():
    state = importlib.import_module("ray._private.state").state
    core = importlib.import_module("ray._private.worker").global_worker.core_worker
    for pid in map(int, sys.stdin):
        for name, actor in state.actor_table(None).items():
            if actor["Pid"] == pid:
                core.kill_actor(ray.ActorID.from_hex(name), False)

marks, address, commands = sys.argv[1:]
mark_tasks(RayEngine, marks)
ray.init(address=address, log_to_driver=False)
input()
threading.Thread(target=kill_actors, daemon=True).start()
for command in json.loads(commands):
    if code := main([*command, "--engine", "ray", "--address", address]):
        sys.exit(code)
"""


class RayJob:
    """Commands by actors of a cluster, one after the other.

    Args:
        nodes: the cluster.
        marks: an empty folder.
        commands: words of each.
        n_drivers: processes that are ready to do the commands, each when the one before is killed.
        seed: of all moments and choices.
    """

    def __init__(
        self, nodes: Any, marks: Path, commands: list[list[str]], *, n_drivers: int, seed: int
    ) -> None:
        marks.mkdir()
        self._nodes, self._marks, self._commands = nodes, Marks(marks), commands
        self._random = random.Random(seed)
        self._ready = [self._driver() for _ in range(n_drivers)]
        self._driver_now = self._next()

    def _driver(self) -> Program:
        words = [str(self._marks.folder), self._nodes.address, json.dumps(self._commands)]
        return Program(DRIVER, *words)

    def _next(self) -> Program:
        driver = self._ready.pop(0) if self._ready else self._driver()
        driver.stdin.write("go\n")
        driver.stdin.flush()
        return driver

    def kill(self, kind: str) -> None:
        """Kill a worker, an actor, a node or the driver at a random moment of a task.

        Where the task ended before the kill, another is hit.
        """
        while True:
            pid = self._running(on_a_node_to_lose=kind == "node")
            time.sleep(self._random.random() * 0.1)
            if kind == "driver":
                if self._kill_driver():
                    return
                continue
            if kind == "worker":
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            elif kind == "actor":
                self._driver_now.stdin.write(f"{pid}\n")
                self._driver_now.stdin.flush()
            elif not ended(pid):
                kill_node(self._nodes, node_of(self._nodes, pid))
                self._nodes.add_node(wait=False, **OPTIONS)
            assert soon(lambda: ended(pid))  # noqa: B023
            if self._marks.remove_of(pid):
                return

    def _kill_driver(self) -> int:
        self._driver_now.kill()
        self._driver_now.communicate()
        pids = {pid_of(mark) for mark in self._marks.folder.glob("*.runs")}
        assert soon(lambda: all(map(ended, pids))), "actors end with their driver"
        self._driver_now = self._next()
        return sum(map(self._marks.remove_of, pids))

    def _running(self, *, on_a_node_to_lose: bool) -> int:
        """The process of a running task."""
        since = time.monotonic()
        while True:
            self._go_on()
            pids = [pid for pid in map(pid_of, self._marks.running()) if not ended(pid)]
            if on_a_node_to_lose and pids:
                with contextlib.suppress(FileNotFoundError):
                    pids = [pid for pid in pids if node_of(self._nodes, pid) is not None]
                if (
                    not pids and time.monotonic() > since + 2
                ):  # the head alone may have work left in this step
                    self.let_go(1)
            if pids:
                return self._random.choice(pids)
            time.sleep(0.005)

    def _go_on(self) -> bool:
        """Start the command again that ended because one actor was killed too often; whether all are done."""
        code = self._driver_now.poll()
        if code:
            _, errors = self._driver_now.communicate()
            assert "run it again to go on" in errors, errors
            for pid in map(pid_of, self._marks.running()):
                assert soon(lambda: ended(pid))  # noqa: B023
                self._marks.remove_of(pid)
            self._driver_now = self._next()
        return code == 0

    def let_go(self, n: int) -> None:
        """Let so many of the running tasks end."""
        running = self._marks.running()
        for mark in self._random.sample(running, min(n, len(running))):
            self._marks.let_go(mark)

    def finish(self) -> str:
        """Let all tasks end, and wait for the last command; what the commands printed."""
        self._marks.let_all_go()
        assert soon(self._go_on)
        out, _ = self._driver_now.communicate()
        for driver in self._ready:
            driver.kill()
            driver.communicate()
        self._nodes.wait_for_nodes(600)
        return out


PARTICIPANT = """
import json, sys
from adq_wds.cli.main import main
from adq_wds.engines.shared import Shared
from tests.engines.marks import mark_tasks

marks, beat, commands = sys.argv[1:]
mark_tasks(Shared, marks)
Shared.__init__.__kwdefaults__["beat"] = float(beat)
for command in json.loads(commands):
    if code := main([*command, "--engine", "shared"]):
        sys.exit(code)
"""


class SharedJob:
    """Commands, one after the other, by three processes that share a folder.

    Args:
        marks: an empty folder.
        commands: words of each.
        beat: seconds between heartbeats.
        seed: of all moments and choices.
    """

    def __init__(self, marks: Path, commands: list[list[str]], *, beat: float, seed: int) -> None:
        marks.mkdir()
        self._marks, self._random = Marks(marks), random.Random(seed)
        self._words = [str(marks), str(beat), json.dumps(commands)]
        self._living = [Program(PARTICIPANT, *self._words) for _ in range(3)]

    def kill(self) -> None:
        """Kill one of the three at a random moment of a task, and start another."""
        while True:
            process = self._running()
            time.sleep(self._random.random() * 0.05)
            process.kill()
            process.communicate()
            self._living.remove(process)
            self._living.append(Program(PARTICIPANT, *self._words))
            if self._marks.remove_of(process.pid):
                return

    def _running(self) -> Program:
        """A process with a running task."""
        while True:
            assert all(process.poll() is None for process in self._living), "the commands end after the kills"
            pids = set(map(pid_of, self._marks.running()))
            if running := [process for process in self._living if process.pid in pids]:
                return self._random.choice(running)
            time.sleep(0.005)

    def let_go(self, n: int) -> None:
        """Let so many of the running tasks end."""
        running = self._marks.running()
        for mark in self._random.sample(running, min(n, len(running))):
            self._marks.let_go(mark)

    def finish(self) -> None:
        """Let all tasks end, and wait for the three."""
        self._marks.let_all_go()
        for process in self._living:
            _, errors = process.communicate()
            assert process.returncode == 0, errors
