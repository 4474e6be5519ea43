"""Does `decode_image` answer damage, bombs and files that are no image with a `SampleError`, soon and cheaply?"""

import random
import subprocess
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import GifImagePlugin, Image, ImageFile

from adq_wds.errors import SampleError
from adq_wds.samples import image
from adq_wds.samples.image import IMAGE_FORMATS, decode_image
from tests.conftest import MonkeyPatch
from tests.samples.image_files import NOT_IMAGES, RGB, WHOLE, H, W, bombs, encode


@pytest.mark.parametrize("kind", NOT_IMAGES)
def test_what_is_no_whole_image_is_an_error_and_no_program_runs(kind: str, monkeypatch: MonkeyPatch) -> None:
    data, text = NOT_IMAGES[kind]
    started: list[object] = []
    monkeypatch.setattr(subprocess.Popen, "__init__", lambda self, *a, **k: started.append(a))
    with pytest.raises(SampleError, match=text) as caught:
        decode_image(data)
    assert "cannot decode" not in str(caught.value) or caught.value.__cause__ is not None
    assert started == []


def test_formats_are_fixed_and_each_is_read() -> None:
    assert set(WHOLE) | {"AVIF"} == set(IMAGE_FORMATS)
    assert not {"EPS", "WMF", "SVG", "PSD"} & set(IMAGE_FORMATS)
    for data in WHOLE.values():
        assert decode_image(data).size == (W, H)


@pytest.mark.parametrize("form", ["PNG", "WEBP", "GIF", "TIFF", "AVIF"])
def test_several_frames_are_refused_and_not_counted(form: str, monkeypatch: MonkeyPatch) -> None:
    if form not in WHOLE:
        pytest.skip("this Pillow has no AVIF")
    data = encode(RGB, form, save_all=True, append_images=[Image.new("RGB", (W, H))])
    monkeypatch.setattr(GifImagePlugin.GifImageFile, "n_frames", property(lambda self: 1 // 0))  # walks them
    with pytest.raises(SampleError, match=f"this {form} has several frames; expected one still image"):
        decode_image(data)


def test_the_pixel_limit_is_exact_and_of_the_header() -> None:
    assert decode_image(WHOLE["PNG"], max_pixels=H * W).size == (W, H)
    for form, data in WHOLE.items():
        with pytest.raises(SampleError, match=f"too large: {W} x {H} = {W * H} pixels, at most {W * H - 1}"):
            decode_image(data, max_pixels=H * W - 1)
        assert form in IMAGE_FORMATS


def test_bad_options_are_the_programs_error() -> None:
    with pytest.raises(ValueError, match="max_pixels=0"):
        decode_image(WHOLE["PNG"], max_pixels=0)
    for colour in ((0, 0), (0, 0, 256), (-1, 0, 0)):
        with pytest.raises(ValueError, match="is no colour"):
            decode_image(WHOLE["PNG"], background=colour)  # type: ignore[arg-type]


def test_with_load_truncated_images_no_half_image_passes(monkeypatch: MonkeyPatch) -> None:
    plain = {form: np.asarray(decode_image(data)) for form, data in WHOLE.items()}
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    for form, data in WHOLE.items():
        assert np.array_equal(np.asarray(decode_image(data)), plain[form]), form
    for form in ("JPEG", "PNG", "GIF", "BMP", "PPM"):
        for part in (0.3, 0.5, 0.7, 0.9):
            with pytest.raises(SampleError):
                decode_image(WHOLE[form][: int(len(WHOLE[form]) * part)])


@pytest.mark.parametrize("name", ["WEBP lossless", "WEBP lossy", "WEBP canvas"])
def test_a_large_webp_is_refused_before_its_reader_makes_room(name: str, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setitem(image._READERS, "WEBP", lambda file: pytest.fail("opened"))
    with pytest.raises(SampleError, match="too large"):
        decode_image(bombs()[name])


def decodes_or_says_why(data: bytes) -> bool:
    try:
        decoded = decode_image(data, max_pixels=1 << 20)
    except SampleError:
        return False
    assert decoded.mode == "RGB"
    assert np.asarray(decoded).shape == (decoded.height, decoded.width, 3)
    return True


@pytest.mark.parametrize("form", WHOLE)
@pytest.mark.filterwarnings("ignore:.*:UserWarning:PIL")
def test_damaged_files_decode_or_raise_sample_error(form: str) -> None:
    data, chance = WHOLE[form], random.Random(form)
    cut = [decodes_or_says_why(data[: chance.randrange(len(data))]) for _ in range(300)]
    for _ in range(300):
        place = chance.randrange(len(data)) if chance.random() < 0.5 else chance.randrange(min(64, len(data)))
        flipped = bytearray(data)
        flipped[place] ^= 1 << chance.randrange(8)
        decodes_or_says_why(bytes(flipped))
    assert sum(cut) <= 30, "hardly a truncated file may pass"


def test_threads_get_what_one_thread_gets() -> None:
    odd = [Image.fromarray(RGB).convert(mode) for mode in ("1", "P", "RGBA", "LAB", "CMYK")]
    grey16 = Image.fromarray(RGB[..., 0].astype(np.uint16) * 257)
    files = [*WHOLE.values(), *(encode(one, "TIFF") for one in [*odd, grey16])]
    files += [encode(odd[2], "PNG"), encode(odd[4], "JPEG"), *(data for data, _ in NOT_IMAGES.values())]

    def outcome(data: bytes) -> bytes | str:
        try:
            return decode_image(data).tobytes()
        except SampleError as error:
            return str(error)

    alone = [outcome(data) for data in files]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(4):
            assert list(pool.map(outcome, files)) == alone
