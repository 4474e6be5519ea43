"""A plan by a stored number keeps what a plainly written sort keeps."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import adq_wds as adq
from adq_wds.cli.main import main
from adq_wds.jobs.select import select_samples
from tests.conftest import MakeShard, write_tar


def number(i: int) -> float:
    """Eight values, so that most stand several times, some of them negative."""
    return round(((i * 7919) % 8 - 3) / 10, 1)


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    """Two shards, named and with keys in another order than they are written in; words as classes, unequal ones."""
    rng, paths = np.random.default_rng(0), []
    for name, n in (("b.tar", 37), ("a.tar", 24)):
        members = []
        for i in rng.permutation(n).tolist():
            stored = {"cos": number(i), "agree": i % 3 == 0, "deep": {"n": i}, "word": "x"}
            members.append((f"k{i:03d}.json", json.dumps(stored).encode()))
            members.append((f"k{i:03d}.cls", b"dog" if i % 5 == 0 else b"cat"))
            members.append((f"k{i:03d}.txt", b" %d\n" % i))
        paths.append(write_tar(tmp_path / name, members))
    return paths


def plainly(plan: adq.Plan, keep: float, *, per_class: bool) -> set[tuple[str, str]]:
    """The share with the largest numbers, by one Python sort."""
    rows = [(row["shard"], row["key"], row["label"]) for row in plan.table().to_pylist()]
    kept = set()
    for label in {row[2] for row in rows} if per_class else {None}:
        of_class = [(shard, key) for shard, key, of in rows if label in (of, None)]
        of_class.sort(key=lambda row: (-number(int(row[1][1:])), row[0], row[1]))
        kept.update(of_class[: round(keep * len(of_class))])
    return kept


def kept(plan: adq.Plan) -> set[tuple[str, str]]:
    return {(row["shard"], row["key"]) for row in plan.table().to_pylist() if row["kept"]}


@pytest.mark.parametrize("keep", [0.01, 0.1, 0.25, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("balance", ["class", "none"])
def test_a_share_is_that_of_a_plain_sort(keep: float, balance: Any, shards: list[Path]) -> None:
    if (keep, balance) == (0.01, "class"):
        return  # keeps none of either class
    plan = adq.select_samples(shards, by="json:cos", keep=keep, balance=balance)
    assert kept(plan) == plainly(plan, keep, per_class=balance == "class")
    turned = adq.select_samples(shards[::-1], by="json:cos", keep=keep, balance=balance)
    assert turned.hash == plan.hash


def test_bounds_are_included(shards: list[Path]) -> None:
    keys = {(shard.name, key) for shard in shards for key in adq.Plan.from_keys([shard], None).keys()}  # noqa: SIM118
    low = adq.select_samples(shards, by="json:cos", at_least=0.1)
    assert kept(low) == {(shard, key) for shard, key in keys if number(int(key[1:])) >= 0.1}
    band = adq.select_samples(shards, by="json:cos", between=(-0.2, 0.1))
    assert kept(band) == {(shard, key) for shard, key in keys if -0.2 <= number(int(key[1:])) <= 0.1}
    assert band.header["settings"] == {
        "source": "select", "by": "json:cos", "at_least": -0.2, "at_most": 0.1, "balance": None,
        "least_kept": -0.2, "most_kept": 0.1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("by", "n"), [("json:agree", 21), ("json:deep.n", 59), ("txt", 59), ("json:none;txt", None)]
)
def test_numbers_stand_in_json_or_text(by: str, n: int | None, shards: list[Path]) -> None:
    if n is None:
        with pytest.raises(adq.SampleError, match="fields 'json' and 'txt' are both there; name one"):
            adq.select_samples(shards, by=by, at_least=1)
    else:
        assert len(adq.select_samples(shards, by=by, at_least=1)) == n


def test_a_column_or_features_are_joined_by_key(make_shard: MakeShard, tmp_path: Path) -> None:
    shard = make_shard("a.tar", 30)
    features = adq.embed_shards([shard], "thumbnail", tmp_path / "features")
    texture = features.texture()
    assert texture is not None
    best = np.sort(texture)[::-1][:6]
    for by in ("features:texture", "x.parquet:texture"):
        if by[0] == "x":
            keys = features.files[0].spans().keys
            pq.write_table(pa.table({"key": keys, "texture": texture}), tmp_path / "x.parquet")
        plan = adq.select_samples([shard], by=f"{tmp_path}/{by}", keep=0.2, balance="none")
        assert sorted(texture[plan.shard("a.tar").kept].tolist(), reverse=True) == best.tolist()
    with pytest.raises(adq.FeaturesError, match="no score 'loss' here, only texture"):
        adq.select_samples([shard], by=f"{tmp_path}/features:loss", keep=0.5)


def test_every_epoch_keeps_the_same_and_the_stream_reads_them(shards: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out" / "plan.parquet"
    plan = adq.select_samples(shards, by="json:cos", keep=0.3, out=out)
    assert plan.header["names"] == ["cat", "dog"]
    for name in plan.shards:
        assert plan.kept_in(name, 3).tolist() == plan.shard(name).kept.tolist()
    read = {(Path(s["__url__"]).name, s["__key__"]) for s in adq.ShardDataset(shards, plan=out)}
    assert read == kept(plan)
    assert set(plan.table()["reason"].to_pylist()) == {"kept", "excluded"}


def test_the_command_shows_what_it_kept(
    shards: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths, out = list(map(str, shards)), str(tmp_path / "p.parquet")
    assert main(["select", *paths, "--by", "json:cos", "--between", "0", "0.2", "-o", out]) == 0
    shown = capsys.readouterr().out
    assert "keeps 23 of 61 samples" in shown
    assert "no bins: chosen by json:cos" in shown
    assert main(["select", *paths, "--by", "json:cos", "--keep", "50%", "--json", "-o", out]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["keep"] == 0.5
    assert main(["select", *paths, "--by", "json:cos", "-o", out]) == 2
    assert "give one of --keep, --at-least and --between; got none" in capsys.readouterr().err
    for high in ("inf", "nan"):
        assert main(["select", *paths, "--by", "json:cos", "--between", "0.5", high, "-o", out]) == 2
        assert "--between must be two finite numbers" in capsys.readouterr().err


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "missing": ({"by": "json:nothing"}, adq.SampleError, r"b.tar|a.tar.*no entry 'nothing'"),
    "no such field": ({"by": "csv"}, adq.SampleError, r"shard a.tar, key '.*no number field: looked for csv"),
    "text": ({"by": "json:word"}, adq.SampleError, r"shard a.tar, key 'k.*', field 'json:word': 'x' is text"),
    "an object": ({"by": "json:deep"}, adq.SampleError, "the entry is an object"),
    "a word": ({"by": "cls"}, adq.SampleError, r"key 'k.*', field 'cls': b'cat' is no number"),
    "keep 0": ({"keep": 0.0}, ValueError, r"keep must lie in \(0, 1\], got 0"),
    "keep 1.5": ({"keep": 1.5}, ValueError, r"keep must lie in \(0, 1\], got 1.5"),
    "keep NaN": ({"keep": float("nan")}, ValueError, r"keep must lie in \(0, 1\]"),
    "two rules": ({"at_least": 0.1}, ValueError, "got keep= and at_least="),
    "no rule": ({"keep": None}, ValueError, "got none"),
    "bounds turned": ({"keep": None, "between": (1, 0)}, ValueError, r"the lower first, got \(1, 0\)"),
    "an infinite bound": ({"keep": None, "between": (0.5, float("inf"))}, ValueError, "between must be two finite numb"),
    "bounds as text": ({"keep": None, "between": "01"}, ValueError, "between must be two finite numbers.*got '01'"),
    "one bound": ({"keep": None, "between": 0.5}, ValueError, "between must be two finite numbers.*got 0.5"),
    "three bounds": ({"keep": None, "between": (0, 1, 2)}, ValueError, "between must be two finite numbers"),
    "keep as text": ({"keep": "0.5"}, ValueError, r"keep must lie in \(0, 1\], got '0.5'"),
    "at least as text": ({"keep": None, "at_least": "1"}, ValueError, "at_least must be a finite number, got '1'"),
    "another balance": ({"balance": "klass"}, ValueError, "balance must be one of class, none, got 'klass'"),
    "several fields": ({"by": ["a"]}, ValueError, r"by must be one field or FILE.parquet:COLUMN, got \['a'\]"),
    "at least NaN": ({"keep": None, "at_least": float("nan")}, ValueError, "at_least must be a finite number"),
    "nothing kept": (
        {"keep": None, "at_least": 7},
        adq.PlanError,
        r"at_least=7.0 keeps none of 61 samples: json:cos goes from -0.3 to 0.4",
    ),
    "too few for a share": ({"keep": 0.001}, adq.PlanError, "keep=0.001 keeps none of 61 samples"),
    "no label": ({"label": "label"}, adq.SampleError, "no label field"),
    "a pickle": ({"by": "pkl"}, ValueError, "would run what a pickle says"),
    "no such file": ({"by": "nowhere.parquet:x"}, adq.FeaturesError, "nowhere.parquet: no such file"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(WRONG))
def test_what_cannot_be_chosen_by_is_refused(case: str, shards: list[Path]) -> None:
    options, kind, message = WRONG[case]
    with pytest.raises(kind, match=message):
        select_samples(shards, **{"by": "json:cos", "keep": 0.5, **options})


@pytest.mark.parametrize("value", [b"NaN", b"Infinity", b"1e39", b"null"])
def test_a_number_that_is_not_finite_names_its_sample(value: bytes, tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", [("x.json", b'{"cos": 1}'), ("y.json", b'{"cos": %s}' % value)])
    with pytest.raises(
        adq.SampleError, match=r"shard a.tar, key 'y', field 'json:cos': .*(finite|number|float32)"
    ):
        select_samples([shard], by="json:cos", at_least=0)


def test_labels_of_two_kinds_are_refused(tmp_path: Path) -> None:
    members = [("x.txt", b"1"), ("x.cls", b"3"), ("y.txt", b"2"), ("y.cls", b"dog")]
    with pytest.raises(adq.PlanError, match="labels are words such as 'dog', and numbers such as 3"):
        select_samples([write_tar(tmp_path / "a.tar", members)], by="txt", keep=0.5)
