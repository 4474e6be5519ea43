"""Locks the folder that a job of planning writes to, and chooses who does its tasks."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from adq_wds.engines.choose import choose_engine
from adq_wds.errors import AdqError
from adq_wds.planning.class_tasks import Workplace
from adq_wds.planning.options import Options
from adq_wds.remote.outputs import local_folder, lock, make_folder
from adq_wds.remote.url_path import as_path
from adq_wds.tables.features import Features


@contextmanager
def locked_folder(
    out: str | os.PathLike[str] | None, error: Callable[[str], AdqError], *, beside: Features | None = None
) -> Iterator[Path | None]:
    """The folder of the file that a job writes, made and locked, for its scratch files; None where it writes none.

    A folder at a URL takes no scratch files, and is None too: they go to the temporary folder.

    Locked before the work, so that of two jobs one learns it at once.

    Args:
        out: the file.
        error: raised where `out` is a folder, or lies among the features.
        beside: features that it must not lie among.

    Raises:
        AdqError: the folder cannot be written, or another job works in it.
    """
    if out is None:
        yield None
        return
    file = as_path(out)
    if file.is_dir():
        raise error(f"{file}: a folder; give a file name")
    if beside is not None and os.path.dirname(os.path.realpath(file)) == os.path.realpath(beside.folder):
        raise error(f"{file}: lies among the features, where every file is one shard's; write it elsewhere")
    folder = make_folder(file.parent)
    with lock(folder):
        yield local_folder(folder)


@contextmanager
def workplace(
    options: Options,
    out: str | os.PathLike[str] | None,
    error: Callable[[str], AdqError],
    *,
    beside: Features | None = None,
) -> Iterator[Workplace]:
    """The engine of `options`, and the locked folder of the file that a job writes; arguments as `locked_folder`.

    Raises:
        ValueError: an unknown engine, or one whose processes need a folder, and there is no `out`.
        AdqError: as `locked_folder`; or the engine cannot run.
    """
    chosen = choose_engine(
        options.engine,
        address=options.address,
        folder=tempfile.gettempdir() if out is None else as_path(out).parent,
    )
    with locked_folder(out, error, beside=beside) as folder:
        yield Workplace(chosen, folder)
