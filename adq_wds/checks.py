"""Checks arguments where they enter: one text for each rule."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

import numpy as np

Ratio = Annotated[float, "in [0, 1]; the command takes 20% for 0.2"]
Count = Annotated[int, ">= 1"]


def positive(name: str, value: int) -> int:
    """`value`, if it is an integer of at least 1; a `ValueError` with its name otherwise."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
    return int(value)


def check_memory(memory_bytes: float) -> None:
    """Raise `ValueError` unless it is a number >= 0."""
    if isinstance(memory_bytes, bool) or not isinstance(memory_bytes, (int, float)) or not memory_bytes >= 0:
        raise ValueError(f"memory_bytes must be a number >= 0, got {memory_bytes!r}")


def listed(name: str, values: Iterable[Any]) -> list[Any]:
    """`values` as a list; a bare string, which would be read letter by letter, is refused."""
    if isinstance(values, str):
        raise ValueError(f"{name} must be a list, got the text {values!r}; write [{values!r}]")
    return list(values)
