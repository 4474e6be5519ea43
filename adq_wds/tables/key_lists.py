"""Writes and reads lists of keys: as text, CSV or JSON lines. A key names a sample, with its shard where it must."""

from __future__ import annotations

import csv
import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from adq_wds.errors import PlanError, located, shorten
from adq_wds.files import atomic_path
from adq_wds.tables.plan_view import PlanView

logger = logging.getLogger("adq_wds")

SampleId = str | tuple[str, str]
"""A key, or (shard, key)."""
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet runs a cell that begins so


def kept_samples(plan: PlanView) -> Iterator[tuple[str | None, str]]:
    """Shard and key of every kept sample, in the plan's order; no shard where the key alone names the sample.

    A key that would not be read back from a line of its own also gets its shard: one with a tab, which separates the
    two, an empty one, or one that begins with a byte order mark.
    """
    several = keys_in_several_shards(plan)
    for name in plan.shards:
        shard = plan.shard(name, hold=False)
        for key, kept in zip(shard.spans.keys, shard.kept.tolist(), strict=True):
            if kept:
                alone = key and "\t" not in key and key[0] != "\ufeff" and key not in several
                yield None if alone else name, key


def keys_in_several_shards(plan: PlanView) -> dict[str, list[str]]:
    """The shards of each key that stands in more than one, whether it is kept or not."""
    first: dict[str, str] = {}
    several: dict[str, list[str]] = {}
    for name in plan.shards:
        for key in plan.shard(name, hold=False).spans.keys:
            if first.setdefault(key, name) != name:
                several.setdefault(key, [first[key]]).append(name)
    return several


def kept_keys(plan: PlanView) -> Iterator[tuple[str, str]]:
    """Shard and key of every kept sample, in the plan's order."""
    for name in plan.shards:
        shard = plan.shard(name, hold=False)
        for key, kept in zip(shard.spans.keys, shard.kept.tolist(), strict=True):
            if kept:
                yield name, key


def write_txt(plan: PlanView, path: Path) -> None:
    """A line for each kept sample: KEY, or SHARD, a tab and KEY where a key stands in several shards.

    Raises:
        PlanError: a key holds a newline. Located.
    """
    with atomic_path(path) as partial, open(partial, "w", encoding="utf-8", newline="") as file:
        for shard, key in kept_samples(plan):
            if "\n" in key or "\r" in key:
                error = PlanError(
                    f"key {shorten(key)} holds a newline, which ends a line; write csv or jsonl"
                )
                raise located(error, shard=shard) if shard is not None else error
            file.write(f"{key}\n" if shard is None else f"{shard}\t{key}\n")


def write_csv(plan: PlanView, path: Path) -> None:
    """Columns `shard` and `key`, quoted where they hold commas, quotes or newlines; keys are as they are."""
    formulas = 0
    with atomic_path(path) as partial, open(partial, "w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)  # with "\r\n" at the ends of lines, it quotes either character
        rows.writerow(["shard", "key"])
        for shard, key in kept_keys(plan):
            rows.writerow([shard, key])
            formulas += key.startswith(_FORMULA)
    if formulas:
        logger.warning(
            "%s: %d keys begin with = + - or @, which a spreadsheet runs as formulas; import the column as text",
            path, formulas,
        )  # fmt: skip


def write_jsonl(plan: PlanView, path: Path) -> None:
    """An object with `shard` and `key` for each kept sample, in ASCII, so that no reader splits a line elsewhere."""
    with atomic_path(path) as partial, open(partial, "w", encoding="ascii", newline="") as file:
        for shard, key in kept_keys(plan):
            file.write(json.dumps({"shard": shard, "key": key}) + "\n")


def read_keys(path: str | os.PathLike[str]) -> list[SampleId]:
    """The keys of a .txt, .csv or .jsonl file, each alone or as (shard, key).

    A csv needs a header with a column `key`, and may have `shard`; other columns are ignored. A line of a jsonl is an
    object with `key` and maybe `shard`, a key, or a list of both.

    Raises:
        ValueError: the name has another ending.
        PlanError: missing, not UTF-8, or a line of another form, with its number.
    """
    file = Path(path)
    if file.suffix not in _READERS:
        raise ValueError(f"{file}: expected the ending {', '.join(_READERS)}, or .npy for indices")
    try:
        return list(_READERS[file.suffix](file))
    except UnicodeDecodeError as error:
        raise PlanError(f"{file}: not UTF-8 text: {error.reason}") from None
    except OSError as error:
        raise PlanError(f"{file}: cannot be read: {error.strerror}") from None


def read_txt(file: Path) -> Iterator[SampleId]:
    """One key a line, or shard and key with a tab between; empty lines are skipped."""
    # not `splitlines`: a key may hold U+2028
    for line in file.read_text(encoding="utf-8-sig").split("\n"):
        shard, tab, key = line.partition("\t")
        if line:
            yield (shard, key) if tab else line


def _read_csv(file: Path) -> Iterator[SampleId]:
    with open(file, encoding="utf-8-sig", newline="") as handle:
        rows = csv.DictReader(handle, strict=True)
        try:
            if "key" not in (rows.fieldnames or ()):
                raise PlanError(f"{file}: no column 'key' among {shorten(rows.fieldnames or [])}")
            for row in rows:
                yield _sample_id(file, rows.line_num, row["key"], row.get("shard") or None)
        except csv.Error as error:
            raise PlanError(f"{file}, line {rows.line_num}: not CSV: {error}") from None


def _read_jsonl(file: Path) -> Iterator[SampleId]:
    for n, line in enumerate(file.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise PlanError(f"{file}, line {n}: not JSON: {shorten(str(error))}") from None
        if isinstance(value, dict):
            yield _sample_id(file, n, value.get("key"), value.get("shard"))
        elif isinstance(value, list) and len(value) == 2:
            yield _sample_id(file, n, value[1], value[0])
        else:
            yield _sample_id(file, n, value, None)


def _sample_id(file: Path, n: int, key: Any, shard: Any) -> SampleId:
    if not isinstance(key, str) or not isinstance(shard, str | None):
        found = shorten(key if shard is None else [shard, key])
        raise PlanError(f"{file}, line {n}: expected a key, and maybe its shard, as text; got {found}")
    return key if shard is None else (shard, key)


_READERS: dict[str, Callable[[Path], Iterator[SampleId]]] = {
    ".txt": read_txt,
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
}
