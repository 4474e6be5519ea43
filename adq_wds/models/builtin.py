"""The small network that comes with the package: an image becomes an embedding without a download.

Two sets of weights, both trained by `examples/train_builtin.py`, each in its own file whose header says how:

- `builtin`: trained with labels on CIFAR-10 train. Its embeddings of CIFAR-10 train know those labels, so numbers
  measured on that set with this encoder flatter it.
- `builtin-free`: trained without labels on the same images; the one to take where that matters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import PIL.Image
import torch
from torch import nn

from adq_wds.errors import AdqError
from adq_wds.files import canonical_json, sha256_text
from adq_wds.models import BUILTIN_NAMES
from adq_wds.models.checkpoints import load_shipped, with_weights
from adq_wds.models.forward import ForwardOptions, pick_device
from adq_wds.models.network_encoder import NetworkEncoder, pooled_and_logits, stretched

DEFINITION = "1"
"""Version of network and preprocessing; rises when equal weights would give other embeddings."""
SIDE = 32
WIDTH = 256
MEAN = (0.4914, 0.4822, 0.4465)  # of CIFAR-10 train, in [0, 1]
STD = (0.2470, 0.2435, 0.2616)
WEIGHTS = Path(__file__).with_name("weights")
PREPROCESSING_HASH = sha256_text(
    canonical_json({"size": [SIDE, SIDE], "filter": "bilinear", "mean": MEAN, "std": STD})
)


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
        return pooled_and_logits(self, x, head=self.head is not None)

    # As timm names the parts of a network

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """The last feature maps (B, 256, 4, 4)."""
        x = self.stem(x)
        x = x + self.mix1(x)
        x = self.down2(x)
        x = x + self.mix2(x)
        x = self.down3(x)
        last: torch.Tensor = x + self.mix3(x)
        return last

    def forward_head(self, maps: torch.Tensor, *, pre_logits: bool = False) -> torch.Tensor:
        """The logits (B, C) of feature maps, or h (B, 256), their means."""
        h = maps.mean((2, 3))
        return h if pre_logits or self.head is None else self.head(h)

    def get_classifier(self) -> nn.Module | None:
        """The linear head, or None."""
        return self.head


def _convolution(n_in: int, n_out: int, *, norm: bool, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(n_in, n_out, kernel, stride, padding=1, bias=not norm)
    return nn.Sequential(convolution, nn.BatchNorm2d(n_out) if norm else nn.Identity(), nn.ReLU(inplace=True))


def builtin_encoder(
    name: str = "builtin",
    *,
    device: str = "cpu",
    amp: bool = False,
    channels_last: bool = True,
    compile: bool = False,  # noqa: A002 - torch's word
) -> NetworkEncoder:
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
    torch_device = pick_device(device)
    path = weights_path(name)
    weights = load_shipped(path)
    head = weights.state.get("head.bias")
    n_classes = None if head is None else head.shape[0]
    try:
        network = with_weights(lambda: SmallNet(n_classes), weights.state)
    except ValueError as error:
        raise AdqError(
            f"weights {path} do not fit encoder {name!r}: {error}; install the package again"
        ) from error
    options.freeze(network, torch_device)
    return NetworkEncoder(
        name=name,
        revision=f"file-sha256={weights.sha256};definition={DEFINITION};{options.revision}",
        preprocessing_hash=PREPROCESSING_HASH,
        width=WIDTH,
        n_classes=n_classes,
        model=network,
        device=torch_device,
        options=options,
        input_size=(SIDE, SIDE),
        _prepare=resized,
        _prepare_whole=resized,
        _normalise=normalised,
        _recipe=partial(builtin_encoder, name, device=device, **asdict(options)),
        trained_on=weights.header["trained_on"],
        saw_labels=n_classes is not None,
    )


def weights_path(name: str) -> Path:
    """The file of the weights of this name. Its header holds `script`, `trained_on`, `settings`, `accuracy` (JSON).

    Raises:
        ValueError: an unknown name.
    """
    if name not in BUILTIN_NAMES:
        raise ValueError(f"unknown built-in encoder {name!r}; expected one of {', '.join(BUILTIN_NAMES)}")
    return WEIGHTS / f"{name}.safetensors"


def resized(images: Sequence[PIL.Image.Image]) -> torch.Tensor:
    """(B, 3, 32, 32) uint8: by Pillow's bilinear filter, which averages when it shrinks."""
    return stretched(images, size=(SIDE, SIDE), resample=PIL.Image.Resampling.BILINEAR)


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    """(B, 3, 32, 32) float32, in the same order in memory, of grey levels (B, 3, 32, 32) uint8."""
    mean, std = (torch.tensor(v, device=pixels.device).view(3, 1, 1) for v in (MEAN, STD))
    return pixels.float().div_(255).sub_(mean).div_(std)
