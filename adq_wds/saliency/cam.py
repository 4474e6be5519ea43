"""Scores patches by a classifier's class activation map (Grad-CAM, Grad-CAM++)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray
from torch import nn

from adq_wds.checks import positive
from adq_wds.core.importance import gradcam, gradcam_plus_plus, patch_means
from adq_wds.errors import shorten
from adq_wds.models.network_encoder import NetworkEncoder
from adq_wds.protocols import Label
from adq_wds.saliency.plain import grid_of

Maps = Callable[[torch.Tensor], torch.Tensor]
Parts = tuple[Maps, Maps, nn.Linear | None]


@dataclass(frozen=True, eq=False)
class CamImportance:
    """Grad-CAM or Grad-CAM++ of each patch; made by `cam_importance`. Pickles as its arguments.

    Attributes:
        encoder: the network with the classifier.
        method: `gradcam` or `gradcam++`.
        patch: side P in pixels of the images' patches.
        use_labels: whether to explain the class of an image's label.
    """

    encoder: NetworkEncoder
    method: str
    patch: int
    use_labels: bool
    _maps: Maps = field(repr=False)
    _logits: Maps = field(repr=False)
    _last: nn.Linear | None = field(repr=False)  # only where the maps are closed

    @property
    def closed(self) -> bool:
        """Whether the logits are a linear map of the mean of the last feature map: no gradient is needed."""
        return self._last is not None

    def __call__(
        self, images: Sequence[PIL.Image.Image], labels: Sequence[Label], seeds: Sequence[int]
    ) -> NDArray[np.float32]:
        """Importance of each patch.

        Args:
            images: B upright RGB images of one size, whose sides P divides; the classifier sees each whole, at its
                own input size.
            labels: of each image, its class's number, or None for the class that is predicted.
            seeds: ignored.

        Returns:
            (B, L) float32, >= 0.

        Raises:
            ValueError: images of several sizes or not RGB, a side that P does not divide, a label that is no class.
        """
        if not len(images):
            return np.empty((0, 0), np.float32)
        grid = grid_of(images, self.patch)
        x = self.encoder.whole(images)
        with self.encoder.running():
            return patch_means(self.of_maps(self._maps(x), labels), grid, self.patch)

    def of_maps(self, maps: torch.Tensor, labels: Sequence[Label]) -> NDArray[np.float32]:
        """(B, h, w) float32, >= 0: the class activation maps of feature maps (B, D, h, w), labels as for a call."""
        maps = maps.float()
        classes = self._classes(labels, maps)
        if self._last is None:
            return cam_by_gradient(self._logits, maps, classes, method=self.method)
        closed_form = gradcam if self.method == "gradcam" else gradcam_plus_plus
        weight = self._last.weight.float().cpu().numpy()
        return closed_form(maps.cpu().contiguous().numpy(), weight, classes)

    def _classes(self, labels: Sequence[Label], maps: torch.Tensor) -> NDArray[np.int64]:
        """(B,): the label, with `use_labels` and where there is one, else the prediction."""
        n_classes = self.encoder.n_classes
        assert n_classes is not None
        asked = list(labels) if self.use_labels else [None] * len(maps)
        if len(asked) != len(maps):
            raise ValueError(f"{len(asked)} labels for {len(maps)} images; expected one each, or None")
        for i, label in enumerate(asked):
            if label is not None and (
                isinstance(label, str) or not 0 <= label < n_classes or int(label) != label
            ):
                raise ValueError(
                    f"image {i} of the batch has label {shorten(label)}, and {self.encoder.name!r} has the classes "
                    f"0 to {n_classes - 1}; give class numbers, or use_labels=False to take what it predicts"
                )
        if None not in asked:
            return np.array(asked, dtype=np.int64)
        predicted = self._logits(maps).argmax(1).tolist()
        return np.array(
            [p if a is None else a for a, p in zip(asked, predicted, strict=True)], dtype=np.int64
        )

    def __reduce__(self) -> tuple[Any, ...]:
        again = partial(cam_importance, method=self.method, patch=self.patch, use_labels=self.use_labels)
        return again, (self.encoder,)


def cam_importance(
    encoder: NetworkEncoder, *, method: str = "gradcam++", patch: int, use_labels: bool = True
) -> CamImportance:
    """The importance of patches by a classifier's class activation map.

    Where the logits are a linear map of the mean of the last feature map and nothing stands between (ResNet, RegNet,
    EfficientNet, DenseNet), one forward pass is enough; this is tested once, here. Elsewhere (ConvNeXt,
    MobileNetV3, VGG) the classifier's head is run backwards.

    Args:
        encoder: with a classifier: `builtin_encoder()` or `timm_encoder(...)`.
        method: `gradcam` or `gradcam++`.
        patch: side P in pixels of the images' patches.
        use_labels: take the map of the image's label where it has one. Only where the classifier's classes are the
            labels; False takes the predicted class always.

    Raises:
        ValueError: an encoder without classifier, or a network without feature maps (a ViT).

    Source: Selvaraju et al. 2017 (arXiv 1610.02391), Chattopadhyay et al. 2018 (arXiv 1710.11063); for choosing
    patches Zhou et al. 2023 (arXiv 2308.10524), who take the predicted class. The closed forms are ours.

    >>> from adq_wds.models.builtin import builtin_encoder
    >>> importance = cam_importance(builtin_encoder(), patch=4)
    >>> importance.closed, importance([PIL.Image.new("RGB", (32, 32))], [3], [0]).shape
    (True, (1, 64))
    """
    patch = positive("patch", patch)
    if encoder.n_classes is None:
        raise ValueError(
            f"encoder {encoder.name!r} gives no logits, and {method} explains them; take one with a head"
        )
    maps, logits, last = _parts(encoder.model)
    x = torch.randn(2, 3, *encoder.input_size, generator=torch.Generator().manual_seed(0)).to(encoder.device)
    with torch.no_grad():
        probe = maps(x)
    if probe.ndim != 4:
        raise ValueError(
            f"encoder {encoder.name!r} ends with features of shape {tuple(probe.shape)}, not with feature maps "
            f"(B, D, h, w), which {method} needs; for a ViT take attention_importance"
        )
    closed = is_closed(logits, probe, last)
    return CamImportance(encoder, method, patch, use_labels, maps, logits, last if closed else None)


@torch.inference_mode(False)  # the caller may be in inference mode
def cam_by_gradient(
    logits: Maps, maps: torch.Tensor, classes: NDArray[np.int64], *, method: str
) -> NDArray[np.float32]:
    """Class activation maps by their definitions, for any head: (B, h, w) float32, >= 0.

    Args:
        logits: the head, from feature maps (B, D, h, w) to (B, C).
        maps: A (B, D, h, w) float32.
        classes: (B,) integers, each image's class.
        method: `gradcam`: the weight of a channel is the mean of g = dz/dA. `gradcam++`: the sum of
            α·ReLU(g) with α = g² / (2g² + S·g³) = 1 / (2 + S·g), S the channel's sum; 0 where g or the divisor is.
    """
    columns = torch.from_numpy(classes).to(maps.device)[:, None]
    A, g = maps.double(), _gradient(lambda leaf: logits(leaf).gather(1, columns).sum(), maps).double()
    if method == "gradcam":
        weight = g.mean((2, 3), keepdim=True)
    else:
        below = 2 + A.sum((2, 3), keepdim=True) * g
        weight = torch.where(below != 0, g.relu() / below, 0).sum((2, 3), keepdim=True)
    cam: NDArray[np.float32] = (weight * A).sum(1).relu().float().cpu().numpy()
    return cam


@torch.inference_mode(False)
def is_closed(logits: Maps, maps: torch.Tensor, last: nn.Linear | None) -> bool:
    """Whether every logit's gradient by the maps is its row of `last`'s weights / Z everywhere, tested on some maps.

    Args:
        maps: (B, D, h, w) of a few unrelated images.
    """
    if last is None or last.in_features != maps.shape[1]:
        return False
    random = torch.randn(len(maps), last.out_features, generator=torch.Generator().manual_seed(1))
    mixture = random.to(maps.device)  # of all classes at once
    with torch.no_grad():
        if logits(maps.float()).shape != mixture.shape:
            return False
    gradient = _gradient(lambda leaf: (logits(leaf) * mixture).sum(), maps.float())
    expected = (mixture @ last.weight.detach().float() / maps[0, 0].numel())[:, :, None, None]
    return bool((gradient - expected).abs().max() <= 1e-5 * expected.abs().max())


def _gradient(function: Maps, maps: torch.Tensor) -> torch.Tensor:
    """The gradient of a scalar function of feature maps."""
    with torch.enable_grad():
        leaf = maps.detach().clone().requires_grad_()
        return torch.autograd.grad(function(leaf), leaf)[0]


def _parts(model: Any) -> Parts:
    """A network as feature maps (B, D, h, w), the logits of these, and its last linear layer."""
    last_axis = getattr(model, "output_fmt", "NCHW") == "NHWC"  # Swin

    def maps(x: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = model.forward_features(x)
        return features.permute(0, 3, 1, 2) if last_axis and features.ndim == 4 else features

    def logits(maps: torch.Tensor) -> torch.Tensor:
        z: torch.Tensor = model.forward_head(maps.permute(0, 2, 3, 1) if last_axis else maps)
        return z

    last = model.get_classifier()
    return maps, logits, last if isinstance(last, nn.Linear) else None
