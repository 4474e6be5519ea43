"""Does storing images without some of their patches save bytes? Measured on some of them, with the container's share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adq_wds.samples.patch_file import Subsampling, encode, encode_whole
from adq_wds.shards.tar_headers import BLOCK


@dataclass(frozen=True)
class StoredBytes:
    """What images take whole and patch-dropped, in bytes: of the files, and of the tar cells that hold them."""

    n_images: int
    whole: int
    patches: int
    whole_cells: int
    patches_cells: int

    def check_smaller(self) -> None:
        """Refuse to store patches where that saves nothing.

        Raises:
            ValueError: the patch-dropped images take as many bytes as the whole ones or more, in files or in tar
                cells; the text has both.
        """
        if self.patches < self.whole and self.patches_cells < self.whole_cells:
            return
        mean = [
            f"{value / self.n_images:.0f}"
            for value in (self.patches, self.whole, self.patches_cells, self.whole_cells)
        ]
        raise ValueError(
            f"storing patches would not make these images smaller: {mean[0]} bytes an image against {mean[1]} whole, "
            f"{mean[2]} against {mean[3]} in tar cells (mean of {self.n_images}, same quality and subsampling, optimised tables); use "
            "larger images, keep fewer patches, or drop them while training"
        )


def measure_bytes(
    images: Iterable[tuple[NDArray[np.uint8], NDArray[np.int64]]],
    patch: int,
    *,
    quality: int = 90,
    subsampling: Subsampling = "4:2:0",
) -> StoredBytes:
    """What some images take, stored whole and without all but their kept patches.

    Args:
        images: pairs of an image (H, W, 3) uint8 and the patches (k,) to keep of it; at least one.
        patch: P, in pixels.
        quality: of both files.
        subsampling: of both files.

    Raises:
        ValueError: as `encode`, or there is no image.
    """
    lengths: list[tuple[int, int]] = []
    for image, kept in images:
        whole = encode_whole(image, quality=quality, subsampling=subsampling)
        lengths.append(
            (len(whole), len(encode(image, kept, patch, quality=quality, subsampling=subsampling)))
        )
    if not lengths:
        raise ValueError("no image to measure; give at least one")
    whole_bytes, patch_bytes = zip(*lengths, strict=True)
    return StoredBytes(
        len(lengths),
        sum(whole_bytes),
        sum(patch_bytes),
        sum(map(cell_bytes, whole_bytes)),
        sum(map(cell_bytes, patch_bytes)),
    )


def cell_bytes(n_bytes: int) -> int:
    """Bytes that a file takes in a tar: a header's block and its content, filled up to whole blocks.

    >>> cell_bytes(674), cell_bytes(512)
    (1536, 1024)
    """
    return BLOCK + n_bytes + -n_bytes % BLOCK
