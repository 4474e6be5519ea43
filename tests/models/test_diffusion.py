"""Engines of variants on tiny networks with random weights; without diffusers its parts are skipped, the others run."""

import importlib.util
import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import adq_wds as adq
from adq_wds.models import Latent, SDEdit, load_scheduler, load_unet
from tests.conftest import pictures

needs_diffusers = pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="needs diffusers")
needs_transformers = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("diffusers", "transformers")),
    reason="needs transformers",
)
pytestmark = pytest.mark.usefixtures("one_thread")


def samples(n: int, side: int = 16) -> list[dict[str, Any]]:
    images = pictures(n, (side, side))
    return [
        {"__key__": f"k{i:03d}", "__url__": "a.tar", "image": image, "label": i % 3}
        for i, image in enumerate(images)
    ]


def pixels(stream: list[dict[str, Any]]) -> Any:
    return np.stack([np.asarray(sample["image"]) for sample in stream])


def tiny_unet(**options: Any) -> Any:
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    blocks: dict[str, Any] = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "norm_num_groups": 4}
    blocks |= {"up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "block_out_channels": (8, 16)}
    sizes: dict[str, Any] = {"sample_size": 16, "layers_per_block": 1, "num_class_embeds": 4}
    return UNet2DModel(**{**blocks, **sizes, "attention_head_dim": 8, **options}).eval()


# ---- Without diffusers


class Half(torch.nn.Module):
    """Predicts half of what it is given, plus a class's number."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.5))
        usual = {"in_channels": 3, "out_channels": 3, "sample_size": 16, "num_class_embeds": 4}
        self.config = SimpleNamespace(**{**usual, **config})

    def forward(self, x: Any, t: Any, class_labels: Any = None) -> Any:
        shift = 0 if class_labels is None else class_labels[:, None, None, None]
        return SimpleNamespace(sample=self.weight * x + shift)


class DDIMScheduler:
    """Takes a tenth of the prediction off, a step."""

    def __init__(self, config: Any = None) -> None:
        self.config = SimpleNamespace()

    from_config = classmethod(lambda cls, config: cls(config))

    def set_timesteps(self, steps: int) -> None:
        self.timesteps = torch.arange(steps).flip(0) * 10

    def add_noise(self, x: Any, noise: Any, t: Any) -> Any:
        return x + t * noise / 100

    def step(self, prediction: Any, t: Any, x: Any) -> Any:
        return SimpleNamespace(prev_sample=x - prediction / 10)


class RandomScheduler(DDIMScheduler):
    pass


def test_strength_times_steps_are_taken_from_the_noised_image() -> None:
    engine = SDEdit(Half(), DDIMScheduler(), strength=0.35, steps=10)
    assert (engine.side, engine.n_classes) == ((16, 16), 4)
    images, noise = (np.random.default_rng(i).normal(size=(2, 3, 16, 16)).astype(np.float32) for i in (0, 1))
    for labels, told in ((np.array([0, 2]), [0, 2]), (None, [3, 3])):
        x = images + noise * 20 / 100  # the third step from the end is at t = 20
        for _ in range(3):
            x = x - (x / 2 + np.array(told)[:, None, None, None]) / 10
        assert np.abs(engine(images, labels, noise) - x).max() < 1e-6


def test_an_unconditional_network_gets_no_class() -> None:
    engine = SDEdit(Half(num_class_embeds=None, sample_size=None), DDIMScheduler(), 1.0, 1)
    assert (engine.side, engine.n_classes) == (None, None)
    images = np.ones((1, 3, 4, 4), np.float32)
    assert engine(images, np.array([7]), images * 0) == pytest.approx(0.95)


def test_strength_0_changes_no_byte() -> None:
    stream = samples(5)
    assert (pixels(adq.Vary(SDEdit(Half(), DDIMScheduler(), 0.0)).apply(stream)) == pixels(stream)).all()


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "strength": (lambda: SDEdit(Half(), DDIMScheduler(), 1.5), r"strength must be a number in \[0, 1\], got 1.5"),
    "NaN": (lambda: SDEdit(Half(), DDIMScheduler(), float("nan")), r"strength must be a number in \[0, 1\]"),
    "no step": (lambda: SDEdit(Half(), DDIMScheduler(), 0.04, 20), "0.04 of 20 steps is none; give at least 0.05"),
    "channels": (lambda: SDEdit(Half(in_channels=1), DDIMScheduler()), "1 channels in and 3 out, expected 3 and 3"),
    "classes": (lambda: SDEdit(Half(class_embed_type="identity"), DDIMScheduler()), "type 'identity', expected num"),
    "random": (lambda: SDEdit(Half(), RandomScheduler()), "RandomScheduler draws noise; expected one of DDIM"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(WRONG))
def test_an_engine_that_cannot_work_is_refused(case: str) -> None:
    make, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        make()


def test_a_side_or_class_of_another_network_names_the_sample() -> None:
    vary = adq.Vary(SDEdit(Half(), DDIMScheduler()))
    with pytest.raises(
        adq.SampleError, match=r"shard a\.tar, key 'k000', field 'image': 8 x 8 pixels, the engine takes 16"
    ):
        vary.apply(samples(1, side=8))
    with pytest.raises(
        adq.SampleError, match="key 'k000', field 'label': label 4, and the engine knows 4 classes"
    ):
        vary.apply([{**samples(1)[0], "label": 4}])


class Pipeline:
    """The outer form of an image-variation pipeline."""

    safety_checker: Any = None

    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)

    def set_progress_bar_config(self, disable: bool) -> None:
        pass

    def __call__(self, image: Any, num_inference_steps: int) -> None:
        pass


def test_what_a_pipeline_does_not_take_is_refused() -> None:
    with pytest.raises(ValueError, match=r"strength=0.5, but Pipeline starts from pure noise; leave it out"):
        Latent(Pipeline(), strength=0.5)
    with pytest.raises(ValueError, match="prompts for Pipeline, which takes none"):
        Latent(Pipeline(), prompts=["a cat"])
    with pytest.raises(ValueError, match=r"would put black images in place of variants.*safety_checker=None"):
        Latent(Pipeline(safety_checker=object()))


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    for load in (load_unet, load_scheduler):
        with pytest.raises(adq.AdqError, match=r'come with diffusers .*pip install "adq-wds\[dda\]"'):
            load(tmp_path)


# ---- With diffusers


@needs_diffusers
@pytest.mark.parametrize("kind", ["DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_another_batch_or_order_moves_next_to_nothing(kind: str) -> None:
    import diffusers

    engine = SDEdit(tiny_unet(), getattr(diffusers, kind)(), strength=0.5, steps=8)
    stream = samples(40)
    whole = pixels(adq.Vary(engine, variant=0).apply(stream)).astype(int)
    assert len(np.unique(whole)) > 100, "it does something"
    cut = pixels(adq.Vary(engine, variant=0, batch_size=7).apply(stream[::-1])).astype(int)[::-1]
    difference = np.abs(whole - cut)
    assert difference.max() <= 1
    assert difference.mean() <= 1e-4
    again = pickle.loads(pickle.dumps(engine))  # noqa: S301 - our own bytes
    assert (pixels(adq.Vary(again, variant=0).apply(stream)) == whole).all()


@needs_diffusers
def test_more_strength_is_further_from_the_image() -> None:
    from diffusers import DDIMScheduler

    stream = samples(8)
    unet = tiny_unet()
    moved = [
        np.abs(
            pixels(adq.Vary(SDEdit(unet, DDIMScheduler(), s)).apply(stream)).astype(int) - pixels(stream)
        ).mean()
        for s in (0.1, 0.3, 0.6)
    ]
    assert moved == sorted(moved)
    assert moved[0] < moved[2] / 2


@needs_diffusers
@pytest.mark.parametrize("kind", ["DDPMScheduler", "EulerAncestralDiscreteScheduler", "sde"])
def test_a_scheduler_that_draws_is_refused(kind: str) -> None:
    import diffusers

    if kind == "sde":
        scheduler = diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++")
    else:
        scheduler = getattr(diffusers, kind)()
    with pytest.raises(ValueError, match="draws noise; expected one of DDIMScheduler"):
        SDEdit(tiny_unet(), scheduler)


@needs_diffusers
@pytest.mark.parametrize("inside", ["", "unet"])
def test_a_saved_network_is_loaded_with_its_scheduler(inside: str, tmp_path: Path) -> None:
    from diffusers import DDPMScheduler

    unet = tiny_unet()
    unet.save_pretrained(tmp_path / inside)
    DDPMScheduler(beta_schedule="squaredcos_cap_v2").save_pretrained(
        tmp_path / ("scheduler" if inside else "")
    )
    if inside:
        (tmp_path / "model_index.json").write_text("{}")
    scheduler = load_scheduler(tmp_path)
    assert type(scheduler).__name__ == "DDIMScheduler"
    assert scheduler.config.beta_schedule == "squaredcos_cap_v2"
    a, b = (adq.Vary(SDEdit(net, scheduler)).apply(samples(3)) for net in (unet, load_unet(tmp_path)))
    assert (pixels(a) == pixels(b)).all()


def _empty(folder: Path) -> None:
    (folder / "config.json").unlink()


def _pickled(folder: Path) -> None:
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / "diffusion_pytorch_model.bin")


def _cut(folder: Path) -> None:
    path = folder / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


def _without_weights(folder: Path) -> None:
    (folder / "diffusion_pytorch_model.safetensors").unlink()


def _other(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))


def _torn(folder: Path) -> None:
    (folder / "config.json").write_text("{")


@needs_diffusers
@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (_empty, r"no UNet here \(no config.json\)"),
        (_pickled, r"diffusion_pytorch_model.bin would be unpickled; expected .safetensors"),
        (_cut, "cannot be loaded as a UNet2DModel"),
        (_without_weights, "no weights; expected .safetensors"),
        (_other, "a 'AutoencoderKL', expected a UNet2DModel"),
        (_torn, "config.json: cannot be read"),
    ],
)
def test_a_folder_without_a_sound_network_is_refused(
    harm: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    tiny_unet().save_pretrained(tmp_path)
    harm(tmp_path)
    with pytest.raises(adq.AdqError, match=message):
        load_unet(tmp_path)


def tiny_pipeline(kind: str, folder: Path) -> Any:
    import diffusers
    import transformers

    torch.manual_seed(0)
    blocks: dict[str, Any] = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
    unet: dict[str, Any] = {"sample_size": 8, "cross_attention_dim": 8, "attention_head_dim": 2}
    if kind == "StableUnCLIPImg2ImgPipeline":
        unet |= {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 16}
    vae: dict[str, Any] = {
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
    }
    down, up = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
    parts: dict[str, Any] = {
        "vae": diffusers.AutoencoderKL(**blocks, **vae),
        "unet": diffusers.UNet2DConditionModel(**blocks, **unet, down_block_types=down, up_block_types=up),
        "scheduler": diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
    }
    clip: dict[str, Any] = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "projection_dim": 8,
        "num_hidden_layers": 1,
    }
    clip["num_attention_heads"] = 2
    if kind != "StableDiffusionImg2ImgPipeline":
        config = transformers.CLIPVisionConfig(**clip, image_size=16, patch_size=4)
        parts["image_encoder"] = transformers.CLIPVisionModelWithProjection(config)
        side = {"height": 16, "width": 16}
        parts["feature_extractor"] = transformers.CLIPImageProcessor(
            crop_size=side, size={"shortest_edge": 16}
        )
    if kind != "StableDiffusionImageVariationPipeline":
        words = ["<|startoftext|>", "<|endoftext|>", "a</w>", "b</w>"]
        (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
        (folder / "merges.txt").write_text("#version: 0.2\n")
        names = str(folder / "vocab.json"), str(folder / "merges.txt")
        parts["tokenizer"] = transformers.CLIPTokenizer(*names, model_max_length=8)
        parts["text_encoder"] = transformers.CLIPTextModel(
            transformers.CLIPTextConfig(
                **clip, vocab_size=4, max_position_embeddings=8, bos_token_id=0, eos_token_id=1
            )
        )
    if kind == "StableUnCLIPImg2ImgPipeline":
        from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import (
            StableUnCLIPImageNormalizer,
        )

        parts["image_normalizer"] = StableUnCLIPImageNormalizer(embedding_dim=8)
        parts["image_noising_scheduler"] = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    else:
        parts["safety_checker"] = None
    if kind == "StableDiffusionImg2ImgPipeline":
        parts["feature_extractor"] = None
    more = {} if kind == "StableUnCLIPImg2ImgPipeline" else {"requires_safety_checker": False}
    return getattr(diffusers, kind)(**parts, **more)


@needs_transformers
@pytest.mark.parametrize(
    "kind",
    [
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionImageVariationPipeline",
        "StableUnCLIPImg2ImgPipeline",
    ],
)
def test_a_pipeline_gives_keyed_variants_of_the_images_size(kind: str, tmp_path: Path) -> None:
    engine = Latent(tiny_pipeline(kind, tmp_path), steps=4)
    stream = samples(5, side=12)
    out = pixels(adq.Vary(engine, variant=0).apply(stream)).astype(int)
    assert out.shape == (5, 12, 12, 3)
    apart = pixels(adq.Vary(engine, variant=0, batch_size=2).apply(stream[::-1])).astype(int)[::-1]
    assert np.abs(out - apart).max() <= 2
    assert (pixels(adq.Vary(engine, variant=1).apply(stream)) != out).any()


@needs_transformers
def test_img2img_takes_a_strength_and_a_prompt_for_each_class(tmp_path: Path) -> None:
    pipeline, stream = tiny_pipeline("StableDiffusionImg2ImgPipeline", tmp_path), samples(3, side=16)
    nothing = Latent(pipeline, strength=0.0)
    assert (pixels(adq.Vary(nothing).apply(stream)) == pixels(stream)).all()
    seen: list[Any] = []
    encode = pipeline.encode_prompt
    pipeline.encode_prompt = lambda prompt, *args, **more: (
        seen.append(prompt) or encode(prompt, *args, **more)
    )
    told = Latent(pipeline, strength=0.5, steps=2, prompts=["a", "b", "a b"])
    adq.Vary(told).apply(stream)
    adq.Vary(told, label=None).apply(stream)
    assert seen == [["a", "b", "a b"], ["", "", ""]]
    with pytest.raises(adq.SampleError, match="label 3, and the engine knows 3 classes"):
        adq.Vary(told).apply([{**stream[0], "label": 3, "image": Image.new("RGB", (16, 16))}])
