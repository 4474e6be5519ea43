"""Reads the headers of our files, and checks their JSON against a type."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
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

from adq_wds.errors import AdqError, FeaturesError, shorten
from adq_wds.files import canonical_json
from adq_wds.tables import bounds

Natural = Annotated[int, range(2**63)]
"""Fits int64; so the others fit the type of their column."""
Natural31 = Annotated[int, range(2**31)]
Natural32 = Annotated[int, range(2**32)]
Width = Annotated[int, range(1, 2**31)]

T = TypeVar("T")


class ShardEntry(TypedDict):
    """A header's entry for one row group, which is a shard."""

    name: str
    n: Natural31
    columns: dict[str, str]


class TableHeader(TypedDict):
    """The entries of every header."""

    format: str
    version: int
    shards: list[ShardEntry]


class EmbeddedBy(TypedDict):
    """Encoder and image field of embeddings; only equal ones can be compared."""

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
    if fault := _fault_of(kind)(value):  # type: ignore[arg-type]
        raise ValueError(what + fault)
    result: T = value
    return result


@cache  # headers list many shards: a type is analysed once, and a place named only for a fault
def _fault_of(kind: Any) -> Callable[[Any], str]:
    """A function that yields the faults of a value, as text to follow its name; none where it is of the type."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        base, within = args
        return lambda value: (
            ""
            if type(value) is base and value in within
            else _mismatch(value, f"{base.__name__} in {within}")
        )
    if origin in (Union, UnionType):
        faults = [_fault_of(each) for each in args]
        return lambda value: "" if "" in (each := [fault(value) for fault in faults]) else each[0]
    if origin is tuple:
        inner = [_fault_of(each) for each in args]
        return lambda value: (
            _first((f"[{i}]", fault(each)) for i, (fault, each) in enumerate(zip(inner, value, strict=True)))
            if type(value) is list and len(value) == len(inner)
            else _mismatch(value, f"list of {len(inner)}")
        )
    if origin is list:
        item = _fault_of(args[0])
        return lambda value: (
            _first((f"[{i}]", item(each)) for i, each in enumerate(value))
            if type(value) is list
            else _mismatch(value, "list")
        )
    if origin is dict:
        item = _fault_of(args[1])

        def of_entries(value: Any) -> str:
            if type(value) is not dict:
                return _mismatch(value, "dict")
            if set(map(type, value.values())) == {args[1]}:  # as hashes are, by column
                return ""
            return _first((f".{shorten(name)[1:-1]}", item(each)) for name, each in value.items())

        return of_entries
    if is_typeddict(kind):
        return _entries_fault(kind)
    types = {float: (float, int)}.get(kind, (kind,))
    name = getattr(kind, "__name__", str(kind)).replace("NoneType", "null")
    return lambda value: "" if kind is Any or type(value) in types else _mismatch(value, name)


def _entries_fault(kind: Any) -> Callable[[Any], str]:
    """As `_fault_of`, for a `TypedDict`."""
    entries = []
    for name, hint in get_type_hints(kind, include_extras=True).items():
        required = get_origin(hint) is not NotRequired
        entries.append((name, _fault_of(hint if required else get_args(hint)[0]), required))

    def fault(value: Any) -> str:
        if type(value) is not dict:
            return _mismatch(value, "object")
        for name, inner, required in entries:
            if name in value:
                if text := inner(value[name]):
                    return f".{name}{text}"
            elif required:
                return f" has no {name!r}"
        return ""

    return fault


def _first(faults: Iterable[tuple[str, str]]) -> str:
    return next((place + fault for place, fault in faults if fault), "")


def _mismatch(value: Any, expected: str) -> str:
    return f" is {shorten(value)}, expected {expected}"


def parse_json(raw: bytes) -> Any:
    """The value of a JSON text that a stranger wrote. Raises `ValueError`: too large, too deep, or no JSON."""
    try:
        bounds.check_header(raw, 0)
        return json.loads(raw)
    except (ValueError, RecursionError, MemoryError) as cause:
        reason = shorten(str(cause) or type(cause).__name__)
        raise ValueError(f"not JSON that can be read ({reason})") from cause


def parse_header(raw: bytes, digest: str, *, kind: str, version: int, header: type[T]) -> T:
    """The JSON header of a file of ours, checked for its SHA-256, format, version and type.

    `bounds` has checked the size of `raw`. Raises `ValueError` that names the failed check.
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
    return check_entries(value, kind=kind, version=version, header=header)


def check_entries(value: Any, *, kind: str, version: int, header: type[T]) -> T:
    """`parse_header`'s checks of a parsed header: its format, version and type."""
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
    """Whether lists and objects are nested at most so deep, since comparing and showing them recurses."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels > 0 and all(_is_flat(each, levels - 1) for each in inner if isinstance(each, (dict, list)))


def _shown(value: object) -> str:
    """A text or number of the header; for a list, which may be deep, only its type."""
    return shorten(value) if isinstance(value, (str, int, float)) else type(value).__name__


def reopened(load: Callable[[str], Any], error: Callable[[str], AdqError], path: str, expected: str) -> Any:
    """What pickled as its path and hash: the file, opened again; an error where its content is another by now."""
    opened = load(path)
    if opened.hash != expected:
        hashes = f"hash {opened.hash[:12]}, was {expected[:12]}"
        raise error(f"{path}: changed since it was opened ({hashes})")
    return opened


def refuse_unlike(
    files: Sequence[tuple[object, Mapping[str, Any]]], names: Sequence[str], remedy: str
) -> None:
    """Raise `FeaturesError` unless files, each with its header, agree in these entries."""
    if unlike := first_unlike([header for _, header in files], names):
        (first, header), (other, unlike_header), name = files[0], files[unlike[0]], unlike[1]
        a, b = (shorten(each.get(name)) for each in (header, unlike_header))
        raise FeaturesError(f"{first} and {other} do not belong together: {name} {a} and {b}; {remedy}")


def first_unlike(headers: Sequence[Mapping[str, Any]], names: Sequence[str]) -> tuple[int, str] | None:
    """The position of the first header that differs from the first one, and the entry's name; None if all agree."""
    return next(
        ((i, name) for i, each in enumerate(headers) for name in names if each[name] != headers[0][name]),
        None,
    )
