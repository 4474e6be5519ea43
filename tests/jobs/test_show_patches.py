"""The picture of dropped patches: numbers that are right, a file that opens, errors that say what to do."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import adq_wds as adq
from adq_wds.cli.main import main
from adq_wds.jobs.show_patches import show_patches
from adq_wds.mae.network import MaeSize, MaskedAutoencoder
from adq_wds.report.patch_sheet import heat, holes, psnr
from adq_wds.samples.patch_file import decode, encode_patches, encode_whole, keep_patches
from adq_wds.writing.write_shards import write_kept
from tests.conftest import Caplog, Capsys


@pytest.fixture
def shard(make_shard: Callable[..., Path]) -> str:
    return str(make_shard("a.tar", 9))


def network(side: int = 32, patch: int = 16) -> MaskedAutoencoder:
    torch.manual_seed(0)
    return MaskedAutoencoder(MaeSize((side, side), patch, 16, 1, 2, 8, 1, 2)).eval()


def test_numbers_are_those_of_the_files_and_the_network(shard: str, tmp_path: Path) -> None:
    texture, mae = adq.importance("texture"), network(64)
    shown = show_patches(shard, texture, tmp_path / "p.png", mae=mae, size=64, patch_keep=0.75, samples=3)
    by_key = {sample["__key__"]: sample for sample in adq.ShardDataset(shard)}
    drop = adq.DropPatches(texture, keep=0.75, size=64)
    for each in shown:
        (look,) = drop.look([by_key[each.key]])
        (kept,) = drop.apply([by_key[each.key]])
        image = keep_patches(look.pixels[0], kept["positions"], 16)
        assert each.whole_bytes == len(encode_whole(look.pixels[0]))
        assert each.stored_bytes == len(encode_patches(image))
        stored = decode(encode_patches(image))
        patches, places = (torch.from_numpy(x.copy())[None] for x in (stored.patches, stored.kept))
        rebuilt = mae.reconstruct_patches(patches, places)[0].numpy()
        dropped = ~image.mask.reshape(4, 4).repeat(16, 0).repeat(16, 1)
        assert each.psnr == pytest.approx(psnr(look.pixels[0], rebuilt, dropped))
    with Image.open(tmp_path / "p.png") as picture:
        assert (picture.format, picture.mode) == ("PNG", "RGB")
        assert picture.width == 5 * 234 + 10
    again = show_patches(shard, texture, tmp_path / "Q.PNG", size=64, samples=3)
    assert [each.key for each in again] == [each.key for each in shown]
    assert Image.open(tmp_path / "Q.PNG").format == "PNG"


def test_small_patches_have_no_jpeg_and_nothing_dropped_no_psnr(shard: str, tmp_path: Path) -> None:
    options: Any = {"patch": 4, "size": 32, "samples": 1}
    texture = adq.importance("texture", patch=4)
    (small,) = show_patches(shard, texture, tmp_path / "p.png", mae=network(32, 4), **options)
    assert (small.stored_bytes, small.ratio) == (None, None)
    with pytest.raises(ValueError, match=r"patch_keep=0.001 keeps none of 64 patches; give at least 0.0156"):
        show_patches(shard, texture, tmp_path / "p.png", patch_keep=0.001, **options)
    (whole,) = show_patches(shard, texture, tmp_path / "p.png", mae=network(32, 4), patch_keep=1.0, **options)
    assert whole.psnr is None


def test_a_network_for_other_images_is_refused(shard: str, tmp_path: Path) -> None:
    texture = adq.importance("texture")
    with pytest.raises(ValueError, match="the network rebuilds patches of 4 pixels, not 16; give that patch"):
        show_patches(shard, texture, tmp_path / "p.png", mae=network(32, 4))
    with pytest.raises(ValueError, match=r"the network's images have \(2, 2\) patches, these \(4, 4\)"):
        show_patches(shard, texture, tmp_path / "p.png", mae=network(32), size=64)
    with pytest.raises(ValueError, match="samples must be an integer >= 1, got 0"):
        show_patches(shard, texture, tmp_path / "p.png", samples=0)
    assert not (tmp_path / "p.png").exists()


@pytest.mark.parametrize("name", ["p.txt", "p.jpg", "p", "png"])
def test_a_picture_of_another_name_than_a_png_is_refused(shard: str, tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}' will hold a PNG; give it a name that ends in .png"):
        show_patches(shard, adq.importance("texture"), tmp_path / name)
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("keep", [1.5, float("nan"), "all"])
def test_a_wrong_ratio_is_called_by_its_name(shard: str, tmp_path: Path, keep: Any) -> None:
    with pytest.raises(ValueError, match=r"^patch_keep must be a number in \[0, 1\], got "):
        show_patches(shard, adq.importance("texture"), tmp_path / "p.png", patch_keep=keep)


def test_the_built_in_classifier_is_named(shard: str, tmp_path: Path, caplog: Caplog) -> None:
    with caplog.at_level(logging.INFO, "adq_wds"):
        show_patches(shard, adq.importance("texture"), tmp_path / "p.png", size=32, samples=1)
        assert not caplog.text
        show_patches(shard, adq.importance("gradcam"), tmp_path / "p.png", size=32, samples=1)
    assert "patches are kept by what 'builtin' looks at, a small classifier" in caplog.text


def test_images_that_lack_patches_already_are_refused(
    make_shard: Callable[..., Path], tmp_path: Path
) -> None:
    random = adq.importance("random")
    whole = make_shard("large.tar", 9, side=96)
    write_kept(whole, None, tmp_path / "p" / "%d.tar", patch_keep=0.5, importance=random, size=64)
    for options in ({}, {"image": "patches.jpg"}):
        text = r"shard 0.tar, key 's0.*, field 'patches.jpg': some of its .* take the shards"
        with pytest.raises(adq.SampleError, match=text):
            show_patches(tmp_path / "p" / "0.tar", random, tmp_path / "p.png", size=64, **options)
    assert not (tmp_path / "p.png").exists()


def test_the_command_draws_and_tells(shard: str, tmp_path: Path, capsys: Capsys) -> None:
    flags = ["--size", "64", "--importance", "texture", "--samples", "2"]
    assert main(["patches", shard, "-o", str(tmp_path / "p.png"), *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(tmp_path / "p.png")
    assert len(lines) == 3
    assert "B, patches " in lines[1]
    assert main(["patches", shard, "-o", str(tmp_path / "p.png"), "--json", *flags]) == 0
    assert len(json.loads(capsys.readouterr().out)["images"]) == 2
    assert main(["patches", shard, "-o", str(tmp_path / "no" / "p.png"), *flags]) == 1
    assert "cannot write" in capsys.readouterr().err
    assert main(["patches", shard, "-o", str(tmp_path / "p.png"), "--mae", "builtin", *flags]) == 2


def test_pixels_are_where_they_should_be() -> None:
    image = np.full((8, 8, 3), 100, dtype=np.uint8)
    kept = holes(image, np.array([0, 3]), (2, 2), 4)
    assert (kept[:4, :4] == 100).all()
    assert (kept[4:, 4:] == 100).all()
    assert (kept[:4, 4:] != 100).any(axis=2).all()
    warm = heat(np.array([0.0, 1.0, 2.0, 4.0]), (2, 2), 4, image).astype(int)
    assert warm[0, 0, 0] < warm[0, 7, 0] < warm[7, 0, 0] < warm[7, 7, 0]
    assert (heat(np.zeros(4), (2, 2), 4, image) == heat(np.ones(4), (2, 2), 4, image)).all()
    other = image.copy()
    other[0, 0] += 10
    assert psnr(image, image) == float("inf")
    assert np.isclose(psnr(image, other), 10 * np.log10(255**2 / (100 / 64)))
    where = np.zeros((8, 8), dtype=bool)
    where[0, 0] = True
    assert np.isclose(psnr(image, other, where), 10 * np.log10(255**2 / 100))


def test_a_pickle_may_be_the_networks_alone(shard: str, tmp_path: Path, capsys: Capsys) -> None:
    mae = tmp_path / "mae.pth"
    torch.save({"model": network(64).state_dict()}, mae)
    given = f"-o {tmp_path / 'p.png'} --mae {mae} --size 64 --importance random --samples 1".split()
    assert main(["patches", shard, *given]) == 2
    assert "read only with --allow-pickle" in capsys.readouterr().err
    assert main(["patches", shard, *given, "--allow-pickle"]) == 2
    assert "how many heads a width of 16 has" in capsys.readouterr().err  # so it was read
