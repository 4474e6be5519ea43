"""The engine `processes`: processes of this machine do a task at a time each."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from multiprocessing import get_context
from multiprocessing.connection import Connection

from adq_wds.engines.engine import Resources, Result, Task, Work
from adq_wds.engines.threads import cores, first_done
from adq_wds.engines.worker import Outcome, Worker, check_portable
from adq_wds.errors import AdqError

_VARIABLE = "OMP_NUM_THREADS"
_worker: Worker  # of this process, where it is one of the pool's


class Processes:
    """As many processes as this machine's cores have room for, each with its own copy of the work."""

    def run(self, tasks: Sequence[Task], work: Work, resources: Resources) -> Iterator[tuple[Task, Result]]:
        """Do the tasks, begun in their order.

        Raises:
            AdqError: a process was killed or ended by itself; or the work cannot be pickled.
            ValueError: the work needs an accelerator.
        """
        if resources.gpus:
            raise ValueError(
                "engine='processes' gives no process a GPU of its own: take engine='threads' or 'ray', or device='cpu'"
            )
        check_portable(work)
        n = min(len(tasks), max(1, cores() // resources.workers))
        if not n:
            return
        context = get_context("spawn")  # a fork would copy locks that torch's threads hold
        ends_with_us, ours = context.Pipe(duplex=False)
        pool = ProcessPoolExecutor(n, mp_context=context, initializer=_start, initargs=(work, ends_with_us))
        try:
            yield from _results(pool, iter(tasks), n, resources.workers)
            pool.shutdown()
        finally:
            ours.close()  # after an error it ends the processes, which may be in the middle of a task
            pool.shutdown(cancel_futures=True)
            ends_with_us.close()


def _results(
    pool: ProcessPoolExecutor, tasks: Iterator[Task], n: int, workers: int
) -> Iterator[tuple[Task, Result]]:
    running: dict[Future[Outcome], Task] = {}
    n_done = 0
    try:
        while True:
            with _native_threads(workers):  # the first tasks start the processes
                running |= {pool.submit(_do, task): task for task in islice(tasks, n - len(running))}
            if not running:
                return
            for future in first_done(running):
                outcome = future.result()
                del running[future]
                n_done += 1
                yield outcome.unpacked()
    except BrokenProcessPool as error:
        names = ", ".join(sorted(task.name for task in running.values())[:3])
        cause = "killed, or out of memory: fewer workers need less"
        if not n_done:
            cause += "; a program of yours starts its jobs under if __name__ == '__main__'"
        raise AdqError(
            f"a process ended while it worked on {names} ({cause}); run it again to go on: what is done stays done"
        ) from error


@contextmanager
def _native_threads(n: int) -> Iterator[None]:
    """Give processes that start meanwhile n threads of BLAS and OpenMP, as Ray does, unless the user has set a number.

    By default each process would take all cores for a product of matrices, beside the others that do. The libraries
    read the number once, when they are loaded.
    """
    if _VARIABLE in os.environ:
        yield
        return
    os.environ[_VARIABLE] = str(n)
    try:
        yield
    finally:
        del os.environ[_VARIABLE]


def _start(work: Work, ends_with_parent: Connection) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the job's ends the others
    threading.Thread(target=_end_with, args=(ends_with_parent,), daemon=True).start()
    _worker = Worker(work)


def _end_with(pipe: Connection) -> None:
    """End this process when the other end of a pipe is closed, or its process was killed."""
    pipe.poll(None)
    os._exit(1)


def _do(task: Task) -> Outcome:
    return _worker.do(task)
