"""Rebuilds images from their kept patches with a masked autoencoder, which never sees the dropped ones."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import Block
from torch import nn

from adq_wds.checks import positive
from adq_wds.errors import AdqError
from adq_wds.mae.patches import cut, joined, nearness, patch_statistics, sine_positions, smooth_fill

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MLP_RATIO = 4


@dataclass(frozen=True)
class MaeSize:
    """The sizes of a masked autoencoder, and the scale of its pixels.

    Attributes:
        image_size: (H, W) in pixels.
        patch: side P of a patch in pixels, dividing both.
        width, depth, heads: of the encoder, which sees kept patches only.
        decoder_width, decoder_depth, decoder_heads: of the decoder, which sees all places. Widths are multiples of
            four and of their heads.
        mean, std: of the colours in [0, 1]; pixels enter and leave the network as (x - mean) / std.
        norm_pix: the decoder was trained to give each patch less its own mean, in units of its own deviation.
        fill: the decoder was trained to give each pixel less its `smooth_fill`, so only the error of an interpolation
            (ours).
        norm_eps: added to variances in layer norms.

    Raises:
        ValueError: numbers that do not fit together.
    """

    image_size: tuple[int, int]
    patch: int
    width: int
    depth: int
    heads: int
    decoder_width: int
    decoder_depth: int
    decoder_heads: int
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    norm_pix: bool = False
    fill: bool = False
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("patch", "width", "depth", "heads", "decoder_width", "decoder_depth", "decoder_heads"):
            positive(name, getattr(self, name))
        P = self.patch
        if len(self.image_size) != 2 or not all(
            type(n) is int and n > 0 and n % P == 0 for n in self.image_size
        ):
            raise ValueError(
                f"image_size={self.image_size!r}: expected height and width in multiples of patch={P}"
            )
        for width, heads in ((self.width, self.heads), (self.decoder_width, self.decoder_heads)):
            if width % heads or width % 4:
                raise ValueError(
                    f"a width of {width} with {heads} heads: expected a multiple of both 4 and heads"
                )
        if self.norm_pix and self.fill:
            raise ValueError(
                "norm_pix and fill: two ways to make the decoder's part smaller; expected one at most"
            )
        if len(self.mean) != 3 or len(self.std) != 3 or min(*self.std, self.norm_eps) <= 0:
            raise ValueError(
                f"mean={self.mean!r}, std={self.std!r}, norm_eps={self.norm_eps!r}: expected three numbers, three "
                "above 0, and one above 0"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.image_size[0] // self.patch, self.image_size[1] // self.patch

    @property
    def n_patches(self) -> int:
        """L."""
        return self.grid[0] * self.grid[1]


class MaskedAutoencoder(nn.Module):
    """A vision transformer that sees the kept patches of an image, and a smaller one that predicts every patch.

    Parameters have the names of the authors' released code. With random weights; `load_mae` reads trained ones.

    Source: He et al. 2022, Masked Autoencoders Are Scalable Vision Learners (arXiv 2111.06377).

    Attributes:
        size: see `MaeSize`.
        revision: which weights, where they were loaded.
    """

    mean: torch.Tensor  # (3,)
    std: torch.Tensor

    def __init__(self, size: MaeSize) -> None:
        super().__init__()
        self.size = size
        self.revision = ""
        L, D, E = size.n_patches, size.width, size.decoder_width
        self.patch_embed = PatchEmbed(size.image_size, size.patch, 3, D)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        self.pos_embed = nn.Parameter(torch.zeros(1, L + 1, D), requires_grad=False)
        self.blocks = _blocks(D, size.depth, size.heads, size.norm_eps)
        self.norm = nn.LayerNorm(D, eps=size.norm_eps)
        self.decoder_embed = nn.Linear(D, E)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, E))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, L + 1, E), requires_grad=False)
        self.decoder_blocks = _blocks(E, size.decoder_depth, size.decoder_heads, size.norm_eps)
        self.decoder_norm = nn.LayerNorm(E, eps=size.norm_eps)
        self.decoder_pred = nn.Linear(E, size.patch**2 * 3)
        # constants, real even where the parameters are made on "meta" to be loaded later
        cpu = torch.device("cpu")
        self.register_buffer("mean", torch.tensor(size.mean, device=cpu), persistent=False)
        self.register_buffer("std", torch.tensor(size.std, device=cpu), persistent=False)
        if self.cls_token.device.type != "meta":
            self._initialise()

    def _initialise(self) -> None:
        """First weights as the authors draw them."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        projection: Any = self.patch_embed.proj
        nn.init.xavier_uniform_(projection.weight.view(self.size.width, -1))
        for token in (self.cls_token, self.mask_token):
            nn.init.normal_(token, std=0.02)
        with torch.no_grad():
            for embedding in (self.pos_embed, self.decoder_pos_embed):
                embedding[0, 1:] = sine_positions(self.size.grid, embedding.shape[2])

    # The network

    def forward(self, patches: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Predict all patches from the kept ones, in the units the network was trained in.

        Args:
            patches: (B, K, P, P, 3) float, kept patches as `normalised` gives them, 0 <= K <= L.
            positions: (B, K) int64, the place of each, 0 ... L - 1, row by row from the top left; each place once.

        Returns:
            (B, L, P, P, 3); `pixels` turns it into grey levels.
        """
        B, K = positions.shape
        projection: Any = self.patch_embed.proj
        # the convolution of the patch embedding is a linear map of each patch, so only kept ones are mapped
        weight = projection.weight.permute(0, 2, 3, 1).flatten(1)  # (D, P·P·3)
        x = nn.functional.linear(patches.flatten(2), weight, projection.bias)
        x = x + self.pos_embed[0, 1:][positions]
        x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(B, -1, -1), x], dim=1)  # (B, 1 + K, D)
        for block in self.blocks:
            x = block(x)
        x = self.decoder_embed(self.norm(x))
        # `keep` turns round here and nowhere else: every place holds the mask token but the kept ones
        E = self.size.decoder_width
        everywhere = self.mask_token.to(x.dtype).expand(B, self.size.n_patches, E)
        everywhere = everywhere.scatter(1, positions[:, :, None].expand(B, K, E), x[:, 1:])
        x = torch.cat([x[:, :1], everywhere], dim=1) + self.decoder_pos_embed  # (B, 1 + L, E)
        for block in self.decoder_blocks:
            x = block(x)
        predicted: torch.Tensor = self.decoder_pred(self.decoder_norm(x))[:, 1:]
        return predicted.view(B, self.size.n_patches, self.size.patch, self.size.patch, 3)

    # Grey levels in and out

    def normalised(self, patches: torch.Tensor) -> torch.Tensor:
        """Patches (B, K, P, P, 3) of grey levels as the network takes them: float32, (x / 255 - mean) / std."""
        return (patches.float() / 255 - self.mean) / self.std

    def targets(self, patches: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The training targets of the decoder.

        Args:
            patches: (B, L, P, P, 3) grey levels of all patches.
            positions: (B, K) int64, those of them that are kept.

        Returns:
            (B, L, P, P, 3) float32.
        """
        target = self.normalised(patches)
        if self.size.norm_pix:
            mean, variance = patch_statistics(target)
            target = (target - mean) / (variance + 1e-6).sqrt()
        if self.size.fill:
            places = positions[:, :, None, None, None].expand(-1, -1, *target.shape[2:])
            target = target - smooth_fill(target.gather(1, places), positions, self.size.grid)
        return target

    def pixels(self, predicted: torch.Tensor, kept: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The output of `forward` as grey levels.

        A network with `norm_pix` predicts each patch up to its mean and deviation. For dropped patches these come
        from the kept patches, by the inverse square of the distance (ours: the authors' demonstration takes them from
        the original, which is not there any more).

        Args:
            predicted: (B, L, P, P, 3).
            kept: (B, K, P, P, 3) grey levels of the kept patches.
            positions: (B, K) int64, as for `forward`.

        Returns:
            (B, L, P, P, 3) float32, not clipped.
        """
        x = predicted.float()
        if self.size.norm_pix:
            mean, variance = self._borrowed_statistics(self.normalised(kept), positions)
            x = x * (variance + 1e-6).sqrt() + mean
        if self.size.fill:
            x = x + smooth_fill(self.normalised(kept), positions, self.size.grid)
        return (x * self.std + self.mean) * 255

    def _borrowed_statistics(
        self, kept: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance for every place, each (B, L, 1, 1, 1); 0 and 1, the data set's, where nothing is kept."""
        mean, variance = patch_statistics(kept)
        columns = torch.stack([torch.ones_like(mean), mean, variance], dim=2).flatten(2)  # (B, K, 3)
        known = columns.new_zeros(len(columns), self.size.n_patches, 3)
        known.scatter_(1, positions[:, :, None].expand_as(columns), columns)
        with torch.autocast(known.device.type, enabled=False):
            sums = nearness(self.size.grid).to(known.device) @ known
        total, mean, variance = sums[..., None, None].unbind(2)  # each (B, L, 1, 1)
        nothing = total == 0
        total = total.masked_fill(nothing, 1)
        return (mean / total)[..., None], (variance / total).masked_fill(nothing, 1)[..., None]

    # Whole images

    @torch.inference_mode()
    def reconstruct(self, images: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        """Images with their dropped patches predicted; the pixels in these are ignored.

        Args:
            images: (B, H, W, 3) uint8 RGB, on the network's device.
            keep: (B, L) bool, True where a patch is kept, row by row from the top left; any number in each image.

        Returns:
            (B, H, W, 3) uint8: the given pixels where kept, predictions elsewhere.

        Raises:
            ValueError: shapes or types differ from these.
            AdqError: a prediction is not finite: damaged weights, or a number type that is too small.
        """
        B, L = len(images), self.size.n_patches
        if images.shape[1:] != (*self.size.image_size, 3) or images.dtype != torch.uint8:
            raise ValueError(
                f"images are {_kind(images)}; expected (B, {', '.join(map(str, self.size.image_size))}, 3) uint8"
            )
        if keep.shape != (B, L) or keep.dtype != torch.bool:
            raise ValueError(
                f"keep is {_kind(keep)}; expected ({B}, {L}) bool, a row of patches for each image"
            )
        patches = cut(images, self.size.patch)
        rebuilt = torch.empty_like(images)
        n_kept = keep.sum(1)
        for n in sorted(set(n_kept.tolist())):  # one pass for all images that keep equally many
            rows = (n_kept == n).nonzero()[:, 0]
            positions = keep[rows].nonzero()[:, 1].view(len(rows), n)
            kept = patches[rows[:, None], positions]
            rebuilt[rows] = self.rebuilt(kept, positions)
        return rebuilt

    def reconstruct_patches(self, patches: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """As `reconstruct`, from kept patches alone.

        Args:
            patches: (B, K, P, P, 3) uint8 RGB, on the network's device; 0 <= K <= L.
            positions: (B, K) int64, as for `forward`.

        Returns:
            (B, H, W, 3) uint8.

        Raises:
            ValueError: shapes or types differ from these, a place outside the image or named twice.
            AdqError: as `reconstruct`.
        """
        self.check_kept(patches, positions)
        return self.rebuilt(patches, positions)

    def check_kept(self, patches: torch.Tensor, positions: torch.Tensor) -> None:
        """Raise `ValueError` unless these are valid arguments of `reconstruct_patches`, on any device."""
        P, L = self.size.patch, self.size.n_patches
        if patches.ndim != 5 or patches.shape[2:] != (P, P, 3) or patches.dtype != torch.uint8:
            raise ValueError(f"patches are {_kind(patches)}; expected (B, K, {P}, {P}, 3) uint8")
        if positions.shape != patches.shape[:2] or positions.dtype != torch.int64:
            raise ValueError(f"positions are {_kind(positions)}; expected {tuple(patches.shape[:2])} int64")
        if positions.numel():
            ordered = positions.sort(1).values
            low, high = int(ordered.min()), int(ordered.max())
            if low < 0 or high >= L:
                raise ValueError(f"positions go from {low} to {high}; expected 0 to {L - 1}")
            if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
                raise ValueError("positions name a place twice in one image; expected each at most once")

    @torch.inference_mode()
    def rebuilt(self, kept: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """As `reconstruct_patches`, without `check_kept`: on an accelerator each check waits for the device."""
        B, K, P = len(kept), kept.shape[1], self.size.patch
        if B == 0 or self.size.n_patches == K:  # nothing to predict
            predicted = kept.new_zeros(B, self.size.n_patches, P, P, 3)
        else:
            x = self.pixels(self(self.normalised(kept), positions), kept, positions)
            if not bool(torch.isfinite(x).all()):
                raise AdqError(
                    "the reconstruction is not finite: the weights are damaged, or the number type is too small "
                    "for this network; run it in float32, under bfloat16 autocast at most"
                )
            predicted = x.round().clamp(0, 255).to(torch.uint8)
        places = positions.view(B, K, 1, 1, 1).expand_as(kept)
        return joined(predicted.scatter(1, places, kept), self.size.grid)


def _blocks(width: int, depth: int, heads: int, eps: float) -> nn.ModuleList:
    norm: Any = partial(nn.LayerNorm, eps=eps)
    return nn.ModuleList(
        [Block(width, heads, mlp_ratio=MLP_RATIO, qkv_bias=True, norm_layer=norm) for _ in range(depth)]
    )


def _kind(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
