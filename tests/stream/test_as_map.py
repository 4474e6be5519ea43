"""Does every number give its sample, for samplers that choose the order?"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import adq_wds as adq
from tests.stream.conftest import OnlyEven, TarSet, Trips, noisy, number

Options = dict[str, Any]


def test_as_map_gives_every_sample_by_number(tar_set: TarSet) -> None:
    options: Options = {"plan": tar_set.plan, "pipes": [adq.Map(number), adq.Map(noisy)]}
    dataset = adq.ShardDataset(tar_set.urls, shuffle=True, batch_size=3, rank=1, world=2, **options)
    view = dataset.as_map()
    ordered = list(adq.ShardDataset(tar_set.urls, **options))
    assert len(view) == 28
    assert [view[i] for i in range(28)] == view.__getitems__(range(28)) == ordered
    assert view[-1] == ordered[-1]
    assert view[np.int64(3)] == view[torch.tensor(3)] == ordered[3]
    dataset.set_epoch(1)
    assert view[0]["u"] != ordered[0]["u"]
    for wrong in (28, -29):
        with pytest.raises(IndexError, match=f"sample {wrong} of 28"):
            view[wrong]


def test_as_map_works_with_torchs_samplers(tar_set: TarSet) -> None:
    view = adq.ShardDataset(
        tar_set.urls, plan=tar_set.plan, pipes=[adq.Map(number)], fields=("key", "label")
    ).as_map()
    seen: Counter[str] = Counter()
    for rank in range(2):
        sampler = torch.utils.data.DistributedSampler(view, num_replicas=2, rank=rank, shuffle=True)
        for keys, labels in torch.utils.data.DataLoader(
            view, batch_size=5, sampler=sampler, num_workers=rank
        ):
            seen.update(keys)
            assert labels.dtype == torch.int64
    assert seen == Counter(key for _, key in tar_set.kept)
    weighted = torch.utils.data.WeightedRandomSampler([1.0] * 7 + [0.0] * 21, 50)
    drawn = {
        key for keys, _ in torch.utils.data.DataLoader(view, batch_size=5, sampler=weighted) for key in keys
    }
    assert drawn <= {key for _, key in tar_set.kept[:7]}


def test_as_map_knows_the_plans_labels(make_shard: Callable[..., Path], tmp_path: Path) -> None:
    shards = [str(make_shard(f"f-{i}.tar", 10, first=10 * i)) for i in range(2)]
    features = adq.embed_shards(shards, "thumbnail", tmp_path / "features")
    plan = adq.build_plan(features, bins=2, keep=0.5)
    view = adq.ShardDataset(shards, plan=plan, pipes=[adq.Decode()], fields=("label",)).as_map()
    assert view.labels().tolist() == [label for (label,) in view]
    with pytest.raises(TypeError, match="labels: the plan knows them"):
        adq.ShardDataset(shards).as_map().labels()


def test_as_map_refuses_what_has_no_sample_for_every_number(tar_set: TarSet) -> None:
    for options in ({"pipes": [OnlyEven()]}, {"on_error": "skip"}, {"pipes": [Trips(on_error="skip")]}):
        with pytest.raises(TypeError, match="as_map: each number must give a sample"):
            adq.ShardDataset(tar_set.urls, plan=tar_set.plan, **options).as_map()
    with pytest.raises(ValueError, match="as_map: with fresh=True"):
        adq.ShardDataset(tar_set.urls, plan=tar_set.plan, fresh=True).as_map()


def test_a_sample_by_number_points_to_as_map(tar_set: TarSet) -> None:
    dataset = adq.ShardDataset(tar_set.urls, plan=tar_set.plan)
    with pytest.raises(TypeError, match=r"write \.as_map\(\)\[0\]"):
        dataset[0]
    assert dataset.as_map()[0]["__key__"] == next(iter(dataset))["__key__"]
