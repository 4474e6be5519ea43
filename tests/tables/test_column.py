"""Are numbers from elsewhere joined by shard and key, and refused where they do not fit?"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import adq_wds as adq
from adq_wds.cli.main import main
from adq_wds.tables.column import Column
from tests.conftest import Capsys, write_tar

ROWS = [("a.tar", f"k{i}") for i in range(6)] + [("b.tar", f"k{i}") for i in range(3, 7)]


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> adq.Features:
    """Two shards; keys k3 to k5 stand in both."""
    folder = tmp_path_factory.mktemp("column")
    for name in ("a.tar", "b.tar"):
        write_tar(folder / name, [(f"{key}.txt", b"x") for shard, key in ROWS if shard == name])
    rows = np.eye(len(ROWS), 12, dtype=np.float32)
    return adq.Features.from_arrays(folder, ROWS, rows, out=folder / "features")


def saved(path: Path, rows: Any, **columns: Any) -> Column:
    shard, key = zip(*rows, strict=True) if rows else ((), ())
    table = {"shard": list(shard), "key": list(key), "loss": [float(i) for i in range(len(rows))]} | columns
    pq.write_table(pa.table({name: values for name, values in table.items() if values is not None}), path)
    return Column(path, "loss")


@pytest.mark.parametrize("written", ["{}", "/old/place/{}", "https://me:secret@host/x/{}?token=1"])
def test_numbers_are_joined_by_key_in_any_order(written: str, features: adq.Features, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    order = rng.permutation(len(ROWS))
    shuffled = [ROWS[i] for i in order] + [("c.tar", "k0"), ("a.tar", "unknown")]
    column = saved(tmp_path / "x.parquet", [(written.format(shard), key) for shard, key in shuffled])
    expected = np.argsort(order).astype(np.float32)
    assert column.values(features).tolist() == expected.tolist()


def test_shards_may_be_missing_where_keys_stand_once(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("p.txt", b"x"), ("q.txt", b"y")])
    features = adq.Features.from_arrays(tmp_path, ["p", "q"], np.eye(2), out=tmp_path / "f")
    column = saved(tmp_path / "x.parquet", [("", "q"), ("", "p")], shard=None, loss=[7, -2])
    assert column.values(features).tolist() == [-2, 7]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "a sample lacks": ({"rows": ROWS[:5] + ROWS[6:]}, "no 'loss' for 1 samples of shard a.tar.*'k5'"),
    "a shard lacks": ({"rows": ROWS[:6]}, "shard b.tar is none of its 1 shards"),
    "a sample twice": ({"rows": [*ROWS, ROWS[1]]}, "shard a.tar, key 'k1' stands 2 times"),
    "NaN": ({"rows": ROWS, "loss": [*range(9), float("nan")]}, "b.tar, key 'k6': 'loss' is not a finite"),
    "null": (
        {"rows": ROWS, "loss": [None, *map(float, range(9))]},
        "a.tar, key 'k0': 'loss' is not a finite",
    ),
    "infinite": ({"rows": ROWS, "loss": [*range(9), 1e300]}, "b.tar, key 'k6': 'loss' is not a finite"),
    "no such column": ({"rows": ROWS, "loss": None}, "0 columns 'loss' among"),
    "no key": ({"rows": ROWS, "key": None}, "0 columns 'key' among"),
    "keys as numbers": ({"rows": ROWS, "key": list(range(10))}, "column 'key' is int64, expected strings"),
    "text": ({"rows": ROWS, "loss": list("0123456789")}, "column 'loss' is string, expected numbers"),
    "no shards, keys in both": ({"rows": ROWS, "shard": None}, "key 'k3' stands 2 times"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_what_does_not_fit_is_refused(case: str, features: adq.Features, tmp_path: Path) -> None:
    options, message = BAD[case]
    column = saved(tmp_path / "x.parquet", **options)
    with pytest.raises(adq.FeaturesError, match=f"x.parquet: .*{message}"):
        column.values(features)


@pytest.mark.parametrize("content", [None, b"", b"no Parquet"])
def test_a_file_of_none_is_refused(content: bytes | None, features: adq.Features, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "x").write_bytes(content)
    with pytest.raises(adq.FeaturesError, match=r"x: (no such file|not a whole Parquet)"):
        Column(tmp_path / "x", "loss").values(features)


def test_a_column_is_a_score_of_a_plan(make_shard: Any, tmp_path: Path) -> None:
    """In Python and by the command; a bin is worth the mean of its samples, from the least of all where one is < 0."""
    shard = make_shard("a.tar", 60)
    features = adq.embed_shards([shard], out=tmp_path / "f")
    keys = features.files[0].spans().keys
    numbers = np.random.default_rng(0).normal(size=len(keys))
    table = pa.table({"shard": ["/elsewhere/a.tar"] * len(keys), "key": keys, "loss": numbers})
    pq.write_table(table, tmp_path / "x.parquet")
    column = Column(tmp_path / "x.parquet", "loss")
    plan = adq.build_plan(features, bins=3, keep=0.5, scores=["texture", column])
    bins = plan.table()["bin"].to_numpy()
    shown = [row["loss"] for row in plan.header["bins"]]
    shifted = numbers.astype(np.float32) - numbers.astype(np.float32).min()
    assert shown == pytest.approx([shifted[bins == k].mean() for k in range(3)], abs=1e-5)
    spec = f"{tmp_path / 'x.parquet'}:loss"
    assert adq.build_plan(features, bins=3, keep=0.5, scores=["texture", spec]).hash == plan.hash
    pq.write_table(
        table.set_column(2, "loss", [numbers + 1e-3 * np.arange(len(keys))]), tmp_path / "x.parquet"
    )
    assert adq.build_plan(features, bins=3, keep=0.5, scores=["texture", spec]).hash != plan.hash
    with pytest.raises(ValueError, match=r"x.parquet:loss holds numbers.*give it to the plan"):
        adq.embed_shards([shard], out=tmp_path / "g", scores=[column])
    with pytest.raises(ValueError, match="score name 'label' is one of ours"):
        adq.build_plan(features, scores=[Column(tmp_path / "x.parquet", "label")])


def test_adq_run_takes_a_column_and_sees_it_change(make_shard: Any, tmp_path: Path, capsys: Capsys) -> None:
    shard = make_shard("a.tar", 60)
    keys = adq.Plan.from_keys([str(shard)], None).keys()
    for loss, nothing in ((1.0, False), (1.0, True), (2.0, False)):
        table = pa.table({"key": keys, "loss": [loss * i for i in range(len(keys))]})
        pq.write_table(table, tmp_path / "x.parquet")
        scores = ["--scores", "texture", f"{tmp_path / 'x.parquet'}:loss"]
        command = ["run", str(shard), "-o", str(tmp_path / "run"), "--bins", "3", *scores]
        assert main(command) == 0
        assert ("nothing to do" in capsys.readouterr().out) == nothing
    assert main(["run", "--from", str(tmp_path / "run" / "run.json"), "-o", str(tmp_path / "run")]) == 0
    assert "nothing to do" in capsys.readouterr().out
