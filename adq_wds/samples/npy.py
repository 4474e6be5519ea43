"""Reads npy files of floats; a header is checked before anything is allocated."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adq_wds.errors import reason_of, shorten

MAGIC = b"\x93NUMPY"
FIELD_PREFIX = "field:"  # the name of the encoder of embeddings in a field of the samples begins so
MAX_HEADER_BYTES = 10_000  # NumPy's own limit
# header length: its width in bytes and its reader, by format version; version 3 is for names that are not Latin
_VERSIONS: dict[tuple[int, int], tuple[int, Any]] = {
    (1, 0): (2, np.lib.format.read_array_header_1_0),
    (2, 0): (4, np.lib.format.read_array_header_2_0),
}


class NpyError(ValueError):
    """No npy file, or its header is damaged or declares too much; the caller adds the place."""


@dataclass(frozen=True)
class NpyHeader:
    """The header of an npy file.

    Attributes:
        shape: as declared, unchecked.
        fortran_order: whether the first axis is the fastest.
        dtype: as declared, any type of NumPy.
        start: offset of the numbers, in bytes.
    """

    shape: tuple[Any, ...]
    fortran_order: bool
    dtype: np.dtype[Any]
    start: int

    @property
    def is_floats(self) -> bool:
        """Whether it declares an array of float16, float32 or float64."""
        # True is an int; and a number of thousands of digits is one that Python refuses to show
        valid = all(type(length) is int and 0 <= length < 2**63 for length in self.shape)
        return valid and self.dtype.kind == "f" and self.dtype.itemsize in (2, 4, 8)

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
    except Exception as error:  # NumPy hands the text to Python's tokenizer and literal reader
        raise NpyError(f"damaged npy header ({reason_of(error)})") from error
    return NpyHeader(shape, fortran_order, dtype, end)


def checked_header(start: bytes, size: int, fits: Callable[[NpyHeader], bool], expected: str) -> NpyHeader:
    """The header of an npy file of floats, compared with its size before anything is allocated.

    Args:
        start: the file's first bytes, as `read_header` takes them.
        size: bytes in the whole file.
        fits: whether a shape is right.
        expected: the right shape, in words.

    Raises:
        NpyError: the header is damaged, of another shape or type, or the file has fewer or more bytes than it declares.
    """
    header = read_header(start, size)
    if not header.is_floats or not fits(header):
        order = ", Fortran order" if header.fortran_order else ""
        raise NpyError(
            f"{str(header.dtype)[:80]} of shape {shorten(header.shape)}{order}; expected {expected} of float16, float32 "
            "or float64"
        )
    if header.declared_bytes != size - header.start:
        raise NpyError(
            f"declares {header.declared_bytes} bytes of numbers, shape {header.shape}, and holds {size - header.start}; "
            "write it again"
        )
    return header


def read_vector(data: bytes) -> NDArray[np.floating[Any]]:
    """The vector (D,), D >= 1, in the bytes of an npy file of shape (D,) or (1, D).

    Raises:
        NpyError: as `checked_header`.
    """
    header = checked_header(data[:MAX_HEADER_BYTES], len(data), _is_vector, "one vector, (D,) or (1, D),")
    return np.frombuffer(data, header.dtype, offset=header.start)


def _is_vector(header: NpyHeader) -> bool:
    shape = header.shape
    return len(shape) in (1, 2) and shape[:-1] in ((), (1,)) and shape[-1] >= 1 and not header.fortran_order
