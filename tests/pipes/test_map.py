"""Are a function's draws its own, whatever a tar brings and wherever the stage stands?"""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds

import adq_wds as adq
from adq_wds.samples.label import read_label


def draw(sample: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    assert not isinstance(sample.get("__adq_epoch__"), bytes | str)
    return {**sample, "u": float(rng.random())}


def shard(path: Path, **forged: bytes) -> str:
    """Four samples in a tar named t.tar, with members `k.<name>` besides."""
    path.mkdir()
    with tarfile.open(path / "t.tar", "w") as tar:
        for key in "abcd":
            for name, data in {"cls": b"1", **forged}.items():
                member = tarfile.TarInfo(f"{key}.{name}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return str(path / "t.tar")


def draws(url: str, *, decode: bool, subsample: bool) -> list[float]:
    stream = wds.WebDataset(url, shardshuffle=False)
    if decode:
        stream = stream.decode()
    if subsample:
        stream = stream.compose(adq.Subsample(adq.Plan.from_keys(url, None)))
    return [sample["u"] for sample in stream.compose(adq.Map(draw, seed=1))]


@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize("subsample", [False, True])
def test_an_epoch_forged_in_a_tar_changes_no_draw(tmp_path: Path, decode: bool, subsample: bool) -> None:
    plain = draws(shard(tmp_path / "plain"), decode=False, subsample=False)
    assert len(set(plain)) == 4
    forged = shard(tmp_path / "forged", __adq_epoch__=b"5")
    assert draws(forged, decode=decode, subsample=subsample) == plain


def test_an_epoch_set_by_a_source_changes_every_draw_and_passes_on() -> None:
    def run(epoch: int) -> list[dict[str, Any]]:
        samples = [{"__key__": key, "__url__": "t.tar", "__adq_epoch__": epoch} for key in "abcd"]
        return list(adq.Map(draw)(samples))

    first, second = run(0), run(1)
    assert not {s["u"] for s in first} & {s["u"] for s in second}
    assert [s["__adq_epoch__"] for s in second] == [1] * 4


def test_a_malformed_spec_in_a_users_function_is_not_skipped() -> None:
    stage = adq.Map(lambda sample: {"y": read_label(sample, "cls;;txt")}, on_error="skip")
    with pytest.raises(ValueError, match="is empty or named twice"):
        list(stage([{"__key__": "a", "__url__": "t.tar", "cls": b"1"}]))


def test_a_tuple_that_could_be_read_as_pairs_is_no_sample() -> None:
    with pytest.raises(TypeError, match=r"^Map got a tuple, expected a sample"):
        list(adq.Map(lambda sample: sample)(iter([("ab", "cd")])))  # type: ignore[arg-type]


def test_a_message_of_the_function_stays_on_one_line() -> None:
    def fail(sample: dict[str, Any]) -> dict[str, Any]:
        raise RuntimeError("one\ntwo")

    with pytest.raises(adq.SampleError, match=r"^shard t.tar, key 'a': Map: RuntimeError: 'one\\ntwo'$"):
        list(adq.Map(fail)([{"__key__": "a", "__url__": "t.tar"}]))
