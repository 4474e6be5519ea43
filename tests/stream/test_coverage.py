"""Does every layout of ranks and workers read the plan, all of it, in one order?"""

import logging
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adq_wds as adq
from adq_wds.core.order import row_order, shard_order
from adq_wds.reading import open_shards as readers
from adq_wds.stream import epoch_order as recipe
from tests.stream.conftest import TarSet, ids, played, write_set

Options = dict[str, Any]


@pytest.mark.parametrize("n_shards", [1, 7, 24])
def test_the_shuffled_order_is_the_one_laid_out_by_hand(tar_sets: dict[int, TarSet], n_shards: int) -> None:
    tar_set = tar_sets[n_shards]
    dataset = adq.ShardDataset(tar_set.urls, plan=tar_set.plan, shuffle=True, seed=5)
    plan = adq.load_plan(tar_set.plan)
    for epoch in range(3):
        line = []
        for s in shard_order(n_shards, stream=plan.hash, seed=5, epoch=epoch).tolist():
            kept = [name for name in tar_set.kept if name[0] == plan.shards[s]]
            shard = plan.shard(plan.shards[s])
            n_bytes = shard.spans.n_bytes[shard.kept]
            order = row_order(n_bytes, shard=plan.shards[s], stream=plan.hash, seed=5, epoch=epoch)
            line += [kept[i] for i in order]
        size, longer = divmod(len(line), 64)
        cuts = np.cumsum([0] + [size + (lane < longer) for lane in range(64)])
        lanes = [line[a:b] for a, b in pairwise(cuts)]
        turns = [lane[i] for i in range(size + 1) for lane in lanes if i < len(lane)]
        assert ids(dataset) == turns


def test_five_epochs_all_differ_and_two_runs_are_equal(tar_set: TarSet) -> None:
    """F17."""

    def run() -> list[list[tuple[str, str]]]:
        dataset = adq.ShardDataset(tar_set.urls, plan=tar_set.plan, shuffle=True, seed=1)
        return [ids(dataset) for _ in range(5)]

    first = run()
    assert run() == first
    assert len({str(epoch) for epoch in first}) == 5
    assert all(Counter(epoch) == Counter(tar_set.kept) for epoch in first)


@pytest.mark.parametrize("options", [{}, {"batch_size": 4}, {"batch_size": 5, "uneven": "ragged"}])
def test_the_order_of_a_rank_does_not_depend_on_workers(tar_set: TarSet, options: Options) -> None:
    """F17."""

    def rank(r: int) -> adq.ShardDataset:
        return adq.ShardDataset(tar_set.urls, plan=tar_set.plan, shuffle=True, rank=r, world=3, **options)

    for r in range(3):
        alone = [ids([batch]) for batch in rank(r)]
        for n_workers in (1, 2, 3, 4, 8):
            assert [ids([batch]) for batch in played(rank(r), n_workers)] == alone
        assert len(rank(r)) == len(alone)


@pytest.mark.parametrize("uneven", ["pad", "ragged", "drop"])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("n_shards", [1, 7, 24])
def test_every_layout_covers_the_plan(
    tar_sets: dict[int, TarSet], n_shards: int, shuffle: bool, uneven: Any
) -> None:
    """F13: 180 layouts."""
    tar_set = tar_sets[n_shards]
    kept = Counter(tar_set.kept)
    for world in (1, 2, 3, 4, 8):
        ranks = [
            adq.ShardDataset(
                tar_set.urls,
                plan=tar_set.plan,
                shuffle=shuffle,
                uneven=uneven,
                rank=r,
                world=world,
                batch_size=3,
            )
            for r in range(world)
        ]
        for n_workers in (0, 1, 2, 3, 4, 8) if uneven == "ragged" else (0, 3):
            seen: Counter[tuple[str, str]] = Counter()
            lengths = []
            for dataset in ranks:
                dataset.set_epoch(2)
                batches = list(played(dataset, n_workers))
                assert len(batches) == len(dataset)
                lengths.append(sum(len(batch) for batch in batches))
                seen += Counter(ids(batches))
            if uneven == "ragged":
                assert seen == kept
                assert max(lengths) - min(lengths) <= 1
            elif uneven == "pad":
                assert not kept - seen
                assert (seen - kept).total() == -kept.total() % world
                assert len(set(lengths)) == 1
            else:
                assert not seen - kept
                assert (kept - seen).total() == kept.total() % world
                assert len(set(lengths)) == 1


def test_uneven_error_speaks_when_the_data_set_is_made(tar_set: TarSet) -> None:
    assert len(adq.ShardDataset(tar_set.urls, plan=tar_set.plan, uneven="error", rank=0, world=4)) == 7
    with pytest.raises(ValueError, match="28 samples do not divide among 8 ranks"):
        adq.ShardDataset(tar_set.urls, plan=tar_set.plan, uneven="error", rank=0, world=8)


def test_a_rank_or_a_worker_with_nothing_is_told_before_the_first_sample(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """F15."""
    tiny = write_set(tmp_path / "tiny", [2], keep=lambda i: True)

    def said(**options: Any) -> str:
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="adq_wds"):
            n_workers = options.pop("n_workers", 0)
            samples = list(played(adq.ShardDataset(tiny.urls, plan=tiny.plan, **options), n_workers))
        assert len(samples) == options.pop("n", len(samples))
        return caplog.text

    assert said() == ""
    assert "rank 2 of 3 has 0 of 2 samples" in said(rank=2, world=3, uneven="ragged")
    assert "rank 0 of 3 has 0 of 2 samples" in said(rank=0, world=3, uneven="drop")
    assert "has 2 of 2 samples in 1 batches, so some of its 2 workers have nothing" in said(
        batch_size=2, n_workers=2
    )
    empty = write_set(tmp_path / "empty", [2], keep=lambda i: False)
    with caplog.at_level(logging.WARNING, logger="adq_wds"):
        assert list(adq.ShardDataset(empty.urls, plan=empty.plan, shuffle=True)) == []
    assert "no sample is kept" in caplog.text


def test_more_shards_than_are_held_are_read_all_the_same(
    tar_sets: dict[int, TarSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "HELD_SHARDS", 3)
    monkeypatch.setattr(readers, "HELD_SHARDS", 3)
    tar_set = tar_sets[24]
    stream = iter(adq.ShardDataset(tar_set.urls, plan=tar_set.plan, shuffle=True))
    seen = []
    for sample in stream:
        seen.append(sample)
        assert len(stream._stages.readers.held) <= 3
        assert stream._order.rows.cache_info().currsize <= 3
    assert Counter(ids(seen)) == Counter(tar_set.kept)
    assert len(stream._stages.readers.held) == 0


def test_the_epoch_goes_on_once_a_sample_is_handed_on_and_may_be_set(tar_set: TarSet) -> None:
    dataset = adq.ShardDataset(tar_set.urls, plan=tar_set.plan, shuffle=True)
    first = ids(dataset)
    assert dataset.epoch == 1
    stream = iter(dataset)
    broken = [next(stream) for _ in range(5)]
    third = ids(dataset)
    assert dataset.epoch == 3
    dataset.set_epoch(1)
    second = ids(dataset)
    assert second[:5] == ids(broken)
    assert len({*map(tuple, (first, second, third))}) == 3
    dataset.set_epoch(0)
    assert ids(dataset) == first
    for wrong in (-1, 1.0, True, "1"):
        with pytest.raises(ValueError, match="epoch must be an integer from 0 to"):
            dataset.set_epoch(wrong)  # type: ignore[arg-type]
