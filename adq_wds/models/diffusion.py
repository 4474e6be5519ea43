"""Makes variants of images with diffusion networks of the library diffusers, as engines for `Vary`.

diffusers (extra ``dda``) is imported when weights are loaded; networks and pipelines that exist need no import.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from adq_wds.checks import Count, positive
from adq_wds.errors import AdqError, reason_of, shorten
from adq_wds.models.forward import pick_device

DETERMINISTIC = ("DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler")
STRENGTH = 0.5
_HAIR = 1e-6  # of a step: what a product of floats may lack


@dataclass(frozen=True, eq=False)
class SDEdit:
    """Noise images part of the way, and denoise them again, with a UNet over pixels.

    Nothing is drawn but the noise that `Vary` gives. A class-conditional UNet gets each image's class; where there are
    no labels it gets its last one, which `examples/train_unet.py` trains as "no class".

    Args:
        unet: a diffusers ``UNet2DModel`` of 3 channels, such as `load_unet` gives, on the device where it is to run.
        scheduler: a DDIM, DPM-Solver++ or UniPC scheduler, such as `load_scheduler` gives; only its settings are used.
        strength: how far images are noised, in [0, 1]: 0 changes nothing, 1 leaves next to nothing of them.
        steps: denoising steps from pure noise; strength · steps of them are taken, rounded down.

    Raises:
        ValueError: `strength` is out of range or takes less than one step, the UNet has other channels or classes of
            another kind, or the scheduler draws noise of its own.

    Source: Meng et al. 2022 (arXiv 2108.01073).
    """

    unet: Any
    scheduler: Any
    strength: float = STRENGTH
    steps: int = 20

    def __post_init__(self) -> None:
        _check_strength(self.strength, positive("steps", self.steps))
        config, kind = self.unet.config, type(self.scheduler).__name__
        channels = (config.in_channels, config.out_channels)
        if channels != (3, 3):
            raise ValueError(
                f"a UNet of {channels[0]} channels in and {channels[1]} out, expected 3 and 3 (RGB)"
            )
        if getattr(config, "class_embed_type", None) is not None:
            raise ValueError(f"a UNet with classes of type {config.class_embed_type!r}, expected numbers")
        sde = str(getattr(self.scheduler.config, "algorithm_type", "")).startswith("sde")
        if kind not in DETERMINISTIC or sde:
            raise ValueError(f"the scheduler {kind} draws noise; expected one of {', '.join(DETERMINISTIC)}")
        self.unet.eval()

    @property
    def side(self) -> tuple[int, int] | None:
        """(height, width) that the UNet was made for; None where it does not say."""
        size = self.unet.config.sample_size
        return (
            (size, size) if isinstance(size, int) else None if size is None else (int(size[0]), int(size[1]))
        )

    @property
    def n_classes(self) -> int | None:
        """Classes of the UNet, "no class" included; None where it takes none."""
        n: int | None = self.unet.config.num_class_embeds
        return n

    @torch.inference_mode()
    def __call__(
        self, images: NDArray[np.float32], labels: NDArray[np.int64] | None, noise: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """See `VariantEngine`."""
        if self.strength == 0:
            return images
        weight = next(self.unet.parameters())
        x, noise_x = (torch.from_numpy(a).to(weight.device, weight.dtype) for a in (images, noise))
        classes = {}
        if self.n_classes is not None:
            numbers = np.full(len(images), self.n_classes - 1) if labels is None else labels
            classes = {"class_labels": torch.from_numpy(numbers).to(weight.device)}
        scheduler = type(self.scheduler).from_config(
            self.scheduler.config
        )  # multistep schedulers hold a state
        scheduler.set_timesteps(self.steps)
        start = self.steps - _steps_taken(self.strength, self.steps)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(start)
        timesteps = scheduler.timesteps[start:].to(weight.device)
        x = scheduler.add_noise(x, noise_x, timesteps[:1])
        for t in timesteps:
            x = scheduler.step(self.unet(x, t, **classes).sample, t, x).prev_sample
        out: NDArray[np.float32] = x.float().cpu().numpy()
        return out


class Latent:
    """Make variants with a diffusers pipeline: img2img, image variation (the published choice) or unCLIP.

    Images are drawn to the pipeline's size and its variants back to theirs. Each image has a generator of its own, seeded
    by the draw that `Vary` gives.

    Args:
        pipeline: a ``StableDiffusionImg2ImgPipeline``, ``StableDiffusionImageVariationPipeline`` or
            ``StableUnCLIPImg2ImgPipeline``, loaded without a safety checker, on the device where it is to run.
        strength: how far images are noised, in [0, 1], for img2img; 0.5 by default. The others start from noise.
        steps: denoising steps.
        guidance: scale of classifier-free guidance.
        prompts: a text for each class, for pipelines that take one; none by default.

    Raises:
        ValueError: `strength` is out of range or the pipeline has none, prompts that it does not take, or a safety
            checker, which would put black images in place of variants.
    """

    draws_itself: ClassVar[bool] = True

    def __init__(
        self,
        pipeline: Any,
        *,
        strength: float | None = None,
        steps: int = 50,
        guidance: float = 3.0,
        prompts: Sequence[str] | None = None,
    ) -> None:
        kind, takes = type(pipeline).__name__, inspect.signature(pipeline.__call__).parameters
        if "strength" in takes:
            strength = STRENGTH if strength is None else strength
            _check_strength(strength, positive("steps", steps))
        elif strength is not None:
            raise ValueError(f"strength={strength}, but {kind} starts from pure noise; leave it out")
        if prompts is not None and "prompt" not in takes:
            raise ValueError(f"prompts for {kind}, which takes none; leave them out")
        if getattr(pipeline, "safety_checker", None) is not None:
            raise ValueError(
                f"the safety checker of {kind} would put black images in place of variants; load the pipeline with "
                "safety_checker=None, requires_safety_checker=False"
            )
        self.pipeline, self.strength, self.steps, self.guidance = pipeline, strength, steps, guidance
        self.prompts = list(prompts or ())
        self.n_classes = len(self.prompts) or None
        self._takes_prompt = "prompt" in takes
        pipeline.set_progress_bar_config(disable=True)

    def __call__(
        self, images: NDArray[np.float32], labels: NDArray[np.int64] | None, noise: NDArray[np.uint64]
    ) -> NDArray[np.float32]:
        """See `VariantEngine`; `noise` is a seed for each image."""
        if self.strength == 0:
            return images
        side = self.pipeline.unet.config.sample_size * self.pipeline.vae_scale_factor
        levels = np.rint((images + 1) * 127.5).astype(np.uint8).transpose(0, 2, 3, 1)
        drawn = [Image.fromarray(each).resize((side, side), Image.Resampling.BICUBIC) for each in levels]
        options: dict[str, Any] = {"num_inference_steps": self.steps, "guidance_scale": self.guidance}
        options["generator"] = [torch.Generator().manual_seed(int(seed) >> 1) for seed in noise]
        if self.strength is not None:
            options["strength"] = min(
                1.0, self.strength + _HAIR / self.steps
            )  # it takes int(strength * steps)
        if self._takes_prompt:
            classes = labels.tolist() if self.prompts and labels is not None else []
            options["prompt"] = [self.prompts[label] for label in classes] or [""] * len(images)
        made = self.pipeline(image=drawn, output_type="pt", **options).images.float().cpu()
        size = images.shape[2:]
        out: NDArray[np.float32] = F.interpolate(made, size, mode="bicubic", antialias=True).numpy() * 2 - 1
        return out


def load_sdedit(
    unet: str | os.PathLike[str], *, strength: float = STRENGTH, steps: Count = 20, device: str = "cpu"
) -> SDEdit:
    """`SDEdit` by the UNet and the scheduler's settings in a folder.

    Args:
        unet: as the folder of `load_unet`.
        strength: how far images are noised, in [0, 1]: 0 changes nothing, 1 leaves next to nothing of them.
        steps: denoising steps from pure noise; strength times as many are taken.
        device: as for `load_unet`.

    Raises:
        AdqError, ValueError: as `load_unet` and `SDEdit`.
    """
    return SDEdit(load_unet(unet, device=device), load_scheduler(unet), strength, steps)


def load_unet(folder: str | os.PathLike[str], *, device: str = "cpu") -> Any:
    """Load a diffusers ``UNet2DModel`` from a folder; nothing is fetched, and nothing unpickled.

    Args:
        folder: holds ``config.json`` and weights as ``.safetensors``; or a pipeline's folder, which holds ``unet/``.
        device: `cpu`, `cuda`, `cuda:1`, ..., or `auto` (cuda when there is one, else cpu).

    Raises:
        AdqError: diffusers is missing; no such folder, no UNet in it, weights that would be unpickled or do not fit.
    """
    diffusers, path = _diffusers(), _inside(folder, "unet")
    config = _json(path / "config.json", "no UNet here")
    if config.get("_class_name") != "UNet2DModel":
        raise AdqError(f"{path}: a {shorten(config.get('_class_name'))}, expected a UNet2DModel")
    if not any(path.glob("*.safetensors")):
        pickled = next(
            (file.name for ending in ("*.bin", "*.pt", "*.pth") for file in path.glob(ending)), None
        )
        why = "no weights" if pickled is None else f"{pickled} would be unpickled"
        raise AdqError(f"{path}: {why}; expected .safetensors, as save_pretrained writes them")
    try:
        options: dict[str, Any] = {"use_safetensors": True, "local_files_only": True}
        unet = diffusers.UNet2DModel.from_pretrained(str(path), low_cpu_mem_usage=False, **options)
    except Exception as error:
        raise AdqError(f"{path}: cannot be loaded as a UNet2DModel: {reason_of(error)}") from error
    return unet.to(pick_device(device)).eval().requires_grad_(False)


def load_scheduler(folder: str | os.PathLike[str]) -> Any:
    """A DDIM scheduler with the settings in a folder's ``scheduler_config.json``; diffusers' defaults without one.

    Args:
        folder: as for `load_unet`; a pipeline's folder holds ``scheduler/``.

    Raises:
        AdqError: diffusers is missing, or the settings cannot be read or are not those of a scheduler.
    """
    diffusers, path = _diffusers(), _inside(folder, "scheduler") / "scheduler_config.json"
    config = _json(path, "no settings here") if path.exists() else {}
    try:
        return diffusers.DDIMScheduler.from_config(config)
    except Exception as error:
        raise AdqError(f"{path}: no settings of a scheduler: {reason_of(error)}") from error


def _diffusers() -> ModuleType:
    try:
        import diffusers
    except ImportError as error:
        text = f'diffusion networks come with diffusers ({error}): pip install "adq-wds[dda]"'
        raise AdqError(text) from error
    module: ModuleType = diffusers
    return module


def _inside(folder: str | os.PathLike[str], part: str) -> Path:
    path = Path(folder)
    return path / part if (path / "model_index.json").exists() else path


def _json(path: Path, missing: str) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdqError(f"{path.parent}: {missing} (no {path.name})") from None
    except (OSError, ValueError, RecursionError) as error:
        raise AdqError(f"{path}: cannot be read: {shorten(str(error), 200)}") from error
    if not isinstance(config, dict):
        raise AdqError(f"{path}: holds {type(config).__name__}, expected an object")
    return config


def _check_strength(strength: float, steps: int) -> None:
    if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not 0 <= strength <= 1:
        raise ValueError(f"strength must be a number in [0, 1], got {strength!r}")
    if strength and not _steps_taken(strength, steps):
        raise ValueError(f"strength={strength} of {steps} steps is none; give at least {1 / steps:g}")


def _steps_taken(strength: float, steps: int) -> int:
    """strength · steps rounded down, where 0.29 · 100 is 29, not the 28.999999999999996 of a float."""
    return int(strength * steps + _HAIR)
