"""How does a timm network become an encoder? Its own preprocessing, one forward pass, pooled features and logits."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import timm
import timm.data
import torch
from numpy.typing import NDArray

from adq_wds.errors import AdqError
from adq_wds.files import canonical_json, sha256_text
from adq_wds.models.checkpoints import file_sha256, state_sha256
from adq_wds.models.forward import Forward, ForwardOptions
from adq_wds.models.timm_build import check_timm_name, load_checkpoint, load_pretrained
from adq_wds.samples.image import check_rgb


@dataclass(frozen=True, eq=False)
class TimmEncoder:
    """A frozen timm network; made by `timm_encoder`.

    May be called from several threads at once: on the CPU they run side by side, on an accelerator the forward
    passes queue while the next images are prepared. Pickles as its arguments, not as its weights: another process
    loads the same weights again, and fails when they have changed.

    Attributes:
        name: as given to `timm_encoder`.
        revision: which weights (SHA-256), timm version, number type, and what else of `ForwardOptions` is not usual.
        preprocessing_hash: SHA-256 of size, crop, interpolation, mean and deviation.
        width: D.
        n_classes: C, or None without a head.
        model: the network, in evaluation mode, without gradients.
    """

    name: str
    revision: str
    preprocessing_hash: str
    width: int
    n_classes: int | None
    model: torch.nn.Module = field(repr=False)
    device: torch.device
    _forward: Forward = field(repr=False)
    _resize: Any = field(repr=False)  # PIL image -> (3, H, W) uint8
    _mean: torch.Tensor = field(repr=False)  # (3, 1, 1), in grey levels, on `device`
    _std: torch.Tensor = field(repr=False)
    _arguments: Mapping[str, Any] = field(repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __call__(
        self, images: Sequence[PIL.Image.Image]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """Embed a batch.

        Args:
            images: B RGB images of any sizes.

        Returns:
            h (B, D) float32, timm's pooled features before the classifier, and logits (B, C) float32, or None without
            a head.

        Raises:
            ValueError: an image is not RGB; names its position and mode.
        """
        if not len(images):
            return np.empty((0, self.width), np.float32), self._no_logits()
        check_rgb(images)
        pixels = torch.stack([torch.as_tensor(self._resize(image)) for image in images])  # (B, 3, H, W) uint8
        with self._lock if self.device.type != "cpu" else contextlib.nullcontext(), torch.inference_mode():
            # uint8 travels to the device, a quarter of the bytes; there it is scaled, in place
            order = self._forward.options.memory_format
            x = pixels.to(self.device).to(torch.float32, memory_format=order)
            return self._forward(x.sub_(self._mean).div_(self._std))

    def _no_logits(self) -> NDArray[np.float32] | None:
        return None if self.n_classes is None else np.empty((0, self.n_classes), np.float32)

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (dict(self._arguments), self.revision)


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
) -> TimmEncoder:
    """An encoder from a timm network by name.

    Args:
        name: a timm model (`resnet18`, `vit_small_patch14_dinov2.lvd142m`) or `hf_hub:OWNER/NAME`.
        checkpoint: a file with the weights, `.safetensors`; its classifier decides the number of classes.
        pretrained: fetch, without `checkpoint`, the weights timm knows for the name (from its cache when they are
            there). False gives random weights, the same ones each time, for trying things out.
        head: keep the classifier and give logits. False also takes weights that have none.
        device: `cpu`, `cuda`, `cuda:1`, ..., or `auto` (cuda when there is one, else cpu).
        image_size: side of the network's input in pixels, when not its own.
        allow_pickle: read `.pth`, `.pt`, `.bin`, `.ckpt` checkpoints too: tensors only, no code is run. (What
            timm fetches by name is read by timm: safetensors where offered, else tensors only in the same way.)
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
    if image_size is not None and (type(image_size) is not int or image_size < 1):
        raise ValueError(f"image_size={image_size!r}: expected a number of pixels >= 1")
    place = pick_device(device)
    if checkpoint is not None:
        checkpoint = Path(checkpoint).absolute()
    with _own_random_state():
        if checkpoint is not None:
            model = load_checkpoint(
                name, checkpoint, image_size=image_size, allow_pickle=allow_pickle, cache_dir=cache_dir
            )
        else:
            model = load_pretrained(name, pretrained=pretrained, image_size=image_size, cache_dir=cache_dir)
    n_classes = getattr(model, "num_classes", 0) or None
    if head and n_classes is None:
        source = f"checkpoint {checkpoint}" if checkpoint else f"timm model {name!r}"
        raise ValueError(f"{source} has no classifier, so there are no logits; pass head=False")
    options.place(model, place)
    timm_data: Any = timm.data
    config = timm_data.resolve_model_data_config(model, args={"img_size": image_size})
    # "prefetcher" is timm's word for: end with whole grey levels, they are scaled on the device
    resize = timm_data.create_transform(**config, is_training=False, use_prefetcher=True)
    weights = file_sha256(checkpoint) if checkpoint else state_sha256(model.state_dict().items())
    return TimmEncoder(
        name=name,
        revision=f"{'file' if checkpoint else 'weights'}-sha256={weights};timm={timm.__version__};{options.revision}",
        preprocessing_hash=_preprocessing_hash(config, resize),
        width=_probe_width(model, name, config["input_size"], place),
        n_classes=n_classes if head else None,
        model=model,
        device=place,
        _forward=Forward(name, partial(pooled_and_logits, model, head=head), options, place),
        _resize=resize,
        _mean=_grey_levels(config["mean"], place),
        _std=_grey_levels(config["std"], place),
        _arguments={
            "name": name,
            "checkpoint": checkpoint,
            "pretrained": pretrained,
            "head": head,
            "device": device,
            "image_size": image_size,
            "allow_pickle": allow_pickle,
            "cache_dir": cache_dir,
            **asdict(options),
        },
    )


def pooled_and_logits(
    model: torch.nn.Module, x: torch.Tensor, *, head: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Pooled features (B, D) and logits (B, C) of a timm network from one pass through its body.

    Only the head runs twice: its own `forward_head` knows what lies between pooling and classifier (a hidden layer
    in MobileNetV3 and VGG, a norm in ConvNeXt, two classifiers in distilled networks).
    """
    body: Any = model
    features = body.forward_features(x)
    h: torch.Tensor = body.forward_head(features, pre_logits=True)
    return h, body.forward_head(features) if head else None


def pick_device(device: str) -> torch.device:
    """The device a name stands for; `auto` is cuda when there is one, else cpu.

    Raises:
        ValueError: not a device, or one this machine does not have.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device={device!r}: expected 'cpu', 'cuda', 'cuda:N' or 'auto'") from error
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device={device!r}: torch sees {torch.cuda.device_count()} CUDA devices; use 'auto' or 'cpu'"
        )
    return place


def _again(arguments: dict[str, Any], revision: str) -> TimmEncoder:
    """Unpickle: load the weights anew, and insist on the same ones."""
    encoder = timm_encoder(**arguments)
    if encoder.revision != revision:
        raise AdqError(
            f"encoder {encoder.name!r} changed while it was handed to another process: was {revision}, "
            f"now {encoder.revision}; keep the checkpoint and the versions as they are during a run"
        )
    return encoder


@contextlib.contextmanager
def _own_random_state() -> Iterator[None]:
    """Fixed initial weights, without a trace in the caller's random state."""
    generator = torch.default_generator
    before = generator.get_state()
    generator.manual_seed(0)
    try:
        yield
    finally:
        generator.set_state(before)


def _probe_width(model: torch.nn.Module, name: str, input_size: tuple[int, ...], device: torch.device) -> int:
    """D, from one black image: also meets a size the network refuses before the first real batch does."""
    try:
        with torch.inference_mode():
            black = torch.zeros(1, *input_size, device=device).to(memory_format=torch.channels_last)
            h, _ = pooled_and_logits(model, black, head=False)
    except Exception as error:  # networks refuse in their own ways: assertions, shape errors, missing methods
        text = " ".join(str(error).split())[:160]
        raise ValueError(
            f"timm model {name!r} gives no pooled features for an input of {input_size}: "
            f"{type(error).__name__}: {text}; choose another image_size or model"
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

    Not of the steps' `repr`: what that shows of a tensor hangs on torch's print options.
    """
    steps = [
        [type(step).__name__, {k: str(v) for k, v in vars(step).items() if not k.startswith("_")}]
        for step in transform.transforms
    ]
    return sha256_text(canonical_json({"config": dict(config), "steps": steps}))
