"""Writes a plan's selection in forms that other libraries read; a new form is a function and an entry of `FORMATS`.

The command reads `FORMATS` for its help, so Arrow is imported in functions.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from adq_wds.errors import AdqError, PlanError, located
from adq_wds.files import atomic_path, make_folder, write_text
from adq_wds.tables.key_lists import kept_keys, keys_in_several_shards, write_csv, write_jsonl, write_txt
from adq_wds.tables.plan_view import PlanView

logger = logging.getLogger("adq_wds")


def export_plan(plan: PlanView, to: str, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write which samples a plan keeps, for another library.

    Args:
        plan: the plan.
        to: the form, one of `FORMATS`.
        path: the file to write; a new folder for "webshart".
        overwrite: replace a file that exists.

    Raises:
        ValueError: no such form (all are listed).
        PlanError: the form has only keys and a key stands in several shards, or it cannot hold a sample. Located.
        AdqError: `path` exists, or cannot be written.
    """
    if to not in FORMATS:
        raise ValueError(f"no format {to!r}; expected one of {', '.join(FORMATS)}")
    path = Path(path)
    if path.is_file() and not overwrite:
        raise AdqError(f"{path} exists; give another name, or overwrite=True")
    if not plan.n_kept:
        logger.warning("the plan keeps no sample: %s selects none", path)
    FORMATS[to].write(plan, path)


def write_indices(plan: PlanView, path: Path) -> None:
    """An array of int64: the position of each kept sample among all samples, shards in the order of their names."""
    by_number = sorted(plan.shards, key=_by_number)
    for name, other in zip(plan.shards, by_number, strict=True):
        if name != other:
            logger.warning(
                "indices count the shards by name, and %s comes before %s; load them in the order of plan.shards",
                name, other,
            )  # fmt: skip
            break
    parts, first = [np.empty(0, dtype=np.int64)], 0
    for name in plan.shards:
        shard = plan.shard(name, hold=False)
        index = shard.spans.index.astype(np.int64)
        parts.append(first + index[shard.kept])
        first += int(index[-1]) + 1 if len(index) else 0
    with atomic_path(path) as partial, open(partial, "wb") as file:
        np.save(file, np.concatenate(parts), allow_pickle=False)


def _by_number(name: str) -> list[tuple[bool, int, str]]:
    """A sort key that counts numbers in a name as numbers."""
    parts = re.split(r"(\d+)", name)
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]


def write_parquet_filter(plan: PlanView, path: Path) -> None:
    """`filters` of a Parquet reader, as JSON: ``[["key", "in", [KEY, ...]]]``."""
    keys = _only_keys(plan)
    nothing = ["key", "<", ""]  # Arrow takes no empty list
    write_text(path, json.dumps([["key", "in", keys] if keys else nothing]) + "\n")


def write_sql(plan: PlanView, path: Path) -> None:
    """An SQL condition on a column `key`, as LanceDB takes it: ``key IN ('KEY', ...)``."""
    keys = ", ".join("'{}'".format(key.replace("'", "''")) for key in _only_keys(plan))
    write_text(path, f"key IN ({keys})\n" if keys else "false\n")


def write_tags(plan: PlanView, path: Path) -> None:
    """The keys of each tag, as JSON: ``{"kept": [KEY, ...], "quota": [...], ...}``; the tags are the plan's reasons."""
    from adq_wds.tables.plan_rows import SHOWN_REASONS

    several = keys_in_several_shards(plan)
    _refuse_shared(several, several)
    tags: dict[str, list[str]] = defaultdict(list)
    for shard in plan:
        reasons = shard.derived_reason().tolist()
        for key, reason in zip(shard.spans.keys, reasons, strict=True):
            tags[SHOWN_REASONS[reason]].append(key)
    write_text(path, json.dumps(tags) + "\n")


def _only_keys(plan: PlanView) -> list[str]:
    """The kept keys; a `PlanError` where one stands in several shards. Located."""
    keys = [key for _, key in kept_keys(plan)]
    _refuse_shared(keys, keys_in_several_shards(plan))
    return keys


def _refuse_shared(keys: Iterable[str], several: Mapping[str, list[str]]) -> None:
    for key in keys if several else ():
        if key in several:
            error = PlanError(f"also in {several[key][1]}, and this format has keys only; write csv or jsonl")
            raise located(error, shard=several[key][0], key=key)


def write_webshart(plan: PlanView, folder: Path) -> None:
    """A folder with a JSON index for each shard: offset and length of every member of the kept samples.

    Raises:
        PlanError: where the members of a kept sample lie is not known, or a shard is compressed. Located.
        AdqError: the folder exists and is not empty.
    """
    if folder.is_dir() and any(folder.iterdir()):
        raise AdqError(f"{folder} is not empty; give a new folder")
    parent = make_folder(folder.parent)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name[:100]}.", dir=parent))
    try:
        for name in plan.shards:
            files = _members(plan, name)
            file = partial / f"{name.removesuffix('.tar')}.json"
            make_folder(file.parent)
            spans = plan.shard(name, hold=False).spans
            # less than the file's size, by which readers tell an index of all samples
            end = int(spans.byte_offset[-1] + spans.n_bytes[-1]) if len(spans) else 0
            write_text(file, json.dumps({"path": name, "filesize": end, "files": files}) + "\n")
        partial.chmod(0o755)
        os.replace(partial, folder)
    except OSError as error:
        raise AdqError(f"cannot write {folder}: {error.strerror}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _members(plan: PlanView, name: str) -> dict[str, dict[str, int]]:
    """Offset and length of the payload of each member of a shard's kept samples, by member."""
    from adq_wds.tables.members import payload_places

    spans = (shard := plan.shard(name, hold=False)).spans
    if not name.endswith(".tar"):
        raise located(PlanError("compressed, and webshart reads plain .tar files; unpack it"), shard=name)
    rows: NDArray[np.int64] = np.flatnonzero(shard.kept)
    texts = None if spans.members is None else spans.members.take(rows)
    fields, cuts, _ = (
        ([None] * len(rows), None, None) if texts is None else payload_places(texts, spans.n_bytes[rows])
    )
    files = {}
    for i, row in enumerate(rows.tolist()):
        names = fields[i]
        if names is None or cuts is None:
            why = "where its members lie is not in the plan: embed and plan again; if its name is long or not ASCII, webshart must index the shard itself"
            raise located(PlanError(why), shard=name, key=spans.keys[row])
        first = int(spans.byte_offset[row])
        for j, field in enumerate(names):
            start, stop = (int(cut) for cut in cuts[2 * j : 2 * j + 2, i])
            files[f"{spans.keys[row]}.{field}"] = {"offset": first + start, "length": stop - start}
    return files


class Format(NamedTuple):
    """A form of a selection: its writer, and what it is, in a line."""

    write: Callable[[PlanView, Path], None]
    help: str


FORMATS: Mapping[str, Format] = {
    "txt": Format(write_txt, "keys, one a line, as --must-include and --exclude read them"),
    "csv": Format(write_csv, "columns shard and key"),
    "jsonl": Format(write_jsonl, "objects with shard and key, one a line"),
    "indices": Format(
        write_indices, "positions, .npy: torch Subset, datasets select, litdata subset_dataset"
    ),
    "parquet-filter": Format(write_parquet_filter, "filters= on a column key: datasets, pandas, pyarrow"),
    "lancedb": Format(write_sql, "an SQL condition on a column key: LanceDB where, DuckDB"),
    "tags": Format(write_tags, "keys by reason, JSON: tags in FiftyOne and LightlyStudio"),
    "webshart": Format(write_webshart, "a folder of indexes that list the kept samples only"),
}
