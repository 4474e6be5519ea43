"""How does a small image become an embedding without a download? By a small network that comes with the package.

Two sets of weights for one network, both trained by `examples/train_builtin.py`, each in its own file:

- `builtin`: trained with labels on CIFAR-10 train. Its embeddings of CIFAR-10 train know those labels, so numbers
  measured on that set with this encoder flatter it.
- `builtin-free`: trained without labels on the same images; the one to take where that matters.

Each file's header (`weights_header`) says how it was made and what it reached.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import safetensors
import torch
from numpy.typing import NDArray
from torch import nn

from adq_wds.errors import AdqError
from adq_wds.files import canonical_json, sha256_text
from adq_wds.models.checkpoints import file_sha256, load_state, misfit
from adq_wds.models.forward import Forward, ForwardOptions
from adq_wds.samples.image import check_rgb

BUILTIN_NAMES = ("builtin", "builtin-free")
DEFINITION = "1"
"""Version of network and preprocessing; rises when equal weights would give other embeddings."""
SIDE = 32
WIDTH = 256
MEAN = (0.4914, 0.4822, 0.4465)  # of CIFAR-10 train, in [0, 1]
STD = (0.2470, 0.2435, 0.2616)
WEIGHTS = Path(__file__).with_name("weights")
HEADER_ENTRIES = ("script", "trained_on", "settings", "accuracy")


class SmallNet(nn.Module):
    """Six 3×3 convolutions after a 4×4 one of stride 2, on 16×16, 8×8 and 4×4 grids, averaged over the last.

    Every convolution is followed by a ReLU, so h >= 0. 35 million multiply-adds an image, 1.15 million weights.

    Args:
        n_classes: C of the linear head, or None for no head.
        norm: batch normalisation after each convolution, for training. Stored weights have a bias instead, into which
            the training script folds what the normalisation has learnt.
    """

    def __init__(self, n_classes: int | None = None, *, norm: bool = False) -> None:
        super().__init__()
        self.stem = _convolution(3, 64, norm=norm, kernel=4, stride=2)  # 32×32 -> 16×16
        self.mix1 = _convolution(64, 64, norm=norm)
        self.down2 = _convolution(64, 128, norm=norm, stride=2)  # -> 8×8
        self.mix2 = _convolution(128, 128, norm=norm)
        self.down3 = _convolution(128, WIDTH, norm=norm, stride=2)  # -> 4×4
        self.mix3 = _convolution(WIDTH, WIDTH, norm=norm)
        self.head = None if n_classes is None else nn.Linear(WIDTH, n_classes)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """h (B, 256) and logits (B, C), or None without a head, of normalised images (B, 3, 32, 32)."""
        h = self.maps(x).mean((2, 3))
        return h, None if self.head is None else self.head(h)

    def maps(self, x: torch.Tensor) -> torch.Tensor:
        """The last feature maps (B, 256, 4, 4), whose means are h."""
        x = self.stem(x)
        x = x + self.mix1(x)
        x = self.down2(x)
        x = x + self.mix2(x)
        x = self.down3(x)
        last: torch.Tensor = x + self.mix3(x)
        return last


def _convolution(n_in: int, n_out: int, *, norm: bool, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(n_in, n_out, kernel, stride, padding=1, bias=not norm)
    return nn.Sequential(convolution, nn.BatchNorm2d(n_out) if norm else nn.Identity(), nn.ReLU(inplace=True))


@dataclass(frozen=True, eq=False)
class BuiltinEncoder:
    """The small network with one of its sets of weights; made by `builtin_encoder`.

    May be called from several threads at once: on the CPU they run side by side, on an accelerator the forward passes
    queue. Pickles as its name, device and options; another process loads the weights again, and fails when they have changed.

    Attributes:
        name: `builtin` or `builtin-free`.
        revision: SHA-256 of the weights' file, the version of network and preprocessing, number type, and what else
            of `ForwardOptions` is not usual.
        preprocessing_hash: SHA-256 of size, filter, mean and deviation.
        width: D = 256.
        n_classes: C of the head, or None without one.
        trained_on: the images that the weights have seen, in words.
        saw_labels: whether the weights have seen their labels too; if so, embeddings of those very images flatter.
        network: in evaluation mode, without gradients, float32.
    """

    name: str
    revision: str
    n_classes: int | None
    trained_on: str
    saw_labels: bool
    network: SmallNet = field(repr=False)
    device: torch.device
    _forward: Forward = field(repr=False)
    preprocessing_hash: str = sha256_text(
        canonical_json({"size": [SIDE, SIDE], "filter": "bilinear", "mean": MEAN, "std": STD})
    )
    width: int = WIDTH
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __call__(
        self, images: Sequence[PIL.Image.Image]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """Embed a batch.

        Args:
            images: B RGB images of any sizes; resized to 32×32 by `resized`.

        Returns:
            h (B, 256) float32, >= 0, and logits (B, C) float32, or None without a head.

        Raises:
            ValueError: an image is not RGB; names its position and mode.
        """
        check_rgb(images)
        if not len(images):
            return np.empty((0, self.width), np.float32), self._no_logits()
        pixels = torch.from_numpy(np.stack([np.asarray(resized(image)) for image in images]))
        with self._lock if self.device.type != "cpu" else contextlib.nullcontext(), torch.inference_mode():
            return self._forward(normalised(pixels.to(self.device)))

    def _no_logits(self) -> NDArray[np.float32] | None:
        return None if self.n_classes is None else np.empty((0, self.n_classes), np.float32)

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (self.name, str(self.device), self.revision, self._forward.options)


def builtin_encoder(
    name: str = "builtin",
    *,
    device: str = "cpu",
    amp: bool = False,
    channels_last: bool = True,
    compile: bool = False,  # noqa: A002 - torch's word
) -> BuiltinEncoder:
    """The encoder that comes with the package.

    Args:
        name: `builtin`, trained with the labels of CIFAR-10 train, which gives logits (B, 10) too; or `builtin-free`,
            trained without labels, which gives none.
        device: `cpu`, `cuda`, `cuda:1`, ..., or `auto` (cuda when there is one, else cpu).
        amp, channels_last, compile: how the network runs; see `ForwardOptions`.

    Raises:
        ValueError: an unknown name, no such device, or `amp` on a device without bfloat16.
        AdqError: the weights' file is missing, damaged, or another network's: the installation is broken; at the first
            batch, the network cannot be compiled.

    Source: ours; see `examples/train_builtin.py`.

    >>> h, logits = builtin_encoder()([PIL.Image.new("RGB", (640, 480))])
    >>> h.shape, logits.shape
    ((1, 256), (1, 10))
    """
    options = ForwardOptions(amp=amp, channels_last=channels_last, compile=compile)
    if device == "cpu":
        place = torch.device("cpu")
    else:
        from adq_wds.models.timm_encoder import (
            pick_device,  # brings timm, which takes longer than all the rest
        )

        place = pick_device(device)
    path = weights_path(name)
    header = weights_header(name)
    state = load_state(path)
    head = state.get("head.bias")
    n_classes = None if head is None else head.shape[0]
    with torch.device("meta"):  # no first weights: they would draw from the caller's random state
        network = SmallNet(n_classes)
    if difference := misfit(network, state):
        raise AdqError(f"weights {path} do not fit encoder {name!r}: {difference}; install the package again")
    network.load_state_dict({k: v.float() for k, v in state.items()}, assign=True)
    options.place(network, place)
    return BuiltinEncoder(
        name=name,
        revision=f"file-sha256={file_sha256(path)};definition={DEFINITION};{options.revision}",
        n_classes=n_classes,
        trained_on=header["trained_on"],
        saw_labels=n_classes is not None,
        network=network,
        device=place,
        _forward=Forward(name, network, options, place),
    )


def weights_path(name: str) -> Path:
    """Where the weights of this name lie.

    Raises:
        ValueError: an unknown name.
        AdqError: no such file: the installation is broken.
    """
    if name not in BUILTIN_NAMES:
        raise ValueError(f"unknown built-in encoder {name!r}; expected one of {', '.join(BUILTIN_NAMES)}")
    path = WEIGHTS / f"{name}.safetensors"
    if not path.is_file():
        raise AdqError(f"weights {path}: no such file, though it comes with the package; install it again")
    return path


def weights_header(name: str) -> dict[str, str]:
    """How the weights of this name were made: `script`, `trained_on`, `settings` and `accuracy` (JSON).

    Raises:
        ValueError: an unknown name.
        AdqError: the file is missing or damaged, or its header lacks one of the four.
    """
    path = weights_path(name)
    try:
        with safetensors.safe_open(path, framework="np") as file:
            header = dict(file.metadata() or {})
    except (safetensors.SafetensorError, OSError) as error:
        raise AdqError(f"weights {path}: damaged ({error}); install the package again") from error
    if missing := [entry for entry in HEADER_ENTRIES if entry not in header]:
        raise AdqError(f"weights {path}: the header lacks {', '.join(missing)}; install the package again")
    return header


def resized(image: PIL.Image.Image) -> PIL.Image.Image:
    """32×32, stretched where it is not square: Pillow's bilinear filter, which averages when it shrinks."""
    return image if image.size == (SIDE, SIDE) else image.resize((SIDE, SIDE), PIL.Image.Resampling.BILINEAR)


def normalised(images: torch.Tensor) -> torch.Tensor:
    """(B, 3, 32, 32) float32, colours last in memory, of (B, 32, 32, 3) uint8 grey levels."""
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (MEAN, STD))
    return images.permute(0, 3, 1, 2).float().div_(255).sub_(mean).div_(std)


def _again(name: str, device: str, revision: str, options: ForwardOptions) -> BuiltinEncoder:
    """Unpickle: load the weights anew, and insist on the same ones."""
    encoder = builtin_encoder(name, device=device, **asdict(options))
    if encoder.revision != revision:
        raise AdqError(
            f"encoder {name!r} changed while it was handed to another process: was {revision}, "
            f"now {encoder.revision}; keep the installed package as it is during a run"
        )
    return encoder
