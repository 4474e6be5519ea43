"""Does every number give its sample, for samplers that choose the order?"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader, DistributedSampler, WeightedRandomSampler

import adq_wds as adq
from tests.stream.conftest import OnlyEven, TarSet, Trips, made, noisy, number


def test_as_map_gives_every_sample_by_number(tar_set: TarSet) -> None:
    pipes = [adq.Map(number), adq.Map(noisy)]
    dataset = made(tar_set, batch_size=3, rank=1, world=2, pipes=pipes)
    view = dataset.as_map()
    ordered = list(made(tar_set, shuffle=False, batch_size=None, pipes=pipes))
    assert len(view) == 28
    assert [view[i] for i in range(28)] == view.__getitems__(range(28)) == ordered
    assert view[-1] == ordered[-1]
    assert view[np.int64(3)] == ordered[3]
    dataset.set_epoch(1)
    assert view[0]["u"] != ordered[0]["u"]
    for wrong in (28, -29):
        with pytest.raises(IndexError, match=f"sample {wrong} of 28"):
            view[wrong]


def test_as_map_works_with_torchs_samplers(tar_set: TarSet) -> None:
    view = made(tar_set, pipes=[adq.Map(number)], fields=("key", "label")).as_map()
    seen: Counter[str] = Counter()
    for rank in range(2):
        sampler = DistributedSampler(view, num_replicas=2, rank=rank, shuffle=True)
        for keys, _ in DataLoader(view, batch_size=5, sampler=sampler, num_workers=rank):
            seen.update(keys)
    assert seen == Counter(key for _, key in tar_set.kept)
    weighted = WeightedRandomSampler([1.0] * 7 + [0.0] * 21, 50)
    drawn = {key for keys, _ in DataLoader(view, batch_size=5, sampler=weighted) for key in keys}
    assert drawn <= {key for _, key in tar_set.kept[:7]}


def test_as_map_knows_the_plans_labels(make_shard: Callable[..., Path], tmp_path: Path) -> None:
    shards = [str(make_shard(f"f-{i}.tar", 10, first=10 * i)) for i in range(2)]
    plan = adq.build_plan(adq.embed_shards(shards, "thumbnail", tmp_path / "features"), bins=2, keep=0.5)
    view = adq.ShardDataset(shards, plan=plan, pipes=[adq.Decode()], fields=("label",)).as_map()
    assert view.labels().tolist() == [label for (label,) in view]
    with pytest.raises(TypeError, match="labels: the plan knows them"):
        adq.ShardDataset(shards).as_map().labels()


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"pipes": [OnlyEven()]}, TypeError),
        ({"on_error": "skip"}, TypeError),
        ({"pipes": [Trips(on_error="skip")]}, TypeError),
        ({"fresh": True}, ValueError),
    ],
)
def test_as_map_refuses_numbers_without_a_sample(tar_set: TarSet, options: Any, kind: Any) -> None:
    with pytest.raises(kind, match=r"as_map: (each number must give a sample|with fresh=True)"):
        made(tar_set, **options).as_map()


def test_a_stream_takes_no_number_and_points_to_as_map(tar_set: TarSet) -> None:
    with pytest.raises(TypeError, match=r"write \.as_map\(\)\[0\]"):
        made(tar_set)[0]
