"""Batches of columns, as Ray Data hands them to pipes: rows are those of a stream, and Arrow between stages loses nothing."""

import logging
from typing import Any

import numpy as np
import pytest

import adq_wds as adq
from adq_wds.pipes.batches import Batch, batch_of, samples_of
from tests.conftest import Caplog
from tests.pipes.streams import raw


def through_arrow(batch: Batch) -> Batch:
    """What comes out of Arrow again: tuples are lists, None among numbers is NaN."""
    out = {}
    for name, column in batch.items():
        values = [list(v) if isinstance(v, tuple) else v for v in column]
        numbers = {type(value) for value in values} == {float, type(None)}
        if values:
            column = np.array(values, dtype=float) if numbers else batch_of([{"x": v} for v in values])["x"]
        out[name] = column
    return out


@pytest.mark.parametrize("size", [1, 9, 100])
def test_a_codebook_selects_as_in_a_stream(urls: list[str], codebook: adq.Codebook, size: int) -> None:
    stages: list[Any] = [
        adq.Embed(adq.encoder("thumbnail")),
        adq.AssignBins(codebook),
        adq.Subsample(codebook, keep=0.5, keep_fields=True),
    ]
    stream = raw(urls)
    for stage in stages:
        stream = stream.compose(stage)
    samples, made = [{k: v for k, v in s.items() if k != "__local_path__"} for s in raw(urls)], []
    for i in range(0, len(samples), size):
        batch = batch_of(samples[i : i + size])
        for stage in stages:
            batch = through_arrow(stage(batch))
        made += samples_of(batch)
    expected = [{k: v for k, v in s.items() if k != "__local_path__"} for s in stream]
    assert 0 < len(made) < len(samples)
    for row, other in zip(made, expected, strict=True):
        assert {**row, "emb.npy": row["emb.npy"].tolist()} == {**other, "emb.npy": other["emb.npy"].tolist()}


def test_a_batch_that_loses_all_keeps_its_columns(urls: list[str]) -> None:
    batch = batch_of(list(raw(urls[0])))
    out = adq.Subsample(adq.Plan.from_keys(urls[0], []))(batch)
    assert {name: len(column) for name, column in out.items()} == dict.fromkeys(batch, 0)
    assert adq.Embed(adq.encoder("thumbnail"))(out).keys() == batch.keys()


def test_bad_rows_are_named_or_skipped(urls: list[str], caplog: Caplog) -> None:
    batch = batch_of(list(raw(urls[0])))
    batch["jpg"][7] = b"no"
    with pytest.raises(adq.SampleError, match=r"^shard t-0.tar, key 's00007', field 'jpg': not an image"):
        adq.Embed(adq.encoder("thumbnail"))(batch)
    with caplog.at_level(logging.WARNING, "adq_wds"):
        out = adq.Embed(adq.encoder("thumbnail"), on_error="skip")(batch)
    assert len(out["__key__"]) == 59
    assert "key 's00007'" in caplog.text
