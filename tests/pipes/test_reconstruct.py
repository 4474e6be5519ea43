"""Kept patches become whole images: the kept pixels to the last bit, the others as the network says."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import adq_wds as adq
from adq_wds.core.patches import cut_patches
from adq_wds.mae.network import MaeSize, MaskedAutoencoder
from adq_wds.mae.reconstruct_batches import reconstruct_batches
from adq_wds.pipes.reconstruct import Reconstruct

SIZE = MaeSize((16, 16), 4, 16, 2, 2, 8, 1, 2)
Samples = list[dict[str, Any]]


@pytest.fixture(scope="module")
def mae() -> MaskedAutoencoder:
    torch.manual_seed(0)
    return MaskedAutoencoder(SIZE).eval()


def pictures(n: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (n, 16, 16, 3), dtype=np.uint8)


def samples_of(images: Any, **options: Any) -> Samples:
    raw = [{"__key__": f"k{i}", "__url__": "a.tar", "image": x, "cls": i} for i, x in enumerate(images)]
    drop = adq.DropPatches(adq.importance("random", patch=4), **{"keep": 0.5, **options})
    return drop.apply(raw)


def mask(samples: Samples) -> Any:
    keep = np.zeros((len(samples), 16), dtype=bool)
    for row, sample in zip(keep, samples, strict=True):
        row[sample["positions"]] = True
    return keep


def test_the_pipe_gives_what_the_network_gives_of_whole_images(mae: MaskedAutoencoder) -> None:
    images = pictures(7)
    samples = samples_of(images)
    expected = mae.reconstruct(torch.from_numpy(images), torch.from_numpy(mask(samples))).numpy()
    before = [dict(sample) for sample in samples]
    out = Reconstruct(mae).apply(samples)
    for sample, whole, kept, image in zip(out, expected, mask(samples), images, strict=True):
        assert set(sample) == {"__key__", "__url__", "cls", "image"}
        assert sample["image"].dtype == np.uint8
        assert np.abs(sample["image"].astype(int) - whole).max() <= 1
        cells, stored = cut_patches(np.stack([sample["image"], image]), 4)
        assert np.array_equal(cells[kept], stored[kept])
        assert sample["image"].base is None, "a view would keep the whole batch alive"
    assert all(a.keys() == b.keys() for a, b in zip(before, samples, strict=True))


@pytest.mark.parametrize("keep", [0.0, 1.0])
def test_nothing_kept_and_everything_kept_are_defined(mae: MaskedAutoencoder, keep: float) -> None:
    """F35."""
    images = pictures(3)
    out = Reconstruct(mae).apply(samples_of(images, keep=keep))
    assert all(sample["image"].shape == (16, 16, 3) for sample in out)
    if keep == 1:
        assert np.array_equal(np.stack([sample["image"] for sample in out]), images)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"patches": None}, r"field 'patches': NoneType there, expected an array, as DropPatches and Decode"),
        ({"positions": np.arange(3)}, r"positions are .*; expected \(1, 8\) int64"),
        ({"positions": np.zeros(8, np.int64)}, "positions name a place twice"),
        ({"positions": np.arange(10, 18)}, r"positions go from 10 to 17; expected 0 to 15"),
        ({"positions": np.arange(8, dtype=np.int32)}, r"positions are .*; expected \(1, 8\) int64"),
        ({"grid": np.array([2, 8])}, r"field 'grid': .*but this network's images have 4 x 4 patches"),
        ({"patches": np.zeros((8, 8, 8, 3), np.uint8)}, r"patches are .*; expected \(B, K, 4, 4, 3\) uint8"),
        ({"image": b""}, r"field 'image': is there already; rename or drop it"),
    ],
)
def test_what_are_not_patches_of_such_an_image_is_a_bad_sample(
    mae: MaskedAutoencoder, change: dict[str, Any], text: str
) -> None:
    (sample,) = samples_of(pictures(1))
    with pytest.raises(adq.SampleError, match=rf"shard a.tar, key 'k0'.*{text}"):
        list(Reconstruct(mae)([{**sample, **change}]))


def test_damaged_weights_are_an_error_and_no_image(mae: MaskedAutoencoder) -> None:
    """F35."""
    out = mae.reconstruct_patches(torch.zeros(1, 2, 4, 4, 3, dtype=torch.uint8), torch.tensor([[0, 1]]))
    assert out.is_inference(), "no graph is kept of what nobody trains"
    broken = MaskedAutoencoder(SIZE).eval()
    with torch.no_grad():
        broken.decoder_pred.weight.fill_(float("nan"))
    with pytest.raises(adq.AdqError, match="the reconstruction is not finite"):
        Reconstruct(broken).apply(samples_of(pictures(1)))


def collated(samples: Samples) -> Any:
    return torch.utils.data.default_collate([(s["patches"], s["positions"], s["cls"]) for s in samples])


def normalised(images: Any, mean: Any, std: Any) -> Any:
    x = images.astype(np.float64) / 255
    return ((x - np.array(mean)) / np.array(std)).transpose(0, 3, 1, 2)


def test_batches_come_back_as_normalised_images(mae: MaskedAutoencoder) -> None:
    samples = samples_of(pictures(10))
    expected = np.stack([sample["image"] for sample in Reconstruct(mae).apply(samples)])
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    batches = [collated(samples[:6]), collated(samples[6:])]
    out = list(reconstruct_batches(batches, mae, mean=mean, std=std))
    assert [len(labels) for _, labels in out] == [6, 4]
    assert torch.cat([labels for _, labels in out]).tolist() == list(range(10))
    images = torch.cat([images for images, _ in out])
    assert (images.dtype, images.shape) == (torch.float32, (10, 3, 16, 16))
    assert not images.is_inference(), "a training must be able to save them"
    assert np.abs(images.numpy() - normalised(expected, mean, std)).max() <= 1.01 / 255 / 0.2
    kept = mask(samples).reshape(10, 1, 4, 4).repeat(4, 2).repeat(4, 3).repeat(3, 1)
    assert np.abs(images.numpy() - normalised(expected, mean, std))[kept].max() <= 1e-5
    (other,) = reconstruct_batches([collated(samples)], mae, mean=np.array(mean), std=torch.tensor(std))  # type: ignore[arg-type]
    assert other[0].dtype == torch.float32
    assert torch.allclose(other[0], images, atol=1.01 / 255 / 0.2)


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"mean": (0.5,)}, ValueError, r"mean=\(0.5,\): expected three numbers"),
        ({"mean": (0, 0, float("nan"))}, ValueError, "mean=.*expected three numbers"),
        ({"std": (1, 0, 1)}, ValueError, "std=.*expected three numbers, each above 0"),
        ({"device": "nowhere"}, ValueError, "nowhere"),
        ({"mae": "builtin"}, TypeError, "needs a masked autoencoder, got 'builtin'; write adq_wds.load_mae"),
    ],
)
def test_a_wrong_argument_is_met_before_the_first_batch(
    mae: MaskedAutoencoder, options: dict[str, Any], kind: type[Exception], text: str
) -> None:
    with pytest.raises(kind, match=text):
        reconstruct_batches([], **{"mae": mae, **options})


def test_a_batch_that_holds_images_already_is_refused(mae: MaskedAutoencoder) -> None:
    samples = [{**sample, "image": 0} for sample in samples_of(pictures(2))]
    whole = {name: np.stack([s[name] for s in samples]) for name in ("patches", "positions", "image")}
    for batch in (samples, whole):
        with pytest.raises(ValueError, match=r"has a field 'image' already, .* rename or drop it"):
            list(reconstruct_batches([batch], mae))


def test_batches_of_every_form_give_the_same(mae: MaskedAutoencoder) -> None:
    samples = samples_of(pictures(5)) + samples_of(pictures(4, seed=1), keep=0.75)
    samples += samples_of(pictures(2), keep=1.0)
    samples = [samples[i] for i in np.random.default_rng(0).permutation(11)]
    expected = np.stack([sample["image"] for sample in Reconstruct(mae).apply(samples)])
    (ragged,) = reconstruct_batches([samples], mae, mean=(0, 0, 0), std=(1, 1, 1))
    assert sorted(ragged) == ["__key__", "__url__", "cls", "image"]
    assert ragged["cls"].tolist() == [sample["cls"] for sample in samples]
    assert ragged["__key__"] == [sample["__key__"] for sample in samples]
    assert np.abs(ragged["image"].numpy() * 255 - expected.transpose(0, 3, 1, 2)).max() <= 1.01
    tuples = [(s["patches"], s["positions"], s["cls"]) for s in samples]
    ((images, labels),) = reconstruct_batches([tuples], mae, mean=(0, 0, 0), std=(1, 1, 1))
    assert torch.equal(images, ragged["image"])
    assert torch.equal(labels, ragged["cls"])
    alike = samples_of(pictures(3))
    whole = {name: np.stack([s[name] for s in alike]) for name in ("patches", "positions", "grid")}
    (by_name,) = reconstruct_batches([{**whole, "label": torch.arange(3)}], mae)
    (by_place,) = reconstruct_batches([collated(alike)], mae)
    assert sorted(by_name) == ["image", "label"]
    assert torch.equal(by_name["image"], by_place[0])


@pytest.mark.parametrize("batch", [{"image": 1}, "text", [], torch.zeros(3), (torch.zeros(1),)])
def test_what_is_no_batch_of_patches_is_refused(mae: MaskedAutoencoder, batch: Any) -> None:
    with pytest.raises(ValueError, match=r"expected patches and positions, by name or first"):
        list(reconstruct_batches([batch], mae))


def test_patches_of_another_network_are_refused(mae: MaskedAutoencoder) -> None:
    batch = (torch.zeros(2, 3, 8, 8, 3, dtype=torch.uint8), torch.zeros(2, 3).long())
    with pytest.raises(ValueError, match=r"patches are .*; expected \(B, K, 4, 4, 3\) uint8"):
        list(reconstruct_batches([batch], mae))


@pytest.mark.gpu
def test_on_an_accelerator_pixels_differ_by_little(mae: MaskedAutoencoder) -> None:
    other = MaskedAutoencoder(replace(SIZE))
    other.load_state_dict(mae.state_dict())
    batches = [collated(samples_of(pictures(8, seed=i))) for i in range(5)]
    plain: Any = {"mean": (0, 0, 0), "std": (1, 1, 1)}
    here = torch.cat([x for x, _ in reconstruct_batches(batches, mae, **plain)])
    there = [x.cpu() for x, _ in reconstruct_batches(batches, other, device="cuda", **plain)]
    assert (torch.cat(there) - here).abs().max() <= 6 / 255
