"""Copies are those that a table by contents finds, of whatever order and batch."""

import numpy as np

from adq_wds.core.copies import first_of
from adq_wds.core.known_copies import KnownCopies


def test_copies_are_those_of_a_plain_table() -> None:
    rng = np.random.default_rng(0)
    contents = rng.integers(0, 256, (60, 16), dtype=np.uint8)
    seen = contents[rng.integers(0, 40, 100)]
    draw = rng.integers(0, 2**63, 100).astype(np.uint64)
    known = KnownCopies.of(seen, first_of(seen, np.ones(100, dtype=bool)), draw)
    table: dict[bytes, int] = {}
    for row, own in zip(seen, draw.tolist(), strict=True):
        table.setdefault(row.tobytes(), own)
    assert len(known.digest) == len(table)
    new = np.concatenate([seen, contents])
    draws = np.concatenate([draw, rng.integers(0, 2**63, 60).astype(np.uint64)])
    expected = [table.get(row.tobytes(), own) != own for row, own in zip(new, draws.tolist(), strict=True)]
    assert known.are_copies(new, draws).tolist() == expected
    order = rng.permutation(len(new))
    assert known.are_copies(new[order], draws[order]).tolist() == [expected[i] for i in order]
    assert [bool(known.are_copies(new[i : i + 1], draws[i : i + 1])[0]) for i in range(len(new))] == expected


def test_of_no_samples_there_are_no_copies() -> None:
    none = KnownCopies.of(np.empty((0, 16), np.uint8), np.empty(0, np.int64), np.empty(0, np.uint64))
    assert none.are_copies(np.zeros((2, 16), np.uint8), np.zeros(2, np.uint64)).tolist() == [False, False]
