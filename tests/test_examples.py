"""The examples run as they are, as a newcomer would run them."""

import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import adq_wds as adq
from adq_wds.mae.checkpoints import save_mae
from adq_wds.mae.network import MaeSize, MaskedAutoencoder
from adq_wds.mae.patches import cut
from adq_wds.models import SDEdit, load_scheduler, load_unet
from adq_wds.stream.state import sealed
from adq_wds.writing.write_shards import write_kept
from tests.conftest import Capsys, MonkeyPatch, load_example, write_tar
from tests.programs import FILE, run

EXAMPLES = Path(__file__).parent.parent / "examples"
SMALLER: Any = {"patch_keep": 0.75, "importance": "random", "size": 64}


def example(name: str, *arguments: str) -> str:
    """What it prints."""
    done = run(FILE, str(EXAMPLES / name), *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_score_of_ones_own_decides_in_a_plan(make_shard: Callable[..., Path], tmp_path: Path) -> None:
    shard = make_shard("a.tar", 60)
    out = example("own_score.py", str(shard), "--encoder", "thumbnail", "--out", str(tmp_path / "f"))
    assert "<Plan 12 of 60 samples in 1 shards" in out
    assert out.count("colourfulness") == 10


def test_training_on_a_plan_goes_on_where_it_was_stopped(
    make_shard: Callable[..., Path], tmp_path: Path
) -> None:
    shards = [str(make_shard(f"t-{i}.tar", 60, first=60 * i)) for i in range(2)]
    plan = tmp_path / "plan.parquet"
    adq.Plan.from_keys(shards, [f"s{i:05d}" for i in range(0, 120, 2)]).save(plan)
    command = ["shard_dataset.py", f"{tmp_path}/t-*.tar", str(plan), "--batch-size", "4", "--workers", "1"]
    command += ["--checkpoint", str(tmp_path / "state.json")]
    first = example(*command)
    assert "<ShardDataset 60 samples in 2 shards, epoch 0>, 15 batches an epoch" in first
    assert first.count("15 batches, mean loss") == 2
    state = json.loads((tmp_path / "state.json").read_text())
    assert (state["epoch"], state["t"]) == (2, 0)
    before = {name: value for name, value in {**state, "epoch": 1, "t": 40}.items() if name != "checksum"}
    (tmp_path / "state.json").write_text(json.dumps(sealed(before)))
    again = example(*command)
    assert "epoch 1: 5 batches" in again
    assert again.count("mean loss") == 1


def test_one_pass_keeps_a_part_of_shards_no_fit_has_seen(
    make_shard: Callable[..., Path], tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    seen, new = make_shard("a.tar", 80), make_shard("b.tar", 200, first=80)
    options = ["--out", str(tmp_path / "f"), "--min-pilot", "10", "--keep", "0.5", "--workers", "1"]
    out = example("one_pass.py", str(seen), str(new), "--encoder", "thumbnail", *options)
    assert "<Codebook 10 bins, 2 classes, thumbnail, D = 192>" in out
    kept = int(out.partition("kept ")[2].split()[0])
    assert 70 <= kept <= 130  # 100 expected, four standard deviations either way
    counts = [int(line.split()[-1]) for line in out.splitlines() if line.startswith("bin ")]
    assert (len(counts), sum(counts)) == (10, kept)


@pytest.mark.parametrize("given", [True, False], ids=["of one's own", "made by the example"])
def test_a_fifth_of_a_set_of_instructions_is_kept(given: bool, tmp_path: Path) -> None:
    arguments = []
    if given:
        texts = [f"Say {i} in words, {'please' * (i % 4)}" for i in range(40)]
        members = [(f"k{i}.json", json.dumps({"instruction": text}).encode()) for i, text in enumerate(texts)]
        arguments = [str(write_tar(tmp_path / "t.tar", members))]
    out = example("instruction_tuning.py", *arguments)
    assert ("<Plan 8 of 40 samples in 1 shards" if given else "<Plan 60 of 300 samples in 2 shards") in out
    assert len(out.splitlines()) == 4


@pytest.mark.parametrize("stored", [True, False])
def test_a_vision_transformer_learns_from_kept_patches_alone(
    make_shard: Callable[..., Path], tmp_path: Path, stored: bool, monkeypatch: MonkeyPatch, capsys: Capsys
) -> None:
    make_shard("in/a.tar", 64, side=64)
    options = ["--size", "64", "--depth", "1", "--classes", "2", "--workers", "0", "--epochs", "6"]
    options += ["--batch-size", "16"]
    if stored:
        write_kept(tmp_path / "in", None, tmp_path / "small" / "%d.tar", **SMALLER)
    else:
        options += ["--drop", "random"]
    folder = tmp_path / ("small" if stored else "in")
    monkeypatch.setattr(sys, "argv", ["vit_on_patches.py", str(folder), *options])
    runpy.run_path(str(EXAMPLES / "vit_on_patches.py"), run_name="__main__")  # here, torch is loaded
    out = capsys.readouterr().out
    assert out.count("4 batches of 12 of 16 patches") == 6
    losses = [float(line.rpartition(" ")[2]) for line in out.splitlines()]
    assert losses[-1] < losses[0] - 0.05


def test_with_all_patches_kept_it_is_the_vision_transformer() -> None:
    forward = runpy.run_path(str(EXAMPLES / "vit_on_patches.py"))["forward"]
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=3).eval()
    images = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    everywhere = torch.arange(16).expand(2, -1)
    with torch.no_grad():
        whole = vit((images.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5)
        assert torch.allclose(forward(vit, cut(images, 16), everywhere), whole, atol=1e-5)
        turned = everywhere.flip(1)  # a set of patches, in whatever order
        assert torch.allclose(forward(vit, cut(images, 16).flip(1), turned), whole, atol=1e-5)


@pytest.mark.parametrize("stored", [True, False], ids=["stored", "dropped on the way"])
def test_a_classifier_trains_on_images_rebuilt_on_the_fly(
    make_shard: Callable[..., Path], tmp_path: Path, monkeypatch: MonkeyPatch, capsys: Capsys, stored: bool
) -> None:
    for i in range(2):
        make_shard(f"in/t-{i}.tar", 32, first=32 * i)
    options = ["--classes", "2", "--workers", "0", "--epochs", "2", "--batch-size", "16"]
    folder = tmp_path / "in"
    if stored:
        folder = tmp_path / "small"
        write_kept(tmp_path / "in", None, folder / "%d.tar", **SMALLER)
        torch.manual_seed(0)
        network = MaskedAutoencoder(MaeSize((64, 64), 16, 16, 1, 2, 8, 1, 2))
        save_mae(network, tmp_path / "mae.safetensors", {})
        options += ["--mae", str(tmp_path / "mae.safetensors")]
    else:
        options += ["--drop", "gradcam++"]
    monkeypatch.setattr(sys, "argv", ["train_on_patches.py", str(folder), *options])
    runpy.run_path(str(EXAMPLES / "train_on_patches.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert out.count(f"4 batches of {'64x64' if stored else '32x32'}, mean loss") == 2


def test_hugging_faces_streams_give_exactly_the_kept_samples(
    make_shard: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip("datasets", reason="Hugging Face datasets is not installed")
    shards = [str(make_shard(f"t-{i}.tar", 60, first=60 * i)) for i in range(2)]
    plan = tmp_path / "plan.parquet"
    adq.Plan.from_keys(shards, [f"s{i:05d}" for i in range(0, 120, 5)]).save(plan)
    command = [sys.executable, str(EXAMPLES / "huggingface_datasets.py"), f"{tmp_path}/t-*.tar", str(plan)]
    homes = {name: str(tmp_path / "cache") for name in ("HF_HOME", "HF_DATASETS_CACHE")}
    out = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **homes})
    assert out.stdout == "24 of the 24 kept samples, out of 120\n"


@pytest.mark.slow
def test_ray_data_embeds_exactly_the_kept_samples(make_shard: Callable[..., Path], tmp_path: Path) -> None:
    """By a cluster of its own, which Ray gives up where it does not start within 30 seconds: then another."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install adq-wds[ray]")
    pytest.importorskip("pandas", reason="Ray Data needs pandas: pip install adq-wds[ray]")
    shards = [str(make_shard(f"t-{i}.tar", 60, first=60 * i)) for i in range(2)]
    plan = tmp_path / "plan.parquet"
    adq.Plan.from_keys(shards, [f"s{i:05d}" for i in range(0, 120, 5)]).save(plan)
    command = [sys.executable, str(EXAMPLES / "ray_data.py"), f"{tmp_path}/t-*.tar", str(plan)]
    command += ["--encoder", "thumbnail", "--num-cpus", "2"]
    for _ in range(5):
        out = subprocess.run(command, capture_output=True, text=True, timeout=900)
        if "timed out during startup" not in out.stderr:
            break
    assert out.stdout == "24 of the 24 kept samples, out of 120, embedded to 192 numbers each\n", out.stderr


needs_diffusers = pytest.mark.skipif(
    importlib.util.find_spec("diffusers") is None or importlib.util.find_spec("sklearn") is None,
    reason="needs diffusers and scikit-learn",
)


@needs_diffusers
def test_a_student_is_trained_without_data(tmp_path: Path) -> None:
    few = ["--rounds", "1", "--steps", "5", "--teacher-steps", "20", "--unet-steps", "3"]
    command = [sys.executable, str(EXAMPLES / "dda.py"), "-o", str(tmp_path), *few]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    table = [line for line in lines if line.startswith(("bank", "real", "teacher"))]
    assert [line[:28].strip() for line in table] == [
        "teacher", "bank", "bank + variants", "bank + top half by cosine", "bank + random half", "real digits",
    ]  # fmt: skip
    assert re.fullmatch(r"data-free student: \d+\.\d", lines[-1])


@needs_diffusers
def test_a_unet_goes_on_where_it_was_stopped(make_shard: Callable[..., Path], tmp_path: Path) -> None:
    module = load_example("train_unet")
    options = {"side": 8, "classes": 2, "steps": 6, "channels": (8, 16), "batch_size": 8, "save_every": 2}
    shards = [str(make_shard("t-0.tar", 40))]
    module.train_unet(shards, tmp_path / "whole", **options)

    def kill(*words: object, **more: object) -> None:
        raise KeyboardInterrupt

    module.print = kill  # type: ignore[attr-defined] # it prints behind each checkpoint
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            module.train_unet(shards, tmp_path / "killed", **options)
    module.train_unet(shards, tmp_path / "killed", **options)
    name = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert SDEdit(load_unet(tmp_path / "whole"), load_scheduler(tmp_path / "whole")).n_classes == 3
