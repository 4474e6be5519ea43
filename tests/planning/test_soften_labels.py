"""Are stored soft labels those of the fit or of the network, whole, and equal however shards are cut?"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adq_wds as adq
from adq_wds.cli.main import main
from adq_wds.core.margin import ridge_margins
from adq_wds.core.soft_labels import top_probabilities
from adq_wds.files import lock
from adq_wds.tables.soft_labels import SoftTable
from tests.conftest import MakeFeatures, write_tar

LABEL = np.arange(60) % 3


def blobs(n: int = 60, seed: int = 0) -> Any:
    """(n, 6) unit rows in three overlapping groups."""
    rng = np.random.default_rng(seed)
    rows = np.eye(3, 6)[LABEL[:n]] + rng.normal(scale=0.6, size=(n, 6))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def all_rows(path: Path) -> tuple[Any, Any]:
    """(N, T) classes and probabilities of all shards."""
    table = SoftTable(path)
    shards = [table.shard(entry["name"]) for entry in table.header["shards"]]
    return np.concatenate([s.top for s in shards]), np.concatenate([s.probability for s in shards])


def test_ridge_stores_predictions_of_the_left_out(make_features: MakeFeatures, tmp_path: Path) -> None:
    h = blobs()
    make_features("a.tar", LABEL[:40], embedding=h[:40])
    make_features("b.tar", LABEL[40:], embedding=h[40:])
    report = adq.soften_labels(tmp_path / "features", out=tmp_path / "soft.parquet")
    expected = ridge_margins(lambda: [h.astype(np.float16)], LABEL)
    top, probability = all_rows(tmp_path / "soft.parquet")
    assert top.tolist() == expected.top.tolist()
    assert probability.tobytes() == expected.probability().tobytes()
    assert (report.samples, report.shards, report.n_classes) == (60, 2, 3)
    assert (report.temperature, report.agreement) == (expected.temperature, expected.accuracy)
    adq.soften_labels(tmp_path / "features", temperature=5.0, out=tmp_path / "soft.parquet")
    assert all_rows(tmp_path / "soft.parquet")[1].max() < probability.max()


def test_copies_count_as_one_sample_and_share_its_soft_label(
    make_features: MakeFeatures, tmp_path: Path
) -> None:
    h = blobs()
    make_features("a.tar", LABEL, embedding=h, contents=range(60))
    make_features(
        "b.tar", [1] * 8, embedding=h[[0] * 8], contents=[0] * 8
    )  # the first sample, wrongly labelled
    adq.soften_labels(tmp_path / "features", out=tmp_path / "soft.parquet")
    expected = ridge_margins(lambda: [h.astype(np.float16)], LABEL)
    top, probability = all_rows(tmp_path / "soft.parquet")
    assert top.tolist() == expected.top[[*range(60), *[0] * 8]].tolist()
    assert probability.tobytes() == expected.probability()[[*range(60), *[0] * 8]].tobytes()


def test_class_numbers_with_gaps_stay_as_they_are(make_features: MakeFeatures, tmp_path: Path) -> None:
    make_features("a.tar", np.array([2, 7, 40])[LABEL], embedding=blobs())
    report = adq.soften_labels(tmp_path / "features", out=tmp_path / "soft.parquet")
    assert report.n_classes == 41
    assert set(all_rows(tmp_path / "soft.parquet")[0].ravel().tolist()) == {2, 7, 40}


@pytest.mark.parametrize("n_classes", [3, 20])
def test_logits_give_the_softmax_of_the_eight_likeliest_classes(n_classes: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(scale=3, size=(30, n_classes)).astype(np.float32)
    write_tar(tmp_path / "a.tar", [(f"k{i:02d}.cls", b"%d" % (i % n_classes)) for i in range(30)])
    np.save(tmp_path / "logits.npy", logits)
    features = adq.embed_shards(
        tmp_path / "a.tar", "thumbnail", tmp_path / "logits", embeddings=tmp_path / "logits.npy"
    )
    report = adq.soften_labels(features, source="logits", temperature=2.0, out=tmp_path / "soft.parquet")
    top, probability = all_rows(tmp_path / "soft.parquet")
    n_top = min(8, n_classes)
    assert top.tolist() == np.argsort(-logits, axis=1)[:, :n_top].tolist()
    e = np.exp(np.sort(logits.astype(np.float64), axis=1)[:, ::-1][:, :n_top] / 2)
    assert probability == pytest.approx(e / e.sum(axis=1, keepdims=True), abs=2e-3)  # embeddings are float16
    assert report.agreement == pytest.approx(np.mean(logits.argmax(axis=1) == np.arange(30) % n_classes))


def test_logits_of_more_classes_than_are_there(make_features: MakeFeatures, tmp_path: Path) -> None:
    make_features("a.tar", LABEL, embedding=np.tile(np.eye(6), (10, 1)))
    report = adq.soften_labels(tmp_path / "features", source="logits", out=tmp_path / "soft.parquet")
    assert report.n_classes == 6
    assert all_rows(tmp_path / "soft.parquet")[0][:6, 0].tolist() == list(range(6))


def test_unlabelled_features_of_logits_give_soft_labels(make_features: MakeFeatures, tmp_path: Path) -> None:
    make_features("a.tar", [-1] * 4)
    report = adq.soften_labels(tmp_path / "features", source="logits", out=tmp_path / "soft.parquet")
    assert (report.n_classes, report.agreement) == (6, None)
    assert all_rows(tmp_path / "soft.parquet")[0].shape == (4, 6)


def test_probabilities_are_stored_as_they_are(tmp_path: Path) -> None:
    p = np.array([[1.0, 0.0, 0.0], [0.6, 0.3, 0.1], [0.0, 0.5, 0.5]])
    np.save(tmp_path / "p.npy", p)
    write_tar(tmp_path / "a.tar", [(f"k{i}.cls", b"%d" % i) for i in range(3)])
    adq.embed_shards(tmp_path / "a.tar", "thumbnail", tmp_path / "p", embeddings=tmp_path / "p.npy")
    adq.soften_labels(tmp_path / "p", source="probabilities", out=tmp_path / "soft.parquet")
    top, probability = all_rows(tmp_path / "soft.parquet")
    stored = np.zeros((3, 3))
    np.put_along_axis(stored, top.astype(np.int64), probability, axis=1)
    assert stored == pytest.approx(p, abs=2e-3)


def test_ties_go_to_the_lower_class() -> None:
    top, probability = top_probabilities(np.zeros((2, 12)))
    assert top.tolist() == [[*range(8)]] * 2
    assert probability == pytest.approx(np.full((2, 8), 1 / 8))


def test_the_command_writes_the_file_and_says_what_is_in_it(
    make_features: MakeFeatures, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_features("a.tar", LABEL, embedding=blobs())
    out = str(tmp_path / "soft.parquet")
    assert main(["soften", str(tmp_path / "features"), "-o", out]) == 0
    text = capsys.readouterr().out
    assert "60 samples of 1 shards, 3 classes" in text
    first = (tmp_path / "soft.parquet").read_bytes()
    assert main(["soften", str(tmp_path / "features"), "-o", out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["source"] == "ridge"
    assert (tmp_path / "soft.parquet").read_bytes() == first
    assert main(["soften", str(tmp_path / "features"), "-o", out, "--source", "probabilities"]) == 1
    assert "no probabilities" in capsys.readouterr().err
    assert (tmp_path / "soft.parquet").read_bytes() == first


BAD: dict[str, tuple[list[int], dict[str, Any], str]] = {
    "no labels": ([-1] * 6, {}, "no labels, which source='ridge' needs"),
    "one class": ([4] * 6, {}, "one class, and source='ridge' needs two or more"),
    "no logits": ([0, 7] * 3, {"source": "logits"}, "embeddings of 6 numbers .* are no logits of 8 classes"),
    "no probabilities": (
        [*range(6)],
        {"source": "probabilities"},
        r"shard a\.tar, key 'k0000': no probabilities .* take source='logits'",
    ),
    "no samples": ([], {}, "no usable samples"),
    "many classes": ([0, 2**30], {}, "labels up to 1,073,741,824"),
}


@pytest.mark.parametrize("case", BAD)
def test_features_that_give_no_soft_labels_are_refused(
    case: str, make_features: MakeFeatures, tmp_path: Path
) -> None:
    label, options, text = BAD[case]
    make_features("a.tar", label)
    with pytest.raises(adq.FeaturesError, match=text) as caught:
        adq.soften_labels(tmp_path / "features", out=tmp_path / "soft.parquet", **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "soft.parquet").exists()


def test_wrong_options_are_refused(make_features: MakeFeatures, tmp_path: Path) -> None:
    make_features("a.tar", LABEL, embedding=blobs())
    for temperature in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="temperature must be a number > 0"):
            adq.soften_labels(tmp_path / "features", temperature=temperature)
    with pytest.raises(ValueError, match="source must be one of ridge, logits, probabilities, got 'net'"):
        adq.soften_labels(tmp_path / "features", source="net")  # type: ignore[arg-type]
    with pytest.raises(adq.FeaturesError, match="lies among the features"):
        adq.soften_labels(tmp_path / "features", out=tmp_path / "features" / "soft.parquet")
    with lock(tmp_path), pytest.raises(adq.AdqError, match="in use by pid"):
        adq.soften_labels(tmp_path / "features", out=tmp_path / "soft.parquet")
