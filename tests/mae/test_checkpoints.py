"""Are autoencoders read from each of the three layouts, strictly, and is nothing made on a file's word?"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import re
from collections.abc import Callable
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
from adq_wds.mae.patches import cut, sine_positions, smooth_fill
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


def hub_layout(state: State) -> State:
    """The names of `facebook/vit-mae-base`, written out one by one."""
    named = {}
    for key, value in state.items():
        match key.split("."):
            case [("blocks" | "decoder_blocks") as blocks, n, *inside]:
                place = "vit.encoder.layer" if blocks == "blocks" else "decoder.decoder_layers"
                match inside:
                    case ["attn", "qkv", kind]:
                        for part, rows in zip(("query", "key", "value"), value.chunk(3), strict=True):
                            named[f"{place}.{n}.attention.attention.{part}.{kind}"] = rows.clone()
                    case ["attn", "proj", kind]:
                        named[f"{place}.{n}.attention.output.dense.{kind}"] = value
                    case ["norm1", kind]:
                        named[f"{place}.{n}.layernorm_before.{kind}"] = value
                    case ["norm2", kind]:
                        named[f"{place}.{n}.layernorm_after.{kind}"] = value
                    case ["mlp", "fc1", kind]:
                        named[f"{place}.{n}.intermediate.dense.{kind}"] = value
                    case ["mlp", "fc2", kind]:
                        named[f"{place}.{n}.output.dense.{kind}"] = value
            case ["cls_token"]:
                named["vit.embeddings.cls_token"] = value
            case ["pos_embed"]:
                named["vit.embeddings.position_embeddings"] = value
            case ["patch_embed", "proj", kind]:
                named[f"vit.embeddings.patch_embeddings.projection.{kind}"] = value
            case ["norm", kind]:
                named[f"vit.layernorm.{kind}"] = value
            case _:
                named[f"decoder.{key}"] = value
    return named


CONFIG = {
    "num_attention_heads": 4,
    "decoder_num_attention_heads": 3,
    "norm_pix_loss": False,
    "layer_norm_eps": 1e-12,
    "image_size": 24,
    "hidden_act": "gelu",
}


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


def test_the_authors_layout_needs_heads_where_widths_are_not_theirs(tmp_path: Path) -> None:
    made, path = network(), tmp_path / "mae_visualize_vit_tiny.pth"
    torch.save({"model": made.state_dict()}, path)
    found = load_mae(path, heads=(4, 3), allow_pickle=True)
    assert found.size == SQUARE
    assert_same(found, made)
    with pytest.raises(
        ValueError, match=r"how many heads a width of 16 has; give heads=\(encoder, decoder\)"
    ):
        load_mae(path, allow_pickle=True)
    with pytest.raises(ValueError, match="a pickle, read only with allow_pickle=True"):
        load_mae(path, heads=(4, 3))


@pytest.mark.parametrize(("width", "heads"), [(768, 12), (1024, 16), (1280, 16)])
def test_base_large_and_huge_need_no_heads(tmp_path: Path, width: int, heads: int) -> None:
    size = MaeSize((16, 16), 8, width=width, depth=1, heads=heads, decoder_width=512, decoder_depth=1, decoder_heads=16)  # fmt: skip
    save_file(dict(MaskedAutoencoder(size).state_dict()), tmp_path / "a.safetensors")
    assert load_mae(tmp_path / "a.safetensors").size == size


def test_a_width_that_is_only_published_of_decoders_says_nothing_about_an_encoder(tmp_path: Path) -> None:
    size = MaeSize(
        (16, 16), 8, width=512, depth=1, heads=8, decoder_width=512, decoder_depth=1, decoder_heads=16
    )
    save_file(dict(MaskedAutoencoder(size).state_dict()), tmp_path / "a.safetensors")
    with pytest.raises(
        ValueError, match=r"how many heads a width of 512 has; give heads=\(encoder, decoder\)"
    ):
        load_mae(tmp_path / "a.safetensors")
    assert load_mae(tmp_path / "a.safetensors", heads=(8, 16)).size == size


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


@pytest.mark.parametrize("key", ["patch_embed.proj.weight", "decoder_embed.weight", "pos_embed"])
def test_an_empty_tensor_with_huge_sides_is_refused(tmp_path: Path, key: str) -> None:
    """S5: no byte stands behind such a side, and a product of sides may overflow."""
    dims = {
        "patch_embed.proj.weight": (0, 3, 2**30, 2**30),
        "decoder_embed.weight": (2**40, 0),
        "pos_embed": (0, 2**60, 1),
    }
    save_file({**network().state_dict(), key: torch.empty(dims[key])}, tmp_path / "a.safetensors")
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


def test_layouts_agree_on_a_prediction(tmp_path: Path) -> None:
    made = network()
    save_mae(made, tmp_path / "ours.safetensors", {})
    save_file(hub_layout(made.state_dict()), tmp_path / "hub.safetensors")
    save_file(dict(made.state_dict()), tmp_path / "authors.safetensors")
    images = torch.randint(0, 256, (2, 24, 24, 3), dtype=torch.uint8)
    keep = torch.arange(9).expand(2, -1) % 2 == 0
    answers = [
        load_mae(tmp_path / f"{name}.safetensors", heads=(4, 3)).reconstruct(images, keep)
        for name in ("ours", "hub", "authors")
    ]
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])
    assert not torch.equal(answers[0], images)


def test_the_licence_of_metas_weights_is_said_and_ours_has_no_such_notice(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
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


def test_at_another_size_position_embeddings_are_interpolated_and_all_else_is_kept(tmp_path: Path) -> None:
    made = network()
    with torch.no_grad():  # of a slope, so that interpolation is seen to follow it
        made.pos_embed[0, 1:] = torch.arange(3.0).repeat(3)[:, None]
    save_mae(made, tmp_path / "a.safetensors", {})
    found = load_mae(tmp_path / "a.safetensors", image_size=(48, 24))
    assert found.size == dataclasses.replace(SQUARE, image_size=(48, 24))
    assert found.pos_embed.shape == (1, 19, 16)
    assert found.pos_embed[0, 1:, 0].view(6, 3).T.tolist() == pytest.approx(
        torch.arange(3.0)[:, None].expand(3, 6).numpy(), abs=1e-5
    )
    assert torch.equal(found.pos_embed[:, 0], made.pos_embed[:, 0])
    rest = {k: v for k, v in made.state_dict().items() if "pos_embed" not in k}
    assert all(torch.equal(found.state_dict()[k], v) for k, v in rest.items())
    images = torch.zeros(1, 48, 24, 3, dtype=torch.uint8)
    assert found.reconstruct(images, torch.zeros(1, 18, dtype=torch.bool)).shape == (1, 48, 24, 3)


def test_at_its_own_size_nothing_changes(tmp_path: Path) -> None:
    made = network()
    save_mae(made, tmp_path / "a.safetensors", {})
    assert_same(load_mae(tmp_path / "a.safetensors", image_size=24), made)
    with pytest.raises(
        ValueError, match=r"image_size=\(20, 20\): expected height and width in multiples of patch=8"
    ):
        load_mae(tmp_path / "a.safetensors", image_size=20)


# What does not fit


def changed(change: Callable[[State], Any]) -> State:
    state = dict(network().state_dict())
    change(state)
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("blocks.1.attn.qkv.bias"), r"1 missing \('blocks\.1\.attn\.qkv\.bias'\)"),
        (lambda s: s.update(extra=torch.zeros(1)), r"1 unexpected \('extra'\)"),
        (
            lambda s: s.update({"blocks.999999999.norm1.bias": torch.zeros(16)}),
            r"'blocks\.3\.norm1\.weight'.*1 unexpected \('blocks\.999999999\.norm1\.bias'\)",
        ),
        (
            lambda s: s.update({"norm.bias": torch.zeros(17)}),
            r"1 of another shape \('norm\.bias' is \(17,\), expected \(16,\)\)",
        ),
        (
            lambda s: s.update({"decoder_pred.weight": torch.zeros(48, 12)}),
            r"'decoder_pred\.weight' is \(48, 12\), expected \(192, 12\)",
        ),
        (lambda s: s.pop("pos_embed"), "pos_embed is missing, expected 3 dimensions"),
        (
            lambda s: s.update(pos_embed=torch.zeros(10, 16)),
            r"pos_embed is of shape \(10, 16\), expected 3 dimensions",
        ),
        (lambda s: s.update(pos_embed=torch.zeros(1, 8, 16)), "7 position embeddings, 4 patches of 8 in"),
        (
            lambda s: s.update(pos_embed=torch.zeros(1, 0, 16)),
            r"pos_embed is of shape \(1, 0, 16\), expected 3 dimensions, none empty",
        ),
        (
            lambda s: s.update({"patch_embed.proj.weight": torch.zeros(16, 192)}),
            "patch_embed.proj.weight is of shape",
        ),
        (
            lambda s: s.update({"decoder_embed.weight": torch.zeros(13, 16)}),
            "a width of 13 with 3 heads",
        ),
    ],
)
def test_keys_that_do_not_fit_are_listed(
    tmp_path: Path, change: Callable[[State], Any], message: str
) -> None:
    save_file(changed(change), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"checkpoint .*a\.safetensors.*" + message):
        load_mae(tmp_path / "a.safetensors", heads=(4, 3))


def test_a_hub_file_without_its_keys_projection_is_refused_by_name(tmp_path: Path) -> None:
    state = hub_layout(network().state_dict())
    del state["vit.encoder.layer.1.attention.attention.key.weight"]
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(
        ValueError,
        match=r"missing \('blocks\.1\.attn\.qkv\.weight'\).*unexpected \('blocks\.1\.attn\.q\.weight', ",
    ):
        load_mae(tmp_path / "a.safetensors", heads=(4, 3))


def encoder_only() -> dict[str, State]:
    state = network().state_dict()
    authors = {k: v for k, v in state.items() if not k.startswith(("decoder", "mask_token"))}
    hub = {k: v for k, v in hub_layout(dict(state)).items() if k.startswith("vit.")}
    vit = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=0)
    return {
        "the authors'": authors,
        "the Hub's": hub,
        "the Hub's ViTMAEModel": {k.removeprefix("vit."): v for k, v in hub.items()},
        "timm's": dict(vit.state_dict()),
    }


@pytest.mark.parametrize("whose", encoder_only())
def test_an_encoder_without_its_decoder_is_refused(tmp_path: Path, whose: str) -> None:
    save_file(encoder_only()[whose], tmp_path / "a.safetensors")
    with pytest.raises(
        ValueError, match=r"an encoder without its decoder .*cannot rebuild images; take mae_visualize_vit"
    ):
        load_mae(tmp_path / "a.safetensors")


def test_an_autoencoder_of_another_layout_is_called_that(tmp_path: Path) -> None:
    state = network().state_dict()
    other = {f"encoder.{k}": v.clone() for k, v in state.items() if "decoder" not in k}
    other |= {"encoder_to_decoder.weight": torch.zeros(2, 2), "mask_token": torch.zeros(1)}
    other |= {f"decoder.{k}": v.clone() for k, v in state.items() if k.startswith("blocks")}
    save_file(other, tmp_path / "a.safetensors")
    with pytest.raises(
        ValueError, match=r"holds a masked autoencoder of another layout .*\(keys 'decoder\.blocks"
    ):
        load_mae(tmp_path / "a.safetensors")


@pytest.mark.parametrize("prefix", ["model.", "net.mae."])
def test_an_autoencoder_behind_a_prefix_is_the_one_without_it(tmp_path: Path, prefix: str) -> None:
    state = network().state_dict()
    save_file({prefix + k: v for k, v in state.items()}, tmp_path / "a.safetensors")
    got = load_mae(tmp_path / "a.safetensors", heads=(4, 3)).state_dict()
    assert got.keys() == state.keys()
    assert all(torch.equal(got[k], state[k]) for k in state)


def test_another_network_is_refused(tmp_path: Path) -> None:
    save_file(dict(timm.create_model("resnet10t").state_dict()), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"holds no masked autoencoder \(keys 'bn1"):
        load_mae(tmp_path / "a.safetensors")


def test_a_folder_without_weights_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds neither model\.safetensors nor pytorch_model\.bin"):
        load_mae(tmp_path)
    with pytest.raises(ValueError, match=r"b\.safetensors: no such file"):
        load_mae(tmp_path / "b.safetensors")
    save_mae(network(), tmp_path / "a.safetensors", {})
    with pytest.raises(ValueError, match="device='gpu': expected 'cpu'"):
        load_mae(tmp_path / "a.safetensors", device="gpu")


# Damage and lies


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_mae(network(), path, {})
    whole = path.read_bytes()
    for n_bytes in [*range(200), *range(200, len(whole), 997), len(whole) - 1]:
        path.write_bytes(whole[:n_bytes])
        with pytest.raises(AdqError, match="not a whole safetensors file"):
            load_mae(path)


def with_header(path: Path, entry: str) -> Path:
    save_file({k: v.half() for k, v in network().state_dict().items()}, path, metadata={"mae": entry})
    return path


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", r"\[\], expected a JSON object"),
        ('{"heads": "4"}', "heads is '4'"),
        ('{"heads": true}', "heads is True"),
        ('{"norm_pix": 1}', "norm_pix is 1"),
        ('{"fill": "yes"}', "fill is 'yes'"),
        ('{"norm_eps": NaN}', "norm_eps is nan"),
        ('{"heads": 1' + "0" * 400 + "}", "heads is 10000"),
        ('{"mean": [1, 2, Infinity]}', r"mean is \[1, 2, inf\]"),
        ('{"mean": [[1], 2, 3]}', r"mean is \[\[1\], 2, 3\]"),
        ('{"image_size": null}', "image_size is None"),
    ],
)
def test_a_damaged_header_is_an_error(tmp_path: Path, entry: str, message: str) -> None:
    with pytest.raises(
        AdqError, match=r"checkpoint .*a\.safetensors: header entry 'mae': .*fetch the file again"
    ) as caught:
        load_mae(with_header(tmp_path / "a.safetensors", entry))
    assert re.search(message, str(caught.value))


@pytest.mark.parametrize(
    ("lie", "message"),
    [
        ({"image_size": [2**40, 2**40]}, "9 position embeddings, .* patches of 8"),
        ({"image_size": [24, 48]}, "9 position embeddings, 18 patches of 8"),
        ({"image_size": [24.0, 24.0]}, r"image_size=\(24\.0, 24\.0\)"),
        ({"image_size": [24]}, r"image_size=\(24,\)"),
        ({"heads": 2**60}, "a width of 16 with 1152921504606846976 heads"),
        ({"decoder_heads": -3}, "decoder_heads=-3"),
        ({"std": [1, 1, 0]}, r"std=\(1, 1, 0\)"),
        ({"image_size": [24, 24, 24]}, r"image_size=\(24, 24, 24\)"),
    ],
)
def test_a_header_that_lies_is_refused_before_anything_is_made(
    tmp_path: Path, lie: dict[str, Any], message: str
) -> None:
    path = with_header(tmp_path / "a.safetensors", json.dumps({"heads": 4, "decoder_heads": 3, **lie}))
    with pytest.raises(ValueError, match=message):
        load_mae(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [("<html>", "config.json: not JSON"), ('{"num_attention_heads": [4]}', r"num_attention_heads is \[4\]")],
)
def test_a_damaged_config_is_an_error(tmp_path: Path, text: str, message: str) -> None:
    save_file(hub_layout(network().state_dict()), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(AdqError, match=message):
        load_mae(tmp_path)


def test_fresh_position_embeddings_survive_a_round_trip_closely(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_mae(MaskedAutoencoder(SQUARE), tmp_path / "a.safetensors", {})
    found = load_mae(tmp_path / "a.safetensors")
    torch.testing.assert_close(found.pos_embed[0, 1:], sine_positions((3, 3), 16), atol=5e-4, rtol=0)


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


def test_the_built_in_one_is_nearer_to_photographs_than_its_own_fill(cifar10: Path) -> None:
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
