"""No damage to a shard passes, none is invented, and what it leaves whole is still found: F2, F3, F5."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import adq_wds as adq
from adq_wds.jobs.verify_listed import open_listed
from adq_wds.jobs.verify_shard import check_shard
from adq_wds.shards.samples_in_tar import Span, iter_spans

MakeShard = Callable[..., Path]
One = tuple[Path, bytes, adq.Plan, list[Span]]


@pytest.fixture
def one(make_shard: MakeShard) -> One:
    shard = make_shard("a.tar", 6)
    data, plan = shard.read_bytes(), adq.Plan.from_keys(str(shard), None)
    return shard, data, plan, list(iter_spans(data, shard="a.tar"))


def padding(spans: list[Span]) -> set[int]:
    """The bytes that no reader looks at: those behind a payload in its last block."""
    ends = [member.offset + member.n_bytes for span in spans for member in span.members]
    return {at for end in ends for at in range(end, end + -end % 512)}


def test_no_flip_or_zeroed_block_passes_or_is_invented(one: One) -> None:
    """F3: undetected 0, false alarms 0."""
    shard, data, plan, spans = one
    expected = next(iter(open_listed(plan)))
    free, rng = padding(spans), random.Random(0)
    heads = [member.offset - 512 for span in spans for member in span.members]
    free |= {head + 155 for head in heads}  # behind the NUL that ends a checksum
    nul = {head + 154 for head in heads}  # which may be a space
    for _ in range(1500):
        at, bit = rng.randrange(len(data)), rng.randrange(8)
        damaged = bytearray(data)
        damaged[at] ^= 1 << bit
        shard.write_bytes(damaged)
        check = check_shard(shard, expected)
        same = at in free or (at in nul and damaged[at] == 32)
        assert (not check.differences) == same, (at, bit, check.differences)
        assert check.ok + check.differs + check.missing == len(spans)
        assert check.ok >= len(spans) - 1  # one bit costs one sample at most
    for at in range(0, len(data), 512):
        shard.write_bytes(data[:at] + bytes(512) + data[at + 512 :])
        assert (not check_shard(shard, expected).differences) == (data[at : at + 512] == bytes(512))


def test_no_truncation_passes_and_the_lost_samples_are_counted(one: One) -> None:
    """F2."""
    shard, data, plan, spans = one
    expected = next(iter(open_listed(plan)))
    ends = [span.byte_offset + span.n_bytes for span in spans]
    rng = random.Random(1)
    for cut in [rng.randrange(len(data)) for _ in range(600)] + [0, *ends]:
        shard.write_bytes(data[:cut])
        check = check_shard(shard, expected)
        assert (not check.differences) == (cut >= ends[-1] + 512)
        assert check.ok == sum(end <= cut for end in ends)
        assert check.missing == len(spans) - check.ok


def test_two_shards_cut_and_joined_never_pass(one: One, make_shard: MakeShard) -> None:
    """F5: A cut anywhere, then B, which repeats its keys."""
    shard, data, plan, spans = one
    expected = next(iter(open_listed(plan)))
    other = make_shard("b.tar", 6, side=12).read_bytes()
    free = padding(spans)
    rng = random.Random(2)
    for cut in [rng.randrange(len(data)) for _ in range(200)] + [span.byte_offset for span in spans]:
        joined = data[:cut] + other
        shard.write_bytes(joined)
        check = check_shard(shard, expected)
        assert check.differences
        own = [range(span.byte_offset, span.byte_offset + span.n_bytes) for span in spans]
        whole = [all(data[at] == joined[at] for at in part if at not in free) for part in own]
        assert check.ok == sum(whole)


def test_hostile_spans_in_features_never_read_elsewhere(one: One) -> None:
    shard, data, plan, _ = one
    expected, size = next(iter(open_listed(plan))), len(data)
    hostile = ((-2048, 2048), (0, 2**62), (size, 512), (2**62, 2**62), (-size, 2048), (512, -512))
    for byte_offset, n_bytes in hostile:
        row = (0, "nobody", byte_offset, n_bytes, 1)
        spans = type(expected.spans).from_rows([row])
        listed = replace(expected, spans=spans, used=np.ones(1, dtype=bool), labels=None, complete=False)
        for damage in (False, True):
            shard.write_bytes(b"\xff" + data[1:] if damage else data)
            check = check_shard(shard, listed)
            assert (check.ok, check.missing) == (0, 1)
