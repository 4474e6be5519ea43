"""Checks arguments where they enter, with one error text per rule."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

import numpy as np

Ratio = Annotated[float, "in [0, 1]; the command takes 20% for 0.2"]
Count = Annotated[int, ">= 1"]


def integer(name: str, value: Any, *, least: int, most: int | None = None) -> int:
    """`value` as an int, Python's or numpy's; a `ValueError` with its name unless `least` <= value <= `most`.

    >>> integer("quality", 90, least=1, most=100)
    90
    >>> integer("quality", 0, least=1, most=100)
    Traceback (most recent call last):
    ValueError: quality must be an integer from 1 to 100, got 0
    """
    is_integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if is_integer and least <= value and (most is None or value <= most):
        return int(value)
    bounds = f">= {least}" if most is None else f"from {least} to {most:,}"
    raise ValueError(f"{name} must be an integer {bounds}, got {value!r}")


def positive(name: str, value: object) -> int:
    """`value` as an int, if it is an integer of at least 1; see `integer`."""
    return integer(name, value, least=1)


def check_memory(memory_bytes: float) -> None:
    """Raise `ValueError` unless it is a number >= 0."""
    if isinstance(memory_bytes, bool) or not isinstance(memory_bytes, (int, float)) or not memory_bytes >= 0:
        raise ValueError(f"memory_bytes must be a number >= 0, got {memory_bytes!r}")


def listed(name: str, values: Iterable[Any]) -> list[Any]:
    """`values` as a list; refuses a bare string, which would be read letter by letter."""
    if isinstance(values, str):
        raise ValueError(f"{name} must be a list, got the text {values!r}; write [{values!r}]")
    return list(values)


def no_bar(progress: bool | None) -> bool | None:
    """Tqdm's `disable` for a `progress`: None shows a bar only on a terminal."""
    return None if progress is None else not progress
