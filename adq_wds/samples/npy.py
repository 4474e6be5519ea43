"""What does an npy header declare? Read with NumPy's own reader, before anything is allocated on its word."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

MAGIC = b"\x93NUMPY"
MAX_HEADER_BYTES = 10_000  # NumPy's own limit
# header length: its width in bytes and its reader, by format version; version 3 is for names that are not Latin
_VERSIONS: dict[tuple[int, int], tuple[int, Any]] = {
    (1, 0): (2, np.lib.format.read_array_header_1_0),
    (2, 0): (4, np.lib.format.read_array_header_2_0),
}


class NpyError(ValueError):
    """Bytes that are no npy file, or a header that cannot be believed; whoever read them knows the place."""


@dataclass(frozen=True)
class NpyHeader:
    """What an npy file says of itself.

    Attributes:
        shape: as declared; anything that a tuple may hold.
        fortran_order: whether the first axis is the fastest.
        dtype: as declared; anything that NumPy knows.
        start: where the numbers begin, in bytes.
    """

    shape: tuple[Any, ...]
    fortran_order: bool
    dtype: np.dtype[Any]
    start: int

    @property
    def has_lengths(self) -> bool:
        """Whether its shape is one that an array may have."""
        # True is an int; and a number of thousands of digits is one that Python refuses to show
        return all(type(length) is int and 0 <= length < 2**63 for length in self.shape)

    @property
    def is_floats(self) -> bool:
        """Whether it declares float16, float32 or float64 of some shape."""
        return self.has_lengths and self.dtype.kind == "f" and self.dtype.itemsize in (2, 4, 8)

    @property
    def declared_bytes(self) -> int:
        """Bytes of numbers that it declares."""
        n: int = math.prod(self.shape)
        return n * self.dtype.itemsize


def read_header(start: bytes, size: int) -> NpyHeader:
    """The header of an npy file of `size` bytes.

    Args:
        start: its first bytes, `MAX_HEADER_BYTES` of them, or all when there are fewer.
        size: bytes in the whole file.

    Raises:
        NpyError: not an npy file of version 1 or 2, or a header that is damaged or longer than the file or NumPy allow.

    >>> file = io.BytesIO()
    >>> np.save(file, np.zeros((1, 3), np.float16))
    >>> header = read_header(file.getvalue(), 134)
    >>> header.shape, header.is_floats, header.start + header.declared_bytes
    ((1, 3), True, 134)
    """
    version = (start[6], start[7]) if len(start) >= 12 and start.startswith(MAGIC) else (0, 0)
    if version not in _VERSIONS:
        raise NpyError(f"not an npy file of version 1 or 2 (starts with {start[:12]!r})")
    length_bytes, _ = _VERSIONS[version]
    end = 8 + length_bytes + int.from_bytes(start[8 : 8 + length_bytes], "little")
    if end > min(size, MAX_HEADER_BYTES):
        raise NpyError(f"declares a header of {end} bytes in a file of {size}")
    return _parsed(version, bytes(start[8:end]), end)


@lru_cache(maxsize=64)  # all samples of a set have the same header, and reading it takes 30 µs
def _parsed(version: tuple[int, int], header: bytes, end: int) -> NpyHeader:
    try:
        shape, fortran_order, dtype = _VERSIONS[version][1](io.BytesIO(header))
    except (
        Exception
    ) as error:  # NumPy hands the text to Python's tokenizer and literal reader: any may object
        text = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise NpyError(f"damaged npy header ({text})") from error
    return NpyHeader(shape, fortran_order, dtype, end)
