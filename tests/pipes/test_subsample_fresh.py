"""With an epoch a plan's stream takes the next samples of every bin; without one it never changes."""

import multiprocessing
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import adq_wds as adq
from adq_wds.pipes import subsample
from tests.pipes.streams import ids, raw

Ids = list[tuple[str, str]]


@pytest.fixture
def urls(make_shard: Callable[..., Path]) -> list[str]:
    return [str(make_shard("t-0.tar", 40)), str(make_shard("t-1.tar", 40, first=20))]


@pytest.fixture
def plan(urls: list[str], tmp_path: Path) -> adq.Plan:
    features = adq.embed_shards(urls, "thumbnail", tmp_path / "features")
    must = [("t-1.tar", "s00025")]
    return adq.build_plan(features, bins=3, keep=0.3, must_include=must, out=tmp_path / "plan.parquet")


def kept_in(plan: adq.Plan, epoch: int) -> Ids:
    rows = [(s.name, zip(s.spans.keys, plan.kept_in(s.name, epoch), strict=True)) for s in plan]
    return [(name, key) for name, each in rows for key, kept in each if kept]


def test_every_epoch_keeps_what_the_plan_says_of_it(urls: list[str], plan: adq.Plan) -> None:
    for epoch in (0, 1, 2, 7, np.int64(3)):
        assert ids(raw(urls).compose(adq.Subsample(plan, epoch=epoch))) == kept_in(plan, int(epoch))
    assert kept_in(plan, 0) == ids(raw(urls).compose(adq.Subsample(plan)))
    assert kept_in(plan, 1) != kept_in(plan, 0)


def test_epochs_are_equally_large_and_together_see_everything(urls: list[str], plan: adq.Plan) -> None:
    seen = [Counter(ids(raw(urls).compose(adq.Subsample(plan, epoch=epoch)))) for epoch in range(5)]
    assert {sum(counter.values()) for counter in seen} == {24}
    # 20 of the 80 are copies, which are never kept
    assert len(sum(seen, Counter())) == len({key for _, key in sum(seen, Counter())}) == 60
    assert sum(seen, Counter())["t-1.tar", "s00025"] == 5  # must-include


def test_a_function_is_asked_anew_for_every_chunk(urls: list[str], plan: adq.Plan) -> None:
    epoch = multiprocessing.Value("q", 0)
    pipe = adq.Subsample(plan, epoch=lambda: epoch.value)
    for number in (0, 1, 4, 0):
        epoch.value = number
        assert ids(pipe(raw(urls))) == kept_in(plan, number)


class SharedEpoch:
    """An epoch that workers read: picklable only while they are started, as shared values are."""

    def __init__(self) -> None:
        self.number = multiprocessing.get_context("spawn").Value("q", 0)

    def __call__(self) -> int:
        return int(self.number.value)


@pytest.mark.parametrize(("start", "persistent"), [("fork", True), ("spawn", True), ("fork", False)])
def test_workers_follow_a_shared_epoch(urls: list[str], plan: adq.Plan, start: str, persistent: bool) -> None:
    epoch = SharedEpoch()
    dataset = raw(urls).compose(adq.Subsample(plan, epoch=epoch)).to_tuple("__url__", "__key__")
    options: Any = {"multiprocessing_context": start, "persistent_workers": persistent}
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=2, **options)
    for number in range(3):
        epoch.number.value = number
        assert Counter((Path(url).name, key) for url, key in loader) == Counter(kept_in(plan, number))


def test_the_epoch_may_come_with_the_samples(urls: list[str], plan: adq.Plan) -> None:
    samples = list(raw(urls))
    pipe = adq.Subsample(plan, epoch="sample")
    for epoch in (0, 2):
        assert ids(pipe([{**s, "__adq_epoch__": epoch} for s in samples])) == kept_in(plan, epoch)
    mixed = [{**s, "__adq_epoch__": i % 3} for i, s in enumerate(samples)]
    expected = [set(kept_in(plan, epoch)) for epoch in range(3)]
    assert ids(pipe(mixed)) == [one for i, one in enumerate(ids(samples)) if one in expected[i % 3]]
    assert ids(pipe(samples)) == ids(adq.Subsample(plan)(mixed)) == kept_in(plan, 0)
    forged = [{**s, "__adq_epoch__": b"2"} for s in samples]
    assert ids(adq.Subsample(plan, epoch="sample", verify=False)(forged)) == kept_in(plan, 0)


def test_bytes_are_checked_in_every_epoch(urls: list[str], plan: adq.Plan) -> None:
    changed = [{**s, "cls": b"9"} for s in raw(urls)]
    with pytest.raises(adq.ShardError, match="bytes differ from the plan's"):
        list(adq.Subsample(plan, epoch=2)(changed))
    assert ids(adq.Subsample(plan, epoch=2, verify=False)(changed)) == kept_in(plan, 2)


def test_rows_held_for_epochs_are_bounded_and_not_pickled(
    urls: list[str], plan: adq.Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subsample, "CACHED_SHARDS", 3)
    pipe = adq.Subsample(plan, epoch="sample")
    size = len(pickle.dumps(pipe))
    samples = list(raw(urls))
    for epoch in range(4):
        list(pipe([{**s, "__adq_epoch__": epoch} for s in samples]))
    assert len(pipe._choose._fresh) == 3
    assert len(pickle.dumps(pipe)) < size + 500


def test_what_is_no_epoch_is_refused(urls: list[str], plan: adq.Plan) -> None:
    text = r"epoch must be an integer from 0 to [0-9,]+, got"
    wrong: list[Any] = [-1, True, 1.0, "1", "epoch", "", False, 2**63]
    for epoch in wrong:
        with pytest.raises(ValueError, match=text):
            adq.Subsample(plan, epoch=epoch)
    samples = list(raw(urls))
    for epoch in (each for each in wrong if not isinstance(each, str)):  # a tar's own text is passed over
        with pytest.raises(ValueError, match=text):
            adq.Subsample(plan, epoch=lambda epoch=epoch: epoch).apply(samples)
        with pytest.raises(ValueError, match=text):
            adq.Subsample(plan, epoch="sample").apply([{**s, "__adq_epoch__": epoch} for s in samples])


def test_a_codebooks_options_are_refused_with_a_plan(plan: adq.Plan) -> None:
    for name, value in (("keep", 0.3), ("seed", 1), ("keep_fields", True)):
        with pytest.raises(ValueError, match=f"{name}={value} goes with a codebook; a plan has decided that"):
            adq.Subsample(plan, **{name: value})  # type: ignore[arg-type]
