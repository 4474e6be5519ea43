"""Are a function's draws its own, whatever a tar brings and wherever the stage stands?"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adq_wds as adq
from tests.conftest import write_tar
from tests.pipes.streams import raw


def draw(sample: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    assert not isinstance(sample.get("__adq_epoch__"), bytes | str)
    return {**sample, "u": float(rng.random())}


def shard(path: Path, **forged: bytes) -> str:
    """Four samples in a tar named t.tar, with members `k.<name>` besides."""
    path.mkdir()
    members = [(f"{key}.{name}", data) for key in "abcd" for name, data in {"cls": b"1", **forged}.items()]
    return str(write_tar(path / "t.tar", members))


def draws(url: str, *, decode: bool, subsample: bool) -> list[float]:
    stream = raw(url)
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


def test_an_epoch_set_by_a_source_changes_every_draw() -> None:
    def run(epoch: int) -> list[dict[str, Any]]:
        samples = [{"__key__": key, "__url__": "t.tar", "__adq_epoch__": epoch} for key in "abcd"]
        return list(adq.Map(draw)(samples))

    first, second = run(0), run(1)
    assert not {s["u"] for s in first} & {s["u"] for s in second}
    assert [s["__adq_epoch__"] for s in second] == [1] * 4


def test_a_function_that_gives_no_sample_is_named() -> None:
    text = "shard t.tar, key 'a': .*the function gave NoneType, expected a sample"
    with pytest.raises(adq.SampleError, match=text):
        list(adq.Map(lambda sample: None)([{"__key__": "a", "__url__": "t.tar"}]))  # type: ignore[arg-type,return-value]
