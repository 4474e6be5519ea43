"""Does every loader resume, and read on, however its workers are started?"""

from typing import Any

import pytest
import webdataset as wds
from torchdata.stateful_dataloader import StatefulDataLoader

import adq_wds as adq
from tests.stream.conftest import TarSet, ids, noisy


def made(tar_set: TarSet) -> adq.ShardDataset:
    return adq.ShardDataset(
        tar_set.urls, plan=tar_set.plan, shuffle=True, seed=3, batch_size=4, pipes=[adq.Map(noisy)]
    )


STATEFUL: dict[str, Any] = {
    "torchdata": lambda dataset, **options: StatefulDataLoader(dataset, batch_size=None, **options),
    "adq": adq.Loader,
}


def check_resume(tar_set: TarSet, kind: str, start: str, persistent: bool) -> None:
    """Three batches into the second epoch; then a new loader reads the rest of it and the third."""
    reference = made(tar_set)
    expected = [list(reference) for _ in range(3)]
    options = {"num_workers": 2, "persistent_workers": persistent, "multiprocessing_context": start}
    loader = STATEFUL[kind](made(tar_set), **options)
    assert list(loader) == expected[0]
    batches = iter(loader)
    assert [next(batches) for _ in range(3)] == expected[1][:3]
    state = loader.state_dict()
    del batches, loader
    other = STATEFUL[kind](made(tar_set), **options)
    other.load_state_dict(state)
    assert [list(other) for _ in range(2)] == [expected[1][3:], expected[2]]


@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("kind", sorted(STATEFUL))
def test_a_loader_with_forked_workers_resumes_and_reads_on(
    tar_set: TarSet, kind: str, persistent: bool
) -> None:
    check_resume(tar_set, kind, "fork", persistent)


def test_spawned_workers_get_all_they_need(tar_set: TarSet) -> None:
    """The quick one of those below: from Python 3.14 on workers are not forked unless one asks for it."""
    loader = adq.Loader(made(tar_set), num_workers=1, multiprocessing_context="spawn")
    assert list(loader) == list(made(tar_set))


@pytest.mark.slow
@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("start", ["spawn", "forkserver"])
@pytest.mark.parametrize("kind", sorted(STATEFUL))
def test_a_loader_resumes_and_reads_on_however_workers_start(
    tar_set: TarSet, kind: str, start: str, persistent: bool
) -> None:
    check_resume(tar_set, kind, start, persistent)


def check_webloader(tar_set: TarSet, start: str, persistent: bool) -> None:
    """WebDataset's loader over our data set, with a stage of its own behind it."""
    reference = made(tar_set)
    expected = [ids(reference) for _ in range(3)]
    loader = wds.WebLoader(
        made(tar_set), batch_size=None, num_workers=2, persistent_workers=persistent,
        multiprocessing_context=start,
    ).unlisted()  # fmt: skip
    assert [ids(loader) for _ in range(3)] == expected


@pytest.mark.parametrize("persistent", [True, False])
def test_webdatasets_loader_reads_our_epochs(tar_set: TarSet, persistent: bool) -> None:
    check_webloader(tar_set, "fork", persistent)


@pytest.mark.slow
@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("start", ["spawn", "forkserver"])
def test_webdatasets_loader_reads_our_epochs_however_workers_start(
    tar_set: TarSet, start: str, persistent: bool
) -> None:
    check_webloader(tar_set, start, persistent)
