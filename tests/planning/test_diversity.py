"""Diversity behind a head: from views beside the features into the plan, trained once for all its plans."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adq_wds as adq
from adq_wds.cli.main import main
from adq_wds.core.scores import importance
from adq_wds.planning import diversity_head as heads
from adq_wds.planning.build_plan import find_bins
from adq_wds.tables.bins import Bins
from adq_wds.tables.views import Views

MakeShard = Callable[..., Path]


@pytest.fixture
def shards(make_shard: MakeShard) -> list[Path]:
    return [make_shard("a.tar", 30), make_shard("b.tar", 26, first=30)]


@pytest.fixture
def features(shards: list[Path], tmp_path: Path) -> adq.Features:
    return adq.embed_shards(shards, "thumbnail", tmp_path / "f", views=40)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A name for each time that heads were fitted."""
    calls: list[str] = []
    real = heads.head_diversity

    def counted(*args: Any, **options: Any) -> Any:
        calls.append("contrastive")
        return real(*args, **options)

    monkeypatch.setattr(heads, "head_diversity", counted)
    return calls


def test_a_plan_does_not_hang_on_whether_the_head_was_known(
    features: adq.Features, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers with more digits than a header keeps, of which the last ones would move an importance."""
    rng = np.random.default_rng(0)
    for _ in range(60):
        value, spread = 1 + rng.random(3), rng.random(3) / 100
        monkeypatch.setattr(heads, "head_diversity", lambda *args, v=value, s=spread, **options: (v, s))
        bins = find_bins(features, bins=3)
        first = adq.build_plan(features, bins=bins, diversity_head="contrastive")
        assert adq.build_plan(features, bins=bins, diversity_head="contrastive").hash == first.hash


def test_the_heads_diversity_makes_the_importance(features: adq.Features) -> None:
    plan = adq.build_plan(features, bins=3, keep=0.4, diversity_head="contrastive")
    position, z = Views(features).rows()
    assert len(position) == 40
    table = plan.table().to_pydict()
    bin = np.array(table["bin"])
    value, spread = heads.head_diversity(z, bin[position], 3, size=np.bincount(bin), seed=0)
    shown = plan.header["bins"]
    assert [b["diversity"] for b in shown] == pytest.approx(value.tolist(), rel=1e-9)
    assert [b["diversity_spread"] for b in shown] == pytest.approx(spread.tolist(), rel=1e-6, abs=1e-11)
    expected = importance([value, np.array([b["texture"] for b in shown])])
    assert [b["importance"] for b in shown] == pytest.approx(expected.tolist(), abs=1e-9)
    assert plan.header["settings"]["diversity_head"] == "contrastive"
    plain = adq.build_plan(features, bins=3, keep=0.4)
    assert plain.header["bins"][0]["diversity"] != shown[0]["diversity"]
    assert plain.table()["bin"].to_pylist() == table["bin"]


def test_views_are_trained_on_once(features: adq.Features, trained: list[str], tmp_path: Path) -> None:
    bins = find_bins(features, bins=3)
    first = adq.build_plan(features, bins=bins, keep=0.4, diversity_head="contrastive")
    bins.save(tmp_path / "bins.parquet")
    bins = Bins.load(tmp_path / "bins.parquet")
    again = adq.build_plan(features, bins=bins, keep=0.4, diversity_head="contrastive")
    assert first.hash == again.hash
    assert trained == ["contrastive"]
    assert again.header["bins"] == first.header["bins"]  # to the last digit
    smaller = adq.build_plan(features, bins=bins, keep=0.2, seed=0, diversity_head="contrastive")
    assert set(smaller.keys()) <= set(again.keys())
    assert trained == ["contrastive"]
    assert adq.build_plan(features, bins=3, keep=0.4, diversity_head="contrastive").hash == first.hash
    assert trained == ["contrastive"] * 2


def test_other_views_are_another_diversity(
    features: adq.Features, shards: list[Path], trained: list[str], tmp_path: Path
) -> None:
    bins = find_bins(features, bins=3)
    few = adq.build_plan(features, bins=bins, diversity_head="contrastive")
    adq.embed_shards(shards, "thumbnail", tmp_path / "f", views=56)
    many = adq.build_plan(features, bins=bins, diversity_head="contrastive")
    assert few.header["bins"][0]["diversity"] != many.header["bins"][0]["diversity"]
    assert trained == ["contrastive"] * 2


def test_a_heads_entry_that_cannot_be_is_not_taken(features: adq.Features, trained: list[str]) -> None:
    bins = find_bins(features, bins=3)
    good = adq.build_plan(features, bins=bins, diversity_head="contrastive")
    values: list[Any] = [[1.0], None, "abc", [1.0, "x", 2.0], [10**400, 1.0, 1.0], [None, 1.0, 1.0]]
    values += [[True, 1.0, 1.0], [-1.0, 1.0, 1.0]]
    entry = bins.header["heads"]["contrastive"]
    broken: list[Any] = [{"contrastive": entry | {"value": value}} for value in values]
    broken += [{"contrastive": entry | {"definition": "another head"}}, [1, 2]]
    for heads_ in broken:
        bins.header["heads"] = heads_
        assert adq.build_plan(features, bins=bins, diversity_head="contrastive").hash == good.hash
    assert len(trained) == 11


def test_bins_and_plans_of_a_head_that_is_gone_are_read(features: adq.Features, tmp_path: Path) -> None:
    """Earlier versions had an untrained head, "paper"."""
    bins = find_bins(features, bins=3)
    bins.header["heads"] = {"paper": {"views": "0", "value": [1.0, 1.0, 1.0]}}
    bins.save(tmp_path / "bins.parquet")
    bins = Bins.load(tmp_path / "bins.parquet")
    plan = adq.build_plan(features, bins=bins, diversity_head="contrastive")
    assert sorted(bins.header["heads"]) == ["contrastive", "paper"]
    plan.header["settings"]["diversity_head"] = "paper"
    plan.save(tmp_path / "plan.parquet")
    assert adq.load_plan(tmp_path / "plan.parquet").header["settings"]["diversity_head"] == "paper"


def test_without_views_the_remedy_is_said(shards: list[Path], tmp_path: Path) -> None:
    features = adq.embed_shards(shards, "thumbnail", tmp_path / "f")
    with pytest.raises(
        adq.FeaturesError, match=r"no views here \(a\.parquet and 1 more are missing\); embed with views="
    ):
        adq.build_plan(features, diversity_head="contrastive")
    np.save(tmp_path / "e.npy", np.ones((56, 4), np.float32))
    with pytest.raises(ValueError, match="views need an encoder, and embeddings made elsewhere have none"):
        adq.embed_shards(shards, out=tmp_path / "g", embeddings=tmp_path / "e.npy", views=5)
    with pytest.raises(ValueError, match="views must be an integer >= 1, got -1"):
        adq.embed_shards(shards, "thumbnail", tmp_path / "f", views=-1)


def test_one_class_and_few_images_are_enough(make_shard: MakeShard, tmp_path: Path) -> None:
    shard = make_shard("one.tar", 3, classes=1, side=1)
    features = adq.embed_shards(shard, "thumbnail", tmp_path / "f", views=100)
    plan = adq.build_plan(features, bins=2, keep=0.5, diversity_head="contrastive")
    assert plan.n_kept == 2
    assert all(np.isfinite(b["diversity"]) for b in plan.header["bins"])


def test_the_command_embeds_the_views_it_needs_and_trains_once(
    shards: list[Path], trained: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["-o", str(tmp_path / "run"), "--encoder", "thumbnail", "--bins", "3"]
    run = ["run", *map(str, shards), *out, "--diversity-head", "contrastive"]
    assert main([*run, "--keep", "0.4"]) == 0
    shown = capsys.readouterr().out
    assert "diversity_spread" in shown
    assert "diversity_head contrastive" in shown
    features = adq.Features(tmp_path / "run" / "features")
    assert len(Views(features).rows()[0]) == 56  # all of them: fewer than the default
    assert main([*run, "--keep", "0.2"]) == 0
    assert trained == ["contrastive"]
    assert main([*run, "--keep", "0.2", "--views", "20"]) == 0
    assert trained == ["contrastive"] * 2
    assert len(Views(features).rows()[0]) == 20
    assert main([*run, "--keep", "0.3", "--views", "20"]) == 0
    assert trained == ["contrastive"] * 2
