"""Are the soft targets of the benchmark's trainings those that a user gets, and made of nothing that is trained on?"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import adq_wds as adq
from benchmarks import soft
from benchmarks.training import Recipe, read_images, train

CPU = torch.device("cpu")
RECIPE = Recipe(
    "tiny", epochs=1, batch=8, lr=0.05, warmup=0.2, weight_decay=0, nesterov=True, label_smoothing=0.1, evaluations=1
)  # fmt: skip


@pytest.fixture
def shards(make_shard: Callable[..., Path]) -> list[Path]:
    return [make_shard(f"train-{i}.tar", 40, first=40 * i, side=32) for i in range(2)]


def test_one_hot_targets_train_as_labels_do(shards: list[Path]) -> None:
    data = read_images(shards, CPU)
    rows = np.arange(0, 80, 5)
    plain, targeted = (
        train(RECIPE, data, data, lambda epoch: rows, seed=3, targets=targets).net
        for targets in (None, F.one_hot(data.label, 2).float())
    )
    for a, b in zip(plain.parameters(), targeted.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("source", soft.SOURCES)
def test_targets_are_half_label_and_no_proxy_sees_the_kept(
    source: str, shards: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, rows, seen = read_images(shards, CPU), np.arange(0, 80, 3), []

    def trained(recipe: Any, data: Any, test: Any, rows: Any, **options: Any) -> Any:
        seen.append(rows(0))
        return train(RECIPE, data, test, rows, **options)

    monkeypatch.setattr(soft, "train", trained)
    features = adq.embed_shards(shards, "thumbnail", tmp_path / "features")
    targets = soft.soft_targets(source, features, shards, data, rows, seed=0, precision="float32")
    assert (targets.shape, targets.dtype) == ((80, 2), torch.float32)
    assert torch.allclose(targets.sum(1), torch.ones(80), atol=1e-5)
    own = targets[torch.arange(80), data.label]
    assert own.min() >= 0.5
    assert own.max() < 1
    assert len(seen) == (source == "proxy")
    for chosen in seen:
        assert len(np.unique(chosen)) == len(rows)
        assert not set(chosen.tolist()) & set(rows.tolist())
