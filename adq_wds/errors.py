"""Defines the errors that a user can meet: one family, each built from one string.

A message says what is wrong, the value, what was expected and what to do, and starts with the place:
``shard train-000012.tar, key 'n0144_77', field 'jpg': not an image (starts with b'<html>')``.
"""

from __future__ import annotations

import re
from typing import Any, TypeVar

_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 but tab and newline, DEL, C1
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # marks that turn the direction of text
    "\u2028\u2029\ud800-\udfff]"  # line separators; half a character, which cannot be encoded
)


def printable(text: str) -> str:
    r"""Text that a terminal or a log may show: control characters are escaped, as by `repr`.

    Newlines, tabs and printable characters beyond ASCII stay.

    >>> print(printable("caf\u00e9 \x1b[31mred\u202e"))
    café \x1b[31mred\u202e
    """
    return _CONTROL.sub(lambda match: repr(match[0])[1:-1], text)


class AdqError(Exception):
    """Base of everything this package raises on purpose about data, files and state.

    Wrong arguments are errors of the program and raise `ValueError` or `TypeError` instead. Its text is
    `printable`: files, keys and names come from strangers.
    """

    def __str__(self) -> str:
        return printable(super().__str__())

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by text, since a subclass may have a constructor of its own."""
        return _unpickled, (type(self), self.args, self.__dict__)


def _unpickled(kind: type[AdqError], args: tuple[Any, ...], state: dict[str, Any]) -> AdqError:
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(state)
    return error


class SampleError(AdqError):
    """One sample cannot be used: no image, no label, damaged bytes, a NaN embedding."""


class ShardError(AdqError):
    """A shard cannot be trusted as a whole: truncated, bad header, duplicate key, changed since the plan."""


class FeaturesError(AdqError):
    """Features are damaged, incomplete, or do not belong together."""


class PlanError(AdqError):
    """A plan is damaged, cannot be met, or does not belong to these shards."""


class CodebookError(AdqError):
    """A codebook is damaged or does not belong to these embeddings."""


class StateError(AdqError):
    """A saved state does not belong to this stream."""


class LoaderClosed(AdqError):  # noqa: N818 - it says what is, as StopIteration does
    """The stream has already ended with an error; make a new one."""


E = TypeVar("E", bound=AdqError)


def located(error: E, *, shard: str, key: str | None = None, field: str | None = None) -> E:
    """The same kind of error with its place put in front of its text.

    >>> located(SampleError("empty file"), shard="a.tar", key="x", field="jpg")
    SampleError("shard a.tar, key 'x', field 'jpg': empty file")
    """
    place = f"shard {shard if shard.isprintable() else shorten(shard)}"
    if key is not None:
        place += f", key {shorten(key)}"
    if field is not None:
        place += f", field {shorten(field)}"
    return type(error)(f"{place}: {error}")


def names_place(error: AdqError, shard: str) -> bool:
    """Whether an error's text already starts with its place in `shard`, as `located` writes it."""
    text = str(error)
    return text.startswith("shard ") and (shard in text or shorten(shard) in text)


def retold(error: E, text: str) -> E:
    """A copy of the error with another text, caused by the original; does not call the class's constructor."""
    new = type(error).__new__(type(error))
    new.__dict__.update(error.__dict__)
    new.args = (text,)
    new.__cause__ = error
    return new


def placed(error: E, *, shard: str, key: str) -> E:
    """As `located`, unless the place is named already.

    >>> placed(SampleError("no good"), shard="a.tar", key="x")
    SampleError("shard a.tar, key 'x': no good")
    """
    if names_place(error, shard):
        return error
    return retold(error, str(located(AdqError(str(error)), shard=shard, key=key)))


def shorten(value: object, limit: int = 80) -> str:
    """`repr` of a value on one line, cut in the middle when it is long (keys come from strangers).

    >>> shorten("a" * 100, limit=20)
    "'aaaaaaa...aaaaaaaa'"
    """
    text = repr(value)
    if len(text) <= limit:
        return text
    head = (limit - 3) // 2
    return text[:head] + "..." + text[-(limit - 3 - head) :]


def reason_of(error: BaseException) -> str:
    r"""A foreign error's type and text on one line.

    >>> reason_of(ValueError("no\n  good"))
    'ValueError: no good'
    """
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
