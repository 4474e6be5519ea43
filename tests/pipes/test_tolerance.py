"""Does a tolerance keep the fewest patches that it allows, and does the one chosen for a budget stay within it?"""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

import adq_wds as adq
from adq_wds.pipes.feature_shift import kept_counts
from adq_wds.pipes.tolerance import Drops, choose_tolerance, measure_drops
from adq_wds.samples.fields import Sample
from adq_wds.samples.patch_file import encode

PATCH, SIDE = 16, 64
ENCODER = adq.encoder("thumbnail")
TEXTURE = adq.importance("texture", patch=PATCH)


def pixels(seed: int) -> NDArray[np.uint8]:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (2 + seed % 6, 2 + seed % 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def samples(n: int = 12) -> list[Sample]:
    return [{"__key__": f"k{i}", "__url__": "a.tar", "image": pixels(i)} for i in range(n)]


def shift_by_hand(image: NDArray[np.uint8], k: int) -> float:
    """One image, its k patches of most texture, the others painted over one by one."""
    scores = TEXTURE([Image.fromarray(image)], [None], [0])[0]
    kept = set(sorted(range(16), key=lambda place: (-scores[place], place))[:k])
    painted = image.copy()
    cells = [painted[16 * r : 16 * r + 16, 16 * c : 16 * c + 16] for r in range(4) for c in range(4)]
    colour = np.mean([cells[i] for i in kept], axis=(0, 1, 2)).round()
    for i in set(range(16)) - kept:
        cells[i][:] = colour
    (a, b), _ = ENCODER([Image.fromarray(image), Image.fromarray(painted)])
    return float(1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def dropped(tolerance: float, n: int = 12) -> list[int]:
    pipe = adq.DropPatches(TEXTURE, tolerance=tolerance, encoder=ENCODER)
    return [len(sample["positions"]) for sample in pipe.apply(samples(n))]


def test_the_table_holds_the_shift_of_each_image_at_each_count() -> None:
    table = measure_drops(samples(6), TEXTURE, ENCODER)
    assert table.n_kept.tolist() == [16, 14, 12, 11, 9, 8, 6, 4, 3, 1]
    assert table.shift[:, 0].tolist() == [0] * 6
    by_hand = [[shift_by_hand(pixels(i), k) for k in table.n_kept] for i in range(6)]
    assert np.allclose(table.shift, by_hand, atol=1e-6)


@pytest.mark.parametrize("tolerance", [0.0, 0.003, 0.02, 0.1, 2.0])
def test_the_fewest_patches_within_the_tolerance_are_kept(tolerance: float) -> None:
    expected = []
    for i in range(12):
        kept = 16
        for k in kept_counts(16).tolist():
            if k < 16 and shift_by_hand(pixels(i), k) > tolerance:
                break
            kept = k
        expected.append(kept)
    assert dropped(tolerance) == expected
    assert measure_drops(samples(), TEXTURE, ENCODER).kept_at(tolerance).tolist() == expected


def test_a_shift_equal_to_the_tolerance_is_allowed() -> None:
    grey = {"__key__": "grey", "__url__": "a.tar", "image": np.full((SIDE, SIDE, 3), 77, np.uint8)}
    pipe = adq.DropPatches(TEXTURE, tolerance=0, encoder=ENCODER)
    assert len(pipe.apply([grey])[0]["positions"]) == 1
    table = measure_drops(samples(), TEXTURE, ENCODER)
    exactly = float(table.so_far()[0, 4])
    assert 0 < exactly == dropped_at(exactly).max()


def test_a_feature_that_comes_back_by_luck_is_not_trusted() -> None:
    def unlucky(images: list[Image.Image]) -> NDArray[np.float32]:
        """Elsewhere when just four patches are flat."""
        cells = [np.asarray(image).reshape(4, 16, 4, 16, 3) for image in images]
        flat = [int((c.std(axis=(1, 3)).sum(axis=2) == 0).sum()) for c in cells]
        return np.array([[float(n != 4), float(n == 4)] for n in flat], np.float32)

    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    given = [{"__key__": "noise", "__url__": "a.tar", "image": noise}]
    encoder = adq.encoder(unlucky, name="unlucky")
    table = measure_drops(given, TEXTURE, encoder)
    assert table.shift[0].tolist() == [0, 0, 1, 0, 0, 0, 0, 0, 0, 0]
    pipe = adq.DropPatches(TEXTURE, tolerance=0.5, encoder=encoder)
    assert len(pipe.apply(given)[0]["positions"]) == table.kept_at(0.5)[0] == 14


def dropped_at(tolerance: float) -> NDArray[np.float32]:
    """The shift of the first image's kept patches."""
    table = measure_drops(samples(1), TEXTURE, ENCODER)
    column = table.n_kept.tolist().index(dropped(tolerance, 1)[0])
    return table.so_far()[0, : column + 1]


def test_kept_patches_are_the_most_important_ones() -> None:
    ragged = adq.DropPatches(TEXTURE, tolerance=0.02, encoder=ENCODER).apply(samples())
    assert len({len(sample["positions"]) for sample in ragged}) > 2
    for one, sample in zip(samples(), ragged, strict=True):
        k = len(sample["positions"])
        (fixed,) = adq.DropPatches(TEXTURE, keep=k / 16).apply([one])
        assert np.array_equal(fixed["positions"], sample["positions"])
        assert np.array_equal(fixed["patches"], sample["patches"])


@pytest.mark.parametrize("budget", [0.3, 0.5, 0.75, 0.9, 1.0])
def test_a_budget_of_patches_is_met_and_hardly_missed(budget: float) -> None:
    table = measure_drops(samples(), TEXTURE, ENCODER)
    tolerance = choose_tolerance(table, budget)
    kept = dropped(tolerance)
    assert kept == table.kept_at(tolerance).tolist()
    assert sum(kept) <= budget * 16 * 12
    levels = np.unique(table.so_far())
    assert tolerance not in levels[:-1], "a rounding error would decide"
    below = levels[levels < tolerance]
    if len(below) > 1:  # one level less keeps more than allowed
        assert table.kept_at(float(below[-2])).sum() > budget * 16 * 12


def test_a_budget_of_bytes_is_met_by_the_files() -> None:
    pipe = adq.EncodePatches(quality=80)
    table = measure_drops(samples(), TEXTURE, ENCODER, encode=pipe)
    assert table.n_bytes is not None
    (kept,) = adq.DropPatches(TEXTURE, keep=0.5).apply(samples(1))
    assert table.n_bytes[0, 5] == len(encode(pixels(0), kept["positions"], PATCH, quality=80))
    budget = float(table.n_bytes[:, 0].mean() * 0.8)
    tolerance = choose_tolerance(table, budget, of="bytes")
    stored = pipe.apply(adq.DropPatches(TEXTURE, tolerance=tolerance, encoder=ENCODER).apply(samples()))
    assert 0.5 * budget < np.mean([len(sample["patches.jpg"]) for sample in stored]) <= budget


TABLES = st.tuples(st.integers(1, 6), st.integers(1, 5), st.integers(0, 2**32 - 1))


@settings(max_examples=60)
@given(TABLES, st.floats(0.01, 1.0), st.booleans())
def test_tolerance_is_the_least_in_budget(shape: tuple[int, int, int], share: float, of_bytes: bool) -> None:
    n, more, seed = shape
    rng = np.random.default_rng(seed)
    shift = np.hstack([np.zeros((n, 1)), rng.integers(0, 5, (n, more)) / 8]).astype(np.float32)
    counts = np.sort(rng.choice(np.arange(1, 20), more + 1, replace=False))[::-1]
    n_bytes = rng.integers(1, 100, shift.shape)
    table = Drops(counts, shift, n_bytes)
    cost = n_bytes if of_bytes else np.broadcast_to(counts, shift.shape)

    def total(tolerance: float) -> int:  # image by image, column by column
        spent = 0
        for row, own in zip(shift, cost, strict=True):
            column = 0
            while column < more and row[column + 1] <= tolerance:
                column += 1
            spent += int(own[column])
        return spent

    budget = share * (100 if of_bytes else 1)
    allowed = budget * n * (1 if of_bytes else int(counts[0])) + 1e-6
    levels = sorted({0.0, *np.unique(shift).tolist()})
    fitting = [level for level in levels if total(level) <= allowed]
    of: Any = "bytes" if of_bytes else "patches"
    if not fitting:
        with pytest.raises(ValueError, match="cannot be met"):
            choose_tolerance(table, budget, of=of)
        return
    found = choose_tolerance(table, budget, of=of)
    assert total(found) == total(fitting[0]) <= allowed
    assert found >= fitting[0]


@pytest.mark.parametrize(
    ("budget", "options", "text"),
    [
        (0, {}, r"budget must be a ratio of patches in \(0, 1\], got 0"),
        (1.5, {}, "got 1.5"),
        (float("nan"), {}, "got nan"),
        (0, {"of": "bytes"}, "budget must be bytes an image, above 0, got 0"),
        (float("inf"), {"of": "bytes"}, "got inf"),
        (0.5, {"of": "pixels"}, "of must be 'patches' or 'bytes', got 'pixels'"),
        (0.2, {}, r"a budget of 0.2 of the patches cannot be met: keeping 1 of 4 .* takes 0.25"),
        (9, {"of": "bytes"}, r"a budget of 9 bytes an image cannot be met: .* still takes 20"),
    ],
)
def test_a_budget_that_cannot_be_is_refused(budget: float, options: dict[str, Any], text: str) -> None:
    table = Drops(np.array([4, 1]), np.array([[0, 0.5]], np.float32), np.array([[40, 20]]))
    with pytest.raises(ValueError, match=text):
        choose_tolerance(table, budget, **options)


def test_bytes_that_were_not_measured_are_asked_for() -> None:
    with pytest.raises(ValueError, match=r"bytes were not measured; .* encode=EncodePatches"):
        choose_tolerance(Drops(np.array([4]), np.zeros((1, 1), np.float32)), 100, of="bytes")


def test_images_of_several_sizes_need_a_size() -> None:
    odd = {**samples(1)[0], "image": pixels(0)[:32]}
    with pytest.raises(ValueError, match=r"images of 2 sizes to measure; .* give size="):
        measure_drops([*samples(2), odd], TEXTURE, ENCODER)
    assert len(measure_drops([*samples(2), odd], TEXTURE, ENCODER, size=32).shift) == 3
    with pytest.raises(ValueError, match="no sample to measure"):
        measure_drops([], TEXTURE, ENCODER)
    with pytest.raises(ValueError, match="samples to measure are dicts; give a data set without batch_size"):
        measure_drops([samples(2)], TEXTURE, ENCODER)  # type: ignore[list-item]


def test_a_limit_stops_reading() -> None:
    stream = iter(samples(5))
    assert len(measure_drops(stream, TEXTURE, ENCODER, limit=3).shift) == 3
    assert next(stream)["__key__"] == "k3"
    with pytest.raises(ValueError, match="limit must be an integer >= 1, got 0"):
        measure_drops(stream, TEXTURE, ENCODER, limit=0)


def test_a_feature_that_is_not_finite_is_said_of_its_sample() -> None:
    def broken(images: list[Image.Image]) -> NDArray[np.float32]:
        return np.full((len(images), 2), np.nan, np.float32)

    pipe = adq.DropPatches(TEXTURE, tolerance=0.1, encoder=adq.encoder(broken, name="broken"))
    with pytest.raises(adq.SampleError, match=r"shard a.tar, key 'k0': .*a feature holds NaN or infinity"):
        list(pipe(samples(2)))


def test_an_image_without_feature_has_shifted_wholly() -> None:
    def black(images: list[Image.Image]) -> NDArray[np.float32]:
        return np.array([[float(image.getextrema() == white)] for image in images], np.float32)

    white = ((255, 255),) * 3
    image = np.full((SIDE, SIDE, 3), 255, np.uint8)
    image[:16, :16] = 0
    sample = {"__key__": "a", "__url__": "a.tar", "image": image}
    table = measure_drops([sample], TEXTURE, adq.encoder(black, name="black"))
    assert (table.shift[0, 1:] == 1).all()
