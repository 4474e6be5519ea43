"""What becomes of bad and dropped samples? Each is skipped or raised, named, and counted."""

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import adq_wds as adq
from tests.stream.conftest import (
    OnlyEven,
    TarSet,
    Trips,
    change_a_byte,
    counts,
    ids,
    made,
    number,
    played,
    write_set,
)

BAD = ("k00002", "k00014", "k00039")


def plain(tar_set: TarSet, **options: Any) -> adq.ShardDataset:
    return made(tar_set, **{"shuffle": False, "batch_size": None, **options})


@pytest.fixture
def large(tmp_path: Path) -> TarSet:
    """60 samples in two shards, 40 kept, `BAD` among them."""
    return write_set(tmp_path / "large", [30, 30])


@pytest.fixture
def whole(tmp_path: Path) -> TarSet:
    """48 samples in a shard, all kept."""
    return write_set(tmp_path / "whole", [48], keep=lambda i: True)


def test_a_missing_field_names_the_sample_and_what_it_has(tar_set: TarSet) -> None:
    text = r"shard t-000.tar, key 'k00000': no field 'label' \(fields=\); the sample has \['cls', 'txt'\]"
    with pytest.raises(adq.SampleError, match=text):
        list(plain(tar_set, fields=("txt", "label"), batch_size=4))


@pytest.mark.parametrize("batch_size", [None, 1, 4])
@pytest.mark.parametrize("n_workers", [0, 3])
def test_a_dropping_pipe_drops_just_its_samples(tar_set: TarSet, batch_size: Any, n_workers: int) -> None:
    dataset = plain(tar_set, pipes=[OnlyEven()], batch_size=batch_size)
    expected = [name for name in tar_set.kept if int(tar_set.bytes[name]["cls"]) % 2 == 0]
    assert Counter(ids(played(dataset, n_workers))) == Counter(expected)
    stream: Any = iter(dataset)
    assert ids(stream) == expected
    assert counts(stream.tally) == (28, len(expected), 28 - len(expected), 0)


@pytest.mark.parametrize("batch_size", [None, 1, 4])
@pytest.mark.parametrize("where", ["source", "pipe", "function"])
def test_bad_samples_are_skipped_and_counted(
    large: TarSet, batch_size: Any, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    errors: list[str] = []
    policies = {"source": "skip", "pipe": "raise", "function": lambda e: errors.append(str(e)) or True}
    pipes = [adq.Map(number), Trips(BAD, on_error="skip" if where == "pipe" else "raise")]
    stream: Any = iter(plain(large, pipes=pipes, batch_size=batch_size, on_error=policies[where]))
    with caplog.at_level(logging.WARNING, logger="adq_wds"):
        samples = list(stream)
    assert ids(samples) == [name for name in large.kept if name[1] not in BAD]
    assert counts(stream.tally) == (40, 37, 0, 3)
    lines = [json.loads(r.getMessage()) for r in caplog.records if r.getMessage().startswith("{")]
    assert [line["skipped_by"] for line in lines] == ["Trips"] * 3
    assert all(f"key '{key}'" in line["error"] for key, line in zip(BAD, lines, strict=True))
    assert "ShardDataset: read 40 = kept 37 + dropped 0 + bad 3" in caplog.text
    assert len(errors) == (3 if where == "function" else 0)


def test_batches_are_never_refilled_so_ranks_stay_in_step(whole: TarSet) -> None:
    options: Any = {"batch_size": 6, "pipes": [Trips(("k00003", "k00009"))], "on_error": "skip", "world": 2}
    lengths = [[len(batch) for batch in plain(whole, rank=rank, **options)] for rank in range(2)]
    assert lengths == [[6, 6, 6, 6], [4, 6, 6, 6]]


def test_a_batch_that_loses_all_is_left_out_and_said(whole: TarSet, caplog: pytest.LogCaptureFixture) -> None:
    pipes = [Trips(("k00004", "k00005"))]
    assert len(list(plain(whole, batch_size=2, pipes=pipes, on_error="skip"))) == 23
    assert "a batch of 2 is left out: all were dropped" in caplog.text


def test_skipping_too_many_is_an_error(whole: TarSet) -> None:
    trips = Trips(tuple(f"k{i:05d}" for i in range(0, 40, 5)))
    stream = iter(plain(whole, pipes=[trips], on_error="skip", batch_size=4))
    with pytest.raises(adq.SampleError, match=r"8 of 48 samples are bad, more than max_bad_fraction=0.1"):
        list(stream)
    with pytest.raises(adq.LoaderClosed, match="8 of 48 samples are bad"):
        next(stream)


@pytest.mark.parametrize("on_error", ["raise", "skip", lambda e: True])
@pytest.mark.parametrize("batch_size", [None, 3])
def test_changed_bytes_are_an_error_in_any_case(tmp_path: Path, on_error: Any, batch_size: Any) -> None:
    tar_set = write_set(tmp_path / "set", [9, 9])
    change_a_byte(tar_set.urls[1])  # of k00009, which is kept
    options = {"on_error": on_error, "batch_size": batch_size}
    with pytest.raises(adq.ShardError, match=r"^shard t-001.tar, key 'k00009': bytes differ"):
        list(made(tar_set, **options))
    assert Counter(ids(made(tar_set, verify=False, **options))) == Counter(tar_set.kept)


def test_samples_before_a_bad_one_come_before_its_error(whole: TarSet) -> None:
    stream = iter(plain(whole, pipes=[Trips(("k00021",))]))
    assert [next(stream)["__key__"] for _ in range(21)] == [f"k{i:05d}" for i in range(21)]
    for error in (adq.SampleError, adq.LoaderClosed, adq.LoaderClosed, adq.LoaderClosed):
        with pytest.raises(error, match="tripped over k00021"):
            next(stream)


def without_label(sample: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in sample.items() if k != "cls" or sample["__key__"] not in BAD}


@pytest.mark.parametrize("batch_size", [None, 4])
def test_a_sample_without_the_fields_asked_for_is_bad(large: TarSet, batch_size: Any) -> None:
    options: Any = {"pipes": [adq.Map(without_label)], "fields": ("__key__", "cls"), "on_error": "skip"}
    if batch_size:
        options |= {"batch_size": batch_size, "collate": list}
    stream: Any = iter(plain(large, **options))
    out = [each for batch in stream for each in (batch if batch_size else [batch])]
    assert [key for key, _ in out] == [key for _, key in large.kept if key not in BAD]
    assert counts(stream.tally) == (40, 37, 0, 3)
