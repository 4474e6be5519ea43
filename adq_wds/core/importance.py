"""Says how important each patch of an image is: by texture, by a keyed draw, or by what a classifier looked at.

All of it on arrays. The two class activation maps are closed forms: they need one forward pass and no gradient, and
hold where the logits are a linear map of the mean of the last feature map (ResNet, RegNet, EfficientNet, DenseNet).
Then dz_c/dA_k is the same at each of the Z positions, g_k = w_ck / Z.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from adq_wds.core.patches import Grid, cut_patches
from adq_wds.core.rng import draw
from adq_wds.core.texture import texture

F32 = NDArray[np.float32]


def texture_importance(images: NDArray[np.uint8], patch: int) -> F32:
    """Texture level of each patch, taken by itself: what lies beyond its border plays no part.

    Args:
        images: (B, H, W, 3) uint8 RGB.
        patch: P, side of a patch in pixels, divides H and W.

    Returns:
        (B, L) float32, >= 0; each image's the same whatever else is in the batch.

    Source: Li et al. 2024 (arXiv 2412.16895) for the level; as an importance of patches ours.

    >>> image = np.zeros((1, 4, 8, 3), np.uint8); image[:, :, 6:] = 255
    >>> texture_importance(image, 4).tolist()  # the left patch is flat, an edge runs through the right one
    [[0.0, 1.0]]
    """
    patches = cut_patches(images, patch)  # (B, L, P, P, 3)
    n_images, n_patches = patches.shape[:2]
    return texture(patches.reshape(-1, patch, patch, 3)).reshape(n_images, n_patches)


def patch_seed(seed: int, epoch: int, shard: str, key: str) -> int:
    """The seed of one sample's random importance in one epoch, in [0, 2**64); shard is its base name."""
    return draw(seed, epoch, shard, key, purpose="patches")


def random_importance(seeds: Sequence[int], n_patches: int) -> F32:
    """Uniform draws, one for each patch, that depend on the image's seed and on nothing else.

    Args:
        seeds: B integers in [0, 2**64), from `patch_seed`.
        n_patches: L.

    Returns:
        (B, L) float32 in [0, 1), multiples of 2**-24. The first patches' draws do not depend on L.

    >>> random_importance([7], 2).tolist()
    [[0.6250954270362854, 0.8972137570381165]]
    """
    out = np.empty((len(seeds), n_patches), np.float32)
    for row, seed in zip(out, seeds, strict=True):
        # Raw words, the only part of a generator that NumPy promises not to change.
        row[:] = (np.random.PCG64(seed).random_raw(n_patches) >> np.uint64(40)) * np.float64(2.0**-24)
    return out


def gradcam(features: F32, weight: F32, classes: NDArray[np.int64]) -> F32:
    """Grad-CAM: ReLU(Σ_k g_k·A_k), from the feature maps A and the head's weights.

    Args:
        features: (B, D, h, w) float32, last feature maps, whose means over h × w the head takes.
        weight: (C, D) float32, the head's.
        classes: (B,) integers, each image's class, 0 … C−1.

    Returns:
        (B, h, w) float32, >= 0.

    Source: Selvaraju et al. 2017 (arXiv 1610.02391), eq. 1 and 2; the closed form (their section 3) for a head on
    global average pooling.

    >>> maps = np.array([[[[1.0, 2.0]], [[4.0, 0.0]]]], np.float32)  # one image, two channels of 1 x 2
    >>> gradcam(maps, np.array([[2.0, -1.0]], np.float32), np.array([0])).tolist()  # g = 1, -1/2
    [[[0.0, 2.0]]]
    """
    return _weighted(features, _gradient(features, weight, classes))


def gradcam_plus_plus(features: F32, weight: F32, classes: NDArray[np.int64]) -> F32:
    """Grad-CAM++: ReLU(Σ_k a_k·A_k), a_k = Z·ReLU(g_k) / (2 + g_k·S_k), S_k the sum of A_k over its Z positions.

    With the gradient the same at all positions, the paper's per-position weight g² / (2g² + S·g³) is, too, and its
    sum over positions of weight times ReLU(g) is a_k; 0 where the denominator is.

    Args and Returns as `gradcam`.

    Source: Chattopadhyay et al. 2018 (arXiv 1710.11063), eq. 19 for the weights of a score exp(z); the closed form
    is ours.

    >>> maps = np.array([[[[1.0, 2.0]], [[4.0, 0.0]]]], np.float32)
    >>> gradcam_plus_plus(maps, np.array([[2.0, -1.0]], np.float32), np.array([0])).round(3)
    array([[[0.4, 0.8]]], dtype=float32)
    """
    gradient = _gradient(features, weight, classes)  # (B, D)
    n_positions = features.shape[2] * features.shape[3]
    below = 2 + gradient * features.sum(axis=(2, 3), dtype=np.float64)
    above = n_positions * np.maximum(gradient, 0)
    return _weighted(features, np.divide(above, below, out=np.zeros_like(above), where=below != 0))


def patch_means(maps: F32, grid: Grid, patch: int) -> F32:
    """Mean over each patch of maps that are drawn out to the image's size.

    Args:
        maps: (B, h, w) float32, for instance from `gradcam`.
        grid: rows and columns of patches in the image.
        patch: P, side of a patch in pixels; the image has rows·P × columns·P.

    Returns:
        (B, L) float32. Drawn out bilinearly (pixel centres, edges repeated), as the published programs do, but by
        two small matrices that hold interpolation and mean together: no map of the image's size is made.

    >>> patch_means(np.array([[[0.0, 4.0]]], np.float32), (1, 4), 1).tolist()
    [[0.0, 1.0, 3.0, 4.0]]
    """
    down = _mean_of_bilinear(maps.shape[1], grid[0], patch)  # (rows, h)
    across = _mean_of_bilinear(maps.shape[2], grid[1], patch)  # (columns, w)
    means: F32 = (down @ maps.astype(np.float64) @ across.T).astype(np.float32)  # (B, rows, columns)
    return means.reshape(len(maps), -1)


def _gradient(features: F32, weight: F32, classes: NDArray[np.int64]) -> NDArray[np.float64]:
    """(B, D) float64: of each image's logit by each channel, at any position."""
    n_positions = features.shape[2] * features.shape[3]
    gradient: NDArray[np.float64] = weight[classes].astype(np.float64) / n_positions
    return gradient


def _weighted(features: F32, weight: NDArray[np.float64]) -> F32:
    """(B, h, w): ReLU of the weighted sum over channels of (B, D, h, w)."""
    B, D, h, w = features.shape
    flat = features.reshape(B, D, h * w)
    total = np.matmul(weight[:, None].astype(np.float32), flat)  # (B, 1, h·w)
    positive: F32 = np.maximum(total.reshape(B, h, w), np.float32(0))
    return positive


def _mean_of_bilinear(n_in: int, n_out: int, patch: int) -> NDArray[np.float64]:
    """(n_out, n_in): draw n_in values out to n_out·P pixels, then take the mean of every P."""
    n_pixels = n_out * patch
    position = np.clip((np.arange(n_pixels) + 0.5) * n_in / n_pixels - 0.5, 0, n_in - 1)
    low = np.minimum(position.astype(np.int64), n_in - 1)
    high, share = np.minimum(low + 1, n_in - 1), position - low
    matrix = np.zeros((n_pixels, n_in))
    np.add.at(matrix, (np.arange(n_pixels), low), 1 - share)
    np.add.at(matrix, (np.arange(n_pixels), high), share)
    mean: NDArray[np.float64] = matrix.reshape(n_out, patch, n_in).mean(axis=1)
    return mean
