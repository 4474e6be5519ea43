"""Is every form of a batch taken apart alike, and one of other images refused?"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import adq_wds as adq
from adq_wds.mae.network import MaeSize, MaskedAutoencoder
from adq_wds.mae.reconstruct_batches import read_batch

FIELDS = ("label", "grid", "positions", "patches")


@pytest.fixture(scope="module")
def mae() -> MaskedAutoencoder:
    torch.manual_seed(0)
    return MaskedAutoencoder(MaeSize((16, 16), 4, 16, 1, 2, 8, 1, 2)).eval()


def dataset(make_shard: Callable[..., Path], side: int = 16, **options: Any) -> adq.ShardDataset:
    """Batches of 4 images of side², patches of 4, half of them kept."""
    drop = adq.DropPatches(adq.importance("random", patch=4), keep=0.5)
    given = {"pipes": [adq.Decode(), drop], "batch_size": 4, **options}
    return adq.ShardDataset(make_shard(f"{side}.tar", 4, side=side), **given)


def test_a_loader_tells_the_names_of_its_tuples(
    make_shard: Callable[..., Path], mae: MaskedAutoencoder
) -> None:
    first = dataset(make_shard, fields=("patches", "positions", "label"))
    ((expected, labels),) = adq.reconstruct_batches(first, mae)
    for given in (
        dataset(make_shard, fields=FIELDS),
        adq.Loader(dataset(make_shard, fields=FIELDS)),
        adq.Loader(dataset(make_shard, fields=FIELDS, collate=list)),
    ):
        ((images, again),) = adq.reconstruct_batches(given, mae)
        assert torch.equal(images, expected)
        assert torch.equal(again, labels)
    ((images, again),) = adq.reconstruct_batches(list(dataset(make_shard, fields=FIELDS)), mae, fields=FIELDS)
    assert torch.equal(images, expected)
    ((images, keys, _),) = adq.reconstruct_batches(dataset(make_shard, fields=("__key__", *FIELDS)), mae)
    assert torch.equal(images, expected)
    assert len(keys) == 4
    assert all(isinstance(key, str) for key in keys)


@pytest.mark.parametrize(
    "options", [{"fields": FIELDS}, {"fields": FIELDS, "collate": list}, {"fields": None}]
)
def test_patches_of_an_image_of_another_shape_are_refused(
    make_shard: Callable[..., Path], mae: MaskedAutoencoder, options: dict[str, Any]
) -> None:
    """As many patches might fit, and would be put in wrong places."""
    small = dataset(make_shard, side=12, **options)
    with pytest.raises(ValueError, match=r"3 x 3 patches, .* 4 x 4: give DropPatches"):
        list(adq.reconstruct_batches(small, mae))


def test_one_image_is_no_batch(make_shard: Callable[..., Path], mae: MaskedAutoencoder) -> None:
    single = dataset(make_shard, fields=FIELDS, batch_size=None)
    with pytest.raises(ValueError, match=r"\(8, 4, 4, 3\), .* give the data set batch_size="):
        list(adq.reconstruct_batches(single, mae))


def test_arrays_of_numbers_become_tensors_and_names_stay() -> None:
    patches, positions = np.zeros((2, 3, 4, 4, 3), np.uint8), np.zeros((2, 3), np.int64)
    patches.flags.writeable = False
    batch = read_batch((patches, positions, np.arange(2), np.array(["a", "b"]), ["x", "y"]))
    numbers, names, others = batch.rest.values()
    assert isinstance(numbers, torch.Tensor)
    assert numbers.tolist() == [0, 1]
    assert (names.tolist(), others) == (["a", "b"], ["x", "y"])


def test_images_of_different_numbers_do_not_stack(make_shard: Callable[..., Path]) -> None:
    shards = [make_shard("a.tar", 2, side=16), make_shard("b.tar", 2, side=12)]
    drop = adq.DropPatches(adq.importance("random", patch=4))
    ragged = adq.ShardDataset(shards, pipes=[adq.Decode(), drop], fields=FIELDS, batch_size=4)
    with pytest.raises(ValueError, match=r"differ in shape \(stack expects .* give collate=list"):
        list(ragged)
