"""How many threads, and what do they share? As many as cores, each with one intra-op thread of torch's."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def positive(name: str, value: int) -> int:
    """`value`, if it is an integer of at least 1; a `ValueError` with its name otherwise."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
    return int(value)


@contextmanager
def pool_of_threads(workers: int, name: str) -> Iterator[ThreadPoolExecutor]:
    """A pool whose threads use one intra-op thread each, so that results do not depend on their number.

    What was not begun is given up when the pool is left, also by an error.
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
    """Torch's intra-op threads, set to `n` when given; None while nobody has imported torch."""
    torch: Any = sys.modules.get("torch")
    if torch is None:
        return None
    if n is not None:
        torch.set_num_threads(n)
    return int(torch.get_num_threads())
