"""Runs the batches of one job after another in threads, each with one intra-op thread of torch's."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, TypeVar

_WAIT_S = 1.0
Job = TypeVar("Job")
Result = TypeVar("Result")


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def first_done(futures: Collection[Future[Result]]) -> set[Future[Result]]:
    """Wait until one of some futures is done; all that are.

    A Ctrl-C that comes in the moment in which Python begins to wait for a lock is seen only after that wait: so it
    waits a second at a time.
    """
    while not (done := wait(futures, _WAIT_S, FIRST_COMPLETED).done):
        pass
    return done


def in_order(
    jobs: Iterator[Job],
    length: Callable[[Job], int],
    work: Callable[[Job, range], Result],
    *,
    batch_size: int,
    workers: int,
    name: str,
) -> Generator[tuple[Job, range, Result, bool], None, None]:
    """Work on the batches of one job after another in threads, a few ahead, and give their results in order.

    Args:
        jobs: opened one by one, when their turn comes; at most `workers` of them at a time, so that a process that
            is killed loses no more than those.
        length: samples of a job; one without samples has one empty batch.
        work: what a thread does with a batch.
        batch_size: samples in a batch; the last of a job has fewer.
        workers: threads.
        name: of the threads.

    Yields:
        job, batch, result, and whether it is the job's last one: then the job is done before the next is opened in
        its place.
    """
    flying: deque[tuple[Job, range, bool, Future[Result]]] = deque()
    queued: deque[tuple[Job, range, bool]] = deque()
    n_open = 0
    with pool_of_threads(workers, name) as pool:
        while True:
            while len(flying) < workers + 2:
                if not queued and n_open < workers and (opened := next(jobs, None)) is not None:
                    n = length(opened)
                    batches = [range(i, min(i + batch_size, n)) for i in range(0, max(n, 1), batch_size)]
                    queued.extend((opened, rows, rows is batches[-1]) for rows in batches)
                    n_open += 1
                if not queued:
                    break
                job, rows, last = queued.popleft()
                flying.append((job, rows, last, pool.submit(work, job, rows)))
            if not flying:
                return
            job, rows, last, future = flying.popleft()
            first_done([future])
            yield job, rows, future.result(), last
            n_open -= last


@contextmanager
def pool_of_threads(workers: int, name: str) -> Iterator[ThreadPoolExecutor]:
    """A pool whose threads use one intra-op thread each, so that results do not depend on their number.

    Leaving the pool, also by an error, cancels tasks that have not started.
    """
    before = _torch_threads()
    pool = ThreadPoolExecutor(workers, thread_name_prefix=name, initializer=_torch_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        if before is not None:
            _torch_threads(before)


def _torch_threads(n: int | None = None) -> int | None:
    """Torch's intra-op threads, set to `n` when given; None while torch is not imported."""
    torch: Any = sys.modules.get("torch")
    if torch is None:
        return None
    if n is not None:
        torch.set_num_threads(n)
    return int(torch.get_num_threads())
