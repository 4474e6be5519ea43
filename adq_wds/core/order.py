"""Orders the kept samples of an epoch, and shares them out among ranks and workers.

Index functions, no state: from a position in the epoch to a place on a line of all kept rows, to a shard and
a row of it. Any position is computed without those before it, so a stream starts anywhere, on any layout.

1. Shards are permuted by (stream, seed, epoch): `shard_order`.
2. The kept rows of each are permuted and joined end to end: a line of T places. Neighbouring rows of 2 MiB
   together are a block. Blocks are permuted, then rows inside each (`row_order`). So rows that are fetched together
   are used together, and the last tenth of an epoch needs little more than a tenth of its bytes.
3. The line is cut into L contiguous lanes, the first T mod L of them one place longer.
4. Position t is in lane t mod L, place t div L: `on_line`. Reading takes the lanes in turn, and that is the shuffle:
   what is read at one time comes from L places of the whole set, and at most L shards are open.
5. Rank r of W reads positions start + r, start + r + W, …: `rank_positions`; `n_for_rank` says how many, by `uneven`.
6. Its positions are cut into batches, and batch b is worker b mod n's.

With a global batch of N, steps 5 and 6 deal each N positions out anew: rank r's batch b is start + b · N + r,
start + b · N + r + W, … below start + (b + 1) · N. So a global step has the same samples whatever W is.

So all ranks are at the same position after the same number of batches, and one number is the stream's
position.

Three shards a, b, c that keep 4, 3 and 5 samples, T = 12, cut into L = 4 lanes of 3 places, on W = 2 ranks:

>>> counts = np.array([4, 3, 5])
>>> shards = shard_order(3, stream="plan", seed=1, epoch=0)
>>> shards.tolist()  # c, then a, then b
[2, 0, 1]
>>> n_bytes = [np.full(n, 800_000) for n in counts]  # three rows make a block
>>> rows = [row_order(n_bytes[s], shard="abc"[s], stream="plan", seed=1, epoch=0) for s in shards]
>>> line = [f"{'abc'[s]}{row}" for s, order in zip(shards, rows) for row in order]
>>> " ".join(line)  # of c first its second block, then its first; each in an order of its own
'c4 c3 c0 c1 c2 a3 a1 a2 a0 b1 b2 b0'
>>> [" ".join(line[i : i + 3]) for i in (0, 3, 6, 9)]  # the four lanes
['c4 c3 c0', 'c1 c2 a3', 'a1 a2 a0', 'b1 b2 b0']
>>> places = on_line(np.arange(12), n_total=12, n_lanes=4)
>>> " ".join(line[p] for p in places)  # lanes in turn: the order of the epoch
'c4 c1 a1 b1 c3 c2 a2 b2 c0 a3 a0 b0'
>>> ends = np.cumsum(counts[shards])
>>> slot, row = in_shards(places, ends)  # and without the line: which shard of the order, which row of its order
>>> " ".join(f"{'abc'[shards[s]]}{rows[s][j]}" for s, j in zip(slot, row))
'c4 c1 a1 b1 c3 c2 a2 b2 c0 a3 a0 b0'
>>> for rank in range(2):
...     own = rank_positions(np.arange(6), n_total=12, start=0, rank=rank, world=2)
...     print(rank, own.tolist(), " ".join(line[p] for p in places[own]))
0 [0, 2, 4, 6, 8, 10] c4 a1 c3 a2 c0 a0
1 [1, 3, 5, 7, 9, 11] c1 b1 c2 b2 a3 b0

After one batch of 2 on each rank the stream stands at t = 4; the 8 positions left, on three ranks with "pad":

>>> [n_for_rank(12, start=4, rank=rank, world=3, uneven="pad") for rank in range(3)]
[3, 3, 3]
>>> rank_positions(np.arange(3), n_total=12, start=4, rank=2, world=3).tolist()  # 12 is position 0 again
[6, 9, 0]

Global batches of 5 of these 12 positions, on two ranks; "ragged" deals out what is left for the third step:

>>> for rank in range(2):
...     n = n_for_rank(12, start=0, rank=rank, world=2, uneven="ragged", step=5)
...     print(rank, rank_positions(np.arange(n), n_total=12, start=0, rank=rank, world=2, step=5).tolist())
0 [0, 2, 4, 5, 7, 9, 10]
1 [1, 3, 6, 8, 11]
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from adq_wds.core.rng import draw

I64 = NDArray[np.int64]

Uneven = Literal["pad", "drop", "ragged", "error"]
UNEVEN: tuple[str, ...] = get_args(Uneven)
LANES = 64
BLOCK_BYTES = 2 << 20


def shard_order(n_shards: int, *, stream: str, seed: int, epoch: int) -> I64:
    """The order in which an epoch lays its shards on the line: (S,) int64, a permutation.

    Args:
        n_shards: S, shards in the order of their names.
        stream: the plan's hash, so that another plan is read in another order.
        seed: of the run.
        epoch: >= 0.
    """
    # raw 64-bit numbers, which numpy promises never to change, put in order
    raw = np.random.PCG64(draw(seed, epoch, "", stream, purpose="shards")).random_raw(n_shards)
    return np.argsort(raw, kind="stable").astype(np.int64, copy=False)


def blocks_of(n_bytes: I64) -> I64:
    """The block of each kept row of a shard: neighbours that begin within the same `BLOCK_BYTES` of kept bytes.

    Args:
        n_bytes: (n,) int64, of each row, in the shard's order.

    Returns:
        (n,) int64, ascending from 0; numbers are left out where a row is larger than a block.

    >>> blocks_of(np.array([1_500_000, 600_000, 100, 9_000_000, 5])).tolist()
    [0, 0, 1, 1, 5]
    """
    begins = np.cumsum(n_bytes) - n_bytes
    return begins // BLOCK_BYTES


def row_order(n_bytes: I64, *, shard: str, stream: str, seed: int, epoch: int) -> I64:
    """The order of a shard's kept rows on the line: (n,) int64, a permutation that leaves blocks together.

    Args:
        n_bytes: (n,) int64, of each row, in the shard's order.
        shard: its name.
        stream: the plan's hash.
        seed: of the run.
        epoch: >= 0.
    """
    block = blocks_of(n_bytes)
    n, n_blocks = len(block), int(block[-1]) + 1 if len(block) else 0
    raw = np.random.PCG64(draw(seed, epoch, shard, stream, purpose="rows")).random_raw(n + n_blocks)
    return np.lexsort((raw[:n], raw[n:][block])).astype(np.int64, copy=False)


def on_line(t: I64, *, n_total: int, n_lanes: int) -> I64:
    """Places on the line of positions `t`: lane t mod L, place t div L in it.

    Args:
        t: (n,) int64, 0 <= t < n_total.
        n_total: T, places on the line.
        n_lanes: L; 1 reads the line from end to end.

    >>> on_line(np.arange(7), n_total=7, n_lanes=3).tolist()  # lanes 0 1 2, 3 4 and 5 6
    [0, 3, 5, 1, 4, 6, 2]
    """
    lane, place = t % n_lanes, t // n_lanes
    place += lane * (n_total // n_lanes) + np.minimum(lane, n_total % n_lanes)
    return place


def in_shards(place: I64, ends: I64) -> tuple[I64, I64]:
    """The shard that each place on the line lies in, and the place inside it.

    Args:
        place: (n,) int64.
        ends: (S,) int64, where each shard ends on the line: their kept counts, summed up.

    Returns:
        (n,) int64, which shard of the line; (n,) int64, the row of that shard's order.
    """
    slot = np.searchsorted(ends, place, side="right")
    starts = np.concatenate([[0], ends[:-1]])
    return slot, place - starts[slot]


def n_for_rank(
    n_total: int, *, start: int, rank: int, world: int, uneven: Uneven, step: int | None = None
) -> int:
    """How many positions a rank reads from `start` on.

    Args:
        n_total: T.
        start: first position of all ranks together, 0 <= start <= T.
        rank: r, 0 <= r < world.
        world: W.
        uneven: when T − start is no multiple of `step`: "pad" reads the first positions again, "drop" leaves the last
            ones out, "ragged" deals these out as far as they go, "error" refuses.
        step: positions that ranks share out before they go on, >= W: N with global batches; else W, one for each.

    Raises:
        ValueError: "error", and the last step is not full.

    >>> [[n_for_rank(11, start=0, rank=r, world=4, uneven=u) for r in range(4)] for u in ("pad", "drop", "ragged")]
    [[3, 3, 3, 3], [2, 2, 2, 2], [3, 3, 3, 2]]
    """
    step = step or world
    n_full, left = divmod(n_total - start, step)
    if uneven == "error" and left:
        among = f"among {world} ranks" if step == world else f"into global batches of {step}"
        raise ValueError(
            f"{n_total - start} samples do not divide {among} (uneven='error'): use 'pad' to repeat "
            f"{step - left} of them, 'drop' to leave {left} out, or 'ragged' for unequal ranks"
        )
    last = {"pad": step if left else 0, "ragged": left}.get(uneven, 0)
    return n_full * n_in_step(step, rank=rank, world=world) + n_in_step(last, rank=rank, world=world)


def n_in_step(step: int, *, rank: int, world: int) -> int:
    """How many of `step` positions are a rank's, dealt out in turn: N / W, rounded up for the first ranks."""
    return -(-(step - rank) // world)


def rank_positions(
    k: I64, *, n_total: int, start: int, rank: int, world: int, step: int | None = None
) -> I64:
    """The `k`-th positions of a rank, from the front again beyond T: (n,) int64. `step` as in `n_for_rank`."""
    step = step or world
    own = n_in_step(step, rank=rank, world=world)
    return (start + k // own * step + rank + k % own * world) % n_total
