"""Runs a frozen network as an encoder: prepares the images, computes h and logits, pickles as a recipe."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray

from adq_wds.errors import AdqError
from adq_wds.models.forward import CompiledPass, ForwardOptions, Pass
from adq_wds.protocols import Answer
from adq_wds.samples.image import check_rgb

Prepare = Callable[[Sequence[PIL.Image.Image]], torch.Tensor]
"""From B images to their pixels, uint8, all of one size."""


@dataclass(frozen=True, eq=False)
class NetworkEncoder:
    """A frozen network; made by `builtin_encoder` or `timm_encoder`.

    May be called from several threads at once: on the CPU they run side by side, on an accelerator the forward
    passes queue while the next images are prepared. Pickles as the call that made it, not as its weights: another
    process loads the same weights again, and raises when they have changed.

    Attributes:
        name: as given when it was made.
        revision: which weights (SHA-256), which version of network or timm, number type, and what else of
            `ForwardOptions` is not usual.
        preprocessing_hash: SHA-256 of size, crop, interpolation, mean and deviation.
        width: D.
        n_classes: C, or None without a head.
        model: the network, in evaluation mode, without gradients; has timm's `forward_features` and `forward_head`.
        device: where it is.
        options: how it runs.
        input_size: (H, W) of its input.
        trained_on: the images that the weights were trained on, in words, where known.
        saw_labels: whether the weights were trained with those images' labels; if so, results on these images are too
            good.
    """

    name: str
    revision: str
    preprocessing_hash: str
    width: int
    n_classes: int | None
    model: Any = field(repr=False)
    device: torch.device
    options: ForwardOptions
    input_size: tuple[int, int]
    _prepare: Prepare = field(repr=False)
    _prepare_whole: Prepare = field(repr=False)  # as `_prepare`, but nothing is cropped
    _normalise: Callable[[torch.Tensor], torch.Tensor] = field(repr=False)  # pixels -> (B, 3, H, W) float32
    _recipe: Callable[[], NetworkEncoder] = field(repr=False)
    trained_on: str = ""
    saw_labels: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _network: Pass = field(init=False, repr=False)

    def __post_init__(self) -> None:
        network: Pass = partial(pooled_and_logits, self.model, head=self.n_classes is not None)
        if self.options.compile:
            network = CompiledPass(self.name, network, self.device, self.options.memory_format)
        object.__setattr__(self, "_network", network)

    def __call__(self, images: Sequence[PIL.Image.Image]) -> Answer:
        """Embed a batch.

        Args:
            images: B RGB images of any sizes.

        Returns:
            h (B, D) float32, the pooled features before the classifier, and logits (B, C) float32, or None without
            a head.

        Raises:
            ValueError: an image is not RGB; names its position and mode.
            AdqError: the network cannot be compiled.
        """
        check_rgb(images)
        if not len(images):
            logits = None if self.n_classes is None else np.empty((0, self.n_classes), np.float32)
            return np.empty((0, self.width), np.float32), logits
        pixels = self._prepare(images)
        with self.running(), torch.inference_mode():
            h, z = self._network(self._input(pixels))
            return _float32(h), None if z is None else _float32(z)

    def whole(self, images: Sequence[PIL.Image.Image]) -> torch.Tensor:
        """The network's input (B, 3, H, W) from whole images, while embedding may crop their borders."""
        return self._input(self._prepare_whole(images))

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Run parts of the network as the encoder does: in its number type, and one thread at a time on an
        accelerator."""
        lock = self._lock if self.device.type != "cpu" else contextlib.nullcontext()
        with (
            lock,
            torch.no_grad(),
            torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.amp),
        ):
            yield

    def _input(self, pixels: torch.Tensor) -> torch.Tensor:
        # uint8 travels to the device, a quarter of the bytes; there it is scaled
        return self._normalise(pixels.to(self.device)).contiguous(memory_format=self.options.memory_format)

    def __reduce__(self) -> tuple[Any, ...]:
        return _remake, (self._recipe, self.revision)


def pooled_and_logits(model: Any, x: torch.Tensor, *, head: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Pooled features (B, D) and logits (B, C) of a network from one pass through its body.

    Only the head runs twice: `forward_head` knows the layers between pooling and classifier (a hidden layer
    in MobileNetV3 and VGG, a norm in ConvNeXt, two classifiers in distilled networks).
    """
    features = model.forward_features(x)
    return model.forward_head(features, pre_logits=True), model.forward_head(features) if head else None


def stretched(
    images: Sequence[PIL.Image.Image], *, size: tuple[int, int], resample: PIL.Image.Resampling
) -> torch.Tensor:
    """(B, 3, H, W) uint8 of images drawn to one (H, W), stretched where the sides' ratio is another."""
    height, width = size
    resized = [
        image if image.size == (width, height) else image.resize((width, height), resample)
        for image in images
    ]
    return torch.from_numpy(np.stack([np.asarray(image) for image in resized])).permute(0, 3, 1, 2)


def _float32(values: torch.Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = values.float().cpu().numpy()
    return array


def _remake(recipe: Callable[[], NetworkEncoder], revision: str) -> NetworkEncoder:
    """Unpickle: load the weights again, and raise if they have changed."""
    encoder = recipe()
    if encoder.revision != revision:
        raise AdqError(
            f"encoder {encoder.name!r} changed while it was handed to another process: was {revision}, now "
            f"{encoder.revision}; keep its weights and the installed packages as they are during a run"
        )
    return encoder
