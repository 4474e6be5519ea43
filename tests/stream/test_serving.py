"""What becomes of bad and dropped samples? Each is skipped or raised, named, and counted."""

import io
import json
import logging
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import adq_wds as adq
from tests.stream.conftest import OnlyEven, TarSet, Trips, ids, number, played, write_set

Options = dict[str, Any]


def test_a_missing_field_names_the_sample_and_what_it_has(tar_set: TarSet) -> None:
    dataset = adq.ShardDataset(tar_set.urls, plan=tar_set.plan, fields=("txt", "label"), batch_size=4)
    text = r"shard t-000.tar, key 'k00000': no field 'label' \(fields=\); the sample has \['cls', 'txt'\]"
    with pytest.raises(adq.SampleError, match=text):
        list(dataset)


@pytest.mark.parametrize("batch_size", [None, 1, 4])
@pytest.mark.parametrize("n_workers", [0, 3])
def test_a_dropping_pipe_drops_just_its_samples(tar_set: TarSet, batch_size: Any, n_workers: int) -> None:
    dataset = adq.ShardDataset(tar_set.urls, plan=tar_set.plan, pipes=[OnlyEven()], batch_size=batch_size)
    expected = [name for name in tar_set.kept if int(tar_set.bytes[name]["cls"]) % 2 == 0]
    found = list(played(dataset, n_workers))
    assert Counter(ids(found)) == Counter(expected)
    if n_workers == 0:
        assert ids(found) == expected
        stream = iter(dataset)
        list(stream)
        tally = stream.tally
        assert (tally.read, tally.kept, tally.dropped, tally.bad) == (
            28,
            len(expected),
            28 - len(expected),
            0,
        )


BAD = ("k00002", "k00014", "k00039")


@pytest.mark.parametrize("batch_size", [None, 1, 4])
@pytest.mark.parametrize("where", ["source", "pipe", "function"])
def test_bad_samples_are_skipped_counted_and_logged(
    tmp_path: Path, batch_size: Any, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    tar_set = write_set(tmp_path / "set", [30, 30])
    seen = []
    policy: Any = {"source": "skip", "pipe": "raise", "function": lambda e: seen.append(str(e)) or True}[
        where
    ]
    trips = Trips(BAD, on_error="skip" if where == "pipe" else "raise")
    dataset = adq.ShardDataset(
        tar_set.urls,
        plan=tar_set.plan,
        pipes=[adq.Map(number), trips],
        batch_size=batch_size,
        on_error=policy,
    )
    stream = iter(dataset)
    with caplog.at_level(logging.WARNING, logger="adq_wds"):
        samples = list(stream)
    assert ids(samples) == [name for name in tar_set.kept if name[1] not in BAD]
    assert (stream.tally.read, stream.tally.kept, stream.tally.dropped, stream.tally.bad) == (40, 37, 0, 3)
    lines = [json.loads(r.getMessage()) for r in caplog.records if r.getMessage().startswith("{")]
    assert [line["skipped_by"] for line in lines] == ["Trips"] * 3
    assert all(
        f"key '{key}'" in line["error"] or key in line["error"] for key, line in zip(BAD, lines, strict=True)
    )
    assert "ShardDataset: read 40 = kept 37 + dropped 0 + bad 3" in caplog.text
    assert len(seen) == (3 if where == "function" else 0)
    if batch_size == 4:
        assert [len(batch) for batch in samples].count(4) >= 7


def test_batches_are_never_refilled_so_ranks_stay_in_step(tmp_path: Path) -> None:
    tar_set = write_set(tmp_path / "set", [48], keep=lambda i: True)
    options: Options = {"batch_size": 6, "pipes": [Trips(("k00003", "k00009"))], "on_error": "skip"}
    ranks = [adq.ShardDataset(tar_set.urls, plan=tar_set.plan, rank=r, world=2, **options) for r in range(2)]
    assert [[len(batch) for batch in rank] for rank in ranks] == [[6, 6, 6, 6], [4, 6, 6, 6]]


def test_a_batch_that_loses_all_is_left_out_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tar_set = write_set(tmp_path / "set", [48], keep=lambda i: True)
    dataset = adq.ShardDataset(
        tar_set.urls, plan=tar_set.plan, batch_size=2, pipes=[Trips(("k00004", "k00005"))], on_error="skip"
    )
    with caplog.at_level(logging.WARNING, logger="adq_wds"):
        assert len(list(dataset)) == 23
    assert "a batch of 2 is left out: all were dropped" in caplog.text


def test_skipping_too_many_is_an_error(tmp_path: Path) -> None:
    tar_set = write_set(tmp_path / "set", [40], keep=lambda i: True)
    trips = Trips(tuple(f"k{i:05d}" for i in range(0, 40, 5)))
    dataset = adq.ShardDataset(tar_set.urls, plan=tar_set.plan, pipes=[trips], on_error="skip", batch_size=4)
    stream = iter(dataset)
    with pytest.raises(adq.SampleError, match=r"8 of 40 samples are bad, more than max_bad_fraction=0.1"):
        list(stream)
    with pytest.raises(adq.LoaderClosed, match="8 of 40 samples are bad"):
        next(stream)


@pytest.mark.parametrize("on_error", ["raise", "skip", lambda e: True])
@pytest.mark.parametrize("batch_size", [None, 3])
def test_changed_bytes_are_an_error_in_any_case(tmp_path: Path, on_error: Any, batch_size: Any) -> None:
    tar_set = write_set(tmp_path / "set", [9, 9])
    path = Path(tar_set.urls[1])
    data = bytearray(path.read_bytes())
    data[512] ^= 1  # the first payload, of k00009, which is kept
    path.write_bytes(data)
    options: Options = {"plan": tar_set.plan, "on_error": on_error, "batch_size": batch_size}
    with pytest.raises(adq.ShardError, match=r"^shard t-001.tar, key 'k00009': bytes differ"):
        list(adq.ShardDataset(tar_set.urls, **options))
    assert Counter(ids(adq.ShardDataset(tar_set.urls, verify=False, **options))) == Counter(tar_set.kept)


def test_samples_before_a_bad_one_come_before_its_error(tmp_path: Path) -> None:
    tar_set = write_set(tmp_path / "set", [40], keep=lambda i: True)
    stream = iter(adq.ShardDataset(tar_set.urls, plan=tar_set.plan, pipes=[Trips(("k00021",))]))
    assert [next(stream)["__key__"] for _ in range(21)] == [f"k{i:05d}" for i in range(21)]
    for error in (adq.SampleError, adq.LoaderClosed, adq.LoaderClosed, adq.LoaderClosed):
        with pytest.raises(error, match="tripped over k00021"):
            next(stream)


def test_a_member_named_as_webdatasets_own_is_a_bad_sample(tmp_path: Path) -> None:
    def write(path: Path) -> str:
        with tarfile.open(path, "w") as tar:
            for i in range(20):
                for name in (f"k{i:02d}.txt", *([f"k{i:02d}.__bad__"] if i == 7 else [])):
                    tar.addfile(tarfile.TarInfo(name), io.BytesIO())
        return str(path)

    url = write(tmp_path / "t.tar")
    with pytest.raises(adq.SampleError, match=r"shard t.tar, key 'k07', field '__bad__': reserved"):
        list(adq.ShardDataset(url))
    for batch_size in (None, 5):
        stream = iter(adq.ShardDataset(url, on_error="skip", batch_size=batch_size))
        assert len(ids(stream)) == 19
        assert (stream.tally.read, stream.tally.kept, stream.tally.bad) == (20, 19, 1)


def without_label(sample: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in sample.items() if k != "cls" or sample["__key__"] not in BAD}


@pytest.mark.parametrize("batch_size", [None, 4])
def test_a_sample_without_the_fields_asked_for_is_bad(tmp_path: Path, batch_size: Any) -> None:
    tar_set = write_set(tmp_path / "set", [30, 30])
    dataset = adq.ShardDataset(
        tar_set.urls,
        plan=tar_set.plan,
        pipes=[adq.Map(without_label)],
        fields=("__key__", "cls"),
        batch_size=batch_size,
        collate=list if batch_size else None,
        on_error="skip",
    )
    stream = iter(dataset)
    out = [each for batch in stream for each in (batch if batch_size else [batch])]
    assert [key for key, _ in out] == [key for _, key in tar_set.kept if key not in BAD]
    tally = stream.tally
    assert (tally.read, tally.kept, tally.dropped, tally.bad) == (40, 37, 0, 3)
