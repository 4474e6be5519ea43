"""Makes an encoder of a timm network: its own preprocessing, one forward pass, pooled features and logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import PIL.Image
import timm
import timm.data
import torch

from adq_wds.checks import positive
from adq_wds.errors import reason_of
from adq_wds.files import canonical_json, sha256_text
from adq_wds.models.checkpoints import state_sha256
from adq_wds.models.forward import ForwardOptions, pick_device
from adq_wds.models.network_encoder import NetworkEncoder, pooled_and_logits, stretched
from adq_wds.models.timm_build import check_timm_name, load_checkpoint, load_pretrained


def timm_encoder(
    name: str,
    *,
    checkpoint: str | Path | None = None,
    pretrained: bool = True,
    head: bool = True,
    device: str = "cpu",
    image_size: int | None = None,
    allow_pickle: bool = False,
    cache_dir: str | Path | None = None,
    amp: bool = False,
    channels_last: bool = True,
    compile: bool = False,  # noqa: A002 - torch's word
) -> NetworkEncoder:
    """An encoder from a timm network by name.

    Args:
        name: a timm model (`resnet18`, `vit_small_patch14_dinov2.lvd142m`) or `hf_hub:OWNER/NAME`.
        checkpoint: a file with the weights, `.safetensors`; its classifier decides the number of classes.
        pretrained: without `checkpoint`, fetch timm's weights for the name, or take them from its cache. False gives
            random weights, the same ones each time, for trying things out.
        head: keep the classifier and give logits. False also takes weights that have none.
        device: `cpu`, `cuda`, `cuda:1`, ..., or `auto` (cuda when there is one, else cpu).
        image_size: side of the network's input in pixels, when not its own.
        allow_pickle: read `.pth`, `.pt`, `.bin`, `.ckpt` checkpoints too: tensors only, no code is run. (Files that
            timm fetches by name are read by timm: safetensors where offered, else tensors only in the same way.)
        cache_dir: where fetched weights are kept, when not in the usual place.
        amp, channels_last, compile: how the network runs, as in `ForwardOptions`.

    Raises:
        ValueError: an unknown name (close ones listed), no such file or device, a checkpoint of another network, a
            head asked of weights without one, an image size the network does not take, or `amp` on a device
            without bfloat16.
        AdqError: weights that cannot be fetched, or a damaged checkpoint; at the first batch, a network that cannot
            be compiled.
    """
    options = ForwardOptions(amp=amp, channels_last=channels_last, compile=compile)
    check_timm_name(name)
    if image_size is not None:
        image_size = positive("image_size", image_size)
    torch_device = pick_device(device)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # fixed initial weights
        if checkpoint is not None:
            checkpoint = Path(checkpoint).absolute()
            model, sha256 = load_checkpoint(
                name, checkpoint, image_size=image_size, allow_pickle=allow_pickle, cache_dir=cache_dir
            )
            weights = f"file-sha256={sha256}"
        else:
            model = load_pretrained(name, pretrained=pretrained, image_size=image_size, cache_dir=cache_dir)
            weights = f"weights-sha256={state_sha256(model.state_dict().items())}"
    n_classes = getattr(model, "num_classes", 0) or None
    if head and n_classes is None:
        source = f"checkpoint {checkpoint}" if checkpoint else f"timm model {name!r}"
        raise ValueError(f"{source} has no classifier, so there are no logits; pass head=False")
    options.freeze(model, torch_device)
    timm_data: Any = timm.data
    config = timm_data.resolve_model_data_config(model, args={"img_size": image_size})
    # "prefetcher" is timm's word for: end with whole grey levels, they are scaled on the device
    transform = timm_data.create_transform(**config, is_training=False, use_prefetcher=True)
    input_size = config["input_size"][1:]
    return NetworkEncoder(
        name=name,
        revision=f"{weights};timm={timm.__version__};{options.revision}",
        preprocessing_hash=_preprocessing_hash(config, transform),
        width=_probe_width(model, name, config["input_size"], torch_device),
        n_classes=n_classes if head else None,
        model=model,
        device=torch_device,
        options=options,
        input_size=input_size,
        _prepare=partial(_transformed, transform=transform),
        _prepare_whole=partial(stretched, size=input_size, resample=PIL.Image.Resampling.BICUBIC),
        _normalise=partial(
            _normalised,
            mean=_grey_levels(config["mean"], torch_device),
            std=_grey_levels(config["std"], torch_device),
            order=options.memory_format,
        ),
        _recipe=partial(
            timm_encoder,
            name,
            checkpoint=checkpoint,
            pretrained=pretrained,
            head=head,
            device=device,
            image_size=image_size,
            allow_pickle=allow_pickle,
            cache_dir=cache_dir,
            **asdict(options),
        ),
    )


def _transformed(images: Sequence[PIL.Image.Image], *, transform: Any) -> torch.Tensor:
    """(B, 3, H, W) uint8, each image by timm's own steps."""
    return torch.stack([torch.as_tensor(transform(image)) for image in images])


def _normalised(
    pixels: torch.Tensor, *, mean: torch.Tensor, std: torch.Tensor, order: torch.memory_format
) -> torch.Tensor:
    return pixels.to(torch.float32, memory_format=order).sub_(mean).div_(std)


def _probe_width(model: torch.nn.Module, name: str, input_size: tuple[int, ...], device: torch.device) -> int:
    """D, from one black image; raises for an image size that the network refuses, before the first real batch."""
    try:
        with torch.inference_mode():
            black = torch.zeros(1, *input_size, device=device).to(memory_format=torch.channels_last)
            h, _ = pooled_and_logits(model, black, head=False)
    except Exception as error:  # networks refuse in their own ways: assertions, shape errors, missing methods
        raise ValueError(
            f"timm model {name!r} gives no pooled features for an input of {input_size}: "
            f"{reason_of(error)}; choose another image_size or model"
        ) from error
    if h.ndim != 2 or input_size[0] != 3:
        raise ValueError(
            f"timm model {name!r} gives features of shape {tuple(h.shape)} for an input of {input_size}; "
            "expected (1, D) from three colours; choose another model"
        )
    return h.shape[1]


def _grey_levels(values: Sequence[float], device: torch.device) -> torch.Tensor:
    return torch.tensor([v * 255 for v in values], dtype=torch.float32, device=device).view(3, 1, 1)


def _preprocessing_hash(config: Mapping[str, Any], transform: Any) -> str:
    """SHA-256 of the resolved configuration and of each step's settings.

    Not of the steps' `repr`, which shows tensors by torch's print options.
    """
    steps = [
        [type(step).__name__, {k: str(v) for k, v in vars(step).items() if not k.startswith("_")}]
        for step in transform.transforms
    ]
    return sha256_text(canonical_json({"config": dict(config), "steps": steps}))
