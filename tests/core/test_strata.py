"""Strata by margin are those of a plain sort."""

import numpy as np
import pytest

from adq_wds.core.strata import margin_strata


@pytest.mark.parametrize("n", [0, 1, 4, 7, 50])
@pytest.mark.parametrize("bins", [1, 3, 7, 60])
def test_strata_are_those_of_a_plain_sort(n: int, bins: int) -> None:
    margin = np.random.default_rng(n).integers(-3, 4, n) / 4  # with many ties
    easiest_first = sorted(range(n), key=lambda i: (-margin[i], i))
    least, larger = divmod(n, min(bins, n) or 1)
    wanted, k = {}, 0
    while easiest_first:
        size = least + (k < larger)
        stratum, easiest_first = easiest_first[:size], easiest_first[size:]
        wanted |= {i: (k, place) for place, i in enumerate(stratum)}
        k += 1
    cut = margin_strata(margin.astype(np.float32), bins)
    assert list(zip(cut.bin.tolist(), cut.pick.tolist(), strict=True)) == [wanted[i] for i in range(n)]
    assert (cut.bin.dtype, cut.pick.dtype) == (np.int16, np.int32)
