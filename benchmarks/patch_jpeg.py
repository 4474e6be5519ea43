"""What does dropping patches save on disk and while decoding, and would plain recompression have done as well?

Command:
    ADQ_DATA=DIR python -m benchmarks.patch_jpeg --out benchmarks/results/patch_jpeg.json
DIR holds imagenet-sample/ and cifar10/ shards.

Photographs at 224 (short side, centre crop), quality 90, patches of 16, optimised Huffman tables for both: share of the
bytes of files, and of tar cells with a label's cell; PSNR of kept pixels, at the outermost pixel of patches and inside
them, beside the same pixels of the whole image's JPEG; images a second, one thread, the kinds of work taken
in turn. Then plain recompression at the same mean bytes as each random drop, by bisection of the quality: PSNR over the
whole image (the mean of the images' PSNR). Beside it the PSNR over the whole image of the patch-dropped one with its
holes filled by grey, and by the mean colour of its kept patches: not a reconstruction, but what no network has to know.
Then 32 x 32 images (CIFAR-10, test): 4 x 4 patches, tiled in the best number of columns, and those that fit the JPEG.

Last measured (one of two cores of an AMD EPYC shared with other programs, Pillow 13.0, libjpeg-turbo 3.2, 200
photographs). A quarter dropped at random, 4:2:0: 0.759 of the bytes, 0.782 in tars with labels; 2,620 images a second
encoded, 6,250 decoded, in 0.73 of the time of Pillow's decoder and 0.82 of ours, which is faster. Whole images lie above
the C library's limit for memory that it keeps, so that in some processes they take a fifth longer: then it is 0.6 of
Pillow's, as in the rows of 4:4:4. Half dropped: 0.514, 0.560, and 0.47 to 0.5 of the time. Patches that matter more
cost more: by Grad-CAM++ of the built-in classifier 0.792 and 0.553 of the bytes, Grad-CAM 0.782 and 0.545, texture 0.859
and 0.644; attention (of a transformer with random weights, as none comes with the package) 0.756 and 0.523. Borders lose
0.75 dB with 4:2:0 in one row, 2.0 to 2.4 dB in a rectangle, nothing with 4:4:4; inside, patches are those of the whole
image's JPEG.
Plain recompression to the same bytes as three quarters keeps the whole image, at 34.0 dB (JPEG of quality 82), 36.4 (WebP), 36.8
(AVIF), where the patch-dropped one has 19.3 dB before its holes are rebuilt; at half 31.9, 34.1, 34.4 against 16.3. So
patches are dropped for what training without them does, or computes less, and not for the bytes alone. At 32 x 32,
patches of 4 enlarge (740 bytes against 673); of 16 (4:2:0) and 8 (4:4:4) they save a tenth, 1 and 0.2 % in tar cells.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, features

import adq_wds as adq
from adq_wds.core.importance import patch_seed
from adq_wds.core.patches import cut_patches, n_kept, tile, top_patches, untile
from adq_wds.samples.image import decode_image
from adq_wds.samples.patch_file import (
    CODING_UNIT,
    Subsampling,
    decode,
    encode,
    encode_whole,
)
from benchmarks.common import data_folder, parser, report, seconds, spread

U8 = NDArray[np.uint8]
SIZE, PATCH, QUALITY = 224, 16, 90
LABEL_CELL = 1024
IMPORTANCES = ("random", "texture", "gradcam++", "gradcam", "attention")
RECOMPRESSED: dict[str, dict[str, Any]] = {
    "JPEG": {"subsampling": "4:2:0", "optimize": True},
    "WEBP": {"method": 4},
    "AVIF": {"speed": 8, "max_threads": 1},
}


def pictures(folder: Path, limit: int) -> Iterator[U8]:
    """Images of the shards of a folder, in their order, (H, W, 3) each."""
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if limit and member.name.endswith(".jpg"):
                    limit -= 1
                    content = tar.extractfile(member)
                    assert content is not None
                    yield np.asarray(decode_image(content.read()))


def cell_bytes(n_bytes: int) -> int:
    """Bytes that a file takes in a tar: a header's block and its content, filled up to whole blocks."""
    return 512 + n_bytes + -n_bytes % 512


def at_size(image: U8, size: int) -> U8:
    """Short side to `size`, then the centre."""
    height, width = image.shape[:2]
    scale = size / min(height, width)
    resized = Image.fromarray(image).resize(
        (max(size, round(width * scale)), max(size, round(height * scale))), Image.Resampling.BICUBIC
    )
    left, top = (resized.width - size) // 2, (resized.height - size) // 2
    return np.asarray(resized.crop((left, top, left + size, top + size)))


def choose(images: list[U8], importance: str, keep: float, patch: int) -> list[NDArray[np.int64]]:
    """Numbers of the patches to keep of each image."""
    options: dict[str, Any] = {}
    if importance == "attention":  # no trained transformer comes with the package
        torch.manual_seed(0)
        options = {"encoder": "vit_tiny_patch16_224", "pretrained": False}
    asked = adq.importance(importance, patch=patch, **options)
    kept: list[NDArray[np.int64]] = []
    for at in range(0, len(images), 50):
        pictures = [Image.fromarray(image) for image in images[at : at + 50]]
        seeds = [patch_seed(0, 0, "benchmark", str(at + i)) for i in range(len(pictures))]
        scores = asked(pictures, [None] * len(pictures), seeds)
        kept.extend(top_patches(scores, n_kept(scores.shape[1], keep)))
    return kept


def psnr(mean_square_error: float) -> float:
    """In dB, of 8-bit values."""
    return round(float(10 * np.log10(255**2 / mean_square_error)), 2)


def square_error(a: U8, b: U8) -> NDArray[np.float64]:
    return (a.astype(np.float64) - b) ** 2


def kept_psnr(
    images: list[U8], kept: list[NDArray[np.int64]], files: list[bytes], whole: list[bytes]
) -> dict[str, float]:
    """PSNR of kept pixels, pooled over the images, at and inside patch borders, of both files."""
    inside = np.zeros((PATCH, PATCH), np.bool_)
    inside[1:-1, 1:-1] = True
    errors: dict[str, list[float]] = {}
    for image, places, file, other in zip(images, kept, files, whole, strict=True):
        original = cut_patches(image[None], PATCH)[0][places]
        shown = {
            "patches": decode(file).patches,
            "whole": cut_patches(np.asarray(decode_image(other))[None], PATCH)[0][places],
        }
        for name, patches in shown.items():
            error = square_error(original, patches)
            errors.setdefault(f"{name}_border_db", []).append(float(error[:, ~inside].mean()))
            errors.setdefault(f"{name}_inside_db", []).append(float(error[:, inside].mean()))
    return {name: psnr(float(np.mean(values))) for name, values in errors.items()}


def rates(work: dict[str, list[Callable[[], Any]]], runs: int) -> dict[str, list[float]]:
    """Images a second of each kind of work, one figure a run; in each run all kinds are taken in turn."""
    found: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(runs):
        for name, calls in work.items():
            (taken,) = seconds(lambda: [call() is None for call in calls], 1)
            found[name].append(len(calls) / taken)
    return found


def stock_decode(data: bytes) -> U8:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def speed(
    images: list[U8], kept: list[NDArray[np.int64]], subsampling: Subsampling, runs: int
) -> dict[str, Any]:
    """Encoding and decoding, whole and patch-dropped."""
    whole = [encode_whole(image, quality=QUALITY, subsampling=subsampling) for image in images]
    files = [
        encode(i, k, PATCH, quality=QUALITY, subsampling=subsampling)
        for i, k in zip(images, kept, strict=True)
    ]
    found = rates(
        {
            "encode_whole": [lambda i=i: encode_whole(i, subsampling=subsampling) for i in images],  # type: ignore[misc]
            "encode_patches": [
                lambda i=i, k=k: encode(i, k, PATCH, subsampling=subsampling)  # type: ignore[misc]
                for i, k in zip(images, kept, strict=True)
            ],
            "decode_whole": [lambda d=d: np.asarray(decode_image(d)) for d in whole],  # type: ignore[misc]
            "decode_whole_pillow": [lambda d=d: stock_decode(d) for d in whole],  # type: ignore[misc]
            "decode_patches": [lambda d=d: decode(d) for d in files],  # type: ignore[misc]
        },
        runs,
    )
    ratio = {
        f"decode_time_to_{name}": spread(
            [a / b for a, b in zip(found[name], found["decode_patches"], strict=True)]
        )
        for name in ("decode_whole", "decode_whole_pillow")
    }
    return {**{f"{name}_per_s": spread(values, 4) for name, values in found.items()}, **ratio}


def stored(
    images: list[U8], kept: list[NDArray[np.int64]], subsampling: Subsampling
) -> tuple[dict[str, Any], list[bytes]]:
    """Bytes and PSNR of one row of the table, and its files."""
    whole = [encode_whole(image, quality=QUALITY, subsampling=subsampling) for image in images]
    files = [
        encode(i, k, PATCH, quality=QUALITY, subsampling=subsampling)
        for i, k in zip(images, kept, strict=True)
    ]
    raw = sum(map(len, files)) / sum(map(len, whole))
    cells = [sum(cell_bytes(len(file)) + LABEL_CELL for file in many) for many in (files, whole)]
    row = {
        "bytes_whole": round(sum(map(len, whole)) / len(images)),
        "bytes_patches": round(sum(map(len, files)) / len(images)),
        "of_the_bytes": round(raw, 4),
        "of_the_tar_with_labels": round(cells[0] / cells[1], 4),
        **kept_psnr(images, kept, files, whole),
    }
    return row, files


def border_by_columns(images: list[U8], kept: list[NDArray[np.int64]]) -> dict[str, float]:
    """PSNR at the outermost pixel of kept patches, 4:2:0, by the number of columns they are tiled in."""
    border = np.ones((PATCH, PATCH), np.bool_)
    border[1:-1, 1:-1] = False
    k = len(kept[0])
    errors: dict[int, list[float]] = {}
    for image, places in zip(images, kept, strict=True):
        original = cut_patches(image[None], PATCH)[0][places]
        for columns in (k, 49, 21, 12):
            file = encode_whole(tile(original, columns), quality=QUALITY)
            shown = untile(np.asarray(decode_image(file)), k, PATCH)
            errors.setdefault(columns, []).append(float(square_error(original, shown)[:, border].mean()))
    return {str(columns): psnr(float(np.mean(values))) for columns, values in errors.items()}


def recompressed(images: list[U8], target: float) -> dict[str, Any]:
    """Each codec at the highest quality whose files are at most `target` bytes in the mean."""
    out: dict[str, Any] = {}
    for codec, options in RECOMPRESSED.items():
        if codec != "JPEG" and not features.check(codec.lower()):
            continue
        low, high, best = 1, 100, None
        while low < high:  # the files of quality `low` are small enough
            middle = (low + high) // 2
            files = [_saved(image, codec, middle, options) for image in images]
            if sum(map(len, files)) / len(files) <= target:
                low, best = middle + 1, (middle, files)
            else:
                high = middle
        assert best is not None
        quality, files = best
        values = [
            psnr(float(square_error(a, np.asarray(decode_image(b))).mean()))
            for a, b in zip(images, files, strict=True)
        ]
        out[codec] = {
            "quality": quality,
            "bytes": round(sum(map(len, files)) / len(files)),
            "psnr_db": round(float(np.mean(values)), 2),
        }
    return out


def _saved(image: U8, codec: str, quality: int, options: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, codec, quality=quality, **options)
    return file.getvalue()


def holes_psnr(images: list[U8], files: list[bytes]) -> dict[str, float]:
    """PSNR over the whole image, holes filled with grey or with the mean colour of the kept patches."""
    grey, mean = [], []
    for image, file in zip(images, files, strict=True):
        found = decode(file)
        red, green, blue = found.patches.mean(axis=(0, 1, 2)).round().astype(int).tolist()
        grey.append(psnr(float(square_error(image, found.to_image()).mean())))
        mean.append(psnr(float(square_error(image, found.to_image((red, green, blue))).mean())))
    return {
        "filled_grey_db": round(float(np.mean(grey)), 2),
        "filled_mean_db": round(float(np.mean(mean)), 2),
    }


def small_images(images: list[U8], keep: float) -> dict[str, Any]:
    """32 x 32: patches of 4, tiled with Pillow alone, and those that may be stored."""
    whole = sum(len(encode_whole(image)) for image in images) / len(images)
    kept = choose(images, "random", keep, 4)
    tiled: dict[int, float] = {}
    for columns in (4, 6, 8, 12, 48):
        files = [
            encode_whole(tile(cut_patches(i[None], 4)[0][k], columns))
            for i, k in zip(images, kept, strict=True)
        ]
        tiled[columns] = sum(map(len, files)) / len(files)
    record = 18 + 64 // 8 + 4
    columns = min(tiled, key=tiled.__getitem__)
    out: dict[str, Any] = {
        "images": len(images),
        "bytes_whole_420": round(whole),
        "patch_4_of_420": {
            "columns": columns,
            "bytes_without_mask": round(tiled[columns]),
            "bytes": round(tiled[columns] + record),
        },
    }
    for subsampling, patch in (("4:2:0", 16), ("4:4:4", 8)):
        pairs = list(zip(images, choose(images, "random", keep, patch), strict=True))
        form: dict[str, Any] = {"quality": QUALITY, "subsampling": subsampling}
        wholes = [len(encode_whole(image, **form)) for image, _ in pairs]
        patches = [len(encode(image, kept, patch, **form)) for image, kept in pairs]
        out[f"patch_{patch}_of_{subsampling}"] = {
            "of_the_bytes": round(sum(patches) / sum(wholes), 4),
            "of_the_cells": round(sum(map(cell_bytes, patches)) / sum(map(cell_bytes, wholes)), 4),
        }
    return out


def main() -> None:
    """Measure."""
    arguments = parser(__doc__)
    arguments.set_defaults(runs=9)
    arguments.add_argument("--data", default=os.environ.get("ADQ_DATA"))
    arguments.add_argument("--limit", type=int, default=200, help="photographs")
    a = arguments.parse_args()
    images = [at_size(image, SIZE) for image in pictures(data_folder("imagenet-sample", a.data), a.limit)]
    table: list[dict[str, Any]] = []
    plain: dict[str, Any] = {}
    for keep in (0.75, 0.5):
        for importance in IMPORTANCES:
            kept = choose(images, importance, keep, PATCH)
            for subsampling in CODING_UNIT:
                row, files = stored(images, kept, subsampling)  # type: ignore[arg-type]
                row = {"keep": keep, "importance": importance, "subsampling": subsampling, **row}
                if importance == "random":
                    row |= speed(images, kept, subsampling, a.runs)  # type: ignore[arg-type]
                    if subsampling == "4:2:0":
                        bytes_each = sum(map(len, files)) / len(files)
                        plain[str(keep)] = {
                            "bytes": round(bytes_each),
                            "patches": holes_psnr(images, files),
                            **recompressed(images, bytes_each),
                        }
                table.append(row)
                print(row, flush=True)
    result = {
        "images": len(images),
        "size": SIZE,
        "patch": PATCH,
        "quality": QUALITY,
        "table": table,
        "border_db_by_columns_keep_0.75": border_by_columns(images, choose(images, "random", 0.75, PATCH)),
        "recompressed_to_the_same_bytes": plain,
        "cifar10_keep_0.75": small_images(list(pictures(data_folder("cifar10", a.data), 1000)), 0.75),
        "load_at_end": os.getloadavg()[0],
    }
    report(result, a.out)


if __name__ == "__main__":
    main()
