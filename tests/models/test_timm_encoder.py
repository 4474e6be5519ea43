"""Is a timm network by name the same network, with its own preprocessing, from any checkpoint that fits it?"""

import logging
import multiprocessing
import pickle
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import PIL.Image
import pytest
import timm
import timm.data
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from adq_wds.errors import AdqError
from adq_wds.models.callables import CallableEncoder
from adq_wds.models.forward import pick_device
from adq_wds.models.network_encoder import NetworkEncoder
from adq_wds.models.timm_build import check_timm_name
from adq_wds.models.timm_encoder import timm_encoder
from tests.conftest import Caplog, MonkeyPatch

pytestmark = pytest.mark.usefixtures("one_thread")
COMMIT = "0" * 40
NETWORKS = ["resnet18", "vit_tiny_patch16_224", "convnext_atto", "mobilenetv3_small_050"]


def noise(width: int, height: int, seed: int) -> PIL.Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


IMAGES = [noise(90, 70, 0), noise(32, 32, 1), noise(40, 130, 2)]


def random_state(name: str, **options: Any) -> dict[str, torch.Tensor]:
    """Weights of which none is constant: timm starts classifiers at zero and norms at one."""
    model = timm.create_model(name, **options)
    generator = torch.Generator().manual_seed(7)

    def moved(value: torch.Tensor) -> torch.Tensor:
        added = 0.02 * torch.rand(value.shape, generator=generator) if value.is_floating_point() else 0
        return (value + added).contiguous()

    return {key: moved(value) for key, value in model.state_dict().items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints NAME.safetensors."""
    checkpoints = tmp_path_factory.mktemp("checkpoints")
    for name in NETWORKS:
        save_file(random_state(name), checkpoints / f"{name}.safetensors")
    return checkpoints


def made(folder: Path, name: str, **options: Any) -> NetworkEncoder:
    return timm_encoder(name, checkpoint=folder / f"{name}.safetensors", **options)


def timms_own(name: str, state: dict[str, Any], n_classes: int, **options: Any) -> NDArray[np.float32]:
    """timm's documented way: its transform image by image, its model called once."""
    model = timm.create_model(name, num_classes=n_classes, **options).eval()
    model.load_state_dict({k: v for k, v in state.items() if k in model.state_dict()})
    size = {"img_size": options["img_size"]} if options else {}
    config = timm.data.resolve_model_data_config(model, args=size)
    transform = timm.data.create_transform(**config, is_training=False)
    with torch.inference_mode():
        answer: NDArray[np.float32] = model(torch.stack([transform(image) for image in IMAGES])).numpy()
    return answer


@pytest.mark.parametrize("name", NETWORKS)
def test_embeddings_and_logits_are_timms_own(folder: Path, name: str) -> None:
    encoder = made(folder, name)
    h, logits = encoder(IMAGES)
    state = load_file(folder / f"{name}.safetensors")
    want_h, want_logits = timms_own(name, state, 0), timms_own(name, state, 1000)
    assert logits is not None
    assert h.dtype == logits.dtype == np.float32
    assert h.shape == (3, encoder.width)
    assert logits.shape == (3, encoder.n_classes) == (3, 1000)
    for got, want in ((h, want_h), (logits, want_logits)):
        differs = np.ptp(want, axis=0).max()  # between images
        assert differs > 1e-3
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=min(1e-3, 1e-2 * differs))


def test_without_head_only_the_logits_are_missing(folder: Path) -> None:
    with_head, without = (made(folder, "mobilenetv3_small_050", head=head) for head in (True, False))
    h, logits = without(IMAGES)
    np.testing.assert_array_equal(h, with_head(IMAGES)[0])
    assert logits is None
    assert without.n_classes is None
    assert without([])[0].shape == (0, without.width)
    assert [part.shape for part in with_head([]) if part is not None] == [(0, with_head.width), (0, 1000)]


@pytest.mark.parametrize("n_classes", [10, 0])
def test_the_checkpoint_decides_the_number_of_classes(n_classes: int, tmp_path: Path) -> None:
    save_file(random_state("convnext_atto", num_classes=n_classes), tmp_path / "a.safetensors")
    options: dict[str, Any] = {"checkpoint": tmp_path / "a.safetensors", "image_size": 64}
    if not n_classes:
        with pytest.raises(ValueError, match=r"a\.safetensors has no classifier.*pass head=False"):
            timm_encoder("convnext_atto", **options)
    h, logits = timm_encoder("convnext_atto", **options, head=n_classes > 0)(IMAGES)
    assert h.shape == (3, 320)
    assert (logits is None) == (n_classes == 0)
    assert logits is None or logits.shape == (3, 10)


def test_weights_in_the_authors_own_layout_are_converted(folder: Path, tmp_path: Path) -> None:
    def as_published(key: str) -> str:
        names = {"stem.": "downsample_layers.0.", "head.norm.": "norm.", "head.fc.": "head."}
        for i in range(4):
            names[f"stages.{i}.downsample."] = f"downsample_layers.{i}."
            names[f"stages.{i}.blocks."] = f"stages.{i}."
        names |= {"conv_dw": "dwconv", "mlp.fc1": "pwconv1", "mlp.fc2": "pwconv2"}
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        return key

    state = load_file(folder / "convnext_atto.safetensors")
    torch.save({"model": {as_published(k): v for k, v in state.items()}}, tmp_path / "published.pth")
    encoder = timm_encoder("convnext_atto", checkpoint=tmp_path / "published.pth", allow_pickle=True)
    plain = made(folder, "convnext_atto")
    np.testing.assert_array_equal(encoder(IMAGES)[0], plain(IMAGES)[0])
    assert encoder.n_classes == 1000


@pytest.mark.parametrize(
    ("name", "checkpoint", "differences"),
    [
        ("resnet18", "vit_tiny_patch16_224", r"100 missing .* 152 unexpected \('blocks\.0\.attn"),
        ("resnet34", "resnet18", r"80 missing \('layer1\.2\.conv1\.weight', .*, \.\.\.\); name the network"),
        ("vit_tiny_patch16_384", "vit_tiny_patch16_224", r"1 of another shape \('pos_embed' is \(1, 197, 1"),
    ],
)
def test_another_networks_file_is_refused(folder: Path, name: str, checkpoint: str, differences: str) -> None:
    with pytest.raises(ValueError, match=rf"{checkpoint}\.safetensors .*'{name}': .*{differences}"):
        timm_encoder(name, checkpoint=folder / f"{checkpoint}.safetensors")


def behind(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize("prefix", ["model.", "net.backbone.", "module.backbone.", "encoder.model."])
@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_weights_behind_a_prefix_are_those_without_it(
    folder: Path, tmp_path: Path, name: str, prefix: str, caplog: Caplog
) -> None:
    state = load_file(folder / f"{name}.safetensors")
    plain = made(folder, name)
    save_file(behind(prefix, state), tmp_path / "whole.safetensors")
    whole = timm_encoder(name, checkpoint=tmp_path / "whole.safetensors")
    assert whole.n_classes == plain.n_classes == 1000
    np.testing.assert_array_equal(whole(IMAGES)[0], plain(IMAGES)[0])
    assert caplog.text == ""
    body = {k: v for k, v in state.items() if not k.startswith(("fc.", "head."))}
    with_others = {**behind(prefix, body), "projection.weight": torch.zeros(2)}
    save_file(with_others, tmp_path / "body.safetensors")
    headless = timm_encoder(name, checkpoint=tmp_path / "body.safetensors", head=False)
    np.testing.assert_array_equal(headless(IMAGES)[0], plain(IMAGES)[0])
    assert "the 1 of ['projection'] are not" in caplog.text


def test_published_names_behind_a_prefix_are_converted_too(folder: Path, tmp_path: Path) -> None:
    state = load_file(folder / "vit_tiny_patch16_224.safetensors")
    save_file(behind("model.", state), tmp_path / "a.safetensors")
    at_96 = timm_encoder("vit_tiny_patch16_224", checkpoint=tmp_path / "a.safetensors", image_size=96)
    plain = made(folder, "vit_tiny_patch16_224", image_size=96)
    np.testing.assert_array_equal(at_96(IMAGES)[0], plain(IMAGES)[0])


def test_half_a_network_and_two_networks_are_refused(folder: Path, tmp_path: Path) -> None:
    state = load_file(folder / "resnet18.safetensors")
    half = dict(list(behind("model.", state).items())[::2])
    save_file(half, tmp_path / "half.safetensors")
    with pytest.raises(ValueError, match=r"half\.safetensors .* missing .*start with 'model\.'"):
        timm_encoder("resnet18", checkpoint=tmp_path / "half.safetensors")
    for two in (("student.", "teacher."), ("", "ema.")):
        both = {**behind(two[0], state), **{k: v.clone() for k, v in behind(two[1], state).items()}}
        save_file(both, tmp_path / "two.safetensors")
        with pytest.raises(ValueError, match=rf"several such networks, behind \['{two[0]}', '{two[1]}'\]"):
            timm_encoder("resnet18", checkpoint=tmp_path / "two.safetensors")


@pytest.mark.parametrize("size", [64, 96])
def test_a_vision_transformer_at_another_size_is_timms_own(folder: Path, size: int) -> None:
    name = "vit_tiny_patch16_224"
    checkpoint = folder / f"{name}.safetensors"
    h, _ = timm_encoder(name, checkpoint=checkpoint, image_size=size)(IMAGES)
    overlay = {"file": str(checkpoint)}
    resized: Any = timm.create_model(name, pretrained=True, img_size=size, pretrained_cfg_overlay=overlay)
    expected = timms_own(name, resized.state_dict(), 0, img_size=size)
    np.testing.assert_allclose(h, expected, rtol=1e-4, atol=1e-4)


def test_a_size_the_network_cannot_take_is_refused() -> None:
    for size in (0, -64, True, 64.0, "64"):
        with pytest.raises(ValueError, match=rf"image_size must be an integer >= 1, got {size!r}"):
            timm_encoder("resnet18", pretrained=False, image_size=size)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"'levit_128s' gives no .* input of \(3, 250, 250\)"):
        timm_encoder("levit_128s", pretrained=False, image_size=250)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet-18", "unknown encoder 'resnet-18'; did you mean resnet18,"),
        ("resnet18.a9_in1k", r"did you mean resnet18\.a"),
        ("ViT_tiny_patch16_224", "did you mean vit_tiny_patch16_224"),
        ("timm/resnet18.a1_in1k", "resnet18.a1_in1k, .*, hf_hub:timm/resnet18.a1_in1k"),
        ("hf_hub:", "unknown encoder 'hf_hub:'"),
        ("x" * 500, r"unknown encoder 'x{30,40}\.\.\.x{30,40}'; did you mean builtin, builtin-free, thumb"),
        ("", "unknown encoder ''"),
    ],
)
def test_an_unknown_name_is_refused_with_close_ones(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        timm_encoder(name)


def test_every_name_that_timm_lists_is_a_name() -> None:
    names = timm.list_models() + timm.list_models(pretrained=True)
    assert len(names) > 2000
    sample = names[:: len(names) // 200]
    for name in sample:
        check_timm_name(name)


@pytest.fixture
def offline(monkeypatch: MonkeyPatch, tmp_path: Path) -> Path:
    """No network, and the given folder as the Hub's cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


@pytest.mark.parametrize(
    ("name", "tried"), [("resnet18", "timm/resnet18.a1_in1k"), ("hf_hub:owner/net", "owner/net")]
)
def test_weights_that_cannot_be_fetched_name_source_and_remedy(offline: Path, name: str, tried: str) -> None:
    with pytest.raises(AdqError, match=rf"'{name}'.*{tried} .*give checkpoint=FILE") as info:
        timm_encoder(name, cache_dir=offline)
    assert "\n" not in str(info.value)


def put_in_hub_cache(cache: Path, repository: str, files: dict[str, Path | str]) -> None:
    root = cache / f"models--{repository.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    (root / "snapshots" / COMMIT).mkdir(parents=True)
    for name, content in files.items():
        target = root / "snapshots" / COMMIT / name
        target.write_text(content) if isinstance(content, str) else shutil.copy(content, target)


def test_fetched_weights_come_through_timms_own_loading(offline: Path, folder: Path, tmp_path: Path) -> None:
    weights = folder / "resnet18.safetensors"
    put_in_hub_cache(offline, "timm/resnet18.a1_in1k", {"model.safetensors": weights})
    config = (
        '{"architecture": "resnet18", "num_classes": 1000, "pretrained_cfg": {"input_size": [3, 64, 64], '
    )
    config += '"mean": [0.5, 0.5, 0.5], "num_classes": 1000, "classifier": "fc", "first_conv": "conv1"}}'
    put_in_hub_cache(offline, "owner/net", {"model.safetensors": weights, "config.json": config})
    local = timm_encoder("resnet18", checkpoint=weights)
    fetched = timm_encoder("resnet18", cache_dir=offline)
    np.testing.assert_array_equal(fetched(IMAGES)[0], local(IMAGES)[0])
    assert fetched.preprocessing_hash == local.preprocessing_hash
    hub = timm_encoder("hf_hub:owner/net", cache_dir=offline)
    assert hub.preprocessing_hash != local.preprocessing_hash
    assert hub.revision == fetched.revision  # the same weights
    other_mean = config.replace("[0.5, 0.5, 0.5]", "[0.5, 0.5, 0.4]")
    put_in_hub_cache(offline, "owner/other", {"model.safetensors": weights, "config.json": other_mean})
    assert timm_encoder("hf_hub:owner/other", cache_dir=offline).preprocessing_hash != hub.preprocessing_hash
    again = timm_encoder("hf_hub:owner/net", cache_dir=offline, checkpoint=weights)
    np.testing.assert_array_equal(again(IMAGES)[0], hub(IMAGES)[0])


def test_revision_follows_weights_and_hash_preprocessing(folder: Path, tmp_path: Path) -> None:
    def hashes(checkpoint: Path, **options: Any) -> tuple[str, str]:
        encoder = timm_encoder("convnext_atto", checkpoint=checkpoint, **options)
        return encoder.revision, encoder.preprocessing_hash

    checkpoint = folder / "convnext_atto.safetensors"
    revision, preprocessing = hashes(checkpoint)
    assert f"timm={timm.__version__}" in revision
    torch.set_printoptions(precision=1)
    try:
        assert hashes(shutil.copy(checkpoint, tmp_path / "moved.safetensors")) == (revision, preprocessing)
    finally:
        torch.set_printoptions(profile="default")
    smaller = hashes(checkpoint, image_size=64)
    assert smaller[0] == revision
    assert smaller[1] != preprocessing
    state = load_file(checkpoint)
    state["head.fc.bias"][0] += 1
    save_file(state, tmp_path / "other.safetensors")
    other = hashes(tmp_path / "other.safetensors")
    assert other[0] != revision
    assert other[1] == preprocessing


def test_random_weights_are_logged_and_the_same_each_time(caplog: Caplog) -> None:
    torch.manual_seed(1)
    with caplog.at_level(logging.WARNING, "adq_wds"):
        first = timm_encoder("convnext_atto", pretrained=False, image_size=64)
    assert "convnext_atto has random weights" in caplog.text
    torch.manual_seed(2)
    assert timm_encoder("convnext_atto", pretrained=False, image_size=64).revision == first.revision


def test_an_image_that_is_not_rgb_is_named() -> None:
    encoder = timm_encoder("resnet18", pretrained=False, image_size=32)
    with pytest.raises(ValueError, match=r"image 1 of the batch has mode 'RGBA', not 'RGB'"):
        encoder([IMAGES[0], IMAGES[1].convert("RGBA")])


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_threads_get_the_answers_they_would_get_alone(folder: Path, name: str) -> None:
    encoder = made(folder, name, image_size=64)
    batches = [[noise(40 + i, 50, i), noise(50, 40 + i, 100 + i)] for i in range(24)]
    alone = [encoder(batch)[0] for batch in batches]
    barrier = threading.Barrier(4)

    def start() -> None:
        torch.set_num_threads(1)
        barrier.wait(timeout=300)  # all four at once

    with ThreadPoolExecutor(4, initializer=start) as pool:
        together = list(pool.map(lambda batch: encoder(batch)[0], batches))
    for got, want in zip(together, alone, strict=True):
        np.testing.assert_array_equal(got, want)


def size_of(images: list[PIL.Image.Image]) -> NDArray[np.int64]:
    return np.array([image.size for image in images])


def call(encoder: Any) -> NDArray[np.float32]:
    answer: NDArray[np.float32] = encoder(IMAGES)[0]
    return answer


def test_encoders_reach_another_process_as_arguments(folder: Path) -> None:
    encoder = made(folder, "convnext_atto", image_size=64)
    data = pickle.dumps(encoder)
    assert len(data) < 1000
    again = pickle.loads(data)  # noqa: S301 - our own bytes
    np.testing.assert_array_equal(again(IMAGES)[0], encoder(IMAGES)[0])
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        far, sizes = pool.map(call, [encoder, CallableEncoder(size_of, name="size")])
    np.testing.assert_allclose(far, encoder(IMAGES)[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(sizes, size_of(IMAGES))


def test_a_checkpoint_that_changed_underway_is_refused(folder: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copy(folder / "convnext_atto.safetensors", tmp_path / "a.safetensors"))
    data = pickle.dumps(timm_encoder("convnext_atto", checkpoint=checkpoint, image_size=64))
    state = load_file(checkpoint)
    save_file({k: v * 2 for k, v in state.items()}, checkpoint)
    with pytest.raises(AdqError, match="encoder 'convnext_atto' changed while"):
        pickle.loads(data)  # noqa: S301


def test_a_relative_checkpoint_is_found_again(folder: Path, tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    data = pickle.dumps(timm_encoder("convnext_atto", checkpoint="convnext_atto.safetensors", image_size=64))
    monkeypatch.chdir(tmp_path)
    assert call(pickle.loads(data)).shape == (3, 320)  # noqa: S301


@pytest.mark.parametrize(
    ("device", "n_devices", "picked"),
    [
        ("auto", 1, "cuda"),
        ("auto", 0, "cpu"),
        ("cuda:1", 2, "cuda:1"),
        ("gpu", 0, r"device='gpu': expected 'cpu', 'cuda', 'cuda:N' or 'auto'"),
        ("cuda", 0, r"device='cuda': torch sees 0 CUDA devices; use 'auto' or 'cpu'"),
        ("cuda:3", 1, r"device='cuda:3': torch sees 1 CUDA devices"),
    ],
)
def test_a_device_must_be_there(device: str, n_devices: int, picked: str, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n_devices)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: n_devices > 0)
    if picked.startswith("device="):
        with pytest.raises(ValueError, match=picked):
            pick_device(device)
    else:
        assert pick_device(device) == torch.device(picked)
