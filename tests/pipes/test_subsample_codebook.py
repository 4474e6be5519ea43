"""By a codebook, keyed draws keep each sample with the rate of its bin, on shards that no fit has seen."""

import pickle
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import adq_wds as adq
from adq_wds.core.rng import draw
from adq_wds.files import sha256_text
from adq_wds.pipes.assign_bins import RULE_FIELD
from adq_wds.pipes.embed import ENCODER_FIELD
from tests.pipes.streams import ids, raw

Samples = list[dict[str, Any]]


@pytest.fixture
def assigned(urls: list[str], codebook: adq.Codebook) -> Samples:
    stages = (adq.Embed(adq.encoder("thumbnail")), adq.AssignBins(codebook))
    return list(raw(urls).compose(*stages))


def expected(samples: Samples, codebook: adq.Codebook, keep: float, seed: int, epoch: int = 0) -> Any:
    """Each draw against its rate, one by one, in whole numbers."""
    rates = codebook.rates(keep)
    kept = []
    for sample in samples:
        u = draw(seed, epoch, Path(sample["__url__"]).name, sample["__key__"], purpose="keep")
        if u < int(float(rates[sample[RULE_FIELD][1], sample["bin.cls"]]) * 2**64):
            kept.append(sample)
    return ids(kept)


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
def test_a_draw_below_the_rate_keeps_a_sample(assigned: Samples, codebook: adq.Codebook, keep: float) -> None:
    for seed in (0, 5):
        out = list(adq.Subsample(codebook, keep=keep, seed=seed)(assigned))
        assert ids(out) == expected(assigned, codebook, keep, seed)
        assert 0 < len(out) < 100


def test_a_smaller_keep_lies_inside_a_larger_one(assigned: Samples, codebook: adq.Codebook) -> None:
    keeps = (0, 0.05, 0.2, 0.4, 0.6, 0.8, 1)
    kept = [ids(adq.Subsample(codebook, keep=keep)(assigned)) for keep in keeps]
    assert (kept[0], kept[-1]) == ([], ids(assigned))
    assert all(set(small) < set(large) for small, large in pairwise(kept))


def test_order_and_neighbours_change_nothing(
    assigned: Samples, codebook: adq.Codebook, tmp_path: Path
) -> None:
    out = ids(adq.Subsample(tmp_path / "codebook.safetensors")(assigned))
    assert out == expected(assigned, codebook, 0.3, 0)  # three tenths, unless said
    pipe = adq.Subsample(codebook, keep=0.5)
    moved = [{**s, "__url__": f"/elsewhere/{Path(s['__url__']).name}"} for s in assigned]
    shuffled = [moved[i] for i in np.random.default_rng(0).permutation(100)]
    assert sorted(ids(pipe(shuffled))) == sorted(ids(pipe(assigned)))


def test_the_rates_hold_on_average_over_many_draws(assigned: Samples, codebook: adq.Codebook) -> None:
    """200 seeds of 100 samples: the mean of every sample within five standard errors of its rate."""
    rates = codebook.rates(0.5)
    rate = np.array([rates[s[RULE_FIELD][1], s["bin.cls"]] for s in assigned])
    kept = np.zeros(100)
    place = {one: i for i, one in enumerate(ids(assigned))}
    for seed in range(200):
        for one in ids(adq.Subsample(codebook, keep=0.5, seed=seed).apply(assigned)):
            kept[place[one]] += 1
    assert np.abs(kept / 200 - rate).max() <= 5 * np.sqrt(0.25 / 200)
    assert abs(kept.mean() / 200 - rate.mean()) <= 5 * np.sqrt(0.25 / 20_000)


def test_epochs_draw_anew_only_when_asked(assigned: Samples, codebook: adq.Codebook) -> None:
    later = [{**s, "__adq_epoch__": 2} for s in assigned]
    fixed = expected(assigned, codebook, 0.5, 0)
    second = expected(assigned, codebook, 0.5, 0, epoch=2)
    assert second != fixed
    assert ids(adq.Subsample(codebook, keep=0.5)(later)) == fixed
    assert ids(adq.Subsample(codebook, keep=0.5, epoch=0)(later)) == fixed
    for epoch in (2, lambda: 2, "sample"):
        assert ids(adq.Subsample(codebook, keep=0.5, epoch=epoch)(later)) == second


def test_what_stages_put_is_taken_off_again(
    assigned: Samples, urls: list[str], codebook: adq.Codebook
) -> None:
    original = dict(zip(ids(raw(urls)), raw(urls), strict=True))
    for sample in adq.Subsample(codebook, keep=0.5)(assigned):
        assert sample == original[ids([sample])[0]]
    for sample in adq.Subsample(codebook, keep=0.5, keep_fields=True)(assigned):
        assert set(sample) == {*original[ids([sample])[0]], "emb.npy", "bin.cls"}
    assert {RULE_FIELD, ENCODER_FIELD} <= set(assigned[0])


def test_an_embedding_that_came_with_the_shard_stays(assigned: Samples, codebook: adq.Codebook) -> None:
    own = [{k: v for k, v in s.items() if k != ENCODER_FIELD} for s in assigned]
    out = list(adq.Subsample(codebook, keep=0.5)(own))
    assert all("emb.npy" in sample and "bin.cls" not in sample for sample in out)


@pytest.mark.parametrize(("start", "workers"), [("fork", 2), ("spawn", 1)])
def test_one_pass_in_workers_keeps_the_same_and_can_be_decoded(
    urls: list[str], assigned: Samples, codebook: adq.Codebook, start: str, workers: int
) -> None:
    pipes = (adq.Embed(adq.encoder("thumbnail")), adq.AssignBins(codebook), adq.Subsample(codebook, keep=0.5))
    dataset = raw(urls).compose(*pipes).decode("pil").to_tuple("__key__", "jpg", "cls")
    options: Any = {"num_workers": workers, "multiprocessing_context": start}
    seen = list(torch.utils.data.DataLoader(dataset, batch_size=None, **options))
    assert sorted(key for key, _, _ in seen) == sorted(key for _, key in expected(assigned, codebook, 0.5, 0))
    assert all(image.size == (16, 16) and isinstance(label, int) for _, image, label in seen)


def test_no_bin_or_one_of_another_codebook_ends_the_stream(
    urls: list[str], assigned: Samples, codebook: adq.Codebook, tmp_path: Path
) -> None:
    pipe = adq.Subsample(codebook, on_error="skip")
    text = r"^shard t-0.tar, key 's00000': no bin here: put adq_wds.AssignBins\(codebook\) before"
    for without in (RULE_FIELD, "bin.cls"):
        with pytest.raises(adq.CodebookError, match=text):
            list(pipe([{k: v for k, v in s.items() if k != without} for s in assigned]))
    with pytest.raises(adq.CodebookError, match=text):
        list(raw(urls).compose(pipe))
    with pytest.raises(adq.CodebookError, match=text):
        list(pipe([{**s, "bin.cls": b"1"} for s in assigned]))
    other = adq.fit_codebook(adq.Features(tmp_path / "features"), bins=4, min_pilot=5, seed=1)
    text = r"its bin is by another codebook \(\w{12}, here \w{12}\): use one"
    with pytest.raises(adq.CodebookError, match=text):
        list(adq.Subsample(other)(assigned))


def test_wrong_options_are_met_when_it_is_made(codebook: adq.Codebook) -> None:
    for keep in (-0.1, 1.5, float("nan"), True, "0.3"):
        with pytest.raises(ValueError, match=r"keep must be a number in \[0, 1\], got"):
            adq.Subsample(codebook, keep=keep)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"seed must be an integer, got 0.5"):
        adq.Subsample(codebook, seed=0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="root='data' goes with a plan"):
        adq.Subsample(codebook, root="data")
    with pytest.raises(ValueError, match=r"epoch must be an integer from 0 to [0-9,]+, got -1"):
        adq.Subsample(codebook, epoch=-1)


def test_it_pickles_small(codebook: adq.Codebook, assigned: Samples) -> None:
    pipe = adq.Subsample(codebook, keep=0.5)
    data = pickle.dumps(pipe)
    assert len(data) < 2000
    assert ids(pickle.loads(data)(assigned)) == ids(pipe(assigned))  # noqa: S301 - our own bytes


def stages(codebook: adq.Codebook, **options: Any) -> list[adq.Pipe]:
    last = adq.Subsample(codebook, **{"keep": 0.4, **options})
    return [adq.Embed(adq.encoder("thumbnail")), adq.AssignBins(codebook), last]


def test_a_source_of_ours_draws_and_resumes_by_a_codebook(
    urls: list[str], codebook: adq.Codebook, assigned: Samples
) -> None:
    dataset = adq.ShardDataset(urls, pipes=stages(codebook), shuffle=True, batch_size=8)
    kept = [sample for batch in dataset for sample in batch]
    assert sorted(ids(kept)) == sorted(expected(assigned, codebook, 0.4, 0))
    with pytest.raises(TypeError, match="no length: Subsample may drop samples"):
        len(dataset)
    dataset.set_epoch(0)
    loader = adq.Loader(dataset)
    batches = iter(loader)
    first = [next(batches) for _ in range(4)]
    state = loader.state_dict()
    options: Any = {"shuffle": True, "batch_size": 8, "rank": 0, "world": 1}
    again = adq.ShardDataset(urls, pipes=stages(adq.load_codebook(codebook.path)), **options)
    resumed = adq.Loader(again)
    resumed.load_state_dict(state)
    assert ids(s for batch in [*first, *resumed] for s in batch) == ids(kept)


def test_a_state_is_of_its_codebook_keep_and_seed(
    urls: list[str], codebook: adq.Codebook, tmp_path: Path
) -> None:
    features = adq.Features(tmp_path / "features")
    other = adq.fit_codebook(features, bins=3, min_pilot=5)
    state = adq.Loader(adq.ShardDataset(urls, pipes=stages(codebook))).state_dict()
    for pipes in (stages(other), stages(codebook, keep=0.5), stages(codebook, seed=1), []):
        with pytest.raises(adq.StateError, match="it belongs to another plan or other shards"):
            adq.ShardDataset(urls, pipes=pipes).start_from(state)


def test_a_state_is_of_the_way_epochs_are_drawn(urls: list[str], codebook: adq.Codebook) -> None:
    def state(**options: Any) -> dict[str, Any]:
        return adq.Loader(adq.ShardDataset(urls, pipes=stages(codebook, **options))).state_dict()

    epochs: list[Any] = [None, 3, "sample", lambda: 3]
    states = [state(epoch=epoch) for epoch in epochs]
    for i, epoch in enumerate(epochs):
        again = adq.ShardDataset(urls, pipes=stages(codebook, epoch=epoch))
        for j, saved in enumerate(states):
            if i == j:
                again.start_from(saved)
            else:
                with pytest.raises(adq.StateError, match="it belongs to another plan or other shards"):
                    again.start_from(saved)
    assert state(epoch=0) == state()  # the same draws


def test_a_state_names_each_pipe_that_draws(urls: list[str], codebook: adq.Codebook) -> None:
    def of(*pipes: adq.Pipe) -> str:
        return str(adq.Loader(adq.ShardDataset(urls, pipes=[*pipes])).state_dict()["plan"])

    assign = adq.AssignBins(codebook)
    half, fifth = (adq.Subsample(codebook, keep=keep, keep_fields=True) for keep in (0.5, 0.2))
    assert of(assign, half, assign) != of(assign, fifth, assign)
    assert of(assign, fifth, half) not in (of(assign, half), of(assign, half, half))
    listed = adq.Loader(adq.ShardDataset(urls)).state_dict()["plan"]
    first: list[tuple[list[adq.Pipe], str]] = [
        ([assign], "None None"),
        ([assign, half], "0.5 0"),
        (stages(codebook, keep=None), "None 0"),
    ]
    for pipes, drawn in first:  # states from before load
        assert of(*pipes) == sha256_text(f"{listed}\n{codebook.hash} {drawn}")
