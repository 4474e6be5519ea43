"""A stream's embeddings are those that `embed_shards` stores, wherever they are made, or an error says why not."""

import io
import logging
import multiprocessing
import operator
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import adq_wds as adq
from adq_wds.pipes.embed import ENCODER_FIELD
from tests.embedded import png
from tests.pipes.streams import raw

Samples = list[dict[str, Any]]


@pytest.fixture
def url(make_shard: Callable[..., Path]) -> str:
    return str(make_shard("t-0.tar", 30))


def rows(samples: Any) -> Any:
    return np.stack([sample["emb.npy"] for sample in samples])


class Plain:
    """An encoder whose answer a test chooses."""

    name, revision, preprocessing_hash = "plain", "1", ""

    def __init__(self, answer: Callable[[list[Image.Image]], Any]) -> None:
        self.answer, self.sizes = answer, list[int]()

    def __call__(self, images: Sequence[Image.Image]) -> Any:
        self.sizes.append(len(images))
        return self.answer(list(images))


def means(images: list[Image.Image]) -> Any:
    return np.stack([np.asarray(image, dtype=np.float32).mean(axis=(0, 1)) for image in images]), None


def test_embeddings_equal_those_of_embed_shards_bit_for_bit(url: str, tmp_path: Path) -> None:
    features = adq.embed_shards(url, "thumbnail", tmp_path / "features")
    out = list(adq.Embed(adq.encoder("thumbnail"))(raw(url)))
    assert rows(out).dtype == np.float16
    assert (rows(out) == features.files[0].embedding()).all()
    assert {sample[ENCODER_FIELD] for sample in out} == {("thumbnail", "1", "")}


def test_a_network_stays_within_the_tolerance_of_any_cut(url: str, tmp_path: Path) -> None:
    encoder = adq.encoder("builtin-free")
    samples = list(raw(url))
    whole = rows(adq.Embed(encoder).apply(samples)).astype(np.float64)
    for size in (1, 7, 29):
        parts = rows(adq.Embed(encoder, batch_size=size)(samples)).astype(np.float64)
        assert np.abs(parts - whole).max() <= 1e-3
    stored = adq.embed_shards(url, encoder, tmp_path / "features").files[0].embedding().astype(np.float64)
    assert np.abs(stored - whole).max() <= 1e-3
    assert np.abs(np.linalg.norm(whole, axis=1) - 1).max() < 1e-3


def test_bytes_and_decoded_images_give_the_same(url: str) -> None:
    pipe = adq.Embed(adq.encoder("thumbnail"))
    expected = rows(pipe(raw(url)))
    for form in ("pil", "numpy", "torch"):
        assert (rows(pipe(adq.Decode(to=form)(raw(url)))) == expected).all()
    for form in ("pil", "rgb8"):
        assert (rows(pipe(raw(url).decode(form))) == expected).all()
    by_function = adq.Embed(adq.encoder("thumbnail"), operator.itemgetter("jpg"))
    assert (rows(by_function(raw(url))) == expected).all()


def test_the_image_stays_and_an_older_embedding_is_replaced(url: str) -> None:
    samples: Samples = [{**sample, "emb.npy": b"old"} for sample in raw(url)]
    for before, after in zip(samples, adq.Embed(adq.encoder("thumbnail"))(samples), strict=True):
        assert after["jpg"] == before["jpg"]
        assert after["emb.npy"].shape == (192,)
        assert set(after) - set(before) == {ENCODER_FIELD}


def test_the_encoder_is_called_with_whole_batches(url: str) -> None:
    encoder = Plain(means)
    list(adq.Embed(encoder, batch_size=8)(raw(url)))
    assert encoder.sizes == [8, 8, 8, 6]
    encoder.sizes.clear()
    adq.Embed(encoder, batch_size=8).apply(list(raw(url))[:20])
    assert encoder.sizes == [8, 8, 4]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e39])
def test_an_embedding_that_is_not_finite_is_a_bad_sample(url: str, value: float) -> None:
    def answer(images: list[Image.Image]) -> Any:
        h = np.asarray(means(images)[0], dtype=np.float64)
        h[[np.asarray(image).tobytes() == fifth for image in images], 1] = value
        return h, None

    samples = list(raw(url))
    fifth = np.asarray(Image.open(io.BytesIO(samples[5]["jpg"]))).tobytes()
    text = "shard t-0.tar, key 's00005': its embedding holds NaN or infinity"
    with pytest.raises(adq.SampleError, match=f"^{text}$"):
        list(adq.Embed(Plain(answer))(samples))
    out = list(adq.Embed(Plain(answer), on_error="skip")(samples))
    assert [s["__key__"] for s in out] == [s["__key__"] for s in samples if s["__key__"] != "s00005"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"jpg": b"<html>"}, "field 'jpg': not an image"),
        ({"jpg": Image.new("L", (4, 4))}, "field 'jpg': an image of mode 'L', expected RGB"),
        ({"jpg": np.zeros((4, 4))}, r"field 'jpg': holds ndarray of float64 \(4, 4\), expected a file's"),
        ({"jpg": np.zeros((3, 4, 4), np.uint8)}, r"field 'jpg': holds ndarray of uint8 \(3, 4, 4\)"),
        ({"jpg": torch.zeros(3, 4, 4)}, r"field 'jpg': holds Tensor of float32"),
        ({"jpg": np.zeros((0, 4, 3), np.uint8)}, r"field 'jpg': holds ndarray of uint8 \(0, 4, 3\)"),
        ({"jpg": 3}, "field 'jpg': holds int, expected a file's bytes"),
        ({"jpg": b"", "png": b""}, "fields 'jpg' and 'png' are both there"),
        ({"jpg": png(Image.new("RGB", (16, 17)))}, "'jpg': too large: 16 x 17 = 272 pixels, at most 256"),
    ],
)
def test_a_sample_without_an_image_is_named(url: str, change: dict[str, Any], text: str) -> None:
    samples = list(raw(url))
    samples[2].update(change)
    with pytest.raises(adq.SampleError, match=f"^shard t-0.tar, key 's00002'.*{text}"):
        list(adq.Embed(adq.encoder("thumbnail"), max_pixels=256)(samples))
    skipping = adq.Embed(adq.encoder("thumbnail"), max_pixels=256, on_error="skip")
    assert len(list(skipping(samples))) == 29


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (lambda images: (np.zeros(len(images)), None), r"gave embeddings of shape \(1,\) for 1 images"),
        (lambda images: (np.zeros((len(images), 0)), None), r"of shape \(1, 0\) for 1 images"),
        (lambda images: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_what_an_encoder_does_wrong_is_said_with_the_sample(url: str, answer: Any, text: str) -> None:
    with pytest.raises(adq.SampleError, match=f"^shard t-0.tar, key 's00000': Embed: .*{text}"):
        list(adq.Embed(Plain(answer))(raw(url)))


def test_what_torch_says_of_a_fork_is_said_with_the_remedy(url: str) -> None:
    def answer(images: list[Image.Image]) -> Any:
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess. To use CUDA with ...")

    text = r"Embed: the encoder 'plain' is on an accelerator, .*num_workers=0.*'spawn'.*device='cpu'$"
    for on_error in ("raise", "skip"):
        with pytest.raises(adq.AdqError, match=text) as caught:
            list(adq.Embed(Plain(answer), on_error=on_error)(raw(url)))
        assert not isinstance(caught.value, adq.SampleError)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_a_network_embeds_in_the_workers_of_a_loader(
    url: str, start: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    pipe = adq.Embed(adq.encoder("builtin-free"))
    dataset = raw(url).compose(pipe).to_tuple("__key__", "emb.npy")
    options: Any = {"num_workers": 1, "multiprocessing_context": start}
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, **options)
    expected = {sample["__key__"]: sample["emb.npy"] for sample in pipe(raw(url))}
    seen = dict(loader)
    assert list(seen) == list(expected)
    for key, row in seen.items():
        assert np.abs(np.asarray(row, np.float64) - expected[key].astype(np.float64)).max() <= 1e-3


@pytest.mark.gpu
def test_on_cuda_workers_must_be_spawned(url: str) -> None:
    pipe = adq.Embed(adq.encoder("builtin-free", device="cuda"))
    samples = list(raw(url))
    assert len(list(pipe(samples))) == 30
    refused = pytest.raises(adq.AdqError, match="Embed: the encoder 'builtin-free' is on an accelerator")
    with multiprocessing.get_context("fork").Pool(1) as pool, refused:
        pool.apply(pipe.apply, (samples,))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert len(pool.apply(pipe.apply, (samples,))) == 30


def stored(url: str) -> Samples:
    drop = adq.DropPatches(adq.importance("random"), keep=0.5, size=64)
    return adq.EncodePatches().apply(drop.apply(list(adq.ShardDataset(url, shuffle=False))))


@pytest.mark.parametrize("image", [None, "patches.jpg"])
def test_an_image_without_some_patches_is_embedded_filled(url: str, image: str | None) -> None:
    options = {} if image is None else {"image": image}
    found = adq.Embed(adq.encoder("thumbnail"), **options).apply(stored(url))
    filled = adq.Decode().apply(stored(url))
    assert np.array_equal(rows(found), rows(adq.Embed(adq.encoder("thumbnail")).apply(filled)))
    assert {"patches.jpg", "cls", "emb.npy"} < set(found[0])


def test_tiles_that_another_program_decoded_are_not_embedded(url: str) -> None:
    (sample, *_) = stored(url)
    tiles = {**sample, "patches.jpg": Image.open(io.BytesIO(sample["patches.jpg"])).convert("RGB")}
    with pytest.raises(adq.SampleError, match=r"field 'patches.jpg': holds Image, expected the bytes"):
        adq.Embed(adq.encoder("thumbnail")).apply([tiles])
