"""Which images does the demo train on? scikit-learn's digits, written to tar shards."""

from __future__ import annotations

import io
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from adq_wds.core.rng import draws
from adq_wds.errors import AdqError
from adq_wds.samples.fields import Sample
from adq_wds.tables.spans import scan_spans
from adq_wds.writing.tars import ShardPattern
from adq_wds.writing.write_shards import write_shards

TEST_SHARE = 0.3
SHARD_SAMPLES = 320


@dataclass(frozen=True)
class DigitShards:
    """The two sets as shards: paths in order, and how many images each holds."""

    train: list[str]
    test: list[str]
    n_train: int
    n_test: int


def write_digits(folder: Path) -> DigitShards:
    """Write ``train/train-%06d.tar`` and ``test/test-%06d.tar`` under `folder`; what is there already stays.

    The split is keyed and keeps the classes' proportions, so it is the same on any machine.

    Raises:
        AdqError: scikit-learn is missing, or shards lie there that hold something else; they are left as they are.
    """
    pixels, labels = load_digits()
    in_test = _in_test(labels)
    train, test = (_samples(pixels, labels, np.flatnonzero(chosen)) for chosen in (~in_test, in_test))
    paths = [_write(folder / split, split, samples) for split, samples in (("train", train), ("test", test))]
    return DigitShards(paths[0], paths[1], len(train), len(test))


def load_digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """1,797 grey images (N, 8, 8) uint8 and their digits (N,) int64; scikit-learn holds them, nothing is fetched.

    Raises:
        AdqError: scikit-learn is missing or cannot be imported.
    """
    try:
        from sklearn.datasets import load_digits as bundled
    except ImportError as error:
        text = f'the demo\'s images come with scikit-learn ({error}): pip install "adq-wds[demo]"'
        raise AdqError(text) from error
    images, labels = bundled().images, bundled().target  # 0 … 16 ink levels
    return np.minimum(images * 16, 255).astype(np.uint8), labels.astype(np.int64)


def _in_test(labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(N,) bool: the keyed 30 % of each class."""
    draw = draws(0, 0, "digits", [_key(i) for i in range(len(labels))], purpose="split")
    chosen = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        chosen[rows[np.argsort(draw[rows])][: round(TEST_SHARE * len(rows))]] = True
    return chosen


def _key(i: int) -> str:
    return f"digit-{i:04d}"


def _samples(pixels: NDArray[np.uint8], labels: NDArray[np.int64], rows: NDArray[np.int64]) -> list[Sample]:
    return [
        {"__key__": _key(i), "png": _png(pixels[i]), "cls": str(labels[i]).encode()} for i in rows.tolist()
    ]


def _png(pixels: NDArray[np.uint8]) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def _write(folder: Path, split: str, samples: list[Sample]) -> list[str]:
    """The shards of one split, written unless they are there."""
    pattern = ShardPattern(str(folder / f"{split}-%06d.tar"))
    cuts = [samples[i : i + SHARD_SAMPLES] for i in range(0, len(samples), SHARD_SAMPLES)]
    expected = {pattern.path(i): cut for i, cut in enumerate(cuts)}
    there = pattern.existing()
    for path in there:
        if path not in expected or not _holds(path, expected[path]):
            raise AdqError(
                f"{path} is not as this demo writes it; it is left as it is: give another folder with -o, or remove it"
            )
    if len(there) < len(expected) or not (folder / "_info.json").is_file():
        target = str(folder / f"{split}-%06d.tar")
        write_shards(samples, target, max_samples=SHARD_SAMPLES, split=split, overwrite=True, progress=False)
    return [str(path) for path in expected]


def _holds(path: Path, samples: list[Sample]) -> bool:
    """Does the shard hold these samples, byte for byte?"""
    try:
        spans = scan_spans(path, shard=path.name)
    except AdqError:
        return False
    crc32 = [zlib.crc32(sample["png"] + sample["cls"]) for sample in samples]
    return spans.keys == [sample["__key__"] for sample in samples] and spans.crc32.tolist() == crc32
