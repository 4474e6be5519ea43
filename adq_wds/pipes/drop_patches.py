"""Keeps the most important patches of each image of a stream."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from adq_wds.checks import positive
from adq_wds.core.importance import patch_seed
from adq_wds.core.patches import KEEP, PATCH, Grid, cut_patches, n_kept, patch_grid, top_patches
from adq_wds.core.rng import check_seed
from adq_wds.errors import SampleError, shorten
from adq_wds.pipes.accelerator import accelerator_of
from adq_wds.pipes.base import Pipe
from adq_wds.pipes.embed import as_rgb
from adq_wds.pipes.feature_shift import Look, fewest_patches
from adq_wds.pipes.resize import centre_square
from adq_wds.protocols import Encoder, Importance, Label
from adq_wds.samples.fields import (
    EPOCH_FIELD,
    FILLED_FIELD,
    IMAGE_FIELDS,
    KEPT_FIELDS,
    STORED_FIELDS,
    FieldSpec,
    Sample,
    check_absent,
    check_spec,
    clean_fields,
    image_value,
    place_error,
)
from adq_wds.samples.image import MAX_PIXELS
from adq_wds.samples.label import find_label
from adq_wds.shards.names import base_name

PATCHES_FIELD, POSITIONS_FIELD, GRID_FIELD = KEPT_FIELDS
_DROPPED = (
    "some of its patches are dropped already: Decode(to='patches') gives those it kept; to choose anew, take the shards "
    "with whole images"
)


@dataclass(frozen=True, eq=False)
class DropPatches(Pipe):
    """Keep the most important patches of every image, and where they were; the image's own field goes.

    New fields, as a masked autoencoder or a vision transformer takes them:

    - ``patches``: (k, P, P, 3) uint8, kept patches row by row from the top left;
    - ``positions``: (k,) int64, their numbers in the image, 0 … L−1, ascending;
    - ``grid``: (2,) int64, rows and columns of all L patches.

    With `keep`, and images of one size, k is the same for all, so batches collate as they are
    (``fields=("patches", "positions", "grid", "label")``). With `tolerance` each image has a k of its own, and batches
    stay lists (``collate=list``), which `reconstruct_batches` takes.

    The answer does not depend on the cut into batches, but for importances and encoders that are networks: these add
    in another order for another batch, so of two patches whose importance differs by less than 1e-5 of the image's
    largest, either may be kept.

    Args:
        importance: what says how much each patch matters, such as ``adq_wds.importance("gradcam++")`` gives.
        keep: ratio of patches kept, in [0, 1]: ⌊L·keep⌋ of L, and of equal ones the first. 0.75 unless said.
        tolerance: in place of `keep`: the fewest patches (of 0.9, 0.8, … 0.1 of them) down to which the feature of
            `encoder` shifts by no more than this; `choose_tolerance` finds it for a budget.
        encoder: with `tolerance`: an `Encoder`.
        patch: side P of a patch in pixels: the importance's own, which need not be said again; 16 where it has none.
        size: draw the largest square in the middle to size × size pixels first. None takes images as they are; P must
            divide their sides.
        image: field with the image, as bytes or decoded, as `Embed` takes it; or a function giving one of these. One
            that was stored without some of its patches is refused: `Decode(to="patches")` gives those it kept.
        label: field with the class that an importance explains, a number: "label" after `Decode`, "cls" before it.
            Only where labels are the classes of the importance's classifier: None (default) asks for the class that
            it predicts, as Zhou et al. 2023 (arXiv 2308.10524) do.
        seed: of a random importance, whose draws are keyed by seed, epoch, shard and key.
        max_pixels: a larger image is an error before a pixel is decoded.

    Raises:
        TypeError: no importance, or no encoder.
        ValueError: another argument is out of range or contradicts one, or a field spec is malformed.

    Raises (while streaming):
        SampleError: no image, a damaged one, one that lacks patches already, sides that P does not divide, an
            importance that is not finite.
        AdqError: the importance's device cannot be used in this process.

    >>> from adq_wds.saliency.plain import TextureImportance
    >>> sample = {"__key__": "a", "__url__": "a.tar", "image": np.zeros((32, 32, 3), np.uint8)}
    >>> out = DropPatches(TextureImportance(8), keep=0.5).apply([sample])[0]
    >>> out["patches"].shape, out["positions"].tolist(), out["grid"].tolist()
    ((8, 8, 8, 3), [0, 1, 2, 3, 4, 5, 6, 7], [4, 4])
    """

    one_to_one: ClassVar[bool] = True
    importance: Importance
    keep: float | None = field(default=None, kw_only=True)
    tolerance: float | None = field(default=None, kw_only=True)
    encoder: Encoder | None = field(default=None, kw_only=True)
    patch: int | None = field(default=None, kw_only=True)
    size: int | None = field(default=None, kw_only=True)
    image: FieldSpec = field(default=f"{IMAGE_FIELDS};image", kw_only=True)
    label: FieldSpec | None = field(default=None, kw_only=True)
    seed: int = field(default=0, kw_only=True)
    max_pixels: int = field(default=MAX_PIXELS, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.importance, str | type) or not callable(self.importance):
            hint = (
                f"; write adq_wds.importance({self.importance!r})" if isinstance(self.importance, str) else ""
            )
            raise TypeError(f"DropPatches needs an importance, got {shorten(self.importance)}{hint}")
        self._check_how_many()
        seen = getattr(self.importance, "patch", None)
        if self.patch is None:
            object.__setattr__(self, "patch", PATCH if seen is None else seen)
        patch_grid(self._patch, self._patch, self._patch)
        if seen not in (None, self.patch):
            raise ValueError(
                f"patch={self.patch}, and the importance looks at patches of {seen}; make it with patch={self.patch} too"
            )
        if self.size is not None:
            positive("size", self.size)
            patch_grid(self.size, self.size, self._patch)
        check_spec(self.image, "image")
        check_spec(self.label, "label")
        check_seed(self.seed)
        positive("max_pixels", self.max_pixels)

    def _check_how_many(self) -> None:
        if self.tolerance is None:
            if self.encoder is not None:
                raise ValueError(
                    "an encoder without tolerance= has nothing to measure; leave it out, or give both"
                )
            if self.keep is None:
                object.__setattr__(self, "keep", KEEP)
            n_kept(1, self._keep)
            return
        if self.keep is not None:
            raise ValueError(
                f"keep={self.keep!r} and tolerance={self.tolerance!r} both say how many patches are kept; give one"
            )
        is_number = isinstance(self.tolerance, int | float | np.floating) and not isinstance(
            self.tolerance, bool
        )
        if not is_number or not 0 <= self.tolerance < float("inf"):  # NaN fails too
            raise ValueError(f"tolerance must be a number >= 0 (a shift, 1 - cos), got {self.tolerance!r}")
        if self.encoder is None:
            raise ValueError(
                "tolerance= measures a feature; give encoder=, such as adq_wds.encoder('builtin')"
            )
        if isinstance(self.encoder, str) or not callable(self.encoder):
            raise TypeError(f"encoder must be an encoder, got {self.encoder!r}; write adq_wds.encoder(...)")

    @property
    def _keep(self) -> float:
        assert self.keep is not None
        return self.keep

    @property
    def _patch(self) -> int:
        assert self.patch is not None
        return self.patch

    def apply(self, samples: list[Sample]) -> list[Sample]:
        """Each sample with ``patches``, ``positions`` and ``grid`` in place of its image."""
        cleaned = [clean_fields(sample) for sample in samples]
        for sample in cleaned:
            check_absent(sample, KEPT_FIELDS, "DropPatches")
        for look in self.look(cleaned):
            cells = cut_patches(look.pixels, self._patch)  # (B, L, P, P, 3)
            for i, patches, kept in zip(look.positions, cells, self.choose(look), strict=True):
                if not callable(self.image):
                    del cleaned[i][image_value(cleaned[i], self.image)[0]]
                cleaned[i][PATCHES_FIELD] = patches[kept]
                cleaned[i][POSITIONS_FIELD] = kept.copy()  # a view would keep the batch alive
                cleaned[i][GRID_FIELD] = np.array(look.grid, dtype=np.int64)
        return cleaned

    def look(self, samples: list[Sample]) -> list[Look]:
        """The images of some samples at their size, those of one size together, with the importance of their patches.

        Raises:
            SampleError: as the class says.
        """
        by_size: dict[Grid, list[int]] = {}
        images: list[Image.Image] = []
        for i, sample in enumerate(samples):
            image, grid = self._image(sample)
            by_size.setdefault(grid, []).append(i)
            images.append(image)
        return [self._scored(samples, images, index, grid) for grid, index in by_size.items()]

    def _image(self, sample: Sample) -> tuple[Image.Image, Grid]:
        name, value = image_value(sample, self.image)
        try:
            if name in STORED_FIELDS or sample.get(FILLED_FIELD) is True:
                raise SampleError(_DROPPED)
            image = as_rgb(value, self.max_pixels)
            if self.size is not None:
                image = centre_square(image, self.size)
            return image, patch_grid(image.height, image.width, self._patch)
        except ValueError as error:
            raise place_error(SampleError(f"{error}, or give size="), sample, name) from error
        except SampleError as error:
            raise place_error(error, sample, name) from error.__cause__

    def _scored(self, samples: list[Sample], images: list[Image.Image], index: list[int], grid: Grid) -> Look:
        chosen = [images[i] for i in index]
        labels: list[Label] = [find_label(samples[i], self.label)[1] for i in index]
        seeds = [self._seed(samples[i]) for i in index]
        with accelerator_of("DropPatches", "the importance"):
            scores: NDArray[Any] = np.asarray(self.importance(chosen, labels, seeds))
        expected = (len(index), grid[0] * grid[1])
        if scores.shape != expected:
            raise ValueError(
                f"the importance gave {scores.shape} for {len(index)} images of {grid[0]} x {grid[1]} patches; "
                f"expected {expected}"
            )
        return Look(index, chosen, np.stack([np.asarray(image) for image in chosen]), scores, grid)

    def _seed(self, sample: Sample) -> int:
        epoch = int(sample.get(EPOCH_FIELD, 0))
        return patch_seed(self.seed, epoch, base_name(sample["__url__"]), sample["__key__"])

    def choose(self, look: Look) -> list[NDArray[np.int64]]:
        """Numbers of the patches kept of each image that `look` gave, ascending."""
        if self.tolerance is None:
            return list(top_patches(look.scores, n_kept(look.scores.shape[1], self._keep)))
        assert self.encoder is not None
        with accelerator_of("DropPatches", "the encoder"):
            counts = fewest_patches(self.encoder, look, self.tolerance)
        return [top_patches(row[None], k)[0] for row, k in zip(look.scores, counts.tolist(), strict=True)]
