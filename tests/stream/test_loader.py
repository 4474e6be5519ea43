"""Does `adq.Loader` take what a DataLoader takes, and nothing that would change the order?"""

from typing import Any

import pytest
import torch

import adq_wds as adq
from tests.stream.conftest import TarSet, ids, made, number

OWN = ("batch_size", "shuffle", "sampler", "batch_sampler", "collate_fn", "drop_last")


@pytest.mark.parametrize("option", [*OWN, "in_order", "snapshot_every_n_steps"])
def test_what_the_data_set_decides_is_refused(tar_set: TarSet, option: str) -> None:
    text = (
        "is the data set's matter: give it to ShardDataset"
        if option in OWN
        else "cannot be chosen: the order"
    )
    with pytest.raises(ValueError, match=f"{option}= {text}"):
        adq.Loader(made(tar_set), **{option: 1})


def test_another_data_set_or_an_unknown_option_is_refused(tar_set: TarSet) -> None:
    with pytest.raises(TypeError, match=r"adq\.Loader reads a ShardDataset, got a list"):
        adq.Loader([1, 2, 3])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="unexpected keyword argument 'workers'"):
        adq.Loader(made(tar_set), workers=3)


def test_it_is_a_dataloader_over_the_data_set_itself(tar_set: TarSet) -> None:
    dataset = made(tar_set, pipes=[adq.Map(number)], fields=("key", "label"))
    loader = adq.Loader(dataset)
    assert isinstance(loader, torch.utils.data.DataLoader)
    assert loader.dataset is dataset
    assert len(loader) == len(dataset) == len(list(loader)) == 7
    keys, labels = next(iter(loader))
    assert isinstance(keys, tuple | list)
    assert labels.dtype == torch.int64


def seed_workers(worker_id: int) -> None:
    torch.manual_seed(worker_id)


def test_its_other_options_are_torchs(tar_set: TarSet) -> None:
    options: dict[str, Any] = {"prefetch_factor": 3, "persistent_workers": True, "timeout": 300}
    options |= {
        "worker_init_fn": seed_workers,
        "multiprocessing_context": "fork",
        "generator": torch.Generator(),
    }
    loader = adq.Loader(made(tar_set, shuffle=False), num_workers=1, **options)
    assert ids(loader) == ids(loader) == tar_set.kept


def test_a_state_may_be_asked_for_before_between_and_after(tar_set: TarSet) -> None:
    loader = adq.Loader(made(tar_set))
    states = [loader.state_dict(), *(loader.state_dict() for _ in loader), loader.state_dict()]
    assert [(s["epoch"], s["t"]) for s in states] == [*((0, t) for t in range(0, 28, 4)), (1, 0), (1, 0)]
    loader.dataset.set_epoch(7)
    assert (loader.state_dict()["epoch"], loader.state_dict()["t"]) == (7, 0)
    loader.load_state_dict(states[3])
    assert loader.state_dict() == states[3]


def test_the_end_stays_the_end(tar_set: TarSet) -> None:
    batches = iter(adq.Loader(made(tar_set)))
    list(batches)
    assert [next(batches, None) for _ in range(3)] == [None] * 3


def test_an_epoch_set_while_one_is_read_waits_for_the_next(tar_set: TarSet) -> None:
    loader = adq.Loader(made(tar_set))
    next(iter(loader))
    state = loader.state_dict()
    loader.dataset.set_epoch(5)
    assert loader.state_dict() == state


def test_the_data_set_itself_is_untouched_by_its_loader(tar_set: TarSet) -> None:
    dataset = made(tar_set, shuffle=False)
    first = next(iter(adq.Loader(dataset)))
    assert next(iter(dataset)) == first
    assert ids(dataset) == tar_set.kept
