"""Does a recorder hold each sample's mean margin, whatever the batches, breaks and ranks?"""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import adq_wds as adq
from adq_wds.tables.margin_recorder import MarginRecorder

KEYS = [f"k{i}" for i in range(8)]


def logits(epoch: int) -> torch.Tensor:
    return torch.randn((8, 5), generator=torch.Generator().manual_seed(epoch))


LABELS = torch.arange(8) % 5


def rows(path: Path) -> dict[tuple[str, str], tuple[float, float, int]]:
    table = pq.read_table(path)
    columns = (table[name].to_pylist() for name in ("shard", "key", "aum", "last", "n"))
    return {(shard, key): (aum, last, n) for shard, key, aum, last, n in zip(*columns, strict=True)}


def plain(epoch: int, i: int) -> float:
    z: list[float] = logits(epoch)[i].tolist()
    y = int(LABELS[i])
    return z[y] - max(value for c, value in enumerate(z) if c != y)


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_margins_are_means_over_epochs(batch: int, tmp_path: Path) -> None:
    recorder = MarginRecorder(tmp_path / "m.parquet")
    for epoch in range(3):
        for i in range(0, 8, batch):
            part = slice(i, i + batch)
            recorder.note("https://u:p@host/d/a.tar?t=1", KEYS[part], logits(epoch)[part], LABELS[part])
        recorder.save()
        recorder = MarginRecorder(tmp_path / "m.parquet")  # as after a restart
    got = rows(tmp_path / "m.parquet")
    assert list(got) == [("host/d/a.tar", key) for key in KEYS]
    for i, key in enumerate(KEYS):
        aum, last, n = got["host/d/a.tar", key]
        assert aum == pytest.approx(np.mean([plain(epoch, i) for epoch in range(3)]), abs=1e-6)
        assert last == pytest.approx(plain(2, i), abs=1e-6)
        assert n == 3
    assert b"secret" not in (tmp_path / "m.parquet").read_bytes()


def test_ranks_are_merged_by_counts(tmp_path: Path) -> None:
    whole = MarginRecorder(tmp_path / "whole.parquet")
    ranks = [MarginRecorder(tmp_path / f"{r}.parquet") for r in range(2)]
    for epoch in range(3):
        whole.note("a.tar", KEYS, logits(epoch), LABELS)
        for r in range(2):
            mine = [i for i in range(8) if (i + epoch) % 2 == r]
            ranks[r].note(
                "a.tar", [KEYS[i] for i in mine], logits(epoch)[mine].numpy(), LABELS[mine].tolist()
            )
    for recorder in (whole, *ranks):
        recorder.save()
    MarginRecorder.merge([recorder.path for recorder in ranks], tmp_path / "out.parquet")
    expected, got = rows(whole.path), rows(tmp_path / "out.parquet")
    assert expected.keys() == got.keys()
    for key, (aum, _, n) in expected.items():
        assert got[key][0] == pytest.approx(aum, abs=1e-12)
        assert got[key][2] == n


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keys": KEYS[:7]}, "7 keys and 8 rows of logits"),
        ({"labels": LABELS + 1}, r"labels 1 … 5 for 5 logits"),
        ({"labels": LABELS - 1}, r"labels -1 … 3"),
        ({"labels": LABELS[:3]}, r"logits of shape \(8, 5\) and labels of \(3,\)"),
        ({"logits": torch.zeros(8)}, r"logits of shape \(8,\)"),
        ({"logits": torch.full((8, 5), float("nan"))}, "key 'k0': the margin is not a finite number"),
    ],
)
def test_a_bad_batch_is_refused_whole(change: dict[str, object], message: str, tmp_path: Path) -> None:
    recorder = MarginRecorder(tmp_path / "m.parquet")
    batch: dict[str, object] = {"urls": "a.tar", "keys": KEYS, "logits": logits(0), "labels": LABELS} | change
    with pytest.raises(ValueError, match=message):
        recorder.note(**batch)  # type: ignore[arg-type]
    assert len(recorder) == 0


@pytest.mark.parametrize("content", [b"", b"no Parquet"])
def test_another_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(content)
    with pytest.raises(adq.AdqError, match="m: not a readable Parquet file"):
        MarginRecorder(tmp_path / "m")
