"""Chooses the engine of a job by its name."""

from __future__ import annotations

import os
from typing import Literal

from adq_wds.engines.engine import Engine, ThisProcess

EngineName = Literal["threads", "processes", "ray", "shared"]


def choose_engine(
    engine: str | Engine, *, address: str | None = None, folder: str | os.PathLike[str]
) -> Engine:
    """The engine of a name; an `Engine` object is returned as it is.

    Args:
        engine: ``threads`` (this process), ``processes`` (more of this machine), ``ray`` (actors of a Ray cluster),
            ``shared`` (any number of equal commands that share the folder); or an `Engine`.
        address: of the Ray cluster; only for ``ray``.
        folder: that the job writes to and all its machines see.

    Raises:
        ValueError: an unknown name, or an address without ``ray``.
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
    if engine == "shared":
        from adq_wds.engines.shared import Shared

        return Shared(folder)
    raise ValueError(f"engine must be one of threads, processes, ray, shared, got {engine!r}")
