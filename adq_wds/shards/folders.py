"""Lists the shards in a folder, and warns of other files that look like data."""

from __future__ import annotations

import logging
import os
import re
import shlex

from adq_wds.errors import printable, shorten

logger = logging.getLogger("adq_wds")

TARS = (".tar", ".tar.gz", ".tgz")
_IMAGE = re.compile(r".*\.(?:jpe?g|png|webp|bmp|gif|tiff?)", re.IGNORECASE)
_PACKED = re.compile(  # archives that are not read, and tars of which a part is there
    r".*\.(?:tar(?:\.(?:gz|bz2|xz|zst|lz4|br|z|part|tmp|aria2|crdownload))?|tgz|tbz2?|txz|tzst|zip|7z|rar)",
    re.IGNORECASE,
)


def shards_in(folder: str) -> list[str]:
    """The shards in a folder, sorted; warns of other files that look like data.

    Raises:
        ValueError: there are none; lists what is there instead.
    """
    with os.scandir(folder) as entries:
        is_folder = {entry.name: entry.is_dir() for entry in entries if not entry.name.startswith(".")}
    names = sorted(is_folder)
    shards = [name for name in names if name.endswith(TARS)]
    packed = [name for name in names if _PACKED.fullmatch(name) and not name.endswith(TARS)]
    images = [name for name in names if _IMAGE.fullmatch(name)]
    inside = {name: _listed(os.path.join(folder, name)) for name in names if is_folder[name]}
    deeper = [name for name, files in inside.items() if any(file.endswith(TARS) for file in files)]
    left_out = [
        f"{len(some):,} {what} ({', '.join(map(shorten, some[:3]))}{', …' if len(some) > 3 else ''})"
        for some, what in (
            (packed, "archives of another kind"),
            (images, "images"),
            (deeper, "folders with shards"),
        )
        if some
    ]
    if not shards:
        in_folders = any(_IMAGE.fullmatch(file) for files in inside.values() for file in files)
        pack = (
            f"; to make shards of image files: adq pack {shlex.quote(folder)} -o shards/%06d.tar"
            if images or in_folders
            else ""
        )
        there = f"; there are {', '.join(left_out)}" if left_out else ""
        raise ValueError(f"no shards match {shorten(f'{folder}/*.tar')}, *.tar.gz or *.tgz{there}{pack}")
    if left_out:
        logger.warning(
            "folder %s: %d shards; left out: %s", printable(folder), len(shards), ", ".join(left_out)
        )
    return [os.path.join(folder, name) for name in shards]


def _listed(path: str) -> list[str]:
    """The names in a folder; empty where it is unreadable."""
    try:
        return os.listdir(path)
    except OSError:
        return []
