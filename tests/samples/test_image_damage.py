"""Does `decode_image` answer damage, bombs and files that are no image with a `SampleError`, soon and cheaply?"""

from __future__ import annotations

import io
import json
import random
import struct
import subprocess
import textwrap
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import GifImagePlugin, Image, ImageFile, features

from adq_wds.errors import SampleError
from adq_wds.samples import image
from adq_wds.samples.image import IMAGE_FORMATS, decode_image
from tests.programs import run

H, W = 96, 128
rng = np.random.default_rng(8)
COARSE = Image.fromarray(rng.integers(0, 256, (H // 4, W // 4, 3), dtype=np.uint8))
RGB = np.asarray(COARSE.resize((W, H), Image.Resampling.BICUBIC))


def encode(pixels: Image.Image | NDArray[Any], form: str, **options: Any) -> bytes:
    pixels = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = io.BytesIO()
    pixels.save(file, form, **options)
    return file.getvalue()


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def black_png(side: int) -> bytes:
    """An RGB PNG of side × side pixels; about a thousandth of their bytes."""
    pump = zlib.compressobj(1)
    rows = b"".join(pump.compress(bytes(side * 3 + 1)) for _ in range(side)) + pump.flush()
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


WHOLE = {  # one good file of each format
    "JPEG": encode(RGB, "JPEG", quality=90),
    "PNG": encode(RGB, "PNG"),
    "WEBP": encode(RGB, "WEBP", quality=90),
    "GIF": encode(RGB, "GIF"),
    "BMP": encode(RGB, "BMP"),
    "TIFF": encode(RGB, "TIFF", compression="tiff_lzw"),
    "PPM": encode(RGB, "PPM"),
}
if features.check("avif"):
    WHOLE["AVIF"] = encode(RGB, "AVIF", quality=90)

NOT_IMAGES = {
    "empty": (b"", r"not an image \(0 bytes\)"),
    "garbage": (bytes(range(1, 200)), r"not an image \(starts with b'\\x01"),
    "HTML page": (
        b"<html>404</html>",
        r"not an image \(starts with b'<html>404</html>'\); read are JPEG, PNG",
    ),
    "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', r"not an image \(starts with b'<svg"),
    "EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", r"not an image \(starts with b'%!PS-Adobe"),
    "WMF": (b"\xd7\xcd\xc6\x9a\0\0" + bytes(100), r"not an image \(starts with"),
    "half a JPEG": (
        WHOLE["JPEG"][: len(WHOLE["JPEG"]) // 2],
        "cannot decode this JPEG: OSError: .*truncated",
    ),
    "JPEG cut in its tables": (WHOLE["JPEG"][:300], "cannot decode this JPEG"),
    "truncated PNG": (WHOLE["PNG"][: len(WHOLE["PNG"]) // 2], "cannot decode this PNG: OSError: .*truncated"),
    "AVIF of nothing": (b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf" + bytes(64), "cannot decode this AVIF"),
    "PNG of no size": (black_png(0), "cannot decode this PNG"),
}


@pytest.mark.parametrize("kind", NOT_IMAGES)
def test_what_is_no_whole_image_is_an_error_and_no_program_runs(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
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
def test_several_frames_are_refused_and_not_counted(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_program_that_loads_truncated_images_still_gets_no_half_image(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = {form: np.asarray(decode_image(data)) for form, data in WHOLE.items()}
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    for form, data in WHOLE.items():
        assert np.array_equal(np.asarray(decode_image(data)), plain[form]), form
    for form in ("JPEG", "PNG", "GIF", "BMP", "PPM"):
        for part in (0.3, 0.5, 0.7, 0.9):
            with pytest.raises(SampleError):
                decode_image(WHOLE[form][: int(len(WHOLE[form]) * part)])


def tiff(width: int, height: int, compression: int = 1, tile: int = 0) -> bytes:
    """A grey TIFF with 100 bytes of pixels, whatever its header says."""
    tags = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, compression), (262, 3, 1, 1)]
    place = [(322, 4, 1, tile), (323, 4, 1, tile), (324, 4, 1, 8), (325, 4, 1, 100)]
    tags += place if tile else [(273, 4, 1, 8), (277, 3, 1, 1), (278, 4, 1, height), (279, 4, 1, 100)]
    body = zlib.compress(bytes(90_000)).ljust(100, b"\0")[:100]
    ifd = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    return b"II*\0" + struct.pack("<I", 108) + body + ifd


def bombs() -> dict[str, bytes]:
    lossless = bytearray(encode(RGB, "WEBP", lossless=True))
    lossless[21:25] = struct.pack("<I", 16382 | 16382 << 14)
    lossy = bytearray(WHOLE["WEBP"])
    lossy[26:30] = struct.pack("<HH", 10_000, 10_000)
    canvas = bytearray(encode(RGB, "WEBP", exif=b"Exif\0\0MM"))
    canvas[24:30] = b"\xff\x3f\0" * 2
    screen = b"GIF89a\1\0\1\0\x80\0\0\0\0\0\xff\xff\xff"
    frame = b",\0\0\0\0\1\0\1\0\0\x02\x02\x44\x01\0"
    jpeg_size = struct.pack(">HH", H, W)
    assert WHOLE["JPEG"].count(jpeg_size) == 1
    return {
        "WEBP lossless": bytes(lossless),
        "WEBP lossy": bytes(lossy),
        "WEBP canvas": bytes(canvas),
        "TIFF": tiff(20_000, 20_000),
        "TIFF deflated": tiff(20_000, 20_000, 8),
        "TIFF of one tile": tiff(100, 100, 8, tile=40_000),
        "GIF of 10,000 frames": screen + frame * 10_000 + b";",
        "GIF of a large frame": screen + b",\0\0\0\0\x60\xea\x60\xea" + frame[9:] + b";",
        "BMP": b"BM" + struct.pack("<IIIIiiHHIIIIII", 99, 0, 54, 40, 30_000, 30_000, 1, 24, 0, 0, 0, 0, 0, 0),
        "PPM": b"P6 30000 30000 255 " + bytes(100),
        "JPEG": WHOLE["JPEG"].replace(jpeg_size, struct.pack(">HH", 60_000, 60_000)),
    }


REASONS = {"GIF of 10,000 frames": "several frames", "GIF of a large frame": "DecompressionBombError"}
METER = textwrap.dedent("""
    import json, resource, sys, time, warnings
    from pathlib import Path
    from adq_wds.errors import SampleError
    from adq_wds.samples.image import decode_image

    def peak():  # KiB; VmHWM, because ru_maxrss starts at the parent's
        status = Path("/proc/self/status")
        if status.exists():
            return int(status.read_text().split("VmHWM:")[1].split()[0])
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

    warnings.simplefilter("error")
    for path in sorted(Path(sys.argv[1]).iterdir()):
        data = path.read_bytes()
        before, start = peak(), time.perf_counter()
        try:
            text = str(decode_image(data).size)
        except SampleError as error:
            text = f"SampleError: {error}"
        print(json.dumps([path.name, text, time.perf_counter() - start, peak() - before]))
""")


def test_bombs_are_errors_within_a_second_and_256_mib(tmp_path: Path) -> None:
    files = bombs() | {f"PNG {side}": black_png(side) for side in (9_000, 10_000, 12_000, 14_000)}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    # F9's bounds, in a process of its own; every warning is an error there
    done = run(METER, str(tmp_path))
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == len(files)
    for name, text, seconds, grown in rows:
        assert text.startswith("SampleError: "), (name, text)
        assert REASONS.get(name, "too large") in text, (name, text)
        assert seconds < 1, (name, seconds)
        assert grown < 256 * 1024, (name, grown)


@pytest.mark.parametrize("name", ["WEBP lossless", "WEBP lossy", "WEBP canvas"])
def test_a_large_webp_is_refused_before_its_reader_makes_room(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
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
def test_damaged_files_decode_or_raise_sample_error_and_nothing_else(form: str) -> None:
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
