"""Does the training script draw what it says, resume exactly, and write weights that load?"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import safetensors
import torch

from adq_wds.mae.checkpoints import load_mae
from adq_wds.mae.network import MaeSize, MaskedAutoencoder
from adq_wds.mae.patches import cut
from tests.conftest import load_example

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_example("train_mae")


TINY = """--side 16 --patch 4 --width 16 --depth 1 --heads 2
--decoder-width 16 --decoder-depth 1 --decoder-heads 2"""
RUN = "--epochs 2 --batch 16 --warmup 2 --threads 1 --rate 3e-3 --average 0.5 " + TINY


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_mae(folder / "mae.safetensors").state_dict())


@pytest.mark.parametrize("stop_after", [1, 5, 8])
def test_stopped_anywhere_it_goes_on_as_if_it_had_not_been(
    script: ModuleType, make_shard: Callable[..., Path], tmp_path: Path, stop_after: int
) -> None:
    command = [str(make_shard("a.tar", 70)), *RUN.split()]  # 5 steps an epoch
    script.main([*command, "--scratch", str(tmp_path / "whole")])
    stopped = [*command, "--scratch", str(tmp_path / "parts")]
    script.main([*stopped, "--stop-after", str(stop_after)])
    assert reached(tmp_path / "parts")["step"] == stop_after
    script.main(stopped)
    found, expected = weights(tmp_path / "parts"), weights(tmp_path / "whole")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert reached(tmp_path / "parts")["loss"] == reached(tmp_path / "whole")["loss"]
    assert reached(tmp_path / "parts")["step"] == 10


def reached(folder: Path) -> dict[str, float]:
    with safetensors.safe_open(folder / "mae.safetensors", "pt") as file:
        found: dict[str, float] = json.loads(file.metadata()["reached"])
    return found


def test_weights_load_and_their_header_says_how_they_were_made(
    script: ModuleType, make_shard: Callable[..., Path], tmp_path: Path
) -> None:
    shard = make_shard("a.tar", 40, side=24, label=None)  # unlabelled, and larger than the network's images
    test = ["--test", str(shard), "--n-test", "20", "--trained-on", "noise"]
    script.main([str(shard), *RUN.split(), *test, "--norm-pix", "--no-fill", "--scratch", str(tmp_path)])
    network = load_mae(tmp_path / "mae.safetensors")
    assert (network.size.image_size, network.size.patch, network.size.heads) == ((16, 16), 4, 2)
    assert (network.size.norm_pix, network.size.fill) == (True, False)
    with safetensors.safe_open(tmp_path / "mae.safetensors", "pt") as file:
        header = file.metadata()
    assert header["script"] == "examples/train_mae.py"
    assert header["trained_on"] == "noise"
    assert json.loads(header["settings"])["epochs"] == 2
    assert str(tmp_path) not in json.dumps(header)
    found = reached(tmp_path)
    assert (found["epoch"], found["of_steps"]) == (2, 6)
    assert 5 < found["psnr_db"] < 40


def test_the_psnr_is_of_dropped_pixels_only(
    script: ModuleType, make_shard: Callable[..., Path], tmp_path: Path
) -> None:
    a = script.arguments().parse_args(
        [*TINY.split(), "train", "--test", str(make_shard("a.tar", 8)), "--scratch", "x"]
    )
    grey = MaskedAutoencoder(
        MaeSize((16, 16), 4, 16, 1, 2, 16, 1, 2, mean=(0.5,) * 3, std=(0.25,) * 3)
    ).eval()
    with torch.no_grad():
        grey.decoder_pred.weight.zero_()  # predicts 127.5 everywhere, rounded to 128
    images = torch.cat([images for (images,) in script.images_of(a.test, a, shuffle=False)])
    positions = script.draw_positions(8, (4, 4), 12, 0.0, torch.Generator().manual_seed(0))
    dropped = torch.ones(8, 16, dtype=torch.bool).scatter_(1, positions, False)
    squares = (cut(images, 4)[dropped].double() - 128).square()
    assert script.psnr(grey, a) == pytest.approx(10 * np.log10(255**2 / squares.mean().item()), abs=1e-6)


def n_neighbours(positions: torch.Tensor, grid: tuple[int, int]) -> float:
    """Pairs of dropped patches side by side, per image."""
    dropped = torch.ones(len(positions), grid[0] * grid[1]).scatter_(1, positions, 0.0).view(-1, *grid)
    pairs = (dropped[:, 1:] * dropped[:, :-1]).sum() + (dropped[:, :, 1:] * dropped[:, :, :-1]).sum()
    return float(pairs) / len(positions)


def test_kept_places_differ_and_clumped_drops_lie_together(script: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = {share: script.draw_positions(200, (8, 8), 48, share, generator) for share in (0.0, 1.0)}
    for positions in drawn.values():
        assert positions.shape == (200, 48)
        assert all(len(set(row)) == 48 and 0 <= min(row) <= max(row) < 64 for row in positions.tolist())
    assert n_neighbours(drawn[1.0], (8, 8)) > 1.5 * n_neighbours(drawn[0.0], (8, 8))
    kept = torch.zeros(64).scatter_add_(0, drawn[0.0].flatten(), torch.ones(200 * 48)) / 200
    assert (kept - 0.75).abs().max() < 0.15  # five standard deviations


def test_most_steps_drop_the_usual_share(script: ModuleType) -> None:
    a = argparse.Namespace(drop=0.25, usual=0.6, drop_range=(0.15, 0.6))
    generator = torch.Generator().manual_seed(0)
    drawn = np.array([script.draw_n_kept(64, a, generator) for _ in range(500)])
    assert (drawn == 48).mean() == pytest.approx(0.63, abs=0.08)
    assert (drawn.min(), drawn.max()) == (26, 54)
    nothing = argparse.Namespace(drop=0.0, usual=1.0, drop_range=(0.0, 0.0))
    assert (
        script.draw_n_kept(4, nothing, generator) == 3
    )  # a step without a dropped patch would teach nothing


def test_the_loss_is_of_dropped_patches_only(script: ModuleType) -> None:
    torch.manual_seed(0)
    network = MaskedAutoencoder(MaeSize((16, 16), 4, 16, 1, 2, 16, 1, 2)).eval()
    patches = torch.randint(0, 256, (2, 16, 4, 4, 3), dtype=torch.uint8)
    positions = torch.tensor([[0, 3, 7], [1, 2, 15]])
    loss = float(script.squared_error(network, patches, positions).detach())
    total, n = 0.0, 0
    for i in range(2):
        with torch.no_grad():
            predicted = network(network.normalised(patches[i : i + 1, positions[i]]), positions[i : i + 1])
        for place in set(range(16)) - set(positions[i].tolist()):
            difference = predicted[0, place] - network.normalised(patches[i, place])
            total, n = total + float(difference.square().sum()), n + 48
    assert loss == pytest.approx(total / n, rel=1e-5)
