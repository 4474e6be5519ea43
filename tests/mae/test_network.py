"""Does the autoencoder see kept patches only, give them back as they were, and compute what its papers' code computes?"""

import dataclasses
import itertools
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from adq_wds.core.patches import cut_patches, join_patches
from adq_wds.errors import AdqError
from adq_wds.mae.network import MaeSize, MaskedAutoencoder
from adq_wds.mae.patches import cut, joined, sine_positions, smooth_fill

pytestmark = pytest.mark.usefixtures("one_thread")
SIZE = MaeSize((24, 40), 8, width=16, depth=2, heads=2, decoder_width=12, decoder_depth=2, decoder_heads=3)
L = SIZE.n_patches
COLOURS: dict[str, Any] = {"mean": (0.3, 0.5, 0.6), "std": (0.2, 0.3, 0.1)}
NORM_PIX = dataclasses.replace(SIZE, norm_pix=True, **COLOURS)
FILL = dataclasses.replace(SIZE, fill=True, **COLOURS)
each = pytest.mark.parametrize("size", [SIZE, NORM_PIX, FILL], ids=["pixels", "norm_pix", "fill"])


def network(size: MaeSize = SIZE, seed: int = 0) -> MaskedAutoencoder:
    """Weights in which every part matters: none is left at 0 or 1."""
    torch.manual_seed(seed)
    made = MaskedAutoencoder(size)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return made.eval().requires_grad_(False)


def pictures(n: int, size: MaeSize = SIZE, seed: int = 0) -> torch.Tensor:
    shape = (n, *size.image_size, 3)
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def masks(n: int, seed: int = 0, n_patches: int = L) -> torch.Tensor:
    """Rows that keep none, all, and any number between."""
    rng = np.random.default_rng(seed)
    keep = rng.random((n, n_patches)) < rng.random((n, 1))
    keep[0], keep[-1] = False, True
    return torch.from_numpy(keep)


def as_pixels(keep: torch.Tensor, size: MaeSize = SIZE) -> torch.Tensor:
    """(B, H, W) bool of (B, L)."""
    grid = keep.view(len(keep), *size.grid)
    return grid.repeat_interleave(size.patch, 1).repeat_interleave(size.patch, 2)


def kept_of(images: torch.Tensor, keep: torch.Tensor, size: MaeSize = SIZE) -> tuple[torch.Tensor, ...]:
    """Kept patches and their places; every row keeps equally many."""
    positions = keep.nonzero()[:, 1].view(len(keep), -1)
    return cut(images, size.patch)[torch.arange(len(keep))[:, None], positions], positions


def same_number(n: int, n_kept: int, seed: int = 0) -> torch.Tensor:
    order = torch.rand(n, L, generator=torch.Generator().manual_seed(seed)).argsort(1)
    return order < n_kept


# The network


def as_the_authors_wrote_it(net: MaskedAutoencoder, images: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """The slow oracle, for one image: every patch embedded by the convolution, then shuffled, dropped, put back."""
    ids_shuffle = torch.argsort((~keep).int(), dim=1, stable=True)  # kept first
    ids_restore = torch.argsort(ids_shuffle, dim=1)
    n_kept = int(keep.sum())
    x = (images.permute(0, 3, 1, 2).float() / 255 - net.mean.view(3, 1, 1)) / net.std.view(3, 1, 1)
    x = net.patch_embed(x) + net.pos_embed[:, 1:]
    x = x[:, ids_shuffle[0, :n_kept]]
    x = torch.cat([net.cls_token + net.pos_embed[:, :1], x], dim=1)
    for block in net.blocks:
        x = block(x)
    x = net.decoder_embed(net.norm(x))
    holes = net.mask_token.repeat(1, keep.shape[1] - n_kept, 1)
    shuffled = torch.cat([x[:, 1:], holes], dim=1)
    x = torch.cat([x[:, :1], shuffled[:, ids_restore[0]]], dim=1) + net.decoder_pos_embed
    for block in net.decoder_blocks:
        x = block(x)
    return net.decoder_pred(net.decoder_norm(x))[:, 1:]


@pytest.mark.parametrize("n_kept", [0, 1, 9, L])
def test_a_prediction_is_that_of_the_authors_steps(n_kept: int) -> None:
    net, images, keep = network(), pictures(3), same_number(3, n_kept)
    patches, positions = kept_of(images, keep)
    found = net(net.normalised(patches), positions)
    assert found.shape == (3, L, 8, 8, 3)
    for i in range(3):
        expected = as_the_authors_wrote_it(net, images[i : i + 1], keep[i : i + 1])
        torch.testing.assert_close(found[i : i + 1].flatten(2), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("grid", "width"), [((3, 5), 12), ((14, 14), 64)])
def test_positions_are_the_authors_sines(grid: tuple[int, int], width: int) -> None:
    found = sine_positions(grid, width)
    quarter = width // 4
    for place, (row, column) in enumerate(itertools.product(range(grid[0]), range(grid[1]))):
        for i in range(quarter):
            omega = 10_000 ** (-i / quarter)
            expected = [f(x * omega) for x in (column, row) for f in (math.sin, math.cos)]
            assert found[place, i::quarter].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("layout", ["published", "version 5", "saved by version 5"])
@pytest.mark.parametrize("mask_ratio", [0.25, 0.75])
def test_equal_to_transformers(tmp_path: Any, layout: str, mask_ratio: float) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers: the extra `bench`")
    from safetensors.torch import load_file, save_file

    from adq_wds.mae.checkpoints import load_mae

    config = transformers.ViTMAEConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128, image_size=40,
        patch_size=8, decoder_hidden_size=24, decoder_num_hidden_layers=2, decoder_num_attention_heads=2,
        decoder_intermediate_size=96, mask_ratio=mask_ratio, norm_pix_loss=True,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.ViTMAEForPreTraining(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    if layout == "version 5":
        save_file(theirs.state_dict(), weights)
    elif layout == "published":
        saved = load_file(weights)
        names = {k: k.replace("decoder_encoder.layer", "decoder_layers") for k in saved}
        save_file({names[k]: v for k, v in saved.items()}, weights)
    ours = load_mae(tmp_path)
    assert (ours.size.heads, ours.size.decoder_heads, ours.size.norm_pix) == (4, 2, True)
    assert ours.size.norm_eps == pytest.approx(1e-12)

    images = pictures(3, ours.size)
    pixels = (images.permute(0, 3, 1, 2).float() / 255 - ours.mean.view(3, 1, 1)) / ours.std.view(3, 1, 1)
    noise = torch.rand(3, 25, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        answer = theirs(pixels, noise=noise)
    patches, positions = kept_of(images, answer.mask == 0, ours.size)
    found = ours(ours.normalised(patches), positions)
    torch.testing.assert_close(found.flatten(2), answer.logits, rtol=1e-4, atol=1e-4)
    errors = answer.logits.view_as(found) - ours.targets(cut(images, 8), positions)
    squares = errors.square().mean((2, 3, 4))
    loss = (squares * answer.mask).sum() / answer.mask.sum()
    assert float(loss) == pytest.approx(float(answer.loss), rel=1e-4)


# Grey levels


def test_patches_are_cut_and_joined_as_core_does() -> None:
    images = pictures(2)
    patches = cut(images, 8)
    assert patches.numpy().tolist() == cut_patches(images.numpy(), 8).tolist()
    assert torch.equal(joined(patches, SIZE.grid), images)
    assert join_patches(patches.numpy(), SIZE.grid).tolist() == images.tolist()


NOWHERE = torch.zeros(2, 0, dtype=torch.int64)


@pytest.mark.parametrize("size", [SIZE, FILL], ids=["pixels", "fill"])
@pytest.mark.parametrize("n_kept", [0, 9, L])
def test_pixels_undo_targets(size: MaeSize, n_kept: int) -> None:
    net, images = network(size), pictures(2)
    kept, positions = kept_of(images, same_number(2, n_kept))
    found = net.pixels(net.targets(cut(images, 8), positions), kept, positions)
    torch.testing.assert_close(found, cut(images, 8).float(), atol=1e-3, rtol=0)


def test_normalised_targets_have_no_mean_and_unit_deviation() -> None:
    targets = network(NORM_PIX).targets(cut(pictures(2), 8), NOWHERE).flatten(2)
    torch.testing.assert_close(targets.mean(2), torch.zeros(2, L), atol=1e-4, rtol=0)
    torch.testing.assert_close(targets.std(2), torch.ones(2, L), atol=1e-3, rtol=0)


def test_where_nothing_is_kept_the_data_sets_statistics_hold() -> None:
    net, predicted = network(NORM_PIX), torch.randn(2, L, 8, 8, 3)
    nothing = torch.zeros(2, 0, 8, 8, 3, dtype=torch.uint8)
    expected = (predicted * torch.tensor(NORM_PIX.std) + torch.tensor(NORM_PIX.mean)) * 255
    torch.testing.assert_close(net.pixels(predicted, nothing, NOWHERE), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("grid", "P", "places"), [((6, 3), 2, [0, 5, 7]), ((5, 2), 5, [0, 3]), ((6, 1), 5, [0])]
)
def test_a_fill_weighs_pixels_by_the_fifth_power(grid: tuple[int, int], P: int, places: list[int]) -> None:
    """By a plain convolution, and for larger patches by a Fourier transform."""
    H, W = grid[0] * P, grid[1] * P
    image = torch.rand(1, H, W, 3, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([places])
    patches = cut(image, P)
    found = joined(smooth_fill(patches[:, positions[0]], positions, grid), grid)[0].numpy()
    here = torch.zeros(1, grid[0] * grid[1], P, P, 1).index_fill(1, positions[0], 1.0)
    known = joined(here, grid)[0, :, :, 0]
    at, values = np.argwhere(known.numpy()), image[0][known.bool()].double().numpy()
    alone = 0
    for pixel in np.ndindex(H, W):
        away = np.abs(at - pixel)
        near = (away.max(1) <= 2 * P) & (away.max(1) > 0)
        weight = np.hypot(*away[near].T.astype(float)) ** -5.0
        alone += not near.any()
        expected = (weight[:, None] * values[near]).sum(0) / weight.sum() if near.any() else np.zeros(3)
        np.testing.assert_allclose(found[pixel], expected, rtol=1e-4, atol=1e-5)
        assert near.any() or (found[pixel] == 0).all()
    assert alone > 0  # the last ones have nothing near


def test_the_fill_is_float32_under_autocast() -> None:
    kept, positions = kept_of(pictures(2), same_number(2, 9))
    expected = smooth_fill(kept.float(), positions, SIZE.grid)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(smooth_fill(kept.float(), positions, SIZE.grid), expected)


def test_a_dropped_patch_borrows_statistics_from_near_ones() -> None:
    net, images, keep = network(NORM_PIX), pictures(1), same_number(1, 4)
    kept, positions = kept_of(images, keep)
    predicted = torch.randn(1, L, 8, 8, 3, generator=torch.Generator().manual_seed(0))
    found = net.pixels(predicted, kept, positions)
    mean, std = (torch.tensor(v).double() for v in (NORM_PIX.mean, NORM_PIX.std))
    x = (kept[0].double() / 255 - mean) / std  # (K, P, P, 3)
    places = [divmod(int(p), SIZE.grid[1]) for p in positions[0]]
    for place in (~keep[0]).nonzero()[:, 0].tolist():
        row, column = divmod(place, SIZE.grid[1])
        weight = torch.tensor([1 / ((row - r) ** 2 + (column - c) ** 2) for r, c in places]).double()
        weight /= weight.sum()
        m, v = (weight * x.mean((1, 2, 3))).sum(), (weight * x.var((1, 2, 3))).sum()
        expected = ((predicted[0, place].double() * (v + 1e-6).sqrt() + m) * std + mean) * 255
        torch.testing.assert_close(found[0, place].double(), expected, rtol=1e-4, atol=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        again = net.pixels(predicted, kept, positions)
    assert torch.equal(again, found), "what is borrowed is float32 always"


# Whole images


@each
def test_only_dropped_pixels_change(size: MaeSize) -> None:
    net, images, keep = network(size), pictures(12), masks(12)
    rebuilt = net.reconstruct(images, keep)
    assert (rebuilt.shape, rebuilt.dtype) == (images.shape, torch.uint8)
    known = as_pixels(keep)
    assert torch.equal(rebuilt[known], images[known])
    assert (rebuilt[~known] != images[~known]).float().mean() > 0.9
    assert torch.equal(rebuilt[-1], images[-1])  # all kept


@each
def test_what_was_dropped_plays_no_part(size: MaeSize) -> None:
    net, keep = network(size), masks(8)
    images, others = pictures(8), pictures(8, seed=1)
    hidden = torch.where(as_pixels(keep)[..., None], images, others)
    assert torch.equal(net.reconstruct(hidden, keep), net.reconstruct(images, keep))


@each
def test_a_dropped_pixel_is_the_rounded_prediction(size: MaeSize) -> None:
    net, images, keep = network(size), pictures(2), same_number(2, 6)
    patches, positions = kept_of(images, keep)
    expected = net.pixels(net(net.normalised(patches), positions), patches, positions)
    rebuilt = cut(net.reconstruct(images, keep), 8)
    inside = (expected[~keep] > 0.5) & (expected[~keep] < 254.5)
    assert inside.float().mean() > 0.3
    assert ((rebuilt[~keep].float() - expected[~keep]).abs()[inside] <= 0.5 + 1e-3).all()
    assert set(rebuilt[~keep][~inside].tolist()) <= {0, 255}


@each
def test_an_image_gets_the_same_answer_in_any_batch(size: MaeSize) -> None:
    net, images, keep = network(size), pictures(10), masks(10)
    whole = net.reconstruct(images, keep).int()
    for i in range(10):
        alone = net.reconstruct(images[i : i + 1], keep[i : i + 1])
        assert (alone[0].int() - whole[i]).abs().max() <= 1  # the last bits of a sum hang on the batch


@each
@pytest.mark.parametrize("n_kept", [0, 1, 9, L])
def test_patches_alone_give_what_images_give(size: MaeSize, n_kept: int) -> None:
    net, images, keep = network(size), pictures(3), same_number(3, n_kept)
    patches, positions = kept_of(images, keep)
    shuffled = torch.randperm(n_kept, generator=torch.Generator().manual_seed(0))
    found = net.reconstruct_patches(patches[:, shuffled], positions[:, shuffled])
    difference = (found.int() - net.reconstruct(images, keep).int()).abs()
    assert difference.max() <= 1
    assert difference[as_pixels(keep)].sum() == 0


def test_no_image_is_a_batch_too() -> None:
    net = network()
    assert net.reconstruct(pictures(0), torch.ones(0, L, dtype=torch.bool)).shape == (0, 24, 40, 3)
    nothing = torch.zeros(0, 4, 8, 8, 3, dtype=torch.uint8)
    assert net.reconstruct_patches(nothing, torch.zeros(0, 4, dtype=torch.int64)).shape == (0, 24, 40, 3)


def test_bfloat16_moves_dropped_pixels_little() -> None:
    net, images, keep = network(), pictures(6), masks(6)
    with torch.autocast("cpu", torch.bfloat16):
        found = net.reconstruct(images, keep)
    expected = net.reconstruct(images, keep)
    assert torch.equal(found[as_pixels(keep)], images[as_pixels(keep)])
    assert (found.int() - expected.int()).abs().float().mean() < 4


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_reconstruction_that_is_not_finite_is_an_error(value: float) -> None:
    net = network()
    net.decoder_pred.bias.fill_(value)
    with pytest.raises(AdqError, match=r"not finite: .*run it in float32"):
        net.reconstruct(pictures(2), same_number(2, 3))
    assert torch.equal(net.reconstruct(pictures(1), masks(1)), pictures(1))  # all kept: nothing is predicted


def test_a_pickle_comes_back_as_the_same_network() -> None:
    net, images, keep = network(NORM_PIX), pictures(2), masks(2)
    again = pickle.loads(pickle.dumps(net))  # noqa: S301 - our own
    assert again.size == net.size
    assert torch.equal(again.reconstruct(images, keep), net.reconstruct(images, keep))


# What is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch": 0}, "patch must be an integer >= 1, got 0"),
        ({"heads": 2.0}, r"heads must be an integer >= 1, got 2\.0"),
        ({"depth": True}, "depth must be an integer >= 1, got True"),
        ({"image_size": (24, 41)}, r"image_size=\(24, 41\): expected height and width in multiples of patch=8"),
        *(({"image_size": size}, "image_size=.*: expected") for size in ((4, 8), (8, 8, 8), (0, 8))),
        ({"heads": 3}, "a width of 16 with 3 heads"),
        ({"width": 18}, "a width of 18 with 2 heads: expected a multiple of both 4 and heads"),
        ({"decoder_heads": 5}, "a width of 12 with 5 heads"),
        ({"std": (1.0, 0.0, 1.0)}, r"std=\(1\.0, 0\.0, 1\.0\)"),
        ({"mean": (1.0,)}, r"mean=\(1\.0,\)"),
        ({"norm_eps": 0.0}, r"norm_eps=0\.0"),
        ({"norm_pix": True, "fill": True}, "norm_pix and fill: .* expected one at most"),
    ],
)  # fmt: skip
def test_numbers_that_do_not_fit_together_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SIZE, **change)


KEEP, PATCHES = torch.ones(2, L, dtype=torch.bool), torch.zeros(1, 2, 8, 8, 3, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("method", "first", "second", "message"),
    [
        ("reconstruct", pictures(2)[:, :16], KEEP, r"images are \(2, 16, 40, 3\) uint8; expected \(B, 24, 40, 3\) uint8"),
        ("reconstruct", pictures(2).float(), KEEP, r"images are \(2, 24, 40, 3\) float32"),
        ("reconstruct", pictures(2).permute(0, 3, 1, 2), KEEP, r"images are \(2, 3, 24, 40\) uint8"),
        ("reconstruct", pictures(2), KEEP[:1], r"keep is \(1, 15\) bool; expected \(2, 15\) bool"),
        ("reconstruct", pictures(2), KEEP[:, :14], r"keep is \(2, 14\) bool"),
        ("reconstruct", pictures(2), KEEP.int(), r"keep is \(2, 15\) int32"),
        ("reconstruct_patches", PATCHES[0], [[0, 1]], r"patches are \(2, 8, 8, 3\) uint8; expected \(B, K, 8, 8, 3\) uint8"),
        ("reconstruct_patches", PATCHES[:, :, :4], [[0, 1]], r"patches are \(1, 2, 4, 8, 3\) uint8"),
        ("reconstruct_patches", PATCHES.float(), [[0, 1]], "patches are .* float32"),
        ("reconstruct_patches", PATCHES, [[0]], r"positions are \(1, 1\) int64; expected \(1, 2\) int64"),
        ("reconstruct_patches", PATCHES, [[0.0, 1.0]], r"positions are \(1, 2\) float32"),
        ("reconstruct_patches", PATCHES, [[0, L]], "positions go from 0 to 15; expected 0 to 14"),
        ("reconstruct_patches", PATCHES, [[-1, 3]], "positions go from -1 to 3"),
        ("reconstruct_patches", PATCHES, [[3, 3]], "positions name a place twice"),
    ],
)  # fmt: skip
def test_images_masks_and_patches_of_another_kind_are_refused(
    method: str, first: torch.Tensor, second: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(network(), method)(first, torch.as_tensor(second))


def test_first_weights_are_the_authors_and_learn() -> None:
    torch.manual_seed(0)
    net = MaskedAutoencoder(SIZE)
    assert torch.equal(net.pos_embed[0, 0], torch.zeros(16))
    assert torch.equal(net.pos_embed[0, 1:], sine_positions(SIZE.grid, 16))
    assert not net.pos_embed.requires_grad
    assert not net.decoder_pos_embed.requires_grad
    assert all(p.abs().sum() > 0 for name, p in net.named_parameters() if not name.endswith("bias"))
    patches, positions = kept_of(pictures(1), same_number(1, 9))
    target = net.targets(cut(pictures(1), 8), positions)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        loss = F.mse_loss(net(net.normalised(patches), positions), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)
