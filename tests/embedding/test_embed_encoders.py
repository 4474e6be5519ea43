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


def is_image(image: Image.Image, i: int) -> bool:
    return image.tobytes() == Image.open(io.BytesIO(png(i))).tobytes()


def rows_with(value: float, at: int) -> Callable[[Sequence[Image.Image]], Any]:
    """Thumbnails, and `value` in one number of image `at`."""

    def answer(images: Sequence[Image.Image]) -> Any:
        h, _ = Thumbnail()(images)
        h = h.astype(np.float64)
        for row, image in zip(h, images, strict=True):
            if is_image(image, at):
                row[3] = value
        return h, None

    return answer


def raising_at(at: int) -> Callable[[Sequence[Image.Image]], Any]:
    def answer(images: Sequence[Image.Image]) -> Any:
        if any(is_image(image, at) for image in images):
            raise RuntimeError("no\nmemory")
        return Thumbnail()(images)

    return answer


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
def test_an_embedding_that_is_no_number_names_its_sample(tmp_path: Path, value: float) -> None:
    """F31; 1e300 does not fit into float32."""
    path = shard_of(tmp_path / "a.tar", 10)
    with pytest.raises(adq.SampleError, match=r"shard a.tar, key 'k7': its embedding holds NaN or infinity"):
        adq.embed_shards(path, Watching(rows_with(value, 7)), tmp_path / "f", batch_size=4)
    (file,) = adq.embed_shards(
        path, Watching(rows_with(value, 7)), tmp_path / "f", batch_size=4, on_error="skip"
    )
    assert [row[1] for row in file.bad] == ["k7"]
    assert np.isfinite(file.embedding()).all()


@pytest.mark.parametrize("value", [1e38, -3.4e38, 1e-45])
def test_very_large_and_very_small_embeddings_have_unit_rows(tmp_path: Path, value: float) -> None:
    path = shard_of(tmp_path / "a.tar", 4)
    answer = lambda images: (np.full((len(images), 16), value), None)  # noqa: E731
    (file,) = adq.embed_shards(path, Watching(answer), tmp_path / "f")
    assert np.array_equal(file.embedding(), np.full((4, 16), np.sign(value) * 0.25, np.float16))
    assert np.isfinite(file.read(["norm"])["norm"].to_numpy()).all()
    adq.build_plan(adq.Features(tmp_path / "f"), bins=2, keep=0.5)


def test_zero_embeddings_stay_zero(tmp_path: Path) -> None:
    path = shard_of(tmp_path / "a.tar", 4)
    (file,) = adq.embed_shards(
        path, Watching(lambda images: (np.zeros((len(images), 5)), None)), tmp_path / "f"
    )
    assert not file.embedding().any()
    assert len(adq.build_plan(tmp_path / "f", bins=2, keep=0.5)) == 2


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (
            lambda images: (np.zeros((len(images) + 1, 4)), None),
            r"shape \(2, 4\) for 1 images, expected \(1, D\)",
        ),
        (lambda images: (np.zeros(4), None), r"shape \(4,\) for 1 images"),
        (lambda images: (np.zeros((len(images), 0)), None), r"shape \(1, 0\)"),
        (
            lambda images: np.zeros((len(images), 4)),
            r"gave a ndarray, expected \(embeddings, logits or None\)",
        ),
        (lambda images: (["x"] * len(images), None), r"ValueError: could not convert string"),
    ],
)
def test_an_encoder_of_the_wrong_shape_is_named(tmp_path: Path, answer: Any, text: str) -> None:
    path = shard_of(tmp_path / "a.tar", 3)
    with pytest.raises(
        adq.SampleError, match=r"shard a.tar, key 'k0': encoder 'watching' fails on it: .*" + text
    ):
        adq.embed_shards(path, Watching(answer), tmp_path / "f")


def test_an_encoder_that_changes_its_width_is_refused(tmp_path: Path) -> None:
    path = shard_of(tmp_path / "a.tar", 10)
    by_batch = Watching(lambda images: (np.ones((len(images), 1 + len(images))), None))
    with pytest.raises(adq.FeaturesError, match=r"shard a.tar: embeddings of 5 and of 3 numbers"):
        adq.embed_shards(path, by_batch, tmp_path / "f", batch_size=4)
    by_image = Watching(lambda images: ([[1.0] * (2 + is_image(image, 1)) for image in images], None))
    with pytest.raises(adq.FeaturesError, match=r"shard a.tar: embeddings of 2 and of 3 numbers"):
        adq.embed_shards(path, by_image, tmp_path / "f")
    shard_of(tmp_path / "b.tar", range(1, 2))
    shard_of(tmp_path / "c.tar", range(2, 3))
    with pytest.raises(adq.FeaturesError, match=r"do not belong together: width 3 and 2"):
        adq.embed_shards([tmp_path / "b.tar", tmp_path / "c.tar"], by_image, tmp_path / "g")


def test_large_images_are_embedded_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def count(images: Sequence[Image.Image]) -> tuple[Any, None]:
        calls.append(len(images))
        return Thumbnail()(images)

    path = shard_of(tmp_path / "a.tar", 10)
    (whole,) = adq.embed_shards(path, Watching(Thumbnail()), tmp_path / "whole", workers=1, batch_size=8)
    monkeypatch.setattr("adq_wds.embedding.batch.PART_PIXELS", 3 * 8 * 8)
    (parts,) = adq.embed_shards(path, Watching(count), tmp_path / "parts", workers=1, batch_size=8)
    assert calls == [3, 3, 2, 2]
    assert (whole.embedding() == parts.embedding()).all()


@pytest.mark.parametrize("workers", [1, 2])
def test_an_encoder_that_fails_on_one_image_names_it(tmp_path: Path, workers: int) -> None:
    path = shard_of(tmp_path / "a.tar", 10)
    text = r"shard a.tar, key 'k5': encoder 'watching' fails on it: RuntimeError: no memory"
    with pytest.raises(adq.SampleError, match=text):
        adq.embed_shards(path, Watching(raising_at(5)), tmp_path / "f", workers=workers)


def test_an_image_that_an_encoder_fails_on_can_be_skipped(tmp_path: Path) -> None:
    path = shard_of(tmp_path / "a.tar", 10)
    (file,) = adq.embed_shards(path, Watching(raising_at(5)), tmp_path / "f", on_error="skip")
    assert [row[1] for row in file.bad] == ["k5"]
    (whole,) = adq.embed_shards(path, Watching(Thumbnail()), tmp_path / "g")
    assert np.array_equal(file.embedding(), np.delete(whole.embedding(), 5, axis=0))


def test_an_encoder_that_fails_on_a_batch_only_says_so(tmp_path: Path) -> None:
    def answer(images: Sequence[Image.Image]) -> Any:
        if len(images) > 2:
            raise MemoryError("too much")
        return Thumbnail()(images)

    path = shard_of(tmp_path / "a.tar", 6)
    with pytest.raises(adq.AdqError, match=r"fails on 6 images at once, .*MemoryError: too .* batch_size"):
        adq.embed_shards(path, Watching(answer), tmp_path / "f")
    assert len(adq.embed_shards(path, Watching(answer), tmp_path / "f", batch_size=2)) == 6
