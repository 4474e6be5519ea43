"""Kernel "gradient" from shards to plan: the head's gradients decide, and a head of other classes is refused."""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

import adq_wds as adq
from adq_wds.cli.main import main
from adq_wds.core.gradient import GradientKernel, gradient_bins, logit_gradients
from adq_wds.core.kernel import unit_rows
from adq_wds.planning.build_plan import find_bins

MakeShard = Callable[..., Path]
MakeFeatures = Callable[..., Any]


@dataclass(frozen=True)
class Head:
    """Mean colours of a 2×2 grid, and a fixed linear head over C classes."""

    n_classes: int | None = 2
    width: int = 12
    name: str = "head"
    revision: str = "1"
    preprocessing_hash: str = ""
    spoilt: bool = False

    def __call__(
        self, images: Sequence[Image.Image]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        small = [np.asarray(image.resize((2, 2), Image.Resampling.BOX), np.float32) for image in images]
        h = np.stack(small).reshape(len(images), 12) / 64
        if self.n_classes is None:
            return h, None
        weights = np.random.default_rng(0).normal(size=(12, self.n_classes)).astype(np.float32)
        logits = h @ weights
        if self.spoilt:
            logits[h[:, 0] > np.float32(2.2)] = np.nan
        return h, logits


class Bright(adq.Score):
    """Mean grey level."""

    name = "bright"

    def per_sample(self, image: Image.Image, h: NDArray[np.float32]) -> float:
        return float(np.asarray(image).mean())


def _two(sample: adq.Sample) -> int:
    return 2


def _named(sample: adq.Sample) -> str:
    return "two"


@pytest.fixture
def shards(make_shard: MakeShard) -> list[Path]:
    return [make_shard("a.tar", 30), make_shard("b.tar", 25, first=30)]


def images_of(path: Path) -> list[Image.Image]:
    import webdataset as wds

    stream = wds.WebDataset(str(path), shardshuffle=False).compose(adq.Decode(to="pil"))
    return [sample["image"] for sample in stream]


def test_bins_are_graphcut_bins_of_the_heads_gradients(shards: list[Path], tmp_path: Path) -> None:
    features = adq.embed_shards(shards, Head(), tmp_path / "f", logit_grad=True, batch_size=8)
    images = [image for path in shards for image in images_of(path)]
    h, logits = Head()(images)
    assert logits is not None
    label = np.arange(55) % 2
    norm = np.sqrt((h.astype(np.float64) ** 2).sum(axis=1))
    unit = (h / norm[:, None]).astype(np.float16)
    b = logit_gradients(logits, label).astype(np.float16)
    stored = np.concatenate([file.logit_grad() for file in features])
    assert np.abs(stored.astype(np.float64) - b).max() < 2e-3
    plan = adq.build_plan(features, bins=4, keep=0.5, kernel="gradient")
    table = plan.table().to_pydict()
    embedding = np.concatenate([file.embedding() for file in features])
    assert np.abs(embedding.astype(np.float64) - unit).max() < 2e-3
    norms = np.concatenate([file.norm() for file in features])
    for c in (0, 1):
        mine = label == c
        expected = gradient_bins(
            GradientKernel.from_rows(unit_rows(stored[mine]), norms[mine], unit_rows(embedding[mine])), 4
        )
        assert np.array(table["bin"])[mine].tolist() == expected.bin.tolist()
        assert np.array(table["pick"])[mine].tolist() == expected.pick.tolist()
    assert plan.header["settings"]["kernel"] == "gradient"
    answers = logits.argmax(axis=1) == label
    assert [file.header["head_right"] for file in features] == [answers[:30].sum(), answers[30:].sum()]
    bins = find_bins(features, bins=4, kernel="gradient")
    assert adq.build_plan(features, bins=bins, keep=0.5, kernel="gradient").hash == plan.hash
    with pytest.raises(ValueError, match="the bins were made with kernel='gradient', not 'features'"):
        adq.build_plan(features, bins=bins)
    other = adq.build_plan(features, bins=4, keep=0.5)
    assert other.table()["bin"].to_pylist() != table["bin"]


def test_gradients_of_two_softmaxes_are_read_and_never_mixed(
    shards: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Earlier versions could make them."""
    with monkeypatch.context() as earlier:
        earlier.setattr("adq_wds.embedding.settings.LOGIT_GRAD", "double_softmax")
        adq.embed_shards(shards[0], Head(), tmp_path / "f", logit_grad=True)
    adq.build_plan(tmp_path / "f", bins=3, kernel="gradient", out=tmp_path / "p.parquet")
    assert adq.load_plan(tmp_path / "p.parquet").header["features"]["logit_grad"] == "double_softmax"
    with pytest.raises(adq.FeaturesError, match="logit_grad 'double_softmax', now 'softmax'"):
        adq.embed_shards(shards, Head(), tmp_path / "f", logit_grad=True)
    with pytest.raises(SystemExit):
        main(["embed", str(shards[0]), "--logit-grad", "--double-softmax"])
    assert "no flag --double-softmax; it is gone: --logit-grad keeps" in capsys.readouterr().err


def test_a_head_of_other_classes_is_refused_with_both_counts(shards: list[Path], tmp_path: Path) -> None:
    features = adq.embed_shards(shards, Head(5), tmp_path / "five", logit_grad=True)
    text = r"head has 5 classes, the data 2 labels \(0 … 1\): kernel 'gradient' needs a head trained"
    with pytest.raises(adq.FeaturesError, match=text):
        adq.build_plan(features, kernel="gradient")
    adq.build_plan(features)  # the embeddings are as good as any
    plain = adq.embed_shards(shards, Head(), tmp_path / "plain")
    with pytest.raises(adq.FeaturesError, match="no logit gradients here, which kernel 'gradient' needs"):
        adq.build_plan(plain, kernel="gradient")


@pytest.mark.parametrize(
    ("head", "options", "text"),
    [
        (Head(2), {"label": _two}, r"shard a\.tar: label 2, but the encoder's head has 2 classes, 0 to 1"),
        (Head(2), {"label": _named}, r"shard a\.tar: label 'two', .*a function as label= may map names"),
        (Head(1), {}, r"shard a\.tar: the head of encoder 'head' has 1 class, whose loss"),
        (Head(None), {}, "encoder 'head' gives no logits, which logit gradients need"),
        (None, {"embeddings": "e.npy"}, "gives no logits, which logit gradients need"),
        (Head(2), {"label": None}, "logit_grad=True and label=None exclude each other"),
    ],
)
def test_heads_and_labels_that_give_no_gradients_are_refused(
    head: Head | None, options: dict[str, Any], text: str, shards: list[Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    np.save("e.npy", np.ones((55, 4), np.float32))
    given = {} if head is None else {"encoder": head}
    with pytest.raises((adq.AdqError, ValueError), match=text):
        adq.embed_shards(shards, out=tmp_path / "f", logit_grad=True, **given, **options)


def test_a_head_may_have_classes_that_the_first_samples_lack(
    shards: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    features = adq.embed_shards(shards, Head(5), tmp_path / "f", logit_grad=True, limit=20)
    with caplog.at_level(logging.WARNING, "adq_wds"):
        adq.build_plan(features, kernel="gradient", bins=2)
    assert "the head has 5 classes, the first samples only 2 of them" in caplog.text


def test_a_head_that_knows_nothing_of_the_labels_is_told(
    make_features: MakeFeatures, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Counts fit, answers do not: classes in another order, or a head of other data."""
    for right, told in ((2, True), (10, True), (12, False), (20, False)):  # of 20: chance is a half
        made = make_features("a.tar", [0, 1] * 10, n_classes=2)
        dataclasses.replace(made, header={**made.header, "head_right": right}).save(
            tmp_path / "features" / "a.parquet"
        )
        caplog.clear()
        with caplog.at_level(logging.WARNING, "adq_wds"):
            adq.build_plan(tmp_path / "features", bins=2, kernel="gradient")
        assert ("was it trained on these labels" in caplog.text) == told


def test_a_norm_below_0_is_refused_by_key(make_features: MakeFeatures, tmp_path: Path) -> None:
    made = make_features("a.tar", [0, 1] * 4, n_classes=2)
    made.norm[5] = -1
    made.save(tmp_path / "features" / "a.parquet")
    with pytest.raises(adq.FeaturesError, match=r"shard a\.tar, key 'k0005': a norm below 0"):
        adq.build_plan(tmp_path / "features", bins=2, kernel="gradient")


def test_gradients_stay_when_other_columns_are_asked_for(shards: list[Path], tmp_path: Path) -> None:
    first = adq.embed_shards(shards, Head(), tmp_path / "f", logit_grad=True)
    rows = np.concatenate([file.logit_grad() for file in first])
    again = adq.embed_shards(shards, Head(), tmp_path / "f", scores=[Bright()])
    assert np.concatenate([file.logit_grad() for file in again]).tobytes() == rows.tobytes()
    both = adq.embed_shards(shards, Head(), tmp_path / "g", logit_grad=True, scores=[Bright()])
    assert again.hash == both.hash


def test_logits_that_are_not_finite_name_the_sample(shards: list[Path], tmp_path: Path) -> None:
    with pytest.raises(adq.SampleError, match=r"shard a\.tar, key 's\d+': its logits hold NaN or infinity"):
        adq.embed_shards(shards, Head(spoilt=True), tmp_path / "f", logit_grad=True)
    features = adq.embed_shards(
        shards, Head(spoilt=True), tmp_path / "f", logit_grad=True, on_error="skip", max_bad_fraction=1.0
    )
    assert 0 < sum(len(file.bad) for file in features) < 55
    assert np.isfinite(np.concatenate([file.logit_grad() for file in features])).all()
    assert len(adq.embed_shards(shards, Head(spoilt=True), tmp_path / "g")) == 55  # logits that nobody reads


def test_the_command_embeds_what_the_kernel_needs(
    make_shard: MakeShard, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`builtin` has a head of ten classes; features made without gradients are made again."""
    shard = str(make_shard("a.tar", 40, classes=10, side=32))
    run = ["run", shard, "--bins", "2", "--keep", "0.5", "-o", str(tmp_path / "run")]
    assert main(run) == 0
    features_only = adq.load_plan(tmp_path / "run" / "plan.parquet").hash
    assert main([*run, "--kernel", "gradient"]) == 0
    plan = adq.load_plan(tmp_path / "run" / "plan.parquet")
    assert plan.hash != features_only
    features = adq.Features(tmp_path / "run" / "features")
    assert features.n_classes == 10
    assert plan.hash == adq.build_plan(features, bins=2, keep=0.5, kernel="gradient").hash
    assert "gradient" in capsys.readouterr().out
    assert (
        main(["run", "--from", str(tmp_path / "run" / "run.json"), "-o", str(tmp_path / "again"), "-q"]) == 0
    )
    assert adq.load_plan(tmp_path / "again" / "plan.parquet").hash == plan.hash
    from_run = ["run", "--from", str(tmp_path / "run" / "run.json"), "-o", str(tmp_path / "colours"), "-q"]
    assert main([*from_run, "--kernel", "features", "--encoder", "thumbnail"]) == 0  # which has no head
    assert main(["run", shard, "--kernel", "gradient", "--dry-run", "--json", "-o", str(tmp_path / "x")]) == 0
    assert '"features_bytes"' in capsys.readouterr().out
    dry = ["run", shard, "--dry-run", "-o", str(tmp_path / "x")]
    for flags, text in (
        (["--encoder", "thumbnail", "--kernel", "gradient"], "'thumbnail' gives no logits"),
        (["--embeddings", "field:emb.npy", "--diversity-head", "contrastive"], "views need an encoder"),
    ):
        assert main([*dry, *flags]) in (1, 2)
        assert text in capsys.readouterr().err


def test_rows_without_gradients_are_as_like_to_all(make_features: MakeFeatures, tmp_path: Path) -> None:
    """Zero rows of the logit gradients and of the embeddings: similarity 0.5, a defined order."""
    made = make_features("a.tar", [0, 1] * 6, n_classes=2)
    assert made.logit_grad is not None
    made.logit_grad[:] = 0
    made.save(tmp_path / "features" / "a.parquet")
    plan = adq.build_plan(tmp_path / "features", bins=3, keep=0.5, kernel="gradient")
    assert plan.table()["pick"].to_pylist() == [0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1]
