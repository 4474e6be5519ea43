"""Reads the shards and sample counts of a description: timm's `_info.json`, or the JSON of wids."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NotRequired, TypedDict

from adq_wds.errors import PlanError, ShardError, shorten
from adq_wds.remote.url_path import AnyPath, UrlPath, as_path
from adq_wds.shards.names import check_shard_name, shown_url
from adq_wds.tables import bounds
from adq_wds.tables.headers import Natural, checked, parse_json

Listed = tuple[str, int]
"""A shard's name in a description, and its samples."""


def read_info(path: str | os.PathLike[str], *, split: str | None = None) -> list[Listed]:
    """The shards of a description as (path, n_samples), in its order.

    Two forms are read: ``{"splits": {NAME: {"name", "num_samples", "filenames", "shard_lengths"}}}``, which timm and
    ``adq write`` make, and ``{"shardlist": [{"url", "nsamples"}], "datasets": [{"name", "shardlist"}]}`` of wids.
    A description comes from a stranger: every shard must be a plain file name below the description's own folder.

    Args:
        path: the JSON file.
        split: only this split (wids: this one of its data sets); all by default.

    Raises:
        ValueError: there is no such split.
        ShardError: missing, no JSON, too large, of another form, or a name is no file below its folder.
    """
    file = as_path(path)
    info = _parsed(file)
    with _errors_of(file):
        if isinstance(info, dict) and "splits" in info:
            parts = _timm_splits(info["splits"])
        elif isinstance(info, dict) and ("shardlist" in info or "datasets" in info):
            parts = _wids_parts(info)
        else:
            raise ValueError("expected 'splits', as timm writes them, or 'shardlist', as wids does")
    if split is not None and split not in parts:
        raise ValueError(f"split {shorten(split)} is not in {file}: it has {shorten(sorted(parts))}")
    listed = parts[split] if split is not None else [row for rows in parts.values() for row in rows]
    with _errors_of(file):
        twice = [name for name, count in Counter(name for name, _ in listed).items() if count > 1]
        if twice:
            raise ValueError(f"shard {shorten(twice[0])} is listed twice; choose one split, or list it once")
        return [(_inside(file.parent, name), n) for name, n in listed]


@contextmanager
def _errors_of(file: AnyPath) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ShardError(f"{file}: {error}") from None


def _parsed(file: AnyPath) -> Any:
    """The JSON document, its size checked before it is parsed."""
    try:
        if not file.is_file():
            raise ShardError(f"{file}: no such file; expected a JSON description of shards")
        with file.open("rb") as handle:
            raw = handle.read(bounds.MAX_HEADER_BYTES + 1)
        return parse_json(raw)
    except OSError as error:
        raise ShardError(f"{file}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ShardError(f"{file}: {error}") from error


class _TimmSplit(TypedDict):
    filenames: list[Any]  # names are checked one by one
    shard_lengths: list[Natural]
    num_samples: NotRequired[Natural | None]


class _WidsShard(TypedDict):
    url: Any
    nsamples: Natural


class _WidsPart(TypedDict):
    shardlist: list[_WidsShard]
    name: NotRequired[str]


def _timm_splits(splits: Any) -> dict[str, list[Listed]]:
    parts = {}
    for name, part in checked(splits, dict[str, _TimmSplit], "splits").items():
        names, counts = part["filenames"], part["shard_lengths"]
        if len(names) != len(counts):
            raise ValueError(
                f"split {shorten(name)} has {len(names)} filenames and {len(counts)} shard_lengths"
            )
        if part.get("num_samples") not in (None, sum(counts)):
            raise ValueError(
                f"split {shorten(name)} has num_samples {part['num_samples']}, its shard_lengths sum to {sum(counts)}"
            )
        parts[name] = [(_name(file), n) for file, n in zip(names, counts, strict=True)]
    return parts


def _wids_parts(info: dict[str, Any]) -> dict[str, list[Listed]]:
    version = info.get("wids_version", 1)
    if version != 1 or type(version) is not int:
        raise ValueError(f"wids_version {shorten(version)}, expected 1")
    parts: dict[str, list[Listed]] = {}
    first = [info] if "shardlist" in info else []
    for part in [*first, *checked(info.get("datasets", []), list[dict[str, Any]], "datasets")]:
        for other in ("source_url", "base", "base_path"):
            if part.get(other):
                raise ValueError(f"{other!r} is refused: shards must lie below this file's folder")
        shards = checked(part, _WidsPart, "a data set")["shardlist"]
        parts.setdefault(part.get("name", ""), []).extend((_name(s["url"]), s["nsamples"]) for s in shards)
    return parts


def _name(value: Any) -> str:
    """The name of a shard, checked to be a plain relative file name."""
    try:
        return check_shard_name(value.removeprefix("./") if isinstance(value, str) else value)
    except PlanError as error:
        if isinstance(value, str) and ":" in value:  # which may hold a secret
            text = f"shard {shown_url(value)} is refused: it is no plain file name, but a URL or command"
            raise ValueError(text) from None
        raise ValueError(str(error)) from None


def _inside(folder: AnyPath, name: str) -> str:
    """The path of a shard; refuses links out of the folder."""
    if isinstance(folder, UrlPath):
        return os.fspath(folder / name)
    path, home = folder / name, os.path.realpath(folder)
    if os.path.commonpath([home, os.path.realpath(path)]) != home:
        raise ValueError(
            f"shard {shorten(name)} is refused: a link leads out of the folder; name the shard itself"
        )
    return str(path)
