"""Scores patches by the attention of a vision transformer's last block."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray
from torch import nn

from adq_wds.checks import positive
from adq_wds.core.importance import patch_means
from adq_wds.core.patches import Grid
from adq_wds.models.network_encoder import NetworkEncoder
from adq_wds.protocols import Label
from adq_wds.saliency.plain import grid_of


@dataclass(frozen=True, eq=False)
class AttentionImportance:
    """How much a vision transformer's last block attends to each patch; made by `attention_importance`.

    Attributes:
        encoder: the vision transformer.
        patch: side P in pixels of the images' patches; the network's own patches may have another size.
    """

    encoder: NetworkEncoder
    patch: int
    _attention: Any = field(repr=False)  # the last block's, in the network
    _open: Any = field(repr=False)  # a copy that computes its weights step by step

    def __call__(
        self, images: Sequence[PIL.Image.Image], labels: Sequence[Label], seeds: Sequence[int]
    ) -> NDArray[np.float32]:
        """Importance of each patch; see `CamImportance`. Labels and seeds are ignored.

        Returns:
            (B, L) float32, >= 0: the class token's attention, or without one the mean over all patches', averaged
            over heads. Where the network's grid differs, it is interpolated bilinearly and averaged over each patch.
        """
        if not len(images):
            return np.empty((0, 0), np.float32)
        grid = grid_of(images, self.patch)
        x = self.encoder.whole(images)
        model = self.encoder.model
        with self.encoder.running():
            weights = self._weights(x).float().mean(1)  # (B, N, N), a row for each token that looks
        n_prefix = model.num_prefix_tokens
        rows = weights[:, :1] if getattr(model, "cls_token", None) is not None else weights[:, n_prefix:]
        seen = rows.mean(1)[:, n_prefix:].cpu().numpy()
        network_grid: Grid = tuple(model.patch_embed.grid_size)
        return (
            seen if network_grid == grid else patch_means(seen.reshape(-1, *network_grid), grid, self.patch)
        )

    def _weights(self, x: torch.Tensor) -> torch.Tensor:
        """(B, heads, N, N) of the last block: its input is recorded and put through the open copy."""
        inputs: list[tuple[Any, Any]] = []
        thread = threading.get_ident()

        def catch(_: nn.Module, args: Any, kwargs: Any = None) -> None:
            # another thread may run the same network; torch calls a hook removed meanwhile without kwargs
            if threading.get_ident() == thread:
                inputs.append((args, kwargs))

        handle = self._attention.register_forward_pre_hook(catch, with_kwargs=True)
        try:
            self.encoder.model.forward_features(x)
        finally:
            handle.remove()
        (args, kwargs), opened = inputs[-1], copy.copy(self._open)
        weights: list[torch.Tensor] = []
        opened._modules = {**opened._modules, "attn_drop": _Record(weights)}
        opened(*args, **(kwargs or {}))
        return weights[0]

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(attention_importance, patch=self.patch), (self.encoder,)


class _Record(nn.Module):
    """Records the attention weights of a forward pass."""

    def __init__(self, weights: list[torch.Tensor]) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.weights.append(x)
        return x


def attention_importance(encoder: NetworkEncoder, *, patch: int) -> AttentionImportance:
    """The importance of patches by a vision transformer's attention.

    Args:
        encoder: a ViT from timm (DeiT, DINO, CLIP and EVA towers too), with or without classifier.
        patch: side P in pixels of the images' patches.

    Raises:
        ValueError: the network has no global attention over patches in its last block.

    Source: Caron et al. 2021 (arXiv 2104.14294), section 4.2.2, for what the last block's class token attends to.
    """
    patch = positive("patch", patch)
    model = encoder.model
    blocks = getattr(model, "blocks", None)
    attention: Any = (
        getattr(blocks[-1], "attn", None) if isinstance(blocks, nn.ModuleList | nn.Sequential) else None
    )
    has_weights = all(hasattr(attention, name) for name in ("fused_attn", "attn_drop"))
    if (
        not has_weights
        or not hasattr(model, "num_prefix_tokens")
        or not hasattr(getattr(model, "patch_embed", None), "grid_size")
    ):
        raise ValueError(
            f"encoder {encoder.name!r} has no attention over all patches in its last block; take a ViT, or a class "
            "activation map (gradcam++) for a convolutional network"
        )
    opened = copy.copy(attention)  # with the same weights
    opened.fused_attn = False
    return AttentionImportance(encoder, patch, attention, opened)
