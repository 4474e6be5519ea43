"""A crop lies in its image, in the range of areas and aspects, whatever the image; a larger choice contains a smaller."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adq_wds.core.rng import generator
from adq_wds.core.views import choose, crop_box

SIDES = st.one_of(st.integers(1, 8), st.integers(1, 3000))


@given(width=SIDES, height=SIDES, seed=st.integers(0, 2**32))
def test_a_crop_lies_in_its_image_and_has_pixels(width: int, height: int, seed: int) -> None:
    (left, top, right, bottom), flip = crop_box(width, height, np.random.default_rng(seed))
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    assert type(flip) is bool


@given(width=SIDES, height=SIDES, seed=st.integers(0, 2**32))
def test_area_and_aspect_are_in_range_up_to_half_a_pixel(width: int, height: int, seed: int) -> None:
    (left, top, right, bottom), _ = crop_box(width, height, np.random.default_rng(seed))
    w, h = right - left, bottom - top
    assert (w - 0.5) / (h + 0.5) <= 4 / 3 + 1e-9
    assert (w + 0.5) / max(h - 0.5, 1e-9) >= 3 / 4 - 1e-9
    largest = 4 / 3 * min(width, height) ** 2  # that an allowed aspect leaves in a long image
    assert (w + 0.5) * (h + 0.5) >= min(0.2 * width * height, largest) - 1e-9


def test_area_and_aspect_of_a_large_image_fill_their_ranges() -> None:
    rng = np.random.default_rng(0)
    boxes = np.array([crop_box(900, 900, rng)[0] for _ in range(4000)])
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area, aspect = w * h / 810_000, w / h
    assert 0.199 < area.min() < 0.21
    assert 0.97 < area.max() <= 1.0
    assert 0.749 < aspect.min() < 0.76
    assert 1.32 < aspect.max() < 1.335
    assert abs(np.log(aspect).mean()) < 0.02  # as often wide as tall
    # a box may lie anywhere: it is as often left of the middle as right of it, and touches all four sides
    assert abs((boxes[:, 0] + boxes[:, 2]).mean() / 2 - 450) < 10
    assert abs((boxes[:, 1] + boxes[:, 3]).mean() / 2 - 450) < 10
    assert boxes.min(axis=0)[:2].tolist() == [0, 0]
    assert boxes.max(axis=0)[2:].tolist() == [900, 900]


def test_a_pixel_and_a_line_are_cropped() -> None:
    rng = np.random.default_rng(2)
    assert {crop_box(1, 1, rng)[0] for _ in range(50)} == {(0, 0, 1, 1)}
    lines = [crop_box(1, 1000, rng)[0] for _ in range(500)]
    assert {(left, right, bottom - top) for left, top, right, bottom in lines} == {(0, 1, 1)}
    assert len({top for _, top, _, _ in lines}) > 300


def test_a_very_long_image_is_cropped_to_the_largest_box() -> None:
    boxes = [crop_box(3000, 30, np.random.default_rng(seed))[0] for seed in range(100)]
    assert {(right - left, bottom - top) for left, top, right, bottom in boxes} == {(40, 30)}
    assert len({left for left, *_ in boxes}) > 50


def test_a_crop_depends_on_its_generator_alone() -> None:
    """Golden, by this very call: another answer is another DEFINITION."""
    found = [crop_box(640, 480, generator(0, number, "a.tar", "k", purpose="view")) for number in (0, 1)]
    assert found == [((151, 1, 525, 475), False), ((135, 70, 429, 360), True)]


@pytest.mark.parametrize("size", [(0, 4), (4, 0), (-1, 4)])
def test_an_image_without_pixels_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf"an image of {size[0]} x {size[1]} pixels has no crop"):
        crop_box(*size, np.random.default_rng(0))


def test_larger_choices_contain_smaller_ones() -> None:
    draw = np.random.default_rng(3).integers(0, 50, 200).astype(np.uint64)  # with ties
    before: set[int] = set()
    for n in (0, 1, 7, 100, 199, 200, 10_000):
        chosen = choose(draw, n)
        assert chosen.tolist() == sorted(sorted(range(200), key=lambda i: (draw[i], i))[:n])
        assert before <= set(chosen.tolist())
        before = set(chosen.tolist())
