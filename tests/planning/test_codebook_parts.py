"""A codebook leaves out of its fit what a plan does, and is then the codebook of what is left."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adq_wds as adq
from adq_wds.cli.main import main
from adq_wds.core.rng import draw
from adq_wds.planning import doubts
from adq_wds.tables.features import file_name
from adq_wds.tables.features_file import ShardFeatures

MakeFeatures = Callable[..., ShardFeatures]
CLEANED: dict[str, Any] = {"clean": 0.2, "dedup": "exact"}


def rows_near_classes(label: list[int], seed: int) -> Any:
    rng = np.random.default_rng(seed)
    h = np.eye(3, 6)[label] + rng.normal(scale=0.4, size=(len(label), 6))
    return h / np.linalg.norm(h, axis=1, keepdims=True)


@pytest.fixture
def shards(make_features: MakeFeatures) -> list[ShardFeatures]:
    """Three classes of 76, 50 and 24 samples; of shard b the first five are copies of five in shard a."""
    made = []
    for shard, first in (("a.tar", 0), ("b.tar", 100)):
        label = [0, 1, 0, 2, 1, 0] * 12 + [0, 0, 1]
        contents = [*range(5), *range(first + 5, first + 75)]
        embedding = rows_near_classes(label, first)
        made.append(make_features(shard, label, first=first, contents=contents, embedding=embedding))
    return made


def fit(folder: Any, **options: Any) -> adq.Codebook:
    return adq.fit_codebook(folder, **{"bins": 3, "checkpoints": 2, "min_pilot": 5, **options})


def test_bins_and_counts_are_those_of_the_samples_that_are_left(
    shards: list[ShardFeatures], tmp_path: Path
) -> None:
    plan = adq.build_plan(tmp_path / "features", bins=3, keep=1.0, **CLEANED)
    left = tmp_path / "left"
    left.mkdir()
    reasons = np.array(plan.table()["reason"].to_pylist()).reshape(2, 75)
    for shard, of_shard in zip(shards, reasons, strict=True):
        keep = np.flatnonzero(of_shard == "kept")
        columns = {
            name: getattr(shard, name)[keep] for name in ("label", "embedding", "norm", "texture", "digest")
        }
        replace(shard, spans=shard.spans.take(keep), **columns).save(left / file_name(shard.shard))
    cleaned, of_the_rest = fit(tmp_path / "features", **CLEANED), fit(left)
    for name in ("query", "threshold", "label", "held_out", "weight"):
        assert np.array_equal(getattr(cleaned, name), getattr(of_the_rest, name)), name
    assert cleaned.header["clean"] == plan.header["clean"]
    assert sum(cleaned.header["n"]) == len(adq.Features(left))


def test_labels_are_doubted_below_the_lowest_margin_that_stays(
    shards: list[ShardFeatures], tmp_path: Path
) -> None:
    found = fit(tmp_path / "features", clean=0.2)
    rows = adq.build_plan(tmp_path / "features", bins=3, keep=1.0, clean=0.2, dedup=None).table().to_pydict()
    assert found.margins is not None
    for c in range(3):
        margins = [
            m
            for m, label, reason in zip(rows["margin"], rows["label"], rows["reason"], strict=True)
            if label == c and reason == "kept"
        ]
        assert found.margins.least[c] == min(margins)
    assert found.header["clean"]["left_out"] == [15, 10, 5]
    assert found.header["n"] == [61, 40, 19]


def test_copies_are_those_of_a_plan(shards: list[ShardFeatures], tmp_path: Path) -> None:
    found = fit(tmp_path / "features", dedup="exact")
    assert found.copies is not None
    assert len(found.copies.digest) == 145
    places = [(shard.shard, key) for shard in shards for key in shard.spans.keys]
    draws = np.array([draw(0, 0, *place, purpose="copy") for place in places], dtype=np.uint64)
    digests = np.concatenate([shard.digest for shard in shards if shard.digest is not None])
    assert np.flatnonzero(found.copies.are_copies(digests, draws)).tolist() == [75, 76, 77, 78, 79]


def test_what_is_not_asked_for_is_not_there(shards: list[ShardFeatures], tmp_path: Path) -> None:
    plain = fit(tmp_path / "features")
    assert (plain.margins, plain.copies) == (None, None)
    assert not plain.header.keys() & {"n", "balance", "clean", "random_layer", "image"}
    assert not plain.header["settings"].keys() & {"balance", "clean", "dedup"}
    equal = fit(tmp_path / "features", balance="equal")
    assert (equal.header["n"], equal.header["balance"]) == ([76, 50, 24], "equal")
    hashes = [fit(tmp_path / "features", **one).hash for one in ({}, {"clean": 0.2}, {"dedup": "exact"})]
    assert len({*hashes, equal.hash}) == 4


def test_a_class_of_one_sample_keeps_it(make_features: MakeFeatures, tmp_path: Path) -> None:
    label = [0, 1] * 30 + [2]
    make_features("a.tar", label, embedding=rows_near_classes(label, 0))
    found = fit(tmp_path / "features", clean=0.5, balance="equal")
    assert found.header["clean"]["left_out"] == [15, 15, 0]
    assert found.margins is not None
    assert found.margins.least[2] == -np.inf
    assert found.class_rates(0.2)[3].tolist() == [1.0] * 3  # the smallest class is kept whole


def test_what_the_features_lack_is_said(make_features: MakeFeatures, tmp_path: Path) -> None:
    make_features("a.tar", [-1] * 40)
    for options, what in (({"clean": "auto"}, "clean='auto'"), ({"balance": 0.5}, "balance=0.5")):
        with pytest.raises(
            adq.FeaturesError, match=f"features: {what} needs labels, and these features have none"
        ):
            fit(tmp_path / "features", **options)
    with pytest.raises(adq.FeaturesError, match=r"a.parquet: dedup='exact' needs digests, .* embed again"):
        fit(tmp_path / "features", dedup="exact")
    make_features("a.tar", [3] * 40, contents=range(40), image="function:mine.image")
    with pytest.raises(adq.FeaturesError, match=r"features: clean=0.1 needs samples of two or more classes"):
        fit(tmp_path / "features", clean=0.1)
    with pytest.raises(
        adq.FeaturesError, match="needs an image field with a name, and a function gave these"
    ):
        fit(tmp_path / "features", dedup="exact")
    assert fit(tmp_path / "features", balance="equal").class_rates(0.3).shape == (2, 3)
    make_features("a.tar", [0, 1] * 20, contents=[7] * 40)
    with pytest.raises(adq.FeaturesError, match="1 usable samples, too few for a codebook"):
        fit(tmp_path / "features", dedup="exact")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"balance": "even"}, r"balance must be one of \('class', 'equal', 'none'\) or a number"),
        ({"balance": 1.5}, r"balance must be a number in \[0, 1\], got 1.5"),
        ({"clean": 1}, "clean must be above 0 and below 1, got 1"),
        ({"clean": float("nan")}, r"clean must be a number in \[0, 1\], got nan"),
        ({"dedup": "all"}, "dedup must be "),
        ({"dedup": 0.9}, "dedup must be 'exact' or None for a codebook, got 0.9"),
    ],
)
def test_wrong_options_are_met_before_any_work(tmp_path: Path, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        fit(tmp_path / "no features here", **options)


def test_a_place_that_cannot_be_written_is_met_first(
    shards: list[ShardFeatures], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doubts, "fit_ridge", lambda *_: pytest.fail("fitted first"))
    (tmp_path / "a.safetensors").mkdir()
    with pytest.raises(adq.CodebookError, match="a folder; give a file name"):
        fit(tmp_path / "features", clean=0.2, out=tmp_path / "a.safetensors")


def test_auto_doubts_no_label_that_the_fit_predicts(
    shards: list[ShardFeatures], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the share of negative margins is rounded up."""

    def all_negative(margins: Any, label: Any) -> Any:
        return np.bincount(label, weights=margins.margin < 0) / np.bincount(label)

    monkeypatch.setattr(doubts, "wrong_shares", all_negative)
    monkeypatch.setattr(doubts, "DECIMALS", 1)
    plan = adq.build_plan(tmp_path / "features", bins=3, keep=1.0, clean="auto").table().to_pydict()
    n_negative = [0, 0, 0]
    for label, margin in zip(plan["label"], plan["margin"], strict=True):
        n_negative[label] += margin < 0
    rounded_up = np.rint(np.round(np.divide(n_negative, [76, 50, 24]), 1) * [76, 50, 24]) > n_negative
    assert rounded_up.any()
    doubted = [m for m, why in zip(plan["margin"], plan["reason"], strict=True) if why == "label"]
    assert doubted
    assert max(doubted) < 0


def test_a_weak_encoder_is_warned_of_and_leaves_out_nothing(
    make_features: MakeFeatures, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_features("a.tar", np.random.default_rng(0).integers(0, 3, 300).tolist())
    found = fit(tmp_path / "features", clean="auto")
    assert "margins say little of labels" in caplog.text
    assert found.header["clean"]["left_out"] == [0, 0, 0]
    assert found.margins is not None
    assert (found.margins.least == -np.inf).all()


def test_the_command_says_what_it_leaves_out_of_each_class(
    shards: list[ShardFeatures], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "codebook.safetensors"
    flags = "--bins 3 --checkpoints 2 --min-pilot 5 --keep 0.2 --balance equal --clean 0.2 --dedup exact"
    assert main(["codebook", str(tmp_path / "features"), "-o", str(out), *flags.split()]) == 0
    assert (
        adq.load_codebook(out).hash == fit(tmp_path / "features", **CLEANED, balance="equal", keep=0.2).hash
    )
    text = capsys.readouterr().out
    assert "samples are left out whose labels are doubted (" in text
    assert "balance equal: kept of each class" in text
    assert main(["show", str(out), "--keep", "0.2"]) == 0
    assert capsys.readouterr().out == text
