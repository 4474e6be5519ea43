"""Encoders that misbehave: the image they fail on is named, and what they give is checked (F31)."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import adq_wds as adq
from adq_wds.models.thumbnail import Thumbnail
from tests.embedded import Watching, png, shard_of

Answer = Callable[[Sequence[Image.Image]], Any]


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """Ten images."""
    return shard_of(tmp_path / "a.tar", 10)


def is_image(image: Image.Image, i: int) -> bool:
    return image.tobytes() == Image.open(io.BytesIO(png(i))).tobytes()


def thumbnails(images: Sequence[Image.Image], *, value: float = 0, at: int = -1, raises_at: int = -1) -> Any:
    """Thumbnails, with `value` in one number of image `at`, or an error for image `raises_at`."""
    if any(is_image(image, raises_at) for image in images if raises_at >= 0):
        raise RuntimeError("no\nmemory")
    h = Thumbnail()(images)[0].astype(np.float64)
    for row, image in zip(h, images, strict=True):
        if at >= 0 and is_image(image, at):
            row[3] = value
    return h, None


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
def test_an_embedding_that_is_no_number_names_its_sample(shard: Path, tmp_path: Path, value: float) -> None:
    """F31; 1e300 does not fit into float32."""
    encoder = Watching(lambda images: thumbnails(images, value=value, at=7))
    with pytest.raises(adq.SampleError, match=r"shard a.tar, key 'k7': its embedding holds NaN or infinity"):
        adq.embed_shards(shard, encoder, tmp_path / "f", batch_size=4)
    (file,) = adq.embed_shards(shard, encoder, tmp_path / "f", batch_size=4, on_error="skip")
    assert [row[1] for row in file.bad] == ["k7"]
    assert np.isfinite(file.embedding()).all()


@pytest.mark.parametrize(("value", "unit"), [(1e38, 0.25), (-3.4e38, -0.25), (1e-45, 0.25), (0, 0)])
def test_strange_numbers_have_unit_rows_or_0(shard: Path, tmp_path: Path, value: float, unit: float) -> None:
    encoder = Watching(lambda images: (np.full((len(images), 16), value), None))
    (file,) = adq.embed_shards(shard, encoder, tmp_path / "f")
    assert np.array_equal(file.embedding(), np.full((10, 16), unit, np.float16))
    assert np.isfinite(file.norm()).all()
    assert len(adq.build_plan(adq.Features(tmp_path / "f"), bins=2, keep=0.5)) == 5


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (lambda images: (np.zeros((len(images) + 1, 4)), None), r"shape \(2, 4\) for 1 .* expected \(1, D\)"),
        (lambda images: (np.zeros(4), None), r"embeddings of shape \(4,\) for 1 images"),
        (lambda images: (np.zeros((len(images), 0)), None), r"embeddings of shape \(1, 0\)"),
        (lambda images: (np.ones((len(images), 2)), np.zeros(3)), r"logits of shape \(3,\) .* \(1, C\)"),
        (lambda images: np.zeros((len(images), 4)), r"gave a ndarray, expected \(embeddings, logits or None\)"),
        (lambda images: (["x"] * len(images), None), r"ValueError: could not convert string"),
    ],
)  # fmt: skip
def test_an_answer_of_wrong_shape_is_named(shard: Path, tmp_path: Path, answer: Answer, text: str) -> None:
    with pytest.raises(adq.SampleError, match=r"shard a.tar, key 'k0': encoder 'watching' fails .*" + text):
        adq.embed_shards(shard, Watching(answer), tmp_path / "f")


def test_an_encoder_that_changes_its_width_is_refused(shard: Path, tmp_path: Path) -> None:
    by_batch = Watching(lambda images: (np.ones((len(images), 1 + len(images))), None))
    with pytest.raises(adq.FeaturesError, match=r"shard a.tar: embeddings of 5 and of 3 numbers"):
        adq.embed_shards(shard, by_batch, tmp_path / "f", batch_size=4)
    by_image = Watching(lambda images: ([[1.0] * (2 + is_image(image, 1)) for image in images], None))
    with pytest.raises(adq.FeaturesError, match=r"shard a.tar: embeddings of 2 and of 3 numbers"):
        adq.embed_shards(shard, by_image, tmp_path / "f")
    two = [shard_of(tmp_path / f"{name}.tar", range(i, i + 1)) for i, name in ((1, "b"), (2, "c"))]
    with pytest.raises(adq.FeaturesError, match=r"do not belong together: width 3 and 2"):
        adq.embed_shards(two, by_image, tmp_path / "g")


def test_large_images_are_cut_into_parts(
    shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (whole,) = adq.embed_shards(shard, Watching(), tmp_path / "whole", workers=1, batch_size=8)
    monkeypatch.setattr("adq_wds.embedding.batch.PART_PIXELS", 3 * 8 * 8)
    encoder = Watching()
    (parts,) = adq.embed_shards(shard, encoder, tmp_path / "parts", workers=1, batch_size=8)
    assert encoder.calls == [3, 3, 2, 2]
    assert (whole.embedding() == parts.embedding()).all()


@pytest.mark.parametrize("workers", [1, 2])
def test_an_image_that_it_fails_on_is_named_or_skipped(shard: Path, tmp_path: Path, workers: int) -> None:
    encoder = Watching(lambda images: thumbnails(images, raises_at=5))
    text = r"shard a.tar, key 'k5': encoder 'watching' fails on it: RuntimeError: no memory"
    with pytest.raises(adq.SampleError, match=text):
        adq.embed_shards(shard, encoder, tmp_path / "f", workers=workers)
    (file,) = adq.embed_shards(shard, encoder, tmp_path / "f", workers=workers, on_error="skip")
    assert [row[1] for row in file.bad] == ["k5"]
    (whole,) = adq.embed_shards(shard, Watching(), tmp_path / "g")
    assert np.array_equal(file.embedding(), np.delete(whole.embedding(), 5, axis=0))


def test_an_encoder_that_fails_on_a_batch_only_says_so(shard: Path, tmp_path: Path) -> None:
    def answer(images: Sequence[Image.Image]) -> Any:
        if len(images) > 2:
            raise MemoryError("too much")
        return Thumbnail()(images)

    with pytest.raises(adq.AdqError, match=r"fails on 10 images at once, .*MemoryError: too .* batch_size"):
        adq.embed_shards(shard, Watching(answer), tmp_path / "f")
    assert len(adq.embed_shards(shard, Watching(answer), tmp_path / "f", batch_size=2)) == 10


def test_logit_gradients_need_a_head_of_these_labels(shard: Path, tmp_path: Path) -> None:
    def head(C: int) -> Watching:
        return Watching(lambda images: (np.ones((len(images), 4)), np.ones((len(images), C))))

    with pytest.raises(adq.AdqError, match=r"encoder 'watching' gives no logits, .* with a classifier head"):
        adq.embed_shards(shard, Watching(), tmp_path / "f", logit_grad=True)
    with pytest.raises(adq.FeaturesError, match=r"shard a.tar: the head .* has 1 class, .* take a head"):
        adq.embed_shards(shard, head(1), tmp_path / "f", logit_grad=True)
    with pytest.raises(adq.FeaturesError, match=r"shard a.tar: label 'k0', but the encoder's head has 2"):
        adq.embed_shards(shard, head(2), tmp_path / "f", logit_grad=True, label=lambda s: s["__key__"])
    with pytest.raises(ValueError, match="logit gradients need labels"):
        adq.embed_shards(shard, head(2), tmp_path / "f", logit_grad=True, label=None)
    bad = Watching(lambda images: (np.ones((len(images), 4)), np.full((len(images), 2), np.nan)))
    with pytest.raises(adq.SampleError, match=r"shard a.tar, key 'k0': its logits hold NaN or infinity"):
        adq.embed_shards(shard, bad, tmp_path / "f", logit_grad=True)
