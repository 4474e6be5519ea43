"""A score of a user: made while embedding, used by the plan, found by name, refused when it does not fit."""

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

import adq_wds as adq
from adq_wds.cli.main import main
from adq_wds.core.scores import importance
from tests.folders import dates

MakeShard = Callable[..., Path]


class Red(adq.Score):
    """How red an image is."""

    name = "red"

    def per_sample(self, image: Image.Image, h: NDArray[np.float32]) -> float:
        return float(np.asarray(image)[..., 0].mean())


class Redder(Red):
    """Another revision, with other numbers."""

    revision = "2"

    def per_sample(self, image: Image.Image, h: NDArray[np.float32]) -> float:
        return super().per_sample(image, h) ** 2


class Unmade(Red):
    """Cannot be made."""

    def __init__(self) -> None:
        raise RuntimeError("no\nmodel")


class First(adq.Score):
    """The first number of the embedding."""

    name = "first"

    def per_sample(self, image: Image.Image, h: NDArray[np.float32]) -> float:
        return float(h[0])


class Picky(Red):
    """Fails on some images."""

    name = "picky"

    def per_sample(self, image: Image.Image, h: NDArray[np.float32]) -> float:
        return float("nan") if int(np.asarray(image).sum()) % 3 == 0 else 1.0


SKIP: Any = {"on_error": "skip", "max_bad_fraction": 1.0}


@pytest.fixture
def shards(make_shard: MakeShard) -> list[Path]:
    return [make_shard("a.tar", 30), make_shard("b.tar", 20, first=30)]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Entry points of packages that are not there: name → object, in the group of scores."""
    offered: dict[str, str] = {}

    def entry_points(*, group: str, name: str | None = None) -> list[importlib.metadata.EntryPoint]:
        points = [importlib.metadata.EntryPoint(n, value, "adq_wds.scores") for n, value in offered.items()]
        return [p for p in points if p.group == group and name in (None, p.name)]

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    return offered


def test_a_score_of_a_user_goes_all_the_way_into_the_plan(shards: list[Path], tmp_path: Path) -> None:
    features = adq.embed_shards(shards, "thumbnail", tmp_path / "f", scores=[Red(), First()], batch_size=7)
    thumbnail = adq.encoder("thumbnail")
    for file, path in zip(features, shards, strict=True):
        images = [adq.Decode(to="pil").apply([s])[0]["image"] for s in _samples(path)]
        assert file.score("red").tolist() == [np.float32(np.asarray(i)[..., 0].mean()) for i in images]
        assert file.score("first").tolist() == thumbnail(images)[0][:, 0].tolist()
    plan = adq.build_plan(features, bins=3, keep=0.4, scores=["texture", Red()])
    table = plan.table().to_pydict()
    red = np.concatenate([file.score("red") for file in features]).astype(np.float64)
    means = [red[np.array(table["bin"]) == k].mean() for k in range(3)]
    shown = plan.header["bins"]
    assert np.allclose([b["red"] for b in shown], means, rtol=1e-12)
    expected = importance([np.array([b["texture"] for b in shown]), np.array([b["red"] for b in shown])])
    assert [b["importance"] for b in shown] == pytest.approx(expected.tolist(), abs=1e-11)
    assert plan.header["settings"]["scores"] == ["red", "texture"]
    assert {"texture", "diversity", "red"} <= shown[0].keys()
    assert "first" not in shown[0]


def _samples(path: Path) -> list[dict[str, Any]]:
    import webdataset as wds

    return list(wds.WebDataset(str(path), shardshuffle=False))


def test_a_bad_value_names_the_sample_and_is_skipped_when_asked(shards: list[Path], tmp_path: Path) -> None:
    with pytest.raises(adq.SampleError, match=r"shard a\.tar, key 's\d+': score 'picky' gave nan, .* one"):
        adq.embed_shards(shards, "thumbnail", tmp_path / "f", scores=[Picky()])
    features = adq.embed_shards(shards, "thumbnail", tmp_path / "f", scores=[Picky()], **SKIP)
    bad = sum(len(file.bad) for file in features)
    assert bad > 5
    assert len(features) == 50 - bad
    assert all("score 'picky' gave nan" in row[5] for file in features for row in file.bad)


def test_features_are_made_again_for_a_further_score(shards: list[Path], tmp_path: Path) -> None:
    adq.embed_shards(shards, "thumbnail", tmp_path / "f")
    before = dates(tmp_path / "f")
    both = adq.embed_shards(shards, "thumbnail", tmp_path / "f", scores=[Red(), First()])
    assert dates(tmp_path / "f").keys() == before.keys()
    assert not dates(tmp_path / "f").items() & before.items()
    before = dates(tmp_path / "f")
    assert adq.embed_shards(shards, "thumbnail", tmp_path / "f", scores=[Red()]).hash == both.hash
    assert adq.embed_shards(shards, "thumbnail", tmp_path / "f").hash == both.hash
    assert dates(tmp_path / "f") == before


def test_a_score_that_changed_is_never_mixed_with_old_numbers(shards: list[Path], tmp_path: Path) -> None:
    features = adq.embed_shards(shards, "thumbnail", tmp_path / "f", scores=[Red()])
    changed = Red()
    changed.revision = "2"
    with pytest.raises(ValueError, match="score 'red' has revision '2', the features hold '1'; embed again"):
        adq.build_plan(features, scores=[changed])
    features = adq.embed_shards(shards, "thumbnail", tmp_path / "f", scores=[changed])
    assert {file.scores["red"] for file in features} == {"2"}
    plan = adq.build_plan(features, scores=[changed])
    assert plan.header["features"]["scores"] == {"red": "2"}


def test_a_column_more_never_makes_a_folder_less(shards: list[Path], tmp_path: Path) -> None:
    """Neither by another encoder, nor by a limit, nor by forgetting other columns."""
    first = adq.embed_shards(shards, "thumbnail", tmp_path / "f", scores=[Red()])
    with pytest.raises(adq.FeaturesError, match="was made with encoder 'thumbnail', now 'builtin'"):
        adq.embed_shards(shards, "builtin", tmp_path / "f", scores=[First()])
    assert adq.Features(tmp_path / "f").hash == first.hash
    tried = adq.embed_shards(shards, "thumbnail", tmp_path / "f", scores=[First()], limit=10)
    assert len(tried) == 10
    whole = adq.embed_shards(shards, "thumbnail", tmp_path / "f", scores=[First()])
    assert [file.scores for file in whole] == [{"red": "1", "first": "1"}] * 2
    assert whole.score("red").tobytes() == first.score("red").tobytes()
    both = adq.embed_shards(shards, "thumbnail", tmp_path / "g", scores=[Red(), First()])
    assert whole.hash == both.hash
    part = adq.embed_shards(shards, "thumbnail", tmp_path / "h", limit=20)
    assert part.files[0].n_read == 20
    adq.embed_shards(shards, "thumbnail", tmp_path / "h", scores=[Red()], limit=5)
    assert adq.Features(tmp_path / "h").files[0].n_read == 20


def test_columns_of_samples_that_are_gone_are_not_kept(shards: list[Path], tmp_path: Path) -> None:
    """A score that fails on some leaves them out; asked for again without it, they come back without old numbers."""
    adq.embed_shards(shards, "thumbnail", tmp_path / "f", scores=[Picky()], **SKIP)
    features = adq.embed_shards(shards, "thumbnail", tmp_path / "f", scores=[Red()])
    assert len(features) == 50
    assert [file.scores for file in features] == [{"red": "1"}] * 2


def test_a_score_that_works_in_place_spoils_nothing(shards: list[Path], tmp_path: Path) -> None:
    class Small(Red):
        name = "a_small"

        def per_sample(self, image: Image.Image, h: NDArray[np.float32]) -> float:
            image.thumbnail((4, 4))
            h[:] = 0
            return 1.0

    scores: list[adq.Score] = [Small(), Red(), First()]
    spoilt = adq.embed_shards(shards, "thumbnail", tmp_path / "f", scores=scores)
    clean = adq.embed_shards(shards, "thumbnail", tmp_path / "g", scores=scores[1:])
    for a, b in zip(spoilt, clean, strict=True):
        assert a.texture().tobytes() == b.texture().tobytes()
        assert a.embedding().tobytes() == b.embedding().tobytes()
        assert a.score("red").tobytes() == b.score("red").tobytes()
        assert a.score("first").tobytes() == b.score("first").tobytes()


def test_a_run_sees_that_a_score_changed(
    shards: list[Path], installed: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed["red"] = f"{__name__}:Red"
    flags = ["--encoder", "thumbnail", "--scores", "red", "-q", "-o", str(tmp_path / "r")]
    run = ["run", *map(str, shards), *flags]
    assert main(run) == 0
    old = adq.load_plan(tmp_path / "r" / "plan.parquet").hash
    monkeypatch.setattr(importlib.metadata.EntryPoint, "load", lambda point: Redder)
    assert main(run) == 0
    assert adq.load_plan(tmp_path / "r" / "plan.parquet").hash != old
    assert adq.Features(tmp_path / "r" / "features").files[0].scores == {"red": "2"}


def test_a_plan_by_a_score_that_was_not_made_is_refused(shards: list[Path], tmp_path: Path) -> None:
    features = adq.embed_shards(shards, "thumbnail", tmp_path / "f")
    with pytest.raises(adq.FeaturesError, match=r"a\.parquet: no score 'red' here, only texture; .* with it"):
        adq.build_plan(features, scores=["texture", Red()])
    with pytest.raises(ValueError, match="unknown score 'textur'; did you mean texture"):
        adq.build_plan(features, scores=["textur"])
    with pytest.raises(ValueError, match="scores must each be named once, got"):
        adq.embed_shards(shards, "thumbnail", tmp_path / "g", scores=[Red(), Red()])
    with pytest.raises(ValueError, match="each once"):
        adq.build_plan(features, scores=["texture", "texture"])


def test_an_installed_score_is_found_by_name(
    shards: list[Path], installed: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    installed["red"] = f"{__name__}:Red"
    by_object = adq.embed_shards(shards, "thumbnail", tmp_path / "f", scores=[Red()])
    by_name = adq.embed_shards(shards, "thumbnail", tmp_path / "g", scores=["red"])
    assert by_object.hash == by_name.hash
    expected = adq.build_plan(by_object, bins=3, keep=0.4, scores=["texture", "diversity", Red()])
    flags = ["--encoder", "thumbnail", "--bins", "3", "--keep", "0.4"]
    flags += ["--scores", "texture", "diversity", "red", "-o"]
    assert main(["run", *map(str, shards), *flags, str(tmp_path / "run")]) == 0
    assert "red" in capsys.readouterr().out
    plan = adq.load_plan(tmp_path / "run" / "plan.parquet")
    assert plan.hash == expected.hash
    flags = ["--encoder", "thumbnail", "--scores", "red", "-o", str(tmp_path / "h"), "-q"]
    assert main(["embed", *map(str, shards), *flags]) == 0
    assert adq.Features(tmp_path / "h").hash == by_object.hash


@pytest.mark.parametrize(
    ("offered", "text"),
    [
        ({"red": "no_such_module:Red"}, r"'red' \(no_such_module:Red\) cannot be loaded: ModuleNotFound"),
        ({"red": f"{__name__}:First"}, "entry point 'red' of adq_wds.scores gives a score named 'first'"),
        ({"red": f"{__name__}:Unmade"}, "score 'red' cannot be made: RuntimeError: no model"),
        ({"other": f"{__name__}:Red"}, "unknown score 'red'; did you mean"),
    ],
)
def test_an_installed_score_that_cannot_be_used_is_refused(
    offered: dict[str, str], text: str, shards: list[Path], installed: dict[str, str], tmp_path: Path
) -> None:
    installed |= offered
    with pytest.raises((ValueError, adq.AdqError), match=text):
        adq.embed_shards(shards, "thumbnail", tmp_path / "f", scores=["red"])


def test_nothing_is_loaded_unnamed(shards: list[Path], installed: dict[str, str], tmp_path: Path) -> None:
    installed["red"] = "no_such_module:Red"
    adq.build_plan(adq.embed_shards(shards, "thumbnail", tmp_path / "f"))
