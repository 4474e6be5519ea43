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
from adq_wds.reading import open_shards
from adq_wds.stream import epoch_order
from tests.stream.conftest import Options, TarSet, epochs_of, ids, made, played, write_set


@pytest.mark.parametrize("n_shards", [1, 7, 24])
def test_the_shuffled_order_is_as_laid_out_by_hand(tar_sets: dict[int, TarSet], n_shards: int) -> None:
    tar_set = tar_sets[n_shards]
    dataset = made(tar_set, seed=5, batch_size=None)
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
    first, second = (epochs_of(made(tar_set), 5) for _ in range(2))
    assert first == second
    assert len({str(epoch) for epoch in first}) == 5
    assert all(Counter(epoch) == Counter(tar_set.kept) for epoch in first)


@pytest.mark.parametrize("options", [{"batch_size": None}, {}, {"batch_size": 5, "uneven": "ragged"}])
def test_a_ranks_order_does_not_depend_on_workers(tar_set: TarSet, options: Options) -> None:
    """F17."""
    for rank in range(3):
        dataset = made(tar_set, rank=rank, world=3, **options)
        alone = [ids([batch]) for batch in dataset]
        for n_workers in (1, 2, 3, 4, 8):
            dataset.set_epoch(0)
            assert [ids([batch]) for batch in played(dataset, n_workers)] == alone
        assert len(dataset) == len(alone)


@pytest.mark.parametrize("uneven", ["pad", "ragged", "drop"])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("n_shards", [1, 7, 24])
def test_all_layouts_cover_it(tar_sets: dict[int, TarSet], n_shards: int, shuffle: bool, uneven: Any) -> None:
    """F13: 180 layouts."""
    tar_set = tar_sets[n_shards]
    kept = Counter(tar_set.kept)
    for world in (1, 2, 3, 4, 8):
        options: Options = {"shuffle": shuffle, "uneven": uneven, "world": world, "batch_size": 3}
        ranks = [made(tar_set, rank=r, **options) for r in range(world)]
        for n_workers in (0, 1, 2, 3, 4, 8) if uneven == "ragged" else (0, 3):
            seen: Counter[tuple[str, str]] = Counter()
            lengths = []
            for dataset in ranks:
                dataset.set_epoch(2)
                batches = list(played(dataset, n_workers))
                assert len(batches) == len(dataset)
                lengths.append(sum(len(batch) for batch in batches))
                seen += Counter(ids(batches))
            assert max(lengths) - min(lengths) <= (uneven == "ragged")
            n_odd = kept.total() % world
            assert (kept - seen).total() == (n_odd if uneven == "drop" else 0)
            assert (seen - kept).total() == (-kept.total() % world if uneven == "pad" else 0)


def test_uneven_error_speaks_when_the_data_set_is_made(tar_set: TarSet) -> None:
    assert len(made(tar_set, batch_size=None, uneven="error", rank=0, world=4)) == 7
    with pytest.raises(ValueError, match="28 samples do not divide among 8 ranks"):
        made(tar_set, uneven="error", rank=0, world=8)


@pytest.mark.parametrize(
    ("n_kept", "options", "text"),
    [
        (2, {}, ""),
        (2, {"rank": 2, "world": 3, "uneven": "ragged"}, "rank 2 of 3 has 0 of 2 samples"),
        (2, {"rank": 0, "world": 3, "uneven": "drop"}, "rank 0 of 3 has 0 of 2 samples"),
        (2, {"batch_size": 2, "n_workers": 2}, "in 1 batches, so some of its 2 workers have nothing"),
        (0, {}, "no sample is kept"),
    ],
)
def test_a_rank_or_a_worker_with_nothing_is_told_so(
    tmp_path: Path, n_kept: int, options: Options, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    """F15."""
    tiny = write_set(tmp_path / "tiny", [2], keep=lambda i: i < n_kept)
    options = {"batch_size": None, **options}
    n_workers = options.pop("n_workers", 0)
    with caplog.at_level(logging.WARNING, logger="adq_wds"):
        n_read = len(ids(played(made(tiny, **options), n_workers)))
    assert n_read == (0 if "world" in options else n_kept)
    assert text in caplog.text
    assert bool(text) == bool(caplog.text)


def test_few_of_many_shards_are_open_at_a_time(
    tar_sets: dict[int, TarSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(epoch_order, "CACHED_SHARDS", 3)
    monkeypatch.setattr(open_shards, "CACHED_SHARDS", 3)
    stream: Any = iter(made(tar_sets[24], batch_size=None))
    seen = []
    for sample in stream:
        seen.append(sample)
        assert len(stream._stages.readers._readers) <= 3
        assert stream._order.rows.cache_info().currsize <= 3
    assert Counter(ids(seen)) == Counter(tar_sets[24].kept)
    assert len(stream._stages.readers._readers) == 0


def test_the_epoch_goes_on_with_its_first_sample_and_may_be_set(tar_set: TarSet) -> None:
    dataset = made(tar_set, batch_size=None)
    first = ids(dataset)
    assert dataset.epoch == 1
    stream = iter(dataset)
    broken_off = [next(stream) for _ in range(5)]
    third = ids(dataset)
    assert dataset.epoch == 3
    dataset.set_epoch(1)
    second = ids(dataset)
    assert second[:5] == ids(broken_off)
    assert len({*map(tuple, (first, second, third))}) == 3
    dataset.set_epoch(0)
    assert ids(dataset) == first
    for wrong in (-1, 1.0, True, "1"):
        with pytest.raises(ValueError, match="epoch must be an integer from 0 to"):
            dataset.set_epoch(wrong)  # type: ignore[arg-type]
