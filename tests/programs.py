"""Runs Python programs in processes of their own that need not import torch first (2 s each): forked from one that has.

As `subprocess` does for `python -c`, but for what the process that they are forked from has done: imported our package
and what it stands on, with one BLAS thread. What must happen before those imports still needs `subprocess`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
WARM = """
import atexit, gc, json, os, signal, socket, sys, threading

import PIL.Image, pyarrow.parquet, timm, torch, torchdata.stateful_dataloader
import adq_wds
import adq_wds.cli.main, adq_wds.embedding.embed_shards, adq_wds.planning.build_plan
import adq_wds.mae.checkpoints, adq_wds.stream.loader, adq_wds.writing.write_shards

requests = socket.socket(fileno=int(sys.argv[1]))
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
gc.freeze()
while True:
    number, fds, *_ = socket.recv_fds(requests, 8, 5)
    if not number:
        sys.exit()
    if os.fork() == 0:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        requests.close()
        pid = os.fork()
        if pid == 0:
            break
        os.write(fds[4], b"%d\\n" % pid)
        for fd in fds[:4]:
            os.close(fd)
        _, status = os.waitpid(pid, 0)
        os.write(fds[4], b"%d\\n" % os.waitstatus_to_exitcode(status))
        os._exit(0)
    for fd in fds:
        os.close(fd)
# Here a program's own process goes on. It ends as Python ends, but lets the system free the modules: that takes 1 s less.
with open(fds[3], encoding="utf-8") as file:
    source, sys.argv, cwd, environment = json.load(file)
for fd in range(3):
    os.dup2(fds[fd], fd)
    os.close(fds[fd])
os.close(fds[4])
os.environ.clear()
os.environ.update(environment)
os.chdir(cwd)
del requests, number, fds, fd, pid, file, cwd, environment, _
code = 0
try:
    exec(compile(source, "<program>", "exec"))
except SystemExit as end:
    code = end.code if isinstance(end.code, int) else int(end.code is not None)
    if code and code is not end.code:
        print(end.code, file=sys.stderr)
except BaseException:
    code = 1
    sys.excepthook(*sys.exc_info())
threading._shutdown()
atexit._run_exitfuncs()
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)
"""


@functools.cache
def _warm() -> socket.socket:
    """Where to ask for processes."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    subprocess.Popen(
        [sys.executable, "-c", WARM, str(theirs.fileno())],
        stdin=subprocess.DEVNULL,
        pass_fds=[theirs.fileno()],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    theirs.close()
    return ours


FILE = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"


class Program:
    """A running program: the part of `subprocess.Popen` that the tests need, its streams texts through pipes."""

    def __init__(self, source: str, *arguments: str, env: Mapping[str, str] | None = None) -> None:
        inputs, outputs, errors, requests, ends = [os.pipe() for _ in range(5)]
        theirs = [inputs[0], outputs[1], errors[1], requests[0], ends[1]]
        socket.send_fds(_warm(), [b"5 files."], theirs)
        for fd in theirs:
            os.close(fd)
        with open(requests[1], "w", encoding="utf-8") as file:
            json.dump([source, ["-c", *arguments], os.getcwd(), dict(env or os.environ)], file)
        self.stdin = open(inputs[1], "w", encoding="utf-8")  # noqa: SIM115
        self.stdout, self.stderr, self._end = (
            open(fd, encoding="utf-8")  # noqa: SIM115
            for fd in (outputs[0], errors[0], ends[0])
        )
        self.pid = int(self._end.readline())
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._end], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("program", timeout or 0)
            self.returncode = int(self._end.readline())
        return self.returncode

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def communicate(self, text: str = "", timeout: float = 900) -> tuple[str, str]:
        """All that it writes until it ends; it is killed after so many seconds."""
        late = threading.Timer(timeout, self.kill)
        late.start()
        with contextlib.suppress(BrokenPipeError), self.stdin:
            self.stdin.write(text)
        with ThreadPoolExecutor(1) as other, self.stdout, self.stderr, self._end:
            errors = other.submit(self.stderr.read)
            said = self.stdout.read(), errors.result()
            self.wait()
        late.cancel()
        return said


def soon(holds: Callable[[], bool]) -> bool:
    """Whether it comes to hold within 15 minutes: no machine is too slow."""
    deadline = time.monotonic() + 900
    while not (there := holds()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return there


def run(
    source: str, *arguments: str, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, for at most 15 minutes, as `subprocess.run(..., capture_output=True, text=True)`."""
    program = Program(source, *arguments, env=env)
    out, errors = program.communicate()
    return subprocess.CompletedProcess(["-c", *arguments], program.wait(), out, errors)
