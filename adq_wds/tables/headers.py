"""Reads the headers of our files, and checks JSON against the type that describes it, which FORMAT.md says in words."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from functools import cache
from types import UnionType
from typing import (
    Annotated,
    Any,
    NotRequired,
    TypedDict,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from adq_wds.errors import shorten
from adq_wds.files import canonical_json

Natural = Annotated[int, range(2**63)]
"""Fits int64; so the others fit the type of their column."""
Natural31 = Annotated[int, range(2**31)]
Natural32 = Annotated[int, range(2**32)]
Width = Annotated[int, range(1, 2**31)]

T = TypeVar("T")


class ShardEntry(TypedDict):
    """What a header says of one row group, which is a shard."""

    name: str
    n: Natural31
    columns: dict[str, str]


class TableHeader(TypedDict):
    """What every header holds."""

    format: str
    version: int
    shards: list[ShardEntry]


class EmbeddedBy(TypedDict):
    """Who made embeddings, and of what: only equal ones can be compared."""

    encoder: str
    revision: str
    preprocessing_hash: str
    image: str


def checked(value: Any, kind: type[T], what: str = "header") -> T:
    """`value`, if it is of a type.

    Args:
        value: what a JSON text holds.
        kind: str, int, float, bool, None, Any; `Annotated` with what it must be in; a union, a list, a dict with keys
            of text, a tuple (which JSON holds as a list), or a `TypedDict`, whose further keys are ignored.
        what: the value's name, for the error.

    Raises:
        ValueError: names the entry that is missing or of another type.

    >>> checked([{"n": 3}], list[dict[str, Width]], "shards")
    [{'n': 3}]
    >>> checked([{"n": 0}], list[dict[str, Width]], "shards")
    Traceback (most recent call last):
    ValueError: shards[0].n is 0, expected int in range(1, 2147483648)
    """
    fault = _fault(value, kind, what)
    if fault:
        raise ValueError(fault)
    result: T = value
    return result


def _fault(value: Any, kind: Any, what: str) -> str:
    """What is wrong with a value; nothing where it is of the type."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        faults = [_fault(value, each, what) for each in args]
        return "" if "" in faults else faults[0]
    if origin is Annotated:
        inside = f"{what} is {shorten(value)}, expected {args[0].__name__} in {args[1]}"
        return "" if type(value) is args[0] and value in args[1] else inside
    if is_typeddict(kind) and type(value) is dict:
        entries = []
        for name, (inner, required) in _entries(kind).items():
            if name in value:
                entries.append((value[name], inner, f"{what}.{name}"))
            elif required:
                return f"{what} has no {name!r}"
    elif origin is dict and type(value) is dict:
        entries = [(each, args[1], f"{what}.{shorten(name)[1:-1]}") for name, each in value.items()]
    elif origin is list and type(value) is list:
        entries = [(each, args[0], f"{what}[{i}]") for i, each in enumerate(value)]
    elif origin is tuple and type(value) is list and len(value) == len(args):
        entries = [
            (each, inner, f"{what}[{i}]") for i, (each, inner) in enumerate(zip(value, args, strict=True))
        ]
    else:
        is_one = kind is Any or type(value) is kind or (kind is float and type(value) is int)
        name = (
            "object"
            if is_typeddict(kind)
            else getattr(kind, "__name__", str(kind)).replace("NoneType", "null")
        )
        return "" if is_one else f"{what} is {shorten(value)}, expected {name}"
    return next(filter(None, (_fault(*entry) for entry in entries)), "")


@cache
def _entries(kind: Any) -> dict[str, tuple[Any, bool]]:
    """The type of each entry of a `TypedDict`, and whether it must be there."""
    hints = get_type_hints(kind, include_extras=True)
    return {
        name: (get_args(hint)[0], False) if get_origin(hint) is NotRequired else (hint, True)
        for name, hint in hints.items()
    }


def parse_header(raw: bytes, digest: str, *, kind: str, version: int, header: type[T]) -> T:
    """The JSON header of a file of ours.

    Args:
        raw: its text; of a size that `bounds` has checked.
        digest: its SHA-256, as the file says.
        kind, version: the format that it must be of, and the newest version that is known.
        header: its type.

    Raises:
        ValueError: it is damaged, of another format, of a newer version, or of another type.
    """
    if hashlib.sha256(raw).hexdigest() != digest:
        raise ValueError("damaged: the header does not match its hash; make it again")
    try:
        value = json.loads(raw, parse_constant=_finite, parse_float=_finite)
        if not _is_flat(value):
            raise ValueError("lists in lists in lists, too deep")
        # half a surrogate pair has no UTF-8: the header would have no hash
        if b"\\ud" in raw or b"\\uD" in raw:
            canonical_json(value).encode("utf-8")
    except (ValueError, RecursionError, MemoryError) as cause:
        reason = shorten(str(cause) or type(cause).__name__)
        raise ValueError(f"damaged: the header is not JSON of ours ({reason})") from cause
    entries = value if isinstance(value, dict) else {}
    if entries.get("format") != f"adq_wds.{kind}":
        raise ValueError(f"holds {_shown(entries.get('format'))}, expected adq_wds.{kind}")
    if type(entries.get("version")) is not int or not 1 <= entries["version"] <= version:
        raise ValueError(
            f"version {_shown(entries.get('version'))} of the {kind} format; this adq_wds reads versions 1 to {version}, so a "
            "newer one is needed"
        )
    try:
        return checked(value, header)
    except (ValueError, RecursionError) as cause:
        raise ValueError(f"damaged header: {shorten(str(cause), 200)}") from cause


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"number {text[:20]}")
    return number


def _is_flat(value: Any, levels: int = 32) -> bool:
    """Whether lists and objects lie in each other at most so deep: to compare or to show them is to recurse."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels > 0 and all(_is_flat(each, levels - 1) for each in inner if isinstance(each, (dict, list)))


def _shown(value: object) -> str:
    """A text or number of the header; of a list, which may be deep, its type only."""
    return shorten(value) if isinstance(value, (str, int, float)) else type(value).__name__


def first_unlike(headers: Sequence[Mapping[str, Any]], names: Sequence[str]) -> tuple[int, str] | None:
    """The number of the first header that differs from the first one, and the name of the entry; None if none does."""
    return next(
        ((i, name) for i, each in enumerate(headers) for name in names if each[name] != headers[0][name]),
        None,
    )
