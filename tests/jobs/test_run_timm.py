"""`adq run` with a timm network from a local checkpoint stores timm's own pooled features."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import adq_wds as adq
from adq_wds.cli.main import main
from adq_wds.remote.open_shard import open_shard
from adq_wds.shards.samples_in_tar import iter_spans, read_sample


def images_of(shard: Path) -> list[Image.Image]:
    with open_shard(shard) as buffer:
        samples = [read_sample(buffer, span, url="") for span in iter_spans(buffer, shard=shard.name)]
    return [next(iter(adq.Decode()([{**s, "__url__": shard.name}])))["image"] for s in samples]


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_run_with_a_checkpoint_stores_timms_features(
    name: str, make_shard: Callable[..., Path], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=2)
    weights = tmp_path / "weights.safetensors"
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, weights)
    shards = [make_shard(f"t-{i}.tar", 6, first=6 * i) for i in range(2)]
    out = tmp_path / "out"
    options = ["--encoder", name, "--checkpoint", str(weights), "--keep", "0.5", "--bins", "2", "-q"]
    assert main(["run", *map(str, shards), "-o", str(out), *options]) == 0
    assert adq.load_plan(out / "plan.parquet").n_kept == 6

    model.reset_classifier(0)
    model.eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    for file, shard in zip(adq.Features(out / "features"), shards, strict=True):
        with torch.inference_mode():
            h = model(torch.stack([transform(image) for image in images_of(shard)])).numpy()
        norm = np.linalg.norm(h, axis=1, keepdims=True)
        assert file.embedding() == pytest.approx(h / norm, abs=1e-3)
        assert file.read_columns(["norm"])["norm"].to_numpy() == pytest.approx(norm[:, 0], rel=1e-3)


@pytest.mark.parametrize("source", ["--checkpoint", "--embeddings"])
def test_new_numbers_under_the_old_path_are_not_nothing_to_do(
    source: str, make_shard: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = make_shard("t.tar", 4)
    file = tmp_path / ("e.npy" if source == "--embeddings" else "w.safetensors")
    run = ["run", str(shard), "-o", str(tmp_path / "out"), source, str(file), "--bins", "1"]
    for seed, code in ((0, 0), (0, 0), (1, 1)):
        if source == "--embeddings":
            np.save(file, np.eye(4, dtype=np.float32) * (1 + seed) + np.float32(seed))
        else:
            torch.manual_seed(seed)
            model = timm.create_model("resnet10t", pretrained=False, num_classes=2)
            save_file({key: value.contiguous() for key, value in model.state_dict().items()}, file)
        assert main([*run, *(["--encoder", "resnet10t"] if source == "--checkpoint" else [])]) == code
    assert "was made with revision" in capsys.readouterr().err
