"""Keeps, beside new shards, what they are made of and what is done of them, so that a killed job goes on."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adq_wds.errors import AdqError
from adq_wds.files import canonical_json, remove_left_over
from adq_wds.remote.outputs import make_folder, write_text
from adq_wds.remote.url_path import AnyPath

JOB = ".adq.write/job.json"
_FORMAT = {"format": "adq_wds.write", "version": 1}


@dataclass(frozen=True)
class Unfinished:
    """The folder ``.adq.write`` beside new shards: ``job.json``, and until the job is finished what it has made.

    Attributes:
        shards: the folder of the shards.
        settings: all that the bytes of the shards depend on, as JSON has it.
    """

    shards: AnyPath
    settings: dict[str, Any]

    @property
    def folder(self) -> AnyPath:
        """Its path."""
        return (self.shards / JOB).parent

    def _job(self) -> dict[str, Any]:
        """What the file says, where it is of the same settings."""
        try:
            job = json.loads((self.shards / JOB).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        same = isinstance(job, dict) and job.get("settings") == json.loads(canonical_json(self.settings))
        return job if same and job.items() >= _FORMAT.items() else {}

    @property
    def is_here(self) -> bool:
        """Whether the folder holds work of these settings, finished or not."""
        return bool(self._job())

    @property
    def report(self) -> dict[str, Any] | None:
        """What came out, once the job is finished."""
        report = self._job().get("report")
        return report if isinstance(report, dict) else None

    @property
    def is_whole(self) -> bool:
        """Whether the job is finished, and its shards are still there with their sizes."""
        try:
            return is_written(self.shards, self.report or {})
        except (KeyError, OSError, TypeError, ValueError):
            return False

    def begin(self, *, again: bool) -> None:
        """Make the folder, unless it is here; `again`: also where it says that the job is finished."""
        make_folder(self.folder)
        if again or not self.is_here:
            write_text(self.shards / JOB, canonical_json({**_FORMAT, "settings": self.settings}) + "\n")

    def check(self) -> None:
        """Raise `AdqError` if another process has finished the job."""
        if self.report is not None:
            raise AdqError(f"{self.folder}: another process has finished this job")

    def finish(self, report: dict[str, Any]) -> None:
        """Note the end, and remove all else from the folder."""
        text = canonical_json({**_FORMAT, "settings": self.settings, "report": report})
        write_text(self.shards / JOB, text + "\n")
        self.clear()

    def clear(self) -> None:
        """Remove all but ``job.json`` from the folder."""
        for path in self.folder.iterdir():
            if path != self.shards / JOB:
                remove(path)


def remove(path: AnyPath) -> None:
    """Remove a file, or a folder as that of a plan's parts, unless it is gone or a living process writes it just now."""
    if isinstance(path, Path) and path.suffix == ".partial":
        remove_left_over(path)
    elif isinstance(path, Path) and path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def is_written(folder: AnyPath, report: dict[str, Any]) -> bool:
    """Whether the shards that a `WriteReport` counts are all in a folder with their sizes.

    Raises:
        KeyError, OSError, TypeError, ValueError: no report, no such set, or a shard is missing.
    """
    info = json.loads((folder / "_info.json").read_text(encoding="utf-8"))
    names = [name for split in info["splits"].values() for name in split["filenames"]]
    n_bytes = sum((folder / name).stat().st_size for name in names)
    return bool(len(names) == report["shards"] and n_bytes == report["bytes"])
