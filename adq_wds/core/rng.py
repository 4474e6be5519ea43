"""Draws by key: the same seed, epoch, shard and key give the same draw."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def draw(seed: int, epoch: int, shard: str, key: str, *, purpose: str = "rank") -> int:
    """A uniform draw in [0, 2**64) that depends on its arguments and on nothing else.

    Args:
        seed: the run's seed, any integer of at most 63 bits and a sign.
        epoch: 0 for a plan's ranks.
        shard: the shard's base name (no folder, so that data may move).
        key: the sample's key.
        purpose: keeps draws for different uses independent ("rank", "map", "view", …).

    Returns:
        the first 8 bytes, little-endian, of BLAKE2b over the length-prefixed fields.

    >>> draw(0, 0, "train-000000.tar", "a") == draw(0, 0, "train-000000.tar", "a")
    True
    >>> draw(0, 0, "ab", "c") == draw(0, 0, "a", "bc")
    False
    """
    return int(draws(seed, epoch, shard, [key], purpose=purpose)[0])


def draws(
    seed: int, epoch: int, shard: str, keys: Sequence[str], *, purpose: str = "rank"
) -> NDArray[np.uint64]:
    """`draw` for many keys of one shard: (n,) uint64."""
    head = hashlib.blake2b(digest_size=8)
    for field in (purpose.encode(), _integer(seed), _integer(epoch), shard.encode()):
        head.update(_prefixed(field))
    out = bytearray()
    for key in keys:
        digest = head.copy()
        digest.update(_prefixed(key.encode()))
        out += digest.digest()
    return np.frombuffer(bytes(out), dtype="<u8").astype(np.uint64, copy=False)


def generator(seed: int, epoch: int, shard: str, key: str, *, purpose: str = "map") -> np.random.Generator:
    """A separate numpy generator for one sample in one epoch."""
    return np.random.Generator(np.random.PCG64(draw(seed, epoch, shard, key, purpose=purpose)))


def check_seed(seed: object) -> int:
    """`seed` as an int.

    Raises:
        ValueError: not an integer, or outside the signed 64-bit range.
    """
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
        raise ValueError(f"seed must be an integer, got {seed!r}")
    if not -(2**63) <= int(seed) < 2**63:
        raise ValueError(f"seed must fit into 64 bits, got {seed}")
    return int(seed)


def _integer(value: int) -> bytes:
    return int(value).to_bytes(8, "little", signed=True)


def _prefixed(field: bytes) -> bytes:
    return len(field).to_bytes(8, "little") + field
