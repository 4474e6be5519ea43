"""Locks the folder that a job of planning writes to, and chooses who does its tasks."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from adq_wds.engines.choose import choose_engine
from adq_wds.engines.shared import Shared, lock_for
from adq_wds.errors import AdqError
from adq_wds.planning.class_tasks import Workplace
from adq_wds.planning.options import Options
from adq_wds.remote.outputs import local_folder, lock, make_folder
from adq_wds.remote.url_path import AnyPath, as_path
from adq_wds.tables.features import Features


@contextmanager
def locked_folder(
    out: str | os.PathLike[str] | None, error: Callable[[str], AdqError], *, beside: Features | None = None
) -> Iterator[None]:
    """The folder of the file that a job writes, made and locked while the block runs; nothing where it writes none.

    Locked before the work, so that of two jobs one learns it at once.

    Args:
        out: the file.
        error: raised where `out` is a folder, or lies among the features.
        beside: features that it must not lie among.

    Raises:
        AdqError: the folder cannot be written, or another job works in it.
    """
    folder = _folder_of(out, error, beside)
    with contextlib.nullcontext() if folder is None else lock(folder):
        yield


def _folder_of(
    out: str | os.PathLike[str] | None, error: Callable[[str], AdqError], beside: Features | None
) -> AnyPath | None:
    """The folder of a file, made if missing; arguments as `locked_folder`."""
    if out is None:
        return None
    file = as_path(out)
    if file.is_dir():
        raise error(f"{file}: a folder; give a file name")
    if beside is not None and os.path.dirname(os.path.realpath(file)) == os.path.realpath(beside.folder):
        raise error(f"{file}: lies among the features, where every file is one shard's; write it elsewhere")
    return make_folder(file.parent)


@contextmanager
def workplace(
    options: Options,
    out: str | os.PathLike[str] | None,
    error: Callable[[str], AdqError],
    *,
    job: str,
    settings: Any,
    beside: Features | None = None,
) -> Iterator[Workplace]:
    """The engine of a job, and the folder of the file that it writes, made and locked while the block runs.

    A folder at a URL takes no scratch files: they go to the temporary folder.

    Args:
        options: of the job: `engine`, `address`.
        out, error, beside: as in `locked_folder`.
        job: "plan" or "codebook".
        settings: all that the file depends on, as JSON has it; see `engines.shared.lock_for`.

    Raises:
        ValueError: an unknown engine, or one whose commands need a folder that they share.
        AdqError: as `locked_folder`; or the engine cannot run.
    """
    folder = _folder_of(out, error, beside)
    scratch = local_folder(folder)
    engine = choose_engine(options.engine, address=options.address, folder=scratch or tempfile.gettempdir())
    if isinstance(engine, Shared) and scratch is None:
        raise ValueError("engine='shared' needs out= in a folder that all commands see, not at a URL")
    with contextlib.nullcontext() if folder is None else lock_for(engine, folder, job, settings):
        yield Workplace(engine, scratch)
