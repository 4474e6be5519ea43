"""Do stored patches come back as they were kept, by our decoder and by everybody's?"""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
from numpy.typing import NDArray
from PIL import Image

import adq_wds as adq
from adq_wds.core.patches import cut_patches
from adq_wds.samples.fields import Sample, SpecError
from adq_wds.samples.patch_file import decode as decode_file

KEPT = ("patches", "positions", "grid")
NONE = np.zeros((0, 16, 16, 3), np.uint8)


def pixels(seed: int, side: int = 64) -> NDArray[np.uint8]:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC))


def dropped(n: int = 4, patch: int = 16, keep: float = 0.75, **options: Any) -> list[Sample]:
    fields = [{"__key__": f"k{i}", "image": pixels(i), "cls": b"%d" % i} for i in range(n)]
    given = [{"__url__": "x/a.tar", **sample} for sample in fields]
    return adq.DropPatches(adq.importance("random", patch=patch), keep=keep, **options).apply(given)


def psnr(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    return float(10 * np.log10(255**2 / max(1e-9, ((a.astype(float) - b) ** 2).mean())))


@pytest.mark.parametrize("patch", [16, 32])
def test_what_is_kept_comes_back_in_the_same_fields(patch: int) -> None:
    kept = dropped(patch=patch)
    stored = adq.EncodePatches(quality=95).apply(kept)
    assert [list(sample) for sample in stored] == [["__url__", "__key__", "cls", "patches.jpg"]] * 4
    for out, expected in zip(adq.Decode(to="patches").apply(stored), kept, strict=True):
        assert list(out) == ["__url__", "__key__", *KEPT, "label"]
        assert all(out[name].dtype == expected[name].dtype for name in KEPT)
        assert all(np.array_equal(out[name], expected[name]) for name in ("positions", "grid"))
        assert psnr(out["patches"], expected["patches"]) > 32
        assert out["patches"].flags.writeable
        assert out["patches"].flags.c_contiguous


def test_decoded_as_a_picture_missing_patches_are_filled() -> None:
    kept = dropped(keep=0.5)
    stored = adq.EncodePatches().apply(kept)
    fill = (1, 2, 3)
    in_parts = adq.Decode(to="patches").apply(stored)
    for form in ("pil", "numpy", "torch"):
        for out, parts in zip(adq.Decode(to=form, fill=fill).apply(stored), in_parts, strict=True):
            assert set(out) == {"__key__", "__url__", "image", "label", "__adq_filled__"}
            image = np.asarray(out["image"])
            image = image.transpose(1, 2, 0) if form == "torch" else image
            cells = cut_patches(image[None], 16)[0]
            hidden = np.delete(cells, parts["positions"], axis=0)
            assert np.array_equal(cells[parts["positions"]], parts["patches"])
            assert (hidden == fill).all()
    (grey, *_) = adq.Decode(to="numpy").apply(stored)
    hidden = np.delete(cut_patches(grey["image"][None], 16)[0], in_parts[0]["positions"], axis=0)
    assert (hidden == 128).all()


def test_444_keeps_the_colours_at_the_borders_of_patches_of_8() -> None:
    (kept,) = dropped(1, patch=8)
    (stored,) = adq.EncodePatches(subsampling="4:4:4", quality=95).apply([kept])
    (out,) = adq.Decode(to="patches").apply([stored])
    assert psnr(out["patches"], kept["patches"]) > 38


def test_webdataset_writes_reads_and_shows_them_without_us(tmp_path: Path) -> None:
    stored = adq.EncodePatches().apply(dropped())
    adq.write_shards(stored, tmp_path / "%d.tar")
    found = list(wds.WebDataset(str(tmp_path / "0.tar"), shardshuffle=False).decode("pil"))
    assert [sample["patches.jpg"].size for sample in found] == [(12 * 16, 16)] * 4
    again = list(adq.ShardDataset(tmp_path / "0.tar", pipes=[adq.Decode(to="patches")]))
    direct = adq.Decode(to="patches").apply(stored)
    for one, other in zip(again, direct, strict=True):
        assert all(np.array_equal(one[name], other[name]) for name in KEPT)


def test_an_image_beside_stored_patches_must_be_named() -> None:
    (stored,) = adq.EncodePatches().apply(dropped(1))
    both = {**stored, "ppm": b"P6 1 1 255 abc"}
    (out,) = adq.Decode(image="ppm", to="numpy").apply([both])
    assert out["image"].tolist() == [[[97, 98, 99]]]
    assert "patches.jpg" in out
    (out,) = adq.Decode(image=lambda sample: sample["ppm"], to="numpy").apply([both])
    assert out["image"].shape == (1, 1, 3)
    (out,) = adq.Decode(image=lambda sample: sample["patches.jpg"], to="patches").apply([both])
    assert len(out["patches"]) == 12
    assert {"ppm", "patches.jpg"} < set(out)
    with pytest.raises(adq.SampleError, match=r"fields 'ppm' and 'patches.jpg' are both there"):
        list(adq.Decode()([both]))


@pytest.mark.parametrize(("patch", "subsampling"), [(4, "4:2:0"), (8, "4:2:0"), (4, "4:4:4")])
def test_patches_that_would_enlarge_are_never_skipped(patch: int, subsampling: Any) -> None:
    pipe = adq.EncodePatches(subsampling=subsampling, on_error="skip")
    text = rf"patch={patch} does not work with JPEG {subsampling}: .* enlarges files .*740 bytes against 673 whole"
    with pytest.raises(SpecError, match=text):
        list(pipe(dropped(patch=patch)))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"patches": None}, "these are no kept patches"),
        ({"patches": b"abc"}, "these are no kept patches"),
        ({"positions": np.array([3, 2, 1])}, "these are no kept patches: .*kept must ascend"),
        ({"positions": np.array([0, 99])}, "these are no kept patches"),
        ({"patches": NONE, "positions": np.zeros(0, int)}, "no kept patches: .*kept must be from 1 to 16"),
        ({"grid": np.array([4])}, "these are no kept patches"),
        ({"grid": np.array([0, 4])}, "grid must be an integer >= 1, got 0"),
        ({"patches.jpg": b""}, "field 'patches.jpg': is there already; rename or drop it"),
    ],
)
def test_what_is_no_kept_patches_is_named(change: Sample, text: str) -> None:
    given = dropped()
    given[2] = {**given[2], **change}
    with pytest.raises(adq.SampleError, match=rf"^shard a.tar, key 'k2'.*{text}"):
        list(adq.EncodePatches()(given))


def test_without_drop_patches_before_it_says_so() -> None:
    sample = {"__key__": "k", "__url__": "a.tar", "jpg": b""}
    with pytest.raises(adq.SampleError, match=r"no field 'patches' .* put DropPatches before EncodePatches"):
        list(adq.EncodePatches()([sample]))


def test_damaged_patches_are_named_and_skipped_alone() -> None:
    """S5 and F35: what the record claims is checked before anything is made."""
    stored = adq.EncodePatches().apply(dropped(20))
    jpeg = stored[3]["patches.jpg"]
    assert jpeg.count(b"\0\x04\0\x04") == 1  # rows and columns
    plain = io.BytesIO()
    Image.fromarray(pixels(0)).save(plain, "JPEG")
    cases = {
        "half a file": (jpeg[: len(jpeg) // 2], "(truncated|cannot decode)"),
        "a mask of 2**32": (jpeg.replace(b"\0\x04\0\x04", b"\xff\xff\xff\xff", 1), "damaged patch mask"),
        "no mask": (plain.getvalue(), "no patch mask: .* or read it as an ordinary image"),
        "no picture": (b"<html>", "no patch-dropped image: 6 bytes"),
    }
    for data, text in cases.values():
        bad = [*stored[:3], {**stored[3], "patches.jpg": data}, *stored[4:]]
        for form in ("patches", "pil"):
            place = "^shard a.tar, key 'k3', field 'patches.jpg': "
            with pytest.raises(adq.SampleError, match=place + text):
                list(adq.Decode(to=form)(bad))
            out = list(adq.Decode(to=form, on_error="skip")(bad))
            assert [sample["__key__"] for sample in out] == [f"k{i}" for i in range(20) if i != 3]


def test_dropped_patches_count_in_the_size_of_an_image() -> None:
    stored = adq.EncodePatches().apply(dropped(1, keep=0.1))
    assert len(decode_file(stored[0]["patches.jpg"]).kept) == 1
    with pytest.raises(adq.SampleError, match="4096 pixels, at most 4095 are read; raise max_pixels"):
        list(adq.Decode(to="patches", max_pixels=4095)(stored))
