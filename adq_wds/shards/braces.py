"""Counts the expansions of a pattern with braces, without expanding it.

The grammar is that of the package `braceexpand`, which expands them: ``{a,b}``, ``{000..146}``, ``{a..e}``, steps,
one within another, ``\\`` before a character that is meant as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_NUMBERS = re.compile(r"^(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?$")
_LETTERS = re.compile(r"^([A-Za-z])\.\.([A-Za-z])(?:\.\.-?(\d+))?$")
_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def count_braces(pattern: str) -> int:
    """The number of names that `braceexpand` would give.

    Raises:
        ValueError: an unbalanced brace.

    >>> count_braces("{yfcc/{00000..01481},cc12m/{00000..02175}}.tar")
    3658
    """
    n = 1
    start = depth = 0
    for i, character in _unescaped(pattern):
        if character == "{":
            depth += 1
            if depth == 1:
                start = i + 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                n *= _count_one(pattern[start:i])
    if depth:
        raise ValueError(f"braces that do not match in {pattern!r}")
    return n


def _count_one(inside: str) -> int:
    """The number of names in one pair of braces."""
    if numbers := _NUMBERS.match(inside):
        first, last, step = numbers.groups()
        return _count_range(int(first), int(last), step)
    if letters := _LETTERS.match(inside):
        first, last, step = letters.groups()
        return _count_range(_ALPHABET.index(first), _ALPHABET.index(last), step)
    parts = _alternatives(inside)
    return sum(map(count_braces, parts)) if parts else count_braces(inside)


def _count_range(first: int, last: int, step: str | None) -> int:
    return abs(last - first) // (int(step or 1) or 1) + 1


def _alternatives(inside: str) -> list[str]:
    """The parts between commas outside inner braces; empty without such commas."""
    commas, depth = [], 0
    for i, character in _unescaped(inside):
        depth += (character == "{") - (character == "}")
        if character == "," and depth == 0:
            commas.append(i)
    if depth or not commas:
        return []
    return [inside[a + 1 : b] for a, b in zip([-1, *commas], [*commas, len(inside)], strict=True)]


def _unescaped(text: str) -> Iterator[tuple[int, str]]:
    """The unescaped characters, each with its position."""
    i = 0
    while i < len(text):
        if text[i] == "\\":
            i += 2
            continue
        yield i, text[i]
        i += 1
