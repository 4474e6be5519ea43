"""Does DropPatches keep exactly the patches that matter most, each as it was, whatever stream it stands in? F35."""

import io
from collections.abc import Callable, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

import adq_wds as adq
from adq_wds.core.patches import n_kept
from adq_wds.mae.network import MaeSize, MaskedAutoencoder
from adq_wds.samples.fields import EPOCH_FIELD, Sample

MakeShard = Callable[..., Path]


def pixels(seed: int, height: int = 16, width: int = 24) -> NDArray[np.uint8]:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


def png(image: NDArray[np.uint8]) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG")
    return out.getvalue()


def samples(n: int = 6, *, url: str = "x/a.tar", **size: int) -> list[Sample]:
    fields = [{"png": png(pixels(i, **size)), "cls": b"%d" % (i % 3)} for i in range(n)]
    return [{"__key__": f"k{i}", "__url__": url, **each} for i, each in enumerate(fields)]


def dropped(given: list[Sample], importance: str = "random", patch: int = 4, **options: Any) -> list[Sample]:
    return adq.DropPatches(adq.importance(importance, patch=patch), **options).apply(given)


def crop(image: NDArray[np.uint8], number: int, patch: int) -> NDArray[np.uint8]:
    row, column = divmod(number, image.shape[1] // patch)
    return image[row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.75, 1.0])
@pytest.mark.parametrize("name", ["texture", "random"])
def test_the_most_important_patches_are_kept_in_their_order(name: str, keep: float) -> None:
    given = samples()
    recorded: list[NDArray[np.float32]] = []

    def importance(*given: Any) -> NDArray[np.float32]:
        recorded.append(adq.importance(name, patch=4)(*given))
        return recorded[-1]

    found = adq.DropPatches(importance, keep=keep, patch=4).apply(given)
    (scores,) = recorded
    for i, out in enumerate(found):
        order = sorted(range(24), key=lambda place, row=scores[i]: (-row[place], place))  # ties by position
        expected = sorted(order[: int(24 * keep + 1e-9)])
        assert out["positions"].tolist() == expected
        assert out["grid"].tolist() == [4, 6]
        assert out["patches"].shape == (len(expected), 4, 4, 3)
        for patch, number in zip(out["patches"], expected, strict=True):
            assert np.array_equal(patch, crop(pixels(i), number, 4))
        assert [out[field].dtype for field in ("patches", "positions", "grid")] == ["uint8", "int64", "int64"]


def test_the_images_field_goes_and_all_others_pass() -> None:
    (out,) = dropped(samples(1))
    assert list(out) == ["__key__", "__url__", "cls", "patches", "positions", "grid"]
    assert out["cls"] == b"0"
    assert out["patches"].shape[0] == 18, "three of four, unless said"
    (out,) = dropped(samples(1), image=itemgetter("png"))
    assert "png" in out


def test_images_of_several_sizes_come_out_as_each_would_alone() -> None:
    given = samples(2) + samples(2, height=32, width=8) + samples(1)
    together = dropped(given, "texture")
    for one, out in zip(given, together, strict=True):
        (alone,) = dropped([one], "texture")
        assert np.array_equal(alone["patches"], out["patches"])
    assert [out["grid"].tolist() for out in together] == [[4, 6], [4, 6], [8, 2], [8, 2], [4, 6]]


def test_a_size_makes_all_images_alike() -> None:
    given = samples(1) + samples(1, height=30, width=7)
    assert [out["patches"].shape for out in dropped(given, size=16, patch=8)] == [(3, 8, 8, 3)] * 2


def test_the_draw_hangs_on_seed_epoch_shard_and_key_alone() -> None:
    def positions(seed: int = 0, **fields: Any) -> list[int]:
        (out,) = dropped([{**samples(1)[0], **fields}], seed=seed, keep=0.5)
        return list(out["positions"])

    first = positions()
    assert positions(__url__="elsewhere/a.tar", png=png(pixels(7))) == first
    assert positions(**{EPOCH_FIELD: 0}) == first
    for other in ({"seed": 1}, {EPOCH_FIELD: 1}, {"__url__": "x/b.tar"}, {"__key__": "l"}):
        assert positions(**other) != first  # type: ignore[arg-type]


class Telling:
    """An importance that writes down what it was given."""

    patch = 4

    def __init__(self, shape: tuple[int, ...] | None = None, value: float = 0.0) -> None:
        self.heard: list[tuple[int, list[Any], list[int]]] = []
        self.shape, self.value = shape, value

    def __call__(
        self, images: Sequence[Image.Image], labels: Sequence[Any], seeds: Sequence[int]
    ) -> NDArray[np.float32]:
        self.heard.append((len(images), list(labels), list(seeds)))
        return np.full(self.shape or (len(images), 24), self.value, np.float32)


def test_an_importance_is_called_once_a_chunk_labels_if_asked() -> None:
    given = samples(3)
    for label, expected in ((None, [None] * 3), ("cls", [0, 1, 2])):
        importance = Telling()
        adq.DropPatches(importance, label=label).apply(given)
        assert [labels for _, labels, _ in importance.heard] == [expected]
    for decoded in ("label", itemgetter("label")):
        importance = Telling()
        out = adq.DropPatches(importance, label=decoded).apply(adq.Decode().apply(given))
        assert importance.heard[0][1] == [sample["label"] for sample in out] == [0, 1, 2]
    importance = Telling()
    adq.DropPatches(importance).apply(samples(6))
    assert [n for n, _, _ in importance.heard] == [6]
    assert len(set(importance.heard[0][2])) == 6


def test_a_classifiers_map_hangs_on_the_batch_by_rounding_only() -> None:
    given = samples(12, height=32, width=32)
    importance = adq.importance("gradcam++", patch=4)
    images = [Image.open(io.BytesIO(sample["png"])).convert("RGB") for sample in given]
    whole = importance(images, [None] * 12, [0] * 12)
    alone = np.concatenate([importance([image], [None], [0]) for image in images])
    slack = 1e-5 * whole.max(axis=1, keepdims=True)
    assert (abs(whole - alone) <= slack).all()
    pipe = adq.DropPatches(importance, keep=0.75)
    for i, (one, out) in enumerate(zip(given, pipe.apply(given), strict=True)):
        (other,) = pipe.apply([one])
        differing = set(out["positions"].tolist()) ^ set(other["positions"].tolist())
        last = np.sort(whole[i])[-n_kept(64, 0.75)]
        assert all(abs(whole[i][place] - last) <= slack[i, 0] for place in differing)


def test_batches_collate_and_a_masked_autoencoder_takes_them(make_shard: MakeShard) -> None:
    """F35: kept pixels come out exactly as they were stored."""
    shard = make_shard("a.tar", 12, side=32)
    pipes = [adq.Decode(), adq.DropPatches(adq.importance("texture", patch=8), keep=0.75)]
    fields = ("patches", "positions", "grid", "label")
    dataset = adq.ShardDataset(shard, pipes=pipes, fields=fields, batch_size=6)
    torch.manual_seed(0)
    mae = MaskedAutoencoder(MaeSize((32, 32), 8, 16, 1, 2, 16, 1, 2)).eval()
    for patches, positions, grid, label in dataset:
        assert (patches.dtype, patches.shape) == (torch.uint8, (6, 12, 8, 8, 3))
        assert (positions.dtype, positions.shape) == (torch.int64, (6, 12))
        assert (grid.tolist(), label.shape) == ([[4, 4]] * 6, (6,))
        images = mae.reconstruct_patches(patches, positions).numpy()
        for image, own, places in zip(images, patches.numpy(), positions.tolist(), strict=True):
            assert all(np.array_equal(crop(image, n, 8), p) for n, p in zip(places, own, strict=True))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"png": png(pixels(0, 3, 3))}, "field 'png': .* 3 x 3 pixels .* patches of 4 x 4; .* or give size="),
        ({"png": png(pixels(0, 16, 18))}, "an image of 16 x 18 pixels"),
        ({"png": b"<html>"}, "field 'png': not an image"),
        ({"grid": b"1"}, "field 'grid': is there already; rename or drop it before DropPatches"),
        ({"jpg": b""}, "fields 'jpg' and 'png' are both there"),
    ],
)
def test_a_bad_sample_is_named_and_skipping_drops_it_alone(change: Sample, text: str) -> None:
    given = samples(20)
    given[7] = {**given[7], **change}
    pipe = adq.DropPatches(adq.importance("texture", patch=4))
    with pytest.raises(adq.SampleError, match=f"^shard a.tar, key 'k7'.*{text}"):
        list(pipe(given))
    skipping = adq.DropPatches(adq.importance("texture", patch=4), on_error="skip")
    assert [out["__key__"] for out in skipping(given)] == [f"k{i}" for i in range(20) if i != 7]


@pytest.mark.parametrize(
    ("importance", "text"),
    [
        (Telling(value=float("nan")), "importance of patch 0 of image 0 is nan, .*; half precision"),
        (Telling(value=float("inf")), "is inf, expected a finite number"),
        (Telling(shape=(1, 23)), r"gave \(1, 23\) for 1 images of 4 x 6 patches; expected \(1, 24\)"),
    ],
)
def test_an_importance_that_cannot_be_used_names_its_sample(importance: Telling, text: str) -> None:
    with pytest.raises(adq.SampleError, match=f"shard a.tar, key 'k0': DropPatches: ValueError: .*{text}"):
        list(adq.DropPatches(importance)(samples(1)))


def test_an_accelerator_behind_a_fork_ends_the_stream() -> None:
    def importance(*_: Any) -> NDArray[np.float32]:
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")

    with pytest.raises(adq.AdqError, match=r"DropPatches: the importance is on an accelerator, .*='spawn'"):
        list(adq.DropPatches(importance, patch=4, on_error="skip")(samples(2)))

    encoder = adq.encoder(importance, name="forked")
    pipe = adq.DropPatches(adq.importance("texture", patch=4), tolerance=0.1, encoder=encoder)
    with pytest.raises(adq.AdqError, match=r"DropPatches: the encoder is on an accelerator, .*='spawn'"):
        list(pipe(samples(2)))


def test_patches_are_not_dropped_twice() -> None:
    kept = dropped(samples(1, height=64, width=64), patch=16)
    stored = adq.EncodePatches().apply(kept)
    field = "patches.jpg"
    filled = adq.Decode(label=None).apply(stored)
    named = {"image": field}
    for given, name, options in ((filled, "image", {}), (stored, field, {}), (stored, field, named)):
        text = f"key 'k0', field '{name}': some of its patches are dropped"
        with pytest.raises(adq.SampleError, match=text):
            dropped(given, patch=16, **options)
