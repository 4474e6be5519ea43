"""Is the order a function of the position alone, and does every layout of ranks share it out exactly?"""

from collections import Counter
from itertools import groupby

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adq_wds.core.order import (
    BLOCK_BYTES,
    blocks_of,
    in_shards,
    n_for_rank,
    on_line,
    rank_positions,
    row_order,
    shard_order,
)

Place = tuple[int, int]


def slow_epoch(orders: list[list[int]], n_lanes: int) -> list[Place]:
    """The order of an epoch as one would lay it with cards: (place in the shards' order, row), position by position."""
    line = [(slot, row) for slot, rows in enumerate(orders) for row in rows]
    short, n_longer = divmod(len(line), n_lanes)
    lanes, at = [], 0
    for lane in range(n_lanes):
        size = short + (lane < n_longer)
        lanes.append(line[at : at + size])
        at += size
    out = []
    while any(lanes):
        out += [lane.pop(0) for lane in lanes if lane]
    return out


counts = st.lists(st.integers(0, 12), min_size=1, max_size=9)


@given(counts, st.integers(1, 20), st.integers(-3, 3), st.integers(0, 3))
def test_index_functions_give_the_order_by_hand(kept: list[int], lanes: int, seed: int, epoch: int) -> None:
    shards = shard_order(len(kept), stream="p", seed=seed, epoch=epoch)
    n_bytes = [np.full(n, 700_000) for n in kept]
    rows = [row_order(n_bytes[s], shard=f"{s}.tar", stream="p", seed=seed, epoch=epoch) for s in shards]
    expected = slow_epoch([r.tolist() for r in rows], lanes)
    total = sum(kept)
    line = on_line(np.arange(total), n_total=total, n_lanes=lanes)
    slot, row = in_shards(line, np.cumsum(np.array(kept)[shards]))
    assert [(s, int(rows[s][j])) for s, j in zip(slot.tolist(), row.tolist(), strict=True)] == expected


@given(st.integers(0, 300), st.integers(1, 12), st.data())
def test_ranks_share_out_what_is_left_exactly(total: int, world: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, total))
    shares: dict[str, list[list[int]]] = {"pad": [], "drop": [], "ragged": []}
    for uneven, ranks in shares.items():
        for rank in range(world):
            place = {"start": start, "rank": rank, "world": world}
            n = n_for_rank(total, uneven=uneven, **place)  # type: ignore[arg-type]
            ranks.append(rank_positions(np.arange(n), n_total=total, **place).tolist())
    every = {name: Counter(t for share in ranks for t in share) for name, ranks in shares.items()}
    lengths = {name: {len(share) for share in ranks} for name, ranks in shares.items()}
    assert every["ragged"] == Counter(range(start, total))
    assert max(lengths["ragged"]) - min(lengths["ragged"]) <= 1
    assert len(lengths["pad"]) == len(lengths["drop"]) == 1
    assert not every["ragged"] - every["pad"]
    assert (every["pad"] - every["ragged"]).total() < world
    assert not every["drop"] - every["ragged"]
    assert (every["ragged"] - every["drop"]).total() < world


def test_eight_ranks_share_out_a_thousand_plans() -> None:
    """F16."""
    rng = np.random.default_rng(0)
    for total in rng.integers(0, 10_000, 1000).tolist():
        counts = {
            uneven: [n_for_rank(total, start=0, rank=r, world=8, uneven=uneven) for r in range(8)]  # type: ignore[arg-type]
            for uneven in ("ragged", "pad", "drop")
        }
        assert max(counts["ragged"]) - min(counts["ragged"]) <= 1
        assert sum(counts["ragged"]) == total
        assert set(counts["pad"]) == {-(-total // 8)}
        assert set(counts["drop"]) == {total // 8}


@pytest.mark.parametrize(("total", "world"), [(11, 4), (1, 2), (7, 8)])
def test_error_refuses_unequal_ranks_and_says_what_to_do(total: int, world: int) -> None:
    text = rf"{total} samples .* {world} ranks .* 'pad' to repeat {-total % world} .* 'drop' to leave {total % world}"
    with pytest.raises(ValueError, match=text):
        n_for_rank(total, start=0, rank=0, world=world, uneven="error")
    assert n_for_rank(total * world, start=0, rank=0, world=world, uneven="error") == total


def test_orders_depend_on_stream_seed_epoch_and_shard() -> None:
    def orders(stream: str = "p", seed: int = 0, epoch: int = 0, shard: str = "a.tar") -> tuple[str, str]:
        shards = shard_order(40, stream=stream, seed=seed, epoch=epoch)
        rows = row_order(np.full(40, 100_000), shard=shard, stream=stream, seed=seed, epoch=epoch)
        return str(shards.tolist()), str(rows.tolist())

    first = orders()
    assert orders() == first
    for other in (orders(stream="q"), orders(seed=1), orders(epoch=1)):
        assert other[0] != first[0]
        assert other[1] != first[1]
    assert orders(shard="b.tar")[1] != first[1]
    assert first[0] != first[1]


def test_orders_never_change() -> None:
    """Golden values: a saved state must find the same order with any later numpy."""
    assert shard_order(8, stream="plan", seed=7, epoch=3).tolist() == [2, 1, 4, 3, 6, 7, 0, 5]
    n_bytes = np.full(8, 1 << 19)  # four rows make a block
    rows = row_order(n_bytes, shard="train-000000.tar", stream="plan", seed=7, epoch=3)
    assert rows.tolist() == [6, 4, 5, 7, 2, 0, 1, 3]


@given(st.lists(st.integers(512, 5_000_000), max_size=40), st.integers(0, 5))
def test_rows_of_a_block_stay_together(sizes: list[int], epoch: int) -> None:
    n_bytes = np.array(sizes, dtype=np.int64)
    block, before = [], 0  # the slow way: where a row begins decides
    for size in sizes:
        block.append(before // BLOCK_BYTES)
        before += size
    assert blocks_of(n_bytes).tolist() == block
    order = row_order(n_bytes, shard="a.tar", stream="p", seed=0, epoch=epoch).tolist()
    assert sorted(order) == list(range(len(sizes)))
    runs = [key for key, _ in groupby(block[i] for i in order)]
    assert len(runs) == len(set(block))


def test_both_blocks_and_rows_in_them_are_shuffled() -> None:
    options = {"shard": "a.tar", "stream": "p", "epoch": 0}
    orders = [row_order(np.full(24, 1 << 19), seed=s, **options).tolist() for s in range(9)]  # type: ignore[arg-type]
    firsts = {order[0] // 4 for order in orders}
    assert len(firsts) > 2  # six blocks of four
    assert len({tuple(i % 4 for i in order[:4]) for order in orders}) > 2
