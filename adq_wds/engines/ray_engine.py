"""The engine `ray`: actors of a Ray cluster do a task at a time each; Ray places, restarts and retries them."""

from __future__ import annotations

import logging
import os
import platform
import secrets
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from adq_wds.engines.engine import Resources, Result, Task, Work
from adq_wds.engines.worker import Outcome, Worker, cannot_hand_over, portable
from adq_wds.errors import AdqError, reason_of
from adq_wds.files import sha256_text, write_text

PACKAGES = ("adq-wds", "ray", "torch", "numpy", "pillow")  # whose versions results may depend on
RESTARTS = 5
"""How often Ray starts an actor again that was killed or whose node died, and with it the task that it had."""
_ANSWER_S = 4.0  # to connect to an address, and again to hear an answer
_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(
    [0, 0, 0, 4, 0, 0, 0, 0, 0]
)  # gRPC's; servers answer it
_GO_ON = "run it again to go on: what is done stays done"


@dataclass(frozen=True)
class Driver:
    """What an actor compares with itself before its first task.

    Attributes:
        folder: of the job's output.
        probe: a file in it; None where there is no folder or it is at a URL.
        content: of the probe file, random.
        cwd: the current folder, from which relative paths count.
        versions: of Python and `PACKAGES`.
    """

    folder: str
    probe: str | None
    content: str
    cwd: str
    versions: dict[str, str]

    def fault(self) -> AdqError | None:
        """Why this node cannot do the job's tasks."""
        node = socket.gethostname()
        for name, here in versions().items():
            if here != self.versions[name]:
                return AdqError(
                    f"Ray node {node} has {name} {here}, the job's process has {self.versions[name]}: install the same, "
                    "since results may depend on it"
                )
        if self.probe is not None:
            content = None
            with suppress(OSError):
                content = Path(self.probe).read_text(encoding="utf-8")
            if content != self.content:
                return AdqError(
                    f"Ray node {node} does not see the folder {self.folder}, or sees another of that name: give a "
                    "folder that all nodes share, such as one on NFS, or a URL"
                )
        return None


class RayWorker:
    """The actor: it compares itself with the driver, then loads the work, once."""

    def __init__(self, driver: Driver) -> None:
        with suppress(OSError):
            os.chdir(driver.cwd)
        self._fault: Exception | None = driver.fault()
        self._worker: Worker | None = None

    def fault(self) -> Exception | None:
        """Why it can do nothing."""
        return self._fault

    def do(self, work: list[Any], task: Task) -> Outcome:
        """Do a task; also after a restart, on another node.

        Args:
            work: a reference to it, in a list, so that it is unpickled once, and not before versions are compared.
            task: the task.
        """
        if self._worker is None and self._fault is None:
            try:
                self._worker = Worker(import_module("ray").get(work[0]))
            except Exception as error:
                self._fault = portable(error)
        return Outcome(task, None, self._fault, []) if self._worker is None else self._worker.do(task)


class RayEngine:
    """Actors on every node of a Ray cluster, as many as have room for their cores and GPUs.

    Args:
        address: of the cluster, ``host:port``. By default what `ray.init` finds: the variable RAY_ADDRESS, a cluster
            on this machine, or a new one of this machine alone.
        folder: that the job's tasks write to, if they do.

    Raises:
        AdqError: Ray is not installed.
    """

    def __init__(self, address: str | None, folder: str | os.PathLike[str] | None) -> None:
        try:
            self._ray: Any = import_module("ray")
        except ImportError as error:
            raise AdqError(f"""engine='ray' needs Ray ({error}): pip install "adq-wds[ray]\"""") from error
        self._address, self._folder = address, os.fspath(folder or "")

    def run(self, tasks: Sequence[Task], work: Work, resources: Resources) -> Iterator[tuple[Task, Result]]:
        """Do the tasks, begun in their order. Each actor has a task at a time.

        Raises:
            AdqError: nobody answers at the address; a node has other versions, does not see the folder, or no room;
                an actor was killed more often than Ray retries.
        """
        if not tasks:
            return
        with self._connected(), _driver(self._folder) as driver:
            try:
                reference = self._ray.put(work)
            except Exception as error:  # of any class that a pickler raises
                raise cannot_hand_over(str(error).splitlines()[0]) from error
            actor = self._ray.remote(
                num_cpus=resources.workers,
                num_gpus=resources.gpus,
                max_restarts=RESTARTS,
                max_task_retries=-1,  # tries are also counted while a node's death is not known yet, which takes long
                scheduling_strategy="SPREAD",
            )(RayWorker)
            n = min(len(tasks), self._room(resources))
            yield from self._results([actor.remote(driver) for _ in range(n)], [reference], tasks)

    def _results(
        self, actors: list[Any], work: list[Any], tasks: Sequence[Task]
    ) -> Iterator[tuple[Task, Result]]:
        """Give each actor a task once it has started, and the next when it has done one."""
        waiting, n_left = iter(tasks), len(tasks)
        running: dict[Any, tuple[Any, Task | None]] = {
            actor.fault.remote(): (actor, None) for actor in actors
        }
        actors.clear()  # `running` alone keeps them: Ray ends one without a task, and its cores are free for another
        try:
            while n_left:
                (reference, *_), _ = self._ray.wait(list(running))
                actor, task = running[reference]
                outcome = self._answer(reference, task)
                del running[reference]
                if (more := next(waiting, None)) is not None:
                    running[actor.do.remote(work, more)] = actor, more
                del actor
                if isinstance(outcome, Outcome):
                    n_left -= 1
                    yield outcome.unpacked()
                elif outcome is not None:
                    raise outcome
        finally:
            for actor, _ in running.values():
                self._ray.kill(actor)

    def _answer(self, reference: Any, task: Task | None) -> Any:
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            lines = str(error).strip().splitlines() or [""]
            line = lines[-1 if isinstance(error, self._ray.exceptions.RayTaskError) else 0].strip()
            doing = "it started" if task is None else f"it worked on {task.name}"
            raise AdqError(
                f"a Ray actor ended while {doing} ({type(error).__name__}: {line[:200]}); {_GO_ON}"
            ) from None

    def _room(self, resources: Resources) -> int:
        """Actors that fit on the cluster's nodes."""
        n = 0
        for node in self._ray.nodes():
            if node["Alive"]:
                room = node["Resources"].get("CPU", 0) // resources.workers
                if resources.gpus:
                    room = min(room, node["Resources"].get("GPU", 0) // resources.gpus)
                n += int(room)
        if not n:
            gpus = f" and {resources.gpus:g} GPUs" if resources.gpus else ""
            raise AdqError(
                f"no node of the Ray cluster has {resources.workers} CPUs{gpus}, workers={resources.workers} of a process: "
                "give fewer workers, or larger nodes"
            )
        return n

    @contextmanager
    def _connected(self) -> Iterator[None]:
        """Connect to the cluster while the block runs; a connection of the program's own is used, and stays."""
        if self._ray.is_initialized():
            theirs = self._ray.get_runtime_context().gcs_address
            if self._address not in (None, "auto", theirs):
                raise AdqError(
                    f"this program is connected to the Ray cluster at {theirs}: leave out address={self._address!r}, "
                    "or call ray.shutdown() first"
                )
            yield
            return
        address = self._address or os.environ.get("RAY_ADDRESS")  # as Ray does
        try:
            _knock(address)
            self._ray.init(address=self._address, log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:
            where = f"at {address}" if address else "of this machine"
            raise AdqError(
                f"no Ray cluster {where} ({reason_of(error)}): start one by `ray start --head`, or give its address"
            ) from error
        try:
            yield
        finally:
            self._ray.shutdown()


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that results may depend on, here."""
    return {"Python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}}


def _knock(address: str | None) -> None:
    """Raise `OSError` soon where nobody answers; Ray would try for minutes."""
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if colon and port.isdecimal():
        with socket.create_connection((host, int(port)), timeout=_ANSWER_S) as connection:
            connection.sendall(_GREETING)
            connection.recv(1)


@contextmanager
def _driver(folder: str) -> Iterator[Driver]:
    """This process as actors compare themselves with it; its probe file lies in the folder while the block runs."""
    content = secrets.token_hex(16)
    probe = None if not folder or "://" in folder else _probe_in(Path(folder).absolute(), content[:8])
    if probe is not None:
        write_text(probe, content)
    try:
        yield Driver(folder, None if probe is None else str(probe), content, os.getcwd(), versions())
    finally:
        if probe is not None:
            probe.unlink(missing_ok=True)


def _probe_in(folder: Path, name: str) -> Path:
    """Where this process has its probe file; removes what killed processes of this machine left."""
    prefix = f".adq-probe-{sha256_text(socket.gethostname())[:6]}-"
    for left in folder.glob(f"{prefix}*"):
        try:
            os.kill(int(left.name.removeprefix(prefix).partition("-")[0]), 0)
        except ProcessLookupError:
            left.unlink(missing_ok=True)
        except (OSError, ValueError, OverflowError):
            pass  # it lives, as another user's; or the name is nobody's
    return folder / f"{prefix}{os.getpid()}-{name}"
