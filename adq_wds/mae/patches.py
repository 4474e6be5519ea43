"""Cuts images into patches on any device, joins them, and fills patches from their neighbours."""

from __future__ import annotations

import torch
from torch import nn


def cut(images: torch.Tensor, patch: int) -> torch.Tensor:
    """The patches of images, row by row from the top left: (B, H, W, C) -> (B, L, P, P, C), any number type.

    >>> cut(torch.arange(48).view(1, 4, 4, 3), 2)[0, 1, :, :, 0]
    tensor([[ 6,  9],
            [18, 21]])
    """
    B, H, W, C = images.shape
    rows, columns = H // patch, W // patch
    tiles = images.reshape(B, rows, patch, columns, patch, C).transpose(2, 3)
    return tiles.reshape(B, rows * columns, patch, patch, C)


def joined(patches: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """The images that `cut` made patches (B, L, P, P, C) of, on a grid of rows and columns: (B, H, W, C)."""
    (B, _, P, _, C), (rows, columns) = patches.shape, grid
    tiles = patches.reshape(B, rows, columns, P, P, C).transpose(2, 3)
    return tiles.reshape(B, rows * P, columns * P, C)


def smooth_fill(kept: torch.Tensor, positions: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Every pixel from the kept pixels around it, each weighted by 1 / distance⁵, up to two patches away.

    Args:
        kept: (B, K, P, P, C) float32.
        positions: (B, K) int64, the places of these patches, each place once.
        grid: rows and columns of all L patches.

    Returns:
        (B, L, P, P, C) float32; 0 where no kept pixel is near enough.
    """
    (B, K, P, _, C), L = kept.shape, grid[0] * grid[1]
    places = positions.view(B, K, 1, 1, 1).expand(-1, -1, P, P, C + 1)
    counted = torch.cat([kept, torch.ones_like(kept[..., :1])], 4)
    known = kept.new_zeros(B, L, P, P, C + 1).scatter(1, places, counted)
    image = joined(known, grid).permute(0, 3, 1, 2)  # (B, C + 1, H, W), the last one 1 where kept
    reach = torch.arange(-2 * P, 2 * P + 1, device=kept.device)
    squared = (reach[:, None].square() + reach.square()).float()
    kernel = torch.where(squared > 0, squared.clamp(min=1) ** -2.5, 0.0)
    with torch.autocast(kept.device.type, enabled=False):
        around = _convolved(image, kernel) if P <= SMALL else _convolved_by_fft(image, kernel)
    filled = around[:, :-1] / around[:, -1:].clamp(min=1e-12)
    return cut(filled.permute(0, 2, 3, 1), P)


SMALL = 4  # sides of patches, in pixels, up to which a plain convolution is the fastest


def _convolved(image: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """Each channel of (B, C, H, W) float32 by a kernel (k, k), k odd, zeros beyond the border."""
    H, W = image.shape[2:]
    return nn.functional.conv2d(image.reshape(-1, 1, H, W), kernel[None, None], padding="same").view_as(image)


def _convolved_by_fft(image: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """As `_convolved`, for kernels of many pixels, of which a plain convolution takes each for every pixel.

    In float64, since weights of the farthest pixels are 1e-9 of those of the nearest; what lies below the rounding of
    the transform is 0, as where nothing is near.
    """
    (H, W), k = image.shape[2:], len(kernel)
    size = (H + k - 1, W + k - 1)
    product = torch.fft.rfft2(image.double(), s=size) * torch.fft.rfft2(kernel.double(), s=size)
    around = torch.fft.irfft2(product, s=size)[..., k // 2 : k // 2 + H, k // 2 : k // 2 + W]
    return torch.where(around.abs() > 1e-13, around, 0.0).float()


def sine_positions(grid: tuple[int, int], width: int) -> torch.Tensor:
    """Fixed position embeddings (L, D) float32 as the authors have them: half for the column, half for the row.

    Each half has sin and cos of the coordinate at D / 4 frequencies from 1 down to nearly 1 / 10,000.
    """
    rows, columns = grid
    frequency = 1 / 10_000 ** (torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    across = torch.arange(columns, dtype=torch.float64).repeat(rows)
    down = torch.arange(rows, dtype=torch.float64).repeat_interleave(columns)
    angles = [axis[:, None] * frequency for axis in (across, down)]  # each (L, D / 4)
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1).float()


def nearness(grid: tuple[int, int]) -> torch.Tensor:
    """(L, L) float32: the inverse square of the distance between two places, 1 for a place and itself."""
    rows, columns = (torch.arange(n, dtype=torch.float32) for n in grid)
    places = torch.cartesian_prod(rows, columns)  # (L, 2)
    return 1 / (places[:, None] - places[None]).square().sum(2).clamp(min=1)


def patch_statistics(patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and unbiased variance of each patch (B, K, P, P, 3) over all its values, each (B, K, 1, 1, 1)."""
    mean = patches.mean((2, 3, 4), keepdim=True)
    squares = (patches - mean).square().sum((2, 3, 4), keepdim=True)
    return mean, squares / (patches.shape[2:].numel() - 1)
