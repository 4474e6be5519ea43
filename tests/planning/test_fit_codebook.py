"""A fitted codebook is the exact greedy on keyed pilots, counted on samples outside them."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adq_wds as adq
from adq_wds.cli.main import main
from adq_wds.core.codebook import Checkpoints, bin_checkpoints
from adq_wds.core.graphcut import graphcut_bins
from adq_wds.core.kernel import unit_rows
from adq_wds.core.rng import draw
from adq_wds.planning import fit_codebook as job
from adq_wds.tables.features_file import ShardFeatures

MakeFeatures = Callable[..., ShardFeatures]
BINS, CHECKPOINTS = 3, 2


@pytest.fixture
def features(make_features: MakeFeatures, tmp_path: Path) -> adq.Features:
    """Two shards; 60 samples of class 0, 40 of class 2, 9 of class 5."""
    make_features("a.tar", [0, 2] * 30, bad=[7, 30])
    make_features("b.tar", [0] * 30 + [2] * 10 + [5] * 9, first=100)
    return adq.Features(tmp_path / "features")


def fit(features: Any, **options: Any) -> adq.Codebook:
    return adq.fit_codebook(features, **{"bins": BINS, "checkpoints": CHECKPOINTS, "min_pilot": 5, **options})


def everything(features: adq.Features) -> tuple[Any, Any, Any, list[tuple[str, str]]]:
    """Embeddings, labels, textures and places of all samples."""
    places = [(file.shard, key) for file in features for key in file.spans().keys]
    labels = np.concatenate([file.read_columns(["label"])["label"].to_numpy() for file in features])
    return (
        np.concatenate([f.embedding() for f in features]),
        labels,
        np.concatenate([f.texture() for f in features]),
        places,
    )


def slow_row(features: adq.Features, c: int | None, n_pilot: int, seed: int) -> dict[str, Any]:
    """One rule, the long way round."""
    embedding, labels, texture, places = everything(features)
    mine = [i for i in range(len(labels)) if c is None or labels[i] == c]
    by_draw = sorted(mine, key=lambda i: (draw(seed, 0, *places[i], purpose="pilot"), i))
    pilot, rest = sorted(by_draw[:n_pilot]), sorted(by_draw[n_pilot:])
    rows = unit_rows(embedding[pilot])
    binning = graphcut_bins(rows, BINS)
    query, threshold = bin_checkpoints(rows, binning, CHECKPOINTS)
    found = Checkpoints(query[None], threshold[None]).assign(embedding[rest], np.zeros(len(rest), int))
    held_out = [int((found == k).sum()) for k in range(BINS)]
    return {
        "query": query, "threshold": threshold, "held_out": held_out,
        "bin": binning.bin, "rows": rows, "texture": texture[pilot],
    }  # fmt: skip


def slow_importance(parts: list[dict[str, Any]]) -> Any:
    """Mean texture and 1 / mean similarity of distinct pairs, pair by pair over the classes together."""
    texture, diversity = np.zeros(BINS), np.zeros(BINS)
    for k in range(BINS):
        rows = np.concatenate([part["rows"][part["bin"] == k] for part in parts])
        texture[k] = np.mean(
            np.concatenate([part["texture"][part["bin"] == k] for part in parts]), dtype=np.float64
        )
        pairs = [0.5 + 0.5 * a @ b for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j]
        diversity[k] = 1 / np.mean(pairs)
    total = texture / texture.sum() + diversity / diversity.sum()
    return total / total.sum()


def test_a_codebook_equals_the_method_written_out(features: adq.Features) -> None:
    found = fit(features, pilot=25, seed=3, alpha=0.8)
    parts = [slow_row(features, c, n, 3) for c, n in ((None, 25), (0, 25), (2, 20), (5, 5))]
    assert found.label.tolist() == [-1, 0, 2, 5]
    assert found.header["settings"]["pilot"] == [25, 25, 20, 5]
    for r, part in enumerate(parts):
        for name in ("query", "threshold", "held_out"):
            assert np.array_equal(getattr(found, name)[r], part[name]), (r, name)
    for r, importance in zip(
        range(4), [slow_importance(parts[:1]), *[slow_importance(parts[1:])] * 3], strict=True
    ):
        relative = 0.8 * BINS * importance + 0.2
        assert found.weight[r] == pytest.approx(relative, rel=1e-9)
    assert found.header["scores"]["classes"]["importance"] == pytest.approx(
        slow_importance(parts[1:]), abs=1e-9
    )
    assert found.header["features"] == features.hash
    assert found.encoder == ("synthetic", "1", "0")


def test_half_of_a_class_or_a_thousand_is_held_out(
    features: adq.Features, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fit(features).header["settings"]["pilot"] == [55, 30, 20, 5]
    monkeypatch.setattr(job, "HELD_OUT", 7)
    found = fit(features)
    assert found.header["settings"]["pilot"] == [102, 53, 33, 5]
    assert found.held_out.sum(axis=1).tolist() == [7, 7, 7, 4]
    monkeypatch.setattr(job, "PILOT", 40)
    assert fit(features).header["settings"]["pilot"] == [40, 40, 33, 5]
    assert fit(features, pilot=6).header["settings"]["pilot"] == [6, 6, 6, 5]


def test_the_order_of_files_and_a_saved_file_change_nothing(
    features: adq.Features, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = fit(features)
    assert fit(str(tmp_path / "features")).hash == first.hash
    out = tmp_path / "new" / "codebook.safetensors"
    saved = fit(features, out=out, progress=False)
    assert (saved.hash, saved.path) == (first.hash, out)
    assert adq.load_codebook(out).hash == first.hash
    assert fit(features, memory_bytes=0).hash == first.hash
    others = [fit(features, **change).hash for change in ({"seed": 1}, {"pilot": 6}, {"alpha": 0})]
    assert len({first.hash, *others}) == 4


def test_classes_with_small_pilots_go_by_the_pooled_rule(
    features: adq.Features, caplog: pytest.LogCaptureFixture
) -> None:
    found = fit(features, min_pilot=6)
    assert found.label.tolist() == [-1, 0, 2]
    assert [found.row(c) for c in (0, 2, 5, 7)] == [1, 2, 0, None]
    text = "1 of 3 classes have pilots of fewer than 6 samples (class 5: 5 of its 9): they go by one rule over all classes"
    assert text in caplog.text
    none_of_them = adq.fit_codebook(features, bins=BINS)
    assert none_of_them.label.tolist() == [-1]
    assert [none_of_them.row(c) for c in (0, 2, 5, 7)] == [0, 0, 0, None]
    assert "3 of 3 classes have pilots of fewer than 500 samples (class 0: 30 of its 60)" in caplog.text
    assert set(none_of_them.header["scores"]) == {"pooled"}


def test_a_class_needs_a_pilot_sample_for_every_bin(features: adq.Features) -> None:
    assert fit(features, bins=6, min_pilot=1).label.tolist() == [-1, 0, 2]


def test_names_of_classes_are_kept(make_features: MakeFeatures, tmp_path: Path) -> None:
    make_features("a.tar", [0, 1] * 20, names=["bee", "dog"])
    make_features("b.tar", [0] * 20 + [1], names=["ant", "dog"], first=100)
    found = fit(tmp_path / "features")
    assert found.header["names"] == ["ant", "bee", "dog"]
    assert [found.row(name) for name in ("ant", "bee", "dog", "elk")] == [1, 2, 3, None]


def test_unlabelled_data_has_one_rule(
    make_features: MakeFeatures, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_features("a.tar", [-1] * 40)
    with caplog.at_level(logging.INFO, logger="adq_wds"):
        found = fit(tmp_path / "features")
    assert (found.label.tolist(), found.header["classes"], found.needs_label) == ([-1], [], False)
    assert "no labels: one rule for all samples" in caplog.text


def test_a_crowded_last_bin_is_warned_of(
    features: adq.Features, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = fit(features, pilot=6).frequency()[:, -1] * BINS
    caplog.clear()
    monkeypatch.setattr(job, "_CROWDED", float(np.sort(times)[-2]))
    fit(features, pilot=6)
    who = ["all classes together", "class 0", "class 2", "class 5"][int(times.argmax())]
    pilot = [6, 6, 6, 5][int(times.argmax())]
    text = f"of 4 rules, 1 put more than {np.sort(times)[-2]:g} times its share into the last bin ({who}: {times.max():.1f}"
    assert text in caplog.text
    assert f"a larger pilot (here {pilot})" in caplog.text


def test_allocations_decide_the_weights(features: adq.Features) -> None:
    assert fit(features, allocation="uniform").weight.tolist() == [[1.0] * BINS] * 4
    asked: list[tuple[list[int], float]] = []

    def equal_counts(size: Any, importance: Any, keep: float) -> Any:
        asked.append((size.tolist(), keep))
        assert importance.sum() == pytest.approx(1)
        size[:] = 0  # a rule may work in place
        return np.ones(BINS)

    found = fit(features, allocation=equal_counts, keep=0.4)
    assert asked == [(np.maximum(row, 1).tolist(), 0.4) for row in found.held_out]
    assert (found.weight == 1 / np.maximum(found.held_out, 1)).all()
    assert found.header["settings"]["allocation"].startswith("function:")
    for wrong in (lambda *_: np.ones(2), lambda *_: np.full(BINS, np.nan), lambda *_: -np.ones(BINS)):
        with pytest.raises(
            ValueError, match=r"allocation 'function:.*' must give \(3,\) weights, finite and >= 0, got"
        ):
            fit(features, allocation=wrong)


def test_scores_are_chosen_by_name(features: adq.Features) -> None:
    one = fit(features, scores=["texture"])
    texture = np.array(one.header["scores"]["classes"]["texture"])
    assert one.header["scores"]["classes"]["importance"] == pytest.approx(texture / texture.sum(), abs=1e-9)
    minmax = fit(features, scores=["texture"], normalise="minmax").header["scores"]["classes"]["importance"]
    share = (texture - texture.min()) / (texture.max() - texture.min())
    assert minmax == pytest.approx(share / share.sum(), abs=1e-9)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"bins": 0}, "bins must be an integer from 1 to 32,767, got 0"),
        ({"pilot": 0}, "pilot must be an integer from 1 to 2,147,483,647, got 0"),
        ({"checkpoints": 0}, "checkpoints must be an integer from 1 to 32,767, got 0"),
        ({"min_pilot": -1}, "min_pilot must be an integer"),
        ({"keep": 1.5}, r"keep must be a number in \[0, 1\], got 1.5"),
        ({"scores": ["textures"]}, "unknown score of a codebook 'textures'; did you mean texture"),
        ({"out": "codebook.parquet"}, r"codebook.parquet: a codebook's file ends in .safetensors"),
    ],
)
def test_wrong_arguments_are_met_before_any_work(tmp_path: Path, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        adq.fit_codebook(tmp_path / "no features here", **options)


def test_too_few_samples_are_said(make_features: MakeFeatures, tmp_path: Path) -> None:
    make_features("a.tar", [0] * 5)
    with pytest.raises(
        adq.FeaturesError, match="5 usable samples, too few for a codebook of 4 bins, half of which"
    ):
        fit(tmp_path / "features", bins=4)
    assert fit(tmp_path / "features", bins=3, min_pilot=3).held_out.sum(axis=1).tolist() == [2, 2]
    make_features("a.tar", [0])
    with pytest.raises(adq.FeaturesError, match="1 usable samples, too few for a codebook of 1 bins"):
        fit(tmp_path / "features", bins=1)


# ---- The command


def test_the_command_fits_and_shows(
    features: adq.Features, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "codebook.safetensors"
    options = "--bins 3 --pilot 25 --checkpoints 2 --min-pilot 6 --keep 0.5 --seed 3 --alpha 0.8 --memory-bytes 1000 "
    options += "--allocation adaptive --scores texture --normalise minmax"
    assert main(["codebook", str(tmp_path / "features"), "-o", str(out), *options.split()]) == 0
    expected = fit(
        features, pilot=25, min_pilot=6, keep=0.5, seed=3, alpha=0.8, scores=["texture"], normalise="minmax"
    )
    assert adq.load_codebook(out).hash == expected.hash
    text = capsys.readouterr().out
    assert "3 bins; 2 of 3 classes have rules of their own, all others go by the pooled one" in text
    assert "part of new samples in each bin, and the rate that keeps 0.5 of all:" in text
    assert main(["show", str(out), "--keep", "0.5"]) == 0
    assert capsys.readouterr().out == text
    lines = [line.split() for line in text.splitlines()]
    for r, (first, n_pilot) in enumerate(zip(("pooled", "0", "2"), ("25", "25", "20"), strict=True)):
        at = next(i for i, line in enumerate(lines) if line[:1] == [first] and "part" in line)
        part = [f"{v:.3f}" for v in expected.frequency()[r]]
        assert lines[at] == [first, n_pilot, str(expected.held_out[r].sum()), "part", *part]
        assert lines[at + 1] == ["rate", *(f"{v:.3f}" for v in expected.rates(0.5)[r])]
    assert main(["show", str(out), "--keep", "0.5", "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert about["hash"] == expected.hash
    assert [row["label"] for row in about["rows"]] == [None, 0, 2]
    assert np.array_equal([row["rate"] for row in about["rows"]], expected.rates(0.5))


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["codebook", str(tmp_path), "-o", str(tmp_path / "c.safetensors")]) == 1
    assert "no features here" in capsys.readouterr().err
    assert main(["codebook", str(tmp_path), "-o", "c.parquet"]) == 2
    assert "a codebook's file ends in .safetensors" in capsys.readouterr().err
    (tmp_path / "c.safetensors").write_bytes(b"nothing")
    assert main(["show", str(tmp_path / "c.safetensors")]) == 1
    assert "CodebookError" in capsys.readouterr().err


def test_names_from_strangers_are_shown_on_one_line(
    make_features: MakeFeatures, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_features("a.tar", [0, 1] * 20, names=["a\nb", "x" * 100])
    out = tmp_path / "c.safetensors"
    options = ["-o", str(out), "--bins", "2", "--min-pilot", "2"]
    assert main(["codebook", str(tmp_path / "features"), *options]) == 0
    shown = capsys.readouterr().out
    assert r"'a\nb'" in shown
    assert "x" * 41 not in shown


def test_a_header_of_other_types_is_an_error_when_shown(features: adq.Features) -> None:
    from adq_wds.report.text import show_codebook

    found = fit(features)
    found.header["settings"] = {"pilot": 3}
    with pytest.raises(adq.CodebookError, match="codebook: damaged header"):
        show_codebook(found, 0.3)
