"""Are autoencoders read from each of the three layouts, strictly, and is nothing made on a file's word?"""

import dataclasses
import itertools
import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import timm
import torch
from safetensors.torch import load_file, save_file

from adq_wds.errors import AdqError
from adq_wds.mae import checkpoints
from adq_wds.mae.checkpoints import BUILTIN_MAE, load_mae, save_mae
from adq_wds.mae.network import MaeSize, MaskedAutoencoder
from adq_wds.mae.patches import cut, smooth_fill
from adq_wds.remote.open_shard import open_shard
from adq_wds.samples.whole_image import whole_image
from adq_wds.shards.samples_in_tar import iter_spans, read_sample

State = dict[str, torch.Tensor]
SQUARE = MaeSize((24, 24), 8, width=16, depth=3, heads=4, decoder_width=12, decoder_depth=2, decoder_heads=3)
WIDE = dataclasses.replace(
    SQUARE, image_size=(8, 24), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), norm_pix=True, norm_eps=1e-5
)


def network(size: MaeSize = SQUARE) -> MaskedAutoencoder:
    """With weights that float16 holds exactly."""
    torch.manual_seed(0)
    made = MaskedAutoencoder(size)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter)).copy_(parameter.half())
    return made.eval()


def assert_same(found: MaskedAutoencoder, expected: MaskedAutoencoder) -> None:
    want = expected.state_dict()
    assert found.state_dict().keys() == want.keys()
    assert all(torch.equal(value, want[name]) for name, value in found.state_dict().items())


def save(state: State, folder: Path, header: dict[str, str] | None = None) -> Path:
    save_file(state, folder / "a.safetensors", header)
    return folder / "a.safetensors"


HUB = [  # parts of names: ours, and those of `facebook/vit-mae-base`
    (r"^decoder_blocks\.", "decoder.decoder_layers."), (r"^blocks\.", "vit.encoder.layer."), (r"^norm\.", "vit.layernorm."),
    (r"^cls_token", "vit.embeddings.cls_token"), (r"^pos_embed", "vit.embeddings.position_embeddings"),
    (r"^patch_embed\.proj", "vit.embeddings.patch_embeddings.projection"), (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.norm1\.", ".layernorm_before."), (r"\.norm2\.", ".layernorm_after."), (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."), (r"^(decoder_[enp]|mask_token)", r"decoder.\1"),
]  # fmt: skip


def hub_layout(state: State) -> State:
    """The names of `facebook/vit-mae-base`."""
    named = {}
    for key, value in state.items():
        for ours, theirs in HUB:
            key = re.sub(ours, theirs, key)
        if ".attn.qkv." in key:
            for part, rows in zip(("query", "key", "value"), value.chunk(3), strict=True):
                named[key.replace(".attn.qkv.", f".attention.attention.{part}.")] = rows.clone()
        else:
            named[key] = value
    return named


CONFIG = {
    "num_attention_heads": 4, "decoder_num_attention_heads": 3, "norm_pix_loss": False, "layer_norm_eps": 1e-12,
    "image_size": 24, "hidden_act": "gelu",
}  # fmt: skip


# The three layouts


@pytest.mark.parametrize(
    "size", [SQUARE, WIDE, dataclasses.replace(SQUARE, fill=True)], ids=["square", "wide", "fill"]
)
def test_ours_comes_back_whole_without_being_told_anything(tmp_path: Path, size: MaeSize) -> None:
    made = network(size)
    save_mae(made, tmp_path / "a.safetensors", {"trained_on": "noise"})
    found = load_mae(tmp_path / "a.safetensors")
    assert found.size == size
    assert_same(found, made)
    assert not found.training
    assert not any(p.requires_grad for p in found.parameters())
    assert {p.dtype for p in found.parameters()} == {torch.float32}
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata()["trained_on"] == "noise"
    assert {v.dtype for v in load_file(tmp_path / "a.safetensors").values()} == {torch.float16}


@pytest.mark.parametrize(
    ("width", "heads", "decoder_width", "decoder_heads", "missing"),
    [(768, 12, 512, 16, None), (1024, 16, 512, 16, None), (1280, 16, 512, 16, None), (16, 4, 12, 3, 16),
     (512, 8, 512, 16, 512)],  # of the last, a width of the published decoders says nothing about an encoder
)  # fmt: skip
def test_unknown_widths_need_heads(
    tmp_path: Path, width: int, heads: int, decoder_width: int, decoder_heads: int, missing: int | None
) -> None:
    size = MaeSize((16, 16), 8, width, 1, heads, decoder_width, 1, decoder_heads)
    path = tmp_path / "mae_visualize_vit.pth"
    torch.save({"model": MaskedAutoencoder(size).state_dict()}, path)
    if missing is not None:
        text = rf"how many heads a width of {missing} has; give heads=\(encoder, decoder\)"
        with pytest.raises(ValueError, match=text):
            load_mae(path, allow_pickle=True)
    given = None if missing is None else (heads, decoder_heads)
    assert load_mae(path, heads=given, allow_pickle=True).size == size
    with pytest.raises(ValueError, match="a pickle, read only with allow_pickle=True"):
        load_mae(path, heads=given)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"heads": 4}, "heads=4: expected two integers"),
        ({"heads": (4,)}, r"heads=\(4,\): expected two integers"),
        ({"heads": (2, 2, 2)}, "expected two integers"),
        ({"norm_pix": "no"}, "norm_pix='no': expected True or False"),
        ({"image_size": 32.0}, "image_size=32.0: expected an integer, or two"),
        ({"image_size": (32,)}, r"image_size=\(32,\): expected an integer, or two"),
    ],
)
def test_a_wrong_option_is_met_before_the_file_is_read(tmp_path: Path, options: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        load_mae(tmp_path / "missing.safetensors", **options)


def test_whoever_may_read_the_folder_may_read_the_weights(tmp_path: Path) -> None:
    (tmp_path / "as_usual").touch()
    save_mae(network(), tmp_path / "a.safetensors", {})
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "as_usual").stat().st_mode


def test_a_small_file_cannot_ask_for_many_blocks(tmp_path: Path) -> None:
    """S5: all that are named would be made before they are compared."""
    many = {f"blocks.{i}.norm1.bias": torch.zeros(0) for i in range(129)}
    save_file({**network().state_dict(), **many}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"a\.safetensors: 129 blocks; expected at most 128"):
        load_mae(tmp_path / "a.safetensors", heads=(4, 3))


HUGE = {
    "patch_embed.proj.weight": (0, 3, 2**30, 2**30),
    "decoder_embed.weight": (2**40, 0),
    "pos_embed": (0, 2**60, 1),
}


@pytest.mark.parametrize(("key", "shape"), HUGE.items())
def test_an_empty_tensor_with_huge_sides_is_refused(tmp_path: Path, key: str, shape: tuple[int, ...]) -> None:
    """S5: no byte stands behind such a side, and a product of sides may overflow."""
    save_file({**network().state_dict(), key: torch.empty(shape)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=rf"{key} is of shape .*none empty"):
        load_mae(tmp_path / "a.safetensors", heads=(4, 3))


@pytest.mark.parametrize("place", ["folder", "file"])
def test_the_hubs_layout_with_its_config(tmp_path: Path, place: str) -> None:
    made = network()
    save_file(hub_layout(made.state_dict()), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    found = load_mae(tmp_path if place == "folder" else tmp_path / "model.safetensors")
    assert found.size == dataclasses.replace(SQUARE, norm_eps=1e-12)
    assert_same(found, made)


def test_the_hubs_layout_without_config_as_a_pickle(tmp_path: Path) -> None:
    made = network()
    torch.save(hub_layout(made.state_dict()), tmp_path / "pytorch_model.bin")
    assert_same(load_mae(tmp_path, heads=(4, 3), allow_pickle=True), made)


def test_the_licence_of_metas_weights_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = network()
    save_mae(made, tmp_path / "ours.safetensors", {})
    save_file(hub_layout(made.state_dict()), tmp_path / "hub.safetensors")
    save_file(dict(made.state_dict()), tmp_path / "authors.safetensors")
    with caplog.at_level(logging.INFO, logger="adq_wds"):
        load_mae(tmp_path / "ours.safetensors")
        assert caplog.text == ""
        for name, whose in (("hub", "transformers' ViTMAE"), ("authors", "the MAE authors")):
            load_mae(tmp_path / f"{name}.safetensors", heads=(4, 3))
            assert re.search(f"layout of {whose}; .* under CC-BY-NC 4.0: not for commercial use", caplog.text)
            caplog.clear()


def test_norm_pix_is_as_the_file_says_or_as_told(tmp_path: Path) -> None:
    save_mae(network(WIDE), tmp_path / "a.safetensors", {})
    assert load_mae(tmp_path / "a.safetensors").size.norm_pix
    told = load_mae(tmp_path / "a.safetensors", norm_pix=False)
    assert not told.size.norm_pix
    assert told.revision != load_mae(tmp_path / "a.safetensors").revision


# Another image size


def test_at_another_size_only_positions_are_interpolated(tmp_path: Path) -> None:
    made = network()
    with torch.no_grad():  # of a slope, so that interpolation is seen to follow it
        made.pos_embed[0, 1:] = torch.arange(3.0).repeat(3)[:, None]
    save_mae(made, tmp_path / "a.safetensors", {})
    found = load_mae(tmp_path / "a.safetensors", image_size=(48, 24))
    assert found.size == dataclasses.replace(SQUARE, image_size=(48, 24))
    assert found.pos_embed.shape == (1, 19, 16)
    columns = torch.arange(3.0)[:, None].expand(3, 6).numpy()
    assert found.pos_embed[0, 1:, 0].view(6, 3).T.tolist() == pytest.approx(columns, abs=1e-5)
    assert torch.equal(found.pos_embed[:, 0], made.pos_embed[:, 0])
    rest = {k: v for k, v in made.state_dict().items() if "pos_embed" not in k}
    assert all(torch.equal(found.state_dict()[k], v) for k, v in rest.items())
    images = torch.zeros(1, 48, 24, 3, dtype=torch.uint8)
    assert found.reconstruct(images, torch.zeros(1, 18, dtype=torch.bool)).shape == (1, 48, 24, 3)


def test_at_its_own_size_nothing_changes(tmp_path: Path) -> None:
    made = network()
    save_mae(made, tmp_path / "a.safetensors", {})
    assert_same(load_mae(tmp_path / "a.safetensors", image_size=24), made)
    with pytest.raises(ValueError, match=r"image_size=\(20, 20\): .*multiples of patch=8"):
        load_mae(tmp_path / "a.safetensors", image_size=20)


# What does not fit


Shape = tuple[int, ...] | None
CHANGES: list[tuple[str, Shape, str]] = [  # a tensor, its new shape or None for none, the error
    ("blocks.1.attn.qkv.bias", None, r"1 missing \('blocks\.1\.attn\.qkv\.bias'\)"),
    ("extra", (1,), r"1 unexpected \('extra'\)"),
    ("blocks.999999999.norm1.bias", (16,), r"1 unexpected \('blocks\.999999999\.norm1\.bias'\)"),
    ("norm.bias", (17,), r"1 of another shape \('norm\.bias' is \(17,\), expected \(16,\)\)"),
    ("decoder_pred.weight", (48, 12), r"'decoder_pred\.weight' is \(48, 12\), expected \(192, 12\)"),
    ("pos_embed", None, "pos_embed is missing, expected 3 dimensions"),
    ("pos_embed", (10, 16), r"pos_embed is of shape \(10, 16\), expected 3 dimensions"),
    ("pos_embed", (1, 8, 16), "7 position embeddings, 4 patches of 8 in"),
    ("pos_embed", (1, 0, 16), r"pos_embed is of shape \(1, 0, 16\), expected 3 dimensions, none empty"),
    ("patch_embed.proj.weight", (16, 192), "patch_embed.proj.weight is of shape"),
    ("decoder_embed.weight", (13, 16), "a width of 13 with 3 heads"),
]


@pytest.mark.parametrize(("key", "shape", "message"), CHANGES)
def test_unfit_keys_are_listed(tmp_path: Path, key: str, shape: tuple[int, ...] | None, message: str) -> None:
    state = dict(network().state_dict())
    state.pop(key, None)
    state |= {} if shape is None else {key: torch.zeros(shape)}
    with pytest.raises(ValueError, match=r"checkpoint .*a\.safetensors.*" + message):
        load_mae(save(state, tmp_path), heads=(4, 3))


def others() -> dict[str, tuple[State, str]]:
    """Files of other networks, and what is said of each."""
    state = dict(network().state_dict())
    hub, encoder = hub_layout(state), {k: v for k, v in state.items() if "decoder" not in k}
    bare = "an encoder without its decoder .*cannot rebuild images; take mae_visualize_vit"
    another = {f"encoder.{k}": v for k, v in encoder.items()}
    another["encoder_to_decoder.weight"] = torch.zeros(2, 2)
    another |= {f"decoder.{k}": v.clone() for k, v in state.items() if k.startswith("blocks")}
    vit = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=0)
    without_key = {k: v for k, v in hub.items() if k != "vit.encoder.layer.1.attention.attention.key.weight"}
    hub = {k: v for k, v in hub.items() if k.startswith("vit.")}
    return {
        "the authors' encoder": (encoder, bare),
        "the Hub's encoder": (hub, bare),
        "the Hub's ViTMAEModel": ({k.removeprefix("vit."): v for k, v in hub.items()}, bare),
        "timm's encoder": (dict(vit.state_dict()), bare),
        "another layout": (another, r"a masked autoencoder of another layout .*\(keys 'decoder\.blocks"),
        "a ResNet": (timm.create_model("resnet10t").state_dict(), r"holds no masked autoencoder \(keys 'bn1"),
        "no projection of keys": (
            without_key, r"missing \('blocks\.1\.attn\.qkv\.weight'\).*unexpected \('blocks\.1\.attn\.q\.weight', "
        ),
    }  # fmt: skip


@pytest.mark.parametrize("whose", others())
def test_another_network_is_refused_by_what_it_is(tmp_path: Path, whose: str) -> None:
    state, text = others()[whose]
    with pytest.raises(ValueError, match=text):
        load_mae(save(state, tmp_path), heads=(4, 3))


@pytest.mark.parametrize("prefix", ["model.", "net.mae."])
def test_an_autoencoder_behind_a_prefix_is_the_one_without_it(tmp_path: Path, prefix: str) -> None:
    made = network()
    path = save({prefix + k: v for k, v in made.state_dict().items()}, tmp_path)
    assert_same(load_mae(path, heads=(4, 3)), made)


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds neither model\.safetensors nor pytorch_model\.bin"):
        load_mae(tmp_path)
    with pytest.raises(ValueError, match=r"b\.safetensors: no such file"):
        load_mae(tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="device='gpu': expected 'cpu'"):
        load_mae(tmp_path / "a.safetensors", device="gpu")


# Damage and lies


DAMAGED_HEADERS = [
    ("{", "not JSON"), ("[" * 100_000, "not JSON"), ("[]", r"\[\], expected a JSON object"),
    ('{"heads": "4"}', "heads is '4'"), ('{"heads": true}', "heads is True"), ('{"norm_pix": 1}', "norm_pix is 1"),
    ('{"fill": "yes"}', "fill is 'yes'"), ('{"norm_eps": NaN}', "norm_eps is nan"),
    ('{"heads": 1' + "0" * 400 + "}", "heads is 10000"), ('{"mean": [1, 2, Infinity]}', r"mean is \[1, 2, inf\]"),
    ('{"mean": [[1], 2, 3]}', r"mean is \[\[1\], 2, 3\]"), ('{"image_size": null}', "image_size is None"),
]  # fmt: skip
LIES: list[tuple[dict[str, Any], str]] = [
    ({"image_size": [2**40, 2**40]}, "9 position embeddings, .* patches of 8"),
    ({"image_size": [24, 48]}, "9 position embeddings, 18 patches of 8"),
    ({"image_size": [24.0, 24.0]}, r"image_size=\(24\.0, 24\.0\)"),
    ({"image_size": [24]}, r"image_size=\(24,\)"),
    ({"heads": 2**60}, "a width of 16 with 1152921504606846976 heads"),
    ({"decoder_heads": -3}, "decoder_heads must be an integer >= 1, got -3"),
    ({"std": [1, 1, 0]}, r"std=\(1, 1, 0\)"),
    ({"image_size": [24, 24, 24]}, r"image_size=\(24, 24, 24\)"),
]


@pytest.mark.parametrize(
    ("entry", "kind", "message"),
    [
        *((entry, AdqError, rf"a\.safetensors: header entry 'mae': .*{text}.*fetch the file again")
          for entry, text in DAMAGED_HEADERS),
        *((json.dumps({"heads": 4, "decoder_heads": 3, **lie}), ValueError, text) for lie, text in LIES),
    ],
)  # fmt: skip
def test_a_header_that_is_damaged_or_lies_makes_nothing(
    tmp_path: Path, entry: str, kind: type[Exception], message: str
) -> None:
    path = save({k: v.half() for k, v in network().state_dict().items()}, tmp_path, {"mae": entry})
    with pytest.raises(kind, match=message):
        load_mae(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [("<html>", "config.json: not JSON"), ('{"num_attention_heads": [4]}', r"num_attention_heads is \[4\]")],
)
def test_a_damaged_config_is_an_error(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(AdqError, match=message):
        load_mae(save(hub_layout(network().state_dict()), tmp_path))


# The weights that come with the package


def test_the_built_in_one_is_small_and_says_how_it_was_made() -> None:
    assert BUILTIN_MAE.stat().st_size <= 4_000_000
    with safetensors.safe_open(BUILTIN_MAE, "pt") as file:
        header = file.metadata()
    assert header["script"] == "examples/train_mae.py"
    assert header["trained_on"] == "CIFAR-10 train"
    assert {"epochs", "seed"} <= json.loads(header["settings"]).keys()
    assert {"loss", "psnr_db", "step"} <= json.loads(header["reached"]).keys()
    mae = load_mae("builtin")
    assert (mae.size.image_size, mae.size.patch) == ((32, 32), 4)


def test_the_built_in_one_is_better_than_its_own_fill(cifar10: Path) -> None:
    shard = str(next(cifar10.glob("*test-000000.tar")))
    with open_shard(shard) as buffer:
        spans = itertools.islice(iter_spans(buffer, shard=shard), 100)
        pictures = [whole_image(read_sample(buffer, span, url=shard))[1] for span in spans]
    images = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
    positions = torch.rand(100, 64, generator=torch.Generator().manual_seed(0)).argsort(1)[:, :48]
    keep = torch.zeros(100, 64, dtype=torch.bool).scatter_(1, positions, True)
    patches = cut(images, 4)
    fill = smooth_fill(patches[torch.arange(100)[:, None], positions].float(), positions, (8, 8))
    rebuilt = cut(load_mae("builtin").reconstruct(images, keep), 4)
    of_mae, of_fill = ((found.float() - patches)[~keep].square().mean() for found in (rebuilt, fill))
    assert of_mae < 0.95 * of_fill


def test_a_missing_file_of_the_package_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "BUILTIN_MAE", tmp_path / "builtin-mae.safetensors")
    with pytest.raises(AdqError, match=r"builtin-mae\.safetensors: no such file; .*install that again"):
        load_mae("builtin")
