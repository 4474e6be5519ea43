"""Which shards does a neighbour's description list, and how many samples in each? timm's `_info.json`, wids' JSON."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from adq_wds.errors import PlanError, ShardError, shorten
from adq_wds.shards.names import check_shard_name, shown_url
from adq_wds.tables import bounds

Listed = tuple[str, int]
"""A shard's name in a description, and its samples."""


def read_info(path: str | os.PathLike[str], *, split: str | None = None) -> list[Listed]:
    """The shards that a description lists, as (path, n_samples), in its order.

    Two forms are read: ``{"splits": {NAME: {"name", "num_samples", "filenames", "shard_lengths"}}}``, which timm and
    ``adq write`` make, and ``{"shardlist": [{"url", "nsamples"}], "datasets": [{"name", "shardlist"}]}`` of wids.
    A description comes from a stranger: every shard must be a plain file name below the description's own folder.

    Args:
        path: the JSON file.
        split: only this split (wids: this one of its data sets); all by default.

    Raises:
        ValueError: there is no such split.
        ShardError: missing, no JSON, too large, of another form, or it names what is not a file below its folder.
    """
    file = Path(path)
    info = _parsed(file)
    try:
        if isinstance(info, dict) and "splits" in info:
            parts = _timm_splits(info["splits"])
        elif isinstance(info, dict) and ("shardlist" in info or "datasets" in info):
            parts = _wids_parts(info)
        else:
            raise _InfoError("expected 'splits', as timm writes them, or 'shardlist', as wids does")
        if split is not None and split not in parts:
            raise ValueError(f"split {shorten(split)} is not in {file}: it has {shorten(sorted(parts))}")
        listed = parts[split] if split is not None else [row for rows in parts.values() for row in rows]
        twice = [name for name, count in Counter(name for name, _ in listed).items() if count > 1]
        if twice:
            raise _InfoError(f"shard {shorten(twice[0])} is listed twice; choose one split, or list it once")
        return [(_inside(file.parent, name), n) for name, n in listed]
    except _InfoError as error:
        raise ShardError(f"{file}: {error}") from None


class _InfoError(Exception):
    """What is wrong with a description; `read_info` knows its path."""


def _parsed(file: Path) -> Any:
    """The JSON document, weighed before it is unfolded."""
    try:
        if not file.is_file():
            raise ShardError(f"{file}: no such file; expected a JSON description of shards")
        with file.open("rb") as handle:
            raw = handle.read(bounds.MAX_HEADER_BYTES + 1)
        bounds.check_header(raw, 0)
        return json.loads(raw)
    except OSError as error:
        raise ShardError(f"{file}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError, MemoryError) as cause:
        reason = shorten(str(cause) or type(cause).__name__)
        raise ShardError(f"{file}: not JSON that can be read ({reason})") from cause


def _timm_splits(splits: Any) -> dict[str, list[Listed]]:
    found = {}
    for name, part in _checked(splits, dict, "splits").items():
        where = f"split {shorten(name)}"
        names = _checked(_entry(part, "filenames", where), list, f"{where}, filenames")
        counts = _checked(_entry(part, "shard_lengths", where), list, f"{where}, shard_lengths")
        if len(names) != len(counts):
            raise _InfoError(f"{where} has {len(names)} filenames and {len(counts)} shard_lengths")
        rows = [(_name(file), _count(n, where)) for file, n in zip(names, counts, strict=True)]
        total, said = sum(n for _, n in rows), part.get("num_samples")
        if said is not None and (type(said) is not int or said != total):
            raise _InfoError(f"{where} has num_samples {shorten(said)}, its shard_lengths sum to {total}")
        found[name] = rows
    return found


def _wids_parts(info: dict[str, Any]) -> dict[str, list[Listed]]:
    version = info.get("wids_version", 1)
    if version != 1 or type(version) is not int:
        raise _InfoError(f"wids_version {shorten(version)}, expected 1")
    found: dict[str, list[Listed]] = {}
    own = [info] if "shardlist" in info else []
    for part in [*own, *_checked(info.get("datasets", []), list, "datasets")]:
        where = "shardlist"
        for other in ("source_url", "base", "base_path"):
            if _checked(part, dict, "datasets").get(other):
                raise _InfoError(f"{other!r} is refused: shards must lie below this file's folder")
        shards = _checked(_entry(part, "shardlist", "a data set"), list, where)
        rows = [(_name(_entry(s, "url", where)), _count(_entry(s, "nsamples", where), where)) for s in shards]
        name = part.get("name", "")
        found.setdefault(_checked(name, str, "a data set's name"), []).extend(rows)
    return found


def _entry(value: Any, name: str, where: str) -> Any:
    if name not in _checked(value, dict, where):
        raise _InfoError(f"{where} has no {name!r}")
    return value[name]


def _checked(value: Any, kind: type, where: str) -> Any:
    if type(value) is not kind:
        raise _InfoError(f"{where} is a {type(value).__name__}, expected a {kind.__name__}")
    return value


def _count(value: Any, where: str) -> int:
    if type(value) is not int or value < 0:
        raise _InfoError(f"{where} has a shard of {shorten(value)} samples, expected a number >= 0")
    return value


def _name(value: Any) -> str:
    """The name of a shard, if it is a plain relative file name."""
    try:
        return check_shard_name(value.removeprefix("./") if isinstance(value, str) else value)
    except PlanError as error:
        if isinstance(value, str) and ":" in value:  # which may hold a secret
            text = f"shard {shown_url(value)} is refused: it is no plain file name, but a URL or command"
            raise _InfoError(text) from None
        raise _InfoError(str(error)) from None


def _inside(folder: Path, name: str) -> str:
    """The path of a shard, no link on it leading out of the folder."""
    path, home = folder / name, os.path.realpath(folder)
    if os.path.commonpath([home, os.path.realpath(path)]) != home:
        raise _InfoError(
            f"shard {shorten(name)} is refused: a link leads out of the folder; name the shard itself"
        )
    return str(path)
