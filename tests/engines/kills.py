"""Kills and stops processes that share a folder, at random moments."""

import random
import signal
import subprocess
import time
from collections.abc import Callable

Start = Callable[[], "subprocess.Popen[str]"]


def disturb(start: Start, n_kills: int, seed: int, *, at_most: float) -> None:
    """Three processes at a time; at random moments one is killed or stopped for long, and another is started.

    Those that live end without an error, and so does one more.

    Args:
        start: starts a process.
        n_kills: kills and stops.
        seed: of the moments.
        at_most: seconds between two of them.
    """
    draw = random.Random(seed)
    processes = [start() for _ in range(3)]
    stopped: list[subprocess.Popen[str]] = []
    try:
        for i in range(n_kills):
            time.sleep(draw.random() * at_most)
            process = processes.pop(draw.randrange(3))
            if i % 3 == 2:
                process.send_signal(signal.SIGSTOP)  # longer than the others' patience, by the end
                stopped.append(process)
            else:
                process.kill()
                process.communicate()
            processes.append(start())
        for process in stopped:
            process.send_signal(signal.SIGCONT)
        for process in (*processes, *stopped):
            ends_well(process)
    finally:
        for process in (*processes, *stopped):
            process.kill()
            process.communicate()
    ends_well(start())


def ends_well(process: "subprocess.Popen[str]") -> str:
    """What a process prints, once it has ended without an error."""
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    return out
