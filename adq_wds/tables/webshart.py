"""Reads the members of a shard from the JSON that webshart, cheesechaser and hfutils write beside it."""

from __future__ import annotations

from typing import NotRequired, TypedDict

from adq_wds.shards.tar_headers import BLOCK, Entry
from adq_wds.tables.headers import Natural, checked, parse_json


class _File(TypedDict):
    offset: Natural
    length: NotRequired[Natural]
    size: NotRequired[Natural]
    path: NotRequired[str]
    filename: NotRequired[str]
    fname: NotRequired[str]


def read_members(raw: bytes, n_bytes: int) -> tuple[list[Entry], int] | None:
    """The files that an index lists, in the order of the tar, and the end of the last one; None for any other JSON.

    Args:
        raw: ``{"filesize", "files": {NAME: {"offset", "length"}}}``, or a list of files with their "path". Offsets are
            those of payloads. Folders are not listed.
        n_bytes: size of the shard's file.

    Returns:
        entries, each with the end of the one before as its `start`: its first header lies there or behind it.

    Raises:
        ValueError: no JSON, too large, of another form, or made of a file of another size.
    """
    index = parse_json(raw)
    if not isinstance(index, dict) or not isinstance(index.get("files"), (dict, list)):
        return None
    size = checked(index.get("filesize") or 0, Natural, "filesize")
    if size not in (0, n_bytes):
        raise ValueError(f"it was made of a file of {size:,} bytes")
    if isinstance(index["files"], dict):
        named = list(checked(index["files"], dict[str, _File], "files").items())
    else:
        listed = checked(index["files"], list[_File], "files")
        named = [(f.get("path") or f.get("filename") or f.get("fname") or "", f) for f in listed]
    rows = sorted((file["offset"], file.get("length", file.get("size", -1)), name) for name, file in named)
    entries, end = [], 0
    for payload, length, name in rows:
        if length < 0:
            raise ValueError(f"it lists a file without its length: {name[:80]!r}")
        name.encode()  # a ValueError for half a character, which JSON can hold
        entries.append(Entry(end, name, payload, length))
        end = payload + length + -length % BLOCK
    return entries, end
