"""Which of many samples have plain headers with just these names, and how large are their payloads? All at once.

Plain is what the quick way of `SpanReader.parse` takes: a v7, ustar or GNU header of a plain file, its name in one piece,
its numbers in octal digits as all writers write them, its checksum right.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from adq_wds.shards.tar_headers import BLOCK

_WORDS = BLOCK // 8
_HEADER = np.dtype(
    {
        "names": ["name", "size", "size_end", "sum", "sum_end", "type", "prefix"],
        "formats": ["S100", "(11,)u1", "u1", "(6,)u1", ">u2", "u1", "u1"],
        "offsets": [0, 124, 135, 148, 154, 156, 345],
        "itemsize": BLOCK,
    }
)
_ZERO, _SPACE = ord("0"), ord(" ")
_OCTAL = 8 ** np.arange(10, -1, -1, dtype=np.int64)
_EVEN_BYTES = np.uint64(0x00FF00FF00FF00FF)


def payload_sizes(
    data: Sequence[bytes],
    n_bytes: NDArray[np.int64],
    keys: NDArray[np.object_],
    endings: tuple[str, ...],
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The sizes of n samples' payloads, as far as their members are named by their keys with F endings.

    Args:
        data: the bytes of each sample, headers and padding included; whole blocks, one or more.
        n_bytes: (n,) int64, how many these are.
        keys: (n,) ASCII str, its key.
        endings: what follows the key in the members' names, in order.

    Returns:
        (F, n) int64; and (n,) bool, whether all F headers are plain, and these members the whole sample. Sizes of
        others mean nothing.
    """
    size = np.zeros((len(endings), len(keys)), dtype=np.int64)
    good = np.full(len(keys), len(endings) > 0)
    at = np.zeros(len(keys), dtype=np.int64)
    for i, ending in enumerate(endings):
        heads = _blocks_at(data, at)
        names = (keys + ending).astype("S101")  # one too long stays so
        digits = heads["size"] - np.uint8(_ZERO)
        good &= _plain(heads) & (heads["name"] == names) & (digits < 8).all(axis=1)
        size[i] = digits @ _OCTAL
        at = at + BLOCK + size[i] + -size[i] % BLOCK
        good &= at == n_bytes if i == len(endings) - 1 else at < n_bytes
        at = np.where(good, at, 0)
    return size, good


def _blocks_at(data: Sequence[bytes], at: NDArray[np.int64]) -> NDArray[np.void]:
    """The header that begins at a byte of each sample: (n,)."""
    return np.frombuffer(
        b"".join([span[i : i + BLOCK] for span, i in zip(data, at.tolist(), strict=True)]), dtype=_HEADER
    )


def _plain(heads: NDArray[np.void]) -> NDArray[np.bool_]:
    """Which of n headers are plain, but for name and size: (n,)."""
    digits = heads["sum"] - np.uint8(_ZERO)
    good: NDArray[np.bool_] = (digits < 8).all(axis=1) & (heads["sum_end"] == _SPACE)  # NUL, space
    good &= ((heads["type"] == _ZERO) | (heads["type"] == 0)) & (heads["prefix"] == 0)
    good &= (heads["size_end"] == 0) | (heads["size_end"] == _SPACE)
    # the stored sum counts its own eight bytes as spaces
    counted = _sums(heads) - digits.sum(axis=1, dtype=np.int64) - 6 * _ZERO - _SPACE + 8 * _SPACE
    good &= counted == digits @ _OCTAL[-6:]
    return good


def _sums(heads: NDArray[np.void]) -> NDArray[np.int64]:
    """The sum of each block's bytes: (n,) int64."""
    words = heads.view(np.uint64).reshape(-1, _WORDS)
    pairs = words & _EVEN_BYTES  # four sums of 16 bits side by side: 128 bytes each, so none runs over
    pairs += (words >> np.uint64(8)) & _EVEN_BYTES
    total: NDArray[np.int64] = pairs.sum(axis=1).view(np.uint16).reshape(-1, 4).sum(axis=1, dtype=np.int64)
    return total


def endings_at(data: bytes, key: str, *, most: int) -> tuple[str, ...]:
    """What follows the key in the names of a sample's members; none unless each is a dot and a field.

    Nothing is verified: this is a guess for `payload_sizes`.
    """
    at = 0
    found: list[str] = []
    while at < len(data) and len(found) < most:
        head = data[at : at + BLOCK]
        ending, size = head[len(key) : 100].rstrip(b"\0"), head[124:135]
        if not ending.isascii() or size.strip(b"01234567"):
            return ()
        found.append(ending.decode())
        n = int(size, 8)
        at += BLOCK + n + -n % BLOCK
    named = all(e[:1] == "." and e.isprintable() and e[1:3] != "__" and "/" not in e for e in found)
    different = len({ending.lower() for ending in found}) == len(found)
    return tuple(found) if at == len(data) and named and different else ()
