"""Chooses the engine of a job by its name."""

from __future__ import annotations

import os
from typing import Literal

from adq_wds.engines.engine import Engine, ThisProcess

EngineName = Literal["threads", "processes", "ray", "shared"]


def choose_engine(
    engine: str | Engine, *, address: str | None = None, folder: str | os.PathLike[str] | None
) -> Engine:
    """The engine of a name; an `Engine` object is returned as it is.

    Args:
        engine: ``threads`` (this process), ``processes`` (more of this machine), ``ray`` (actors of a Ray cluster),
            ``shared`` (any number of equal commands that share the folder); or an `Engine`.
        address: of the Ray cluster; only for ``ray``.
        folder: that the job's tasks write to and all its machines see; None where tasks write nothing.

    Raises:
        ValueError: an unknown name, an address without ``ray``, or ``shared`` without a folder.
        AdqError: Ray is not installed.
    """
    if address is not None and engine != "ray":
        raise ValueError(
            f"address={address!r} is that of a Ray cluster, and engine={engine!r} uses none: "
            "leave it out, or use engine='ray'"
        )
    if not isinstance(engine, str):
        return engine
    if engine == "threads":
        return ThisProcess()
    if engine == "processes":
        from adq_wds.engines.processes import Processes

        return Processes()
    if engine == "ray":
        from adq_wds.engines.ray_engine import RayEngine

        return RayEngine(address, folder)
    if engine == "shared" and folder is None:
        raise ValueError("engine='shared' needs out=, a folder that all commands see")
    if engine == "shared" and folder is not None:
        from adq_wds.engines.shared import Shared

        return Shared(folder)
    raise ValueError(f"engine must be one of threads, processes, ray, shared, got {engine!r}")


def default_workers(engine: str | Engine, workers: int | None) -> int | None:
    """Threads of a process: one by default where the engine starts a process for each core."""
    return 1 if workers is None and engine in ("processes", "ray") else workers
