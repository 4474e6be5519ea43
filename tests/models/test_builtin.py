"""Does the encoder that comes with the package give what its weights say, and does its training script make such weights?"""

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import PIL.Image
import pytest
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from adq_wds.errors import AdqError
from adq_wds.models import BUILTIN_NAMES, builtin
from adq_wds.models.builtin import SmallNet, builtin_encoder, resized, weights_path
from adq_wds.models.checkpoints import load_weights
from tests.conftest import load_example, pictures

ROOT = Path(__file__).parents[2]
MAX_WEIGHTS_BYTES = 3_000_000

pytestmark = pytest.mark.usefixtures("one_thread")
all_names = pytest.mark.parametrize("name", BUILTIN_NAMES)


def step_by_step(name: str, image: PIL.Image.Image) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
    """The slow oracle: one image, the stored numbers, plain convolutions in float64."""
    w = {k: v.double() for k, v in safetensors.torch.load_file(weights_path(name)).items()}
    x = torch.tensor(np.asarray(image.resize((32, 32), PIL.Image.Resampling.BILINEAR))).double()
    x = (x / 255 - torch.tensor([0.4914, 0.4822, 0.4465])) / torch.tensor([0.2470, 0.2435, 0.2616])
    x = x.permute(2, 0, 1)[None]
    for down, mix in (("stem", "mix1"), ("down2", "mix2"), ("down3", "mix3")):
        x = F.conv2d(x, w[f"{down}.0.weight"], w[f"{down}.0.bias"], stride=2, padding=1).clamp(min=0)
        x = x + F.conv2d(x, w[f"{mix}.0.weight"], w[f"{mix}.0.bias"], padding=1).clamp(min=0)
    h = x.sum((2, 3))[0] / 16
    logits = (w["head.weight"] @ h + w["head.bias"]).numpy() if "head.weight" in w else None
    return h.numpy(), logits


@all_names
@pytest.mark.parametrize("side", [1, 32, 75])
def test_an_answer_is_that_of_the_stored_numbers(name: str, side: int) -> None:
    images = pictures(3, (side, side))
    h, logits = builtin_encoder(name)(images)
    for i, image in enumerate(images):
        expected_h, expected_logits = step_by_step(name, image)
        np.testing.assert_allclose(h[i], expected_h, rtol=1e-4, atol=1e-5)
        if expected_logits is None:
            assert logits is None
        else:
            assert logits is not None
            np.testing.assert_allclose(logits[i], expected_logits, rtol=1e-4, atol=1e-4)


@all_names
def test_shapes_are_those_announced_and_h_is_not_negative(name: str) -> None:
    encoder = builtin_encoder(name)
    sizes = [(32, 32), (500, 20), (1, 1), (33, 31)]
    for batch in ([PIL.Image.new("RGB", size, (90, 160, 40)) for size in sizes], []):
        h, logits = encoder(batch)
        assert (h.shape, h.dtype) == ((len(batch), encoder.width), np.float32)
        assert (h >= 0).all()
        assert (logits is None) == (encoder.n_classes is None)
        if logits is not None:
            assert (logits.shape, logits.dtype) == ((len(batch), encoder.n_classes), np.float32)


def test_only_the_one_trained_with_labels_has_a_head() -> None:
    with_labels, without = (builtin_encoder(name) for name in ("builtin", "builtin-free"))
    assert (with_labels.n_classes, without.n_classes) == (10, None)
    assert (with_labels.saw_labels, without.saw_labels) == (True, False)
    assert with_labels.trained_on == without.trained_on == "CIFAR-10 train"
    assert with_labels.revision != without.revision
    assert with_labels.preprocessing_hash == without.preprocessing_hash


@all_names
def test_an_image_gets_the_same_answer_in_any_batch(name: str) -> None:
    encoder, images = builtin_encoder(name), pictures(70, (32, 32))
    whole, _ = encoder(images)
    for size in (1, 7, 64):
        parts = [encoder(images[i : i + size])[0] for i in range(0, len(images), size)]
        np.testing.assert_allclose(np.concatenate(parts), whole, rtol=1e-5, atol=1e-5)


@all_names
def test_a_pickle_is_small_and_comes_back_as_the_same_encoder(name: str) -> None:
    encoder, images = builtin_encoder(name), pictures(3, (32, 32))
    data = pickle.dumps(encoder)
    again = pickle.loads(data)  # noqa: S301 - our own
    assert len(data) < 1000
    assert (again.name, again.revision, again.device) == (encoder.name, encoder.revision, encoder.device)
    np.testing.assert_array_equal(again(images)[0], encoder(images)[0])


def test_importing_brings_no_timm() -> None:
    code = "import sys, adq_wds.models.builtin; sys.exit('timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_larger_image_is_averaged() -> None:
    (image,) = pictures(1, (32, 32))
    assert np.array_equal(resized([image])[0].permute(1, 2, 0), np.asarray(image))
    stripes = np.zeros((320, 640, 3), dtype=np.uint8)
    stripes[:, ::2] = 200  # finer than the filter is wide: only an average over all columns gives 100
    inner = resized([PIL.Image.fromarray(stripes)])[0].permute(1, 2, 0).numpy()[:, 1:-1]
    assert inner.shape == (32, 30, 3)
    assert np.abs(inner.astype(int) - 100).max() <= 1


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"encoder 'buildin'; .* builtin, builtin-free"):
        builtin_encoder("buildin")


def cut_to(n: int) -> Any:
    return lambda path: path.write_bytes(path.read_bytes()[:n])


def another_network(path: Path) -> None:
    safetensors.torch.save_file({"stem.0.weight": torch.zeros(64, 3, 3, 3)}, path)


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (Path.unlink, r"builtin\.safetensors: no such file; .*: install that again"),
        *((cut_to(n), r"builtin\.safetensors: .*install that again") for n in (0, 5, 300, 100_000)),
        (another_network, r"do not fit encoder 'builtin': 11 missing .*\(64, 3, 3, 3\), expected"),
    ],
)
def test_damaged_weights_are_a_broken_installation(
    damage: Any, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(weights_path("builtin"), tmp_path)
    monkeypatch.setattr(builtin, "WEIGHTS", tmp_path)
    damage(weights_path("builtin"))
    with pytest.raises(AdqError, match=text):
        builtin_encoder()


@all_names
def test_a_file_is_small_finite_and_says_how_it_was_made(name: str) -> None:
    assert weights_path(name).stat().st_size <= MAX_WEIGHTS_BYTES
    state, header = load_weights(weights_path(name)).state, load_weights(weights_path(name)).header
    assert {v.dtype for v in state.values()} == {torch.float16}
    assert all(torch.isfinite(v).all() for v in state.values())
    assert (ROOT / header["script"]).is_file()
    assert header["trained_on"] == "CIFAR-10 train"
    settings, accuracy = json.loads(header["settings"]), json.loads(header["accuracy"])
    assert settings["name"] == name
    assert settings["max_steps"] is None  # not the weights of a trial run
    assert {"epochs", "rate", "batch", "seed"} <= set(settings)
    assert ("head" in accuracy) == (name == "builtin")
    assert 0.85 <= accuracy["nearest_20"] < 1 or name != "builtin"


@pytest.mark.slow
@all_names
def test_the_accuracy_in_the_header_is_what_the_files_reach(name: str, cifar10: Path, tmp_path: Path) -> None:
    script = load_example("train_builtin")
    shards = [str(cifar10 / f"cifar10-{part}-*.tar") for part in ("train", "test")]
    sets = [script.read_shards(each, tmp_path) for each in shards]
    reached = script.accuracies(builtin_encoder(name).model, *sets)
    assert reached == pytest.approx(json.loads(load_weights(weights_path(name)).header["accuracy"]), abs=5e-4)


@pytest.fixture
def script() -> Iterator[ModuleType]:
    """The training script; the random state is put back after it."""
    state = torch.get_rng_state()
    yield load_example("train_builtin")
    torch.set_rng_state(state)


def run(script: ModuleType, name: str, shard: Path, scratch: Path, **more: object) -> dict[str, torch.Tensor]:
    """Two epochs of one step; gives the stored weights."""
    options: dict[str, object] = {"scratch": scratch, "epochs": 2, "max-steps": 1, "batch": 8, "threads": 1}
    options |= {"warmup": 0, "decay": 1, "average": 0.5, "trained-on": "noise", **more}
    given = [word for option, value in options.items() for word in (f"--{option}", str(value))]
    script.main([name, str(shard), str(shard), *given])
    return safetensors.torch.load_file(scratch / f"{name}.safetensors")


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@all_names
def test_stopped_training_goes_on_to_the_same_weights(
    name: str, script: ModuleType, make_shard: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = make_shard("a.tar", 20, classes=3)
    whole = run(script, name, shard, tmp_path / "whole")
    one_epoch, epochs = script.one_epoch, []

    def stops_once(epoch: int, *rest: Any) -> Any:
        epochs.append(epoch)
        if epochs == [0, 1]:
            raise KeyboardInterrupt
        return one_epoch(epoch, *rest)

    monkeypatch.setattr(script, "one_epoch", stops_once)
    with pytest.raises(KeyboardInterrupt):
        run(script, name, shard, tmp_path / "broken")
    assert equal(run(script, name, shard, tmp_path / "broken"), whole)
    assert epochs == [0, 1, 1]
    assert not equal(run(script, name, shard, tmp_path / "other", seed=1), whole)


def test_labels_move_the_weights_of_one_and_not_of_the_other(
    script: ModuleType, make_shard: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard, read = make_shard("a.tar", 20, classes=3), script.read_shards
    true = {name: run(script, name, shard, tmp_path / "true") for name in BUILTIN_NAMES}

    def other_labels(*arguments: Any) -> Any:
        images, labels = read(*arguments)
        return images, (labels + 1) % 3

    monkeypatch.setattr(script, "read_shards", other_labels)
    other = {name: run(script, name, shard, tmp_path / "other") for name in BUILTIN_NAMES}
    assert [equal(true[name], other[name]) for name in ("builtin", "builtin-free")] == [False, True]


def test_every_epoch_draws_anew(script: ModuleType, make_shard: Any, tmp_path: Path) -> None:
    run(script, "builtin", make_shard("a.tar", 20, classes=3), tmp_path, rate=0)  # only the draws can differ
    first, second = json.loads((tmp_path / "builtin.json").read_text())["history"]
    assert first["loss"] != second["loss"]


def test_stored_weights_load_and_tell_how_they_were_made(
    script: ModuleType, make_shard: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(script, "builtin", make_shard("a.tar", 20, classes=3), tmp_path)
    monkeypatch.setattr(builtin, "WEIGHTS", tmp_path)
    encoder, header = builtin_encoder(), load_weights(weights_path("builtin")).header
    assert (encoder.n_classes, encoder.trained_on) == (3, "noise")
    written = json.loads((tmp_path / "builtin.json").read_text())
    assert json.loads(header["settings"]) == written["settings"]
    assert json.loads(header["accuracy"]) == written["accuracy"]
    assert [entry["epoch"] for entry in written["history"]] == [1, 2]
    assert "a.tar" not in json.dumps(header)  # no path of the machine it was made on


def test_folding_the_normalisation_changes_no_answer(script: ModuleType) -> None:
    torch.manual_seed(0)
    net = SmallNet(4, norm=True)
    for _ in range(3):
        net.train()(torch.randn(8, 3, 32, 32) * 2 + 1)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
        net.get_buffer("mix2.1.running_var").fill_(1e-5)  # as small as what is added to it
        x = torch.randn(3, 3, 32, 32)
        for folded, plain in zip(script.folded(net)(x), net.eval()(x), strict=True):
            torch.testing.assert_close(folded, plain, rtol=1e-4, atol=1e-4)
