"""A variant depends on seed, variant, shard and key alone; what cannot be varied or scored names its sample."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import adq_wds as adq
from adq_wds.pipes.cosine import CosineScore
from adq_wds.pipes.vary import Vary
from tests.conftest import MakeShard, pictures

THUMBNAIL = adq.encoder("thumbnail")


def noisy(images: Any, labels: Any, noise: Any) -> Any:
    return np.clip(images + noise / 4, -1, 1)


def unchanged(images: Any, labels: Any, noise: Any) -> Any:
    return images


def samples(n: int = 6, side: int = 8, **more: Any) -> list[dict[str, Any]]:
    return [
        {"__key__": f"k{i}", "__url__": "d/a.tar", "image": image, "label": i % 3, **more}
        for i, image in enumerate(pictures(n, (side, side)))
    ]


def pixels(stream: Any) -> list[list[int]]:
    return [np.asarray(sample["image"]).ravel().tolist() for sample in stream]


@pytest.fixture
def logits() -> Any:
    """An encoder with three classes, which sees 1 wherever the image is bright."""

    def encode(images: Any) -> Any:
        means = np.array([[np.asarray(image).mean()] for image in images])
        return np.hstack([means, 255 - means]), np.hstack([means * 0, means > 100, means < 20])

    encode.name, encode.revision, encode.preprocessing_hash = "bright", "1", ""  # type: ignore[attr-defined]
    return encode


def test_every_level_survives_an_engine_that_changes_nothing() -> None:
    levels = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    one = {"__key__": "k", "__url__": "a.tar", "image": levels}
    assert (Vary(unchanged, label=None).apply([one])[0]["image"] == levels).all()


@pytest.mark.parametrize("form", ["pil", "numpy", "torch", "bytes"])
def test_the_image_keeps_its_form(form: str, make_shard: MakeShard) -> None:
    ds = adq.ShardDataset(make_shard("a.tar", 3))
    decoded = [] if form == "bytes" else [adq.Decode(to=form)]
    plain = [sample for pipe in [lambda s: s, *decoded] for sample in [*pipe(iter(ds))]][-3:]
    field = "jpg" if form == "bytes" else "image"
    varied = Vary(noisy, label=None).apply(plain)
    kinds = {type(sample[field]) for sample in varied}
    assert kinds == {{"numpy": np.ndarray, "torch": torch.Tensor}.get(form, Image.Image)}
    array = [np.asarray(s[field].permute(1, 2, 0) if form == "torch" else s[field]) for s in varied]
    expected = Vary(noisy, label=None).apply([*adq.Decode(to="numpy")(iter(ds))])
    assert [a.tolist() for a in array] == [sample["image"].tolist() for sample in expected]


def test_variant_seed_and_name_decide_the_noise_a_folder_not() -> None:
    first = pixels(Vary(noisy, variant=1, seed=2).apply(samples()))
    assert pixels(Vary(noisy, variant=1, seed=2).apply(samples())) == first
    assert pixels(Vary(noisy, variant=1, seed=2).apply(samples(__url__="elsewhere/a.tar"))) == first
    assert pixels(Vary(noisy, seed=2).apply(samples(__adq_epoch__=1))) == first
    for other in (Vary(noisy, variant=2, seed=2), Vary(noisy, variant=1), Vary(noisy, seed=2)):
        assert pixels(other.apply(samples())) != first
    assert pixels(Vary(noisy, variant=1, seed=2).apply(samples(__url__="b.tar"))) != first


def test_images_of_several_sizes_go_through_one_stage() -> None:
    mixed = [sample for pair in zip(samples(), samples(side=12), strict=True) for sample in pair]
    small = Vary(noisy).apply(samples())
    assert pixels(Vary(noisy).apply(mixed)[::2]) == pixels(small)


def test_labels_and_seeds_reach_the_engine() -> None:
    told = []

    class Engine:
        draws_itself = True

        def __call__(self, images: Any, labels: Any, noise: Any) -> Any:
            told.append((labels, noise))
            return images

    Vary(Engine()).apply(samples())
    Vary(Engine(), label=None).apply(samples())
    (labels, seeds), (none, same) = told
    assert labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert none is None
    assert seeds.dtype == np.uint64
    assert seeds.tolist() == same.tolist()
    assert len(set(seeds.tolist())) == 6


def test_each_epoch_has_other_variants_and_resumes_exactly(make_shard: MakeShard) -> None:
    def stream() -> adq.ShardDataset:
        pipes = [adq.Decode(to="numpy"), Vary(noisy, seed=1)]
        options: Any = {"shuffle": True, "batch_size": 3, "pipes": pipes, "fields": ("image", "__key__")}
        return adq.ShardDataset(shard, **options)

    shard = make_shard("a.tar", 10)
    ds = stream()
    epochs = []
    for epoch in (0, 1, 0):
        ds.set_epoch(epoch)
        batches = list(ds)
        keys = [key for batch in batches for key in batch[1]]
        images = [image.tolist() for batch in batches for image in batch[0]]
        epochs.append(dict(zip(keys, images, strict=True)))
    assert epochs[0] == epochs[2]
    assert all(epochs[0][key] != epochs[1][key] for key in epochs[0])
    loader = adq.Loader(stream())
    it = iter(loader)
    next(it)
    state = loader.state_dict()
    rest = [(keys, images.tolist()) for images, keys in it]
    again = adq.Loader(stream())
    again.load_state_dict(state)
    assert [(keys, images.tolist()) for images, keys in again] == rest


def test_an_image_that_is_its_own_variant_has_cosine_one(logits: Any) -> None:
    stages = adq.Embed(logits), Vary(unchanged), CosineScore(logits)
    stream = samples()
    for stage in stages:
        stream = stage.apply(stream)
    assert [sample["cos"] for sample in stream] == [1.0] * 6
    means = [np.asarray(sample["image"]).mean() for sample in stream]
    assert [s["agree"] for s in stream] == [
        s["label"] == (m > 100) for s, m in zip(stream, means, strict=True)
    ]


def test_the_cosine_is_that_of_both_embeddings() -> None:
    parents = adq.Embed(THUMBNAIL).apply(samples())
    scored = CosineScore(THUMBNAIL).apply(Vary(noisy).apply(parents))
    again = adq.Embed(THUMBNAIL).apply(Vary(noisy).apply(parents))
    for parent, score, variant in zip(parents, scored, again, strict=True):
        a, b = parent["emb.npy"].astype(float), variant["emb.npy"].astype(float)
        cos = a @ b / (np.linalg.norm(a) * np.linalg.norm(b))
        assert score["cos"] == pytest.approx(cos, abs=1e-6)
        assert 0 < score["cos"] < 1
        assert "agree" not in score, "no logits"
        assert score["emb.npy"].tolist() == parent["emb.npy"].tolist()


def test_unchanged_images_have_cosine_one_and_none_has_more() -> None:
    stages = adq.Embed(THUMBNAIL), Vary(unchanged), CosineScore(THUMBNAIL)
    stream = samples(50)
    for stage in stages:
        stream = stage.apply(stream)
    assert {sample["cos"] for sample in stream} == {1.0}
    flat = {**samples(1)[0], "emb.npy": np.zeros(192, np.float16), "__adq_encoder__": ("thumbnail", "1", "")}
    assert CosineScore(THUMBNAIL).apply([flat])[0]["cos"] == 0


@pytest.mark.parametrize("label", [3, 10, "cat"])
def test_a_label_outside_the_encoders_classes_has_no_agreement(label: Any, logits: Any) -> None:
    stages = adq.Embed(logits), Vary(unchanged, None), CosineScore(logits)
    stream = samples(2, label=label)
    for stage in stages:
        stream = stage.apply(stream)
    assert [("agree" in sample, sample["cos"]) for sample in stream] == [(False, 1.0)] * 2


class Sized:
    side, n_classes = (8, 8), 3

    def __call__(self, images: Any, labels: Any, noise: Any) -> Any:
        return np.where(images.mean(axis=(1, 2, 3), keepdims=True) > 9, images, np.nan * images)


def test_a_wrong_engine_or_option_is_refused_at_once() -> None:
    for engine in ("sdedit", Sized):
        with pytest.raises(TypeError, match=r"Vary needs an engine, such as adq_wds\.models\.SDEdit"):
            Vary(engine)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="variant must be an integer >= 0, got -1"):
        Vary(noisy, variant=-1)
    with pytest.raises(
        TypeError, match=r"CosineScore needs an encoder, got .builtin.; write adq_wds\.encoder"
    ):
        CosineScore("builtin")  # type: ignore[arg-type]


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "another side": (lambda: Vary(Sized()).apply(samples(side=12)), "field 'image': 12 x 12 pixels, the engine takes 8 x 8"),
    "not RGB": (lambda: Vary(noisy).apply(samples(image=Image.new("L", (8, 8)))), "mode 'L', expected RGB"),
    "a class too high": (lambda: Vary(Sized()).apply(samples(label=3)), "label 3, and the engine knows 3 classes"),
    "a word": (lambda: Vary(noisy).apply(samples(label="cat")), r"label 'cat' is a word.*Decode\(classes=\)"),
    "NaN": (lambda: Vary(Sized()).apply(samples()), "the engine's variant holds NaN or infinity"),
    "patches": (
        lambda: list(Vary(noisy, image="patches.jpg")(samples(**{"patches.jpg": b"x"}))),
        "some of its patches are dropped",
    ),
    "no parent": (lambda: CosineScore(THUMBNAIL).apply(samples()), r"'emb.npy': no embedding of the parent"),
    "of a tar": (
        lambda: CosineScore(THUMBNAIL).apply(samples(**{"emb.npy": np.ones(192)})),
        "no embedding of the parent",
    ),
    "another encoder": (
        lambda: CosineScore(adq.encoder("builtin")).apply(adq.Embed(THUMBNAIL).apply(samples())),
        r"embedded by \('thumbnail', '1', ''\), not by \('builtin'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(BAD))
def test_what_cannot_be_varied_or_scored_names_its_sample(case: str) -> None:
    run, message = BAD[case]
    with pytest.raises(adq.SampleError, match=rf"shard a.tar, key 'k\d', .*{message}"):
        run()


def test_an_engine_of_another_shape_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the engine gave \(6, 8, 8\) for images of \(6, 3, 8, 8\)"):
        Vary(lambda images, labels, noise: images[:, 0]).apply(samples())


def test_a_forked_process_cannot_use_an_accelerator() -> None:
    def engine(images: Any, labels: Any, noise: Any) -> Any:
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")

    with pytest.raises(adq.AdqError, match=r"Vary: the engine is on an accelerator.*spawn"):
        Vary(engine).apply(samples())
