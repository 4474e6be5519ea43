"""Is storing patches refused where it would not save bytes, in files or in tar cells, with the numbers?"""

import re

import numpy as np
import pytest
from numpy.typing import NDArray

from adq_wds.samples.patch_file import encode, encode_whole
from adq_wds.writing.patch_bytes import StoredBytes, cell_bytes, measure_bytes
from tests.samples.test_patch_file import picture


def pairs(n: int, rows: int, kept: int) -> list[tuple[NDArray[np.uint8], NDArray[np.int64]]]:
    return [(picture(rows, rows, 16, seed), np.arange(kept)) for seed in range(n)]


def test_what_is_measured_are_the_files_and_their_cells() -> None:
    images = pairs(3, 5, 12)
    whole = [len(encode_whole(image, quality=70, subsampling="4:4:4")) for image, _ in images]
    parts = [len(encode(image, kept, 16, quality=70, subsampling="4:4:4")) for image, kept in images]
    cells = [sum(512 + -(-n // 512) * 512 for n in lengths) for lengths in (whole, parts)]
    found = measure_bytes(images, 16, quality=70, subsampling="4:4:4")
    assert found == StoredBytes(3, sum(whole), sum(parts), *cells)


@pytest.mark.parametrize(("n", "expected"), [(0, 512), (1, 1024), (512, 1024), (513, 1536)])
def test_a_cell_is_a_header_and_whole_blocks(n: int, expected: int) -> None:
    assert cell_bytes(n) == expected


def test_large_images_pass_and_small_ones_are_refused_with_the_numbers() -> None:
    measure_bytes(pairs(2, 8, 32), 16).check_smaller()
    small = measure_bytes(pairs(4, 2, 3), 16)  # 32 x 32
    assert small.patches_cells == small.whole_cells
    said = f"{small.patches / 4:.0f} bytes an image against {small.whole / 4:.0f} whole, 1536 against 1536 in tar cells (mean of 4,"
    with pytest.raises(ValueError, match=re.escape(said)):
        small.check_smaller()


def test_either_kind_of_loss_is_refused() -> None:
    for lost in (StoredBytes(1, 100, 100, 200, 100), StoredBytes(1, 100, 99, 200, 200)):
        with pytest.raises(ValueError, match="would not make these images smaller"):
            lost.check_smaller()
    StoredBytes(1, 100, 99, 200, 199).check_smaller()


def test_nothing_to_measure_is_refused() -> None:
    with pytest.raises(ValueError, match="no image to measure"):
        measure_bytes([], 16)
