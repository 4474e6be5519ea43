"""Packs folders of image files into tar shards: bytes untouched, folders as classes, every file accounted for."""

from __future__ import annotations

import logging
import os
import stat
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from adq_wds.checks import Count, Ratio, no_bar
from adq_wds.core.rng import check_seed, draws
from adq_wds.errors import SampleError, shorten
from adq_wds.pipes.base import MAX_BAD_FRACTION, OnError, Tally, check_on_error
from adq_wds.samples.fields import WHOLE_FIELDS, Sample
from adq_wds.samples.image import image_format
from adq_wds.shards.tar_headers import DEFAULT_LIMITS
from adq_wds.writing.tars import ShardPattern
from adq_wds.writing.write_shards import MAX_BYTES, MAX_SAMPLES, write_shards

logger = logging.getLogger("adq_wds")

IMAGE_SUFFIXES = frozenset(WHOLE_FIELDS.split(";")) | {"jpe", "jfif"}
_FIELDS = {"JPEG": "jpg", "TIFF": "tif"}  # of the other formats, their name
_SPLITS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing"})


@dataclass(frozen=True)
class PackReport:
    """Counts of the files of a folder: files = samples + bad + hidden + the sum of other.

    Attributes:
        shards: new shards.
        samples: images in them.
        bytes: bytes of the shards on the disk.
        classes: names of the classes; the position of a name is its label. None without labels.
        renamed: keys that differ from the file's path without its extension.
        bad: files with an image's extension that are no image, left out (see the log).
        hidden: files left out because their name, or a folder's name above, starts with a dot.
        other: files left out because their extension is not that of an image, by extension.
    """

    shards: int
    samples: int
    bytes: int
    classes: list[str] | None
    renamed: int
    bad: int
    hidden: int
    other: dict[str, int]

    @property
    def files(self) -> int:
        """All files in the folder."""
        return self.samples + self.bad + self.hidden + sum(self.other.values())

    def __str__(self) -> str:
        classes = "no labels" if self.classes is None else f"{len(self.classes):,} classes"
        kinds = f" ({_by_kind(self.other)})" if self.other else ""
        lines = [
            f"{self.samples:,} images, {classes}, in {self.shards:,} shards: {self.bytes:,} bytes on disk",
            f"{self.files:,} files = {self.samples:,} packed + {self.bad:,} bad + {self.hidden:,} hidden"
            f" + {sum(self.other.values()):,} without an image's extension{kinds}",
        ]
        if self.renamed:
            lines.append(f"{self.renamed:,} keys differ from their file's path without its extension")
        return "\n".join(lines)


def _by_kind(n_files: Mapping[str, int]) -> str:
    return ", ".join(f"{kind} {n:,}" for kind, n in n_files.items()) or "none"


def pack_folder(
    folder: str | os.PathLike[str],
    pattern: str | os.PathLike[str],
    *,
    label: Literal["folder"] | None = "folder",
    seed: int = 0,
    on_error: OnError = "raise",
    max_bad_fraction: Ratio = MAX_BAD_FRACTION,
    max_samples: Count = MAX_SAMPLES,
    max_bytes: Count = MAX_BYTES,
    split: str = "train",
    overwrite: bool = False,
    progress: bool | None = None,
) -> PackReport:
    """Pack the image files in a folder, and in its folders, into tar shards.

    A sample is one file, its bytes untouched: the field is named after its content (``jpg``, ``png``, ...), the key is
    its path below `folder` without the extension. Dots in the file's name become ``_``, for a key ends at the first
    dot; so do control characters and bytes that are not UTF-8. A repeated key gets ``-2``, ``-3``, ...

    Files lie in the shards in an order drawn by `seed`: read one after another, shards in the order of their classes
    would give one class at a time. Equal files and seed give equal bytes. ``_info.json`` and ``index.parquet`` stand
    beside the shards, as `write_shards` makes them. Links are followed. An image is recognised by its first
    bytes and not decoded; ``adq verify --decode`` decodes.

    Args:
        folder: one split of a data set, such as ``imagenet/train``.
        pattern: such as ``shards/%06d.tar``, outside `folder`; its folder is made if missing.
        label: "folder": the first folder on a file's path is its class, and ``cls`` holds its number in the sorted
            names of the folders with images (as torchvision's ImageFolder counts), which ``_info.json`` lists under
            ``classes``. Where no image lies in a folder, or with None, there is no label.
        seed: seed of the order in which files lie in the shards.
        on_error: what to do with a file that has the extension of an image and is none, cannot be read, or has no
            label: "raise" or "skip". Or a function of the error that says whether to skip.
        max_bad_fraction: share of bad images, of all, above which skipping is an error too; see `write_kept`.
        max_samples, max_bytes, split, overwrite, progress: as in `write_shards`.

    Raises:
        ValueError: no such folder, no image in it, its folders are splits instead of classes, or an argument is out of
            range.
        SampleError: a file is bad, or too many are; names the file.
        AdqError: the folder of the shards holds those of another run, or cannot be written.
    """
    check_on_error(on_error, max_bad_fraction)
    if label not in ("folder", None):
        raise ValueError(f"label must be 'folder' or None, got {label!r}")
    root = os.fspath(folder)
    if not os.path.isdir(root):
        raise ValueError(f"{shorten(root)} is no folder; expected one with image files")
    target = os.path.realpath(ShardPattern(os.fspath(pattern)).folder)
    if Path(target).is_relative_to(os.path.realpath(root)):
        raise ValueError(f"the shards would lie inside {shorten(root)}; write them to another folder")
    files = _list_files(root)
    if not files.images:
        others = f"other files: {_by_kind(files.other)}; hidden files: {files.hidden:,}"
        raise ValueError(f"no image files in {shorten(root)}; {others}")
    folders = _classes(files.images, root) if label == "folder" else None
    classes = None if folders is None else [_printable(name) for name in folders]
    keys = _keys(files.images)
    order = np.argsort(draws(check_seed(seed), 0, "", keys, purpose="pack"), kind="stable")
    tally = Tally("pack", on_error, max_bad_fraction)
    with tqdm(order.tolist(), unit=" images", desc="pack", disable=no_bar(progress)) as rows:
        images = ((keys[row], files.images[row]) for row in rows)
        written = write_shards(
            _samples(root, images, files.problems, folders, tally),
            pattern,
            classes=classes,
            max_samples=max_samples,
            max_bytes=max_bytes,
            split=split,
            overwrite=overwrite,
            progress=False,
        )
    renamed = sum(key != os.path.splitext(path)[0] for key, path in zip(keys, files.images, strict=True))
    return PackReport(
        written.shards,
        written.samples,
        written.bytes,
        classes,
        renamed,
        tally.bad,
        files.hidden,
        dict(sorted(files.other.items())),
    )


@dataclass
class _Files:
    """The files below a folder; paths are relative, with `/`.

    Attributes:
        images: files to be packed, and paths that cannot be read (a folder, a broken link), sorted.
        problems: why one of them cannot be packed, by path.
        hidden: number of hidden files.
        other: numbers of files with the extension of no image, by extension.
    """

    images: list[str] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)
    hidden: int = 0
    other: Counter[str] = field(default_factory=Counter)


def _list_files(root: str) -> _Files:
    """Every file below a folder. Links are followed, but not to a folder above."""
    files, top = _Files(), os.path.join(root, "")

    def refuse(path: str, why: str) -> None:
        files.problems[path.removeprefix(top) if path != root else "."] = why

    def refuse_unreadable(error: OSError) -> None:
        refuse(os.fspath(error.filename), f"cannot be read: {error.strerror}")

    for folder, below, names in os.walk(root, onerror=refuse_unreadable, followlinks=True):
        here = Path(os.path.realpath(folder))
        for name in list(below):
            path = os.path.join(folder, name)
            if name.startswith("."):
                # links are not followed
                files.hidden += 1 if os.path.islink(path) else sum(len(each[2]) for each in os.walk(path))
                below.remove(name)
            elif here.is_relative_to(os.path.realpath(path)):
                refuse(path, "a link back to a folder that it lies in")
                below.remove(name)
        for name in names:
            path, suffix = os.path.join(folder, name), os.path.splitext(name)[1].lower()
            try:
                if name.startswith("."):
                    files.hidden += 1
                elif not stat.S_ISREG(os.stat(path).st_mode) and suffix[1:] in IMAGE_SUFFIXES:
                    refuse(path, "no plain file")
                elif suffix[1:] in IMAGE_SUFFIXES:
                    files.images.append(path.removeprefix(top))
                else:
                    files.other[_printable(suffix) or "no extension"] += 1
            except OSError as error:  # a broken link
                refuse_unreadable(error)
    files.images = sorted([*files.images, *files.problems], key=os.fsencode)
    return files


def _classes(paths: Sequence[str], root: str) -> list[str] | None:
    """Names of the folders that images lie in, sorted; None where all lie in `root` itself.

    Raises:
        ValueError: the folders are called like the splits of a data set.
    """
    names = sorted({path.split("/", 1)[0] for path in paths if "/" in path})
    if not names:
        logger.warning("no image lies in a folder of %s: packed without labels", shorten(root))
        return None
    if {name.lower() for name in names} <= _SPLITS:
        raise ValueError(
            f"the folders in {shorten(root)} are splits, not classes: {shorten(names)}; pack each by itself, such as "
            f"{shorten(os.path.join(root, names[0]))}, or give label=None"
        )
    with os.scandir(root) as entries:
        folders = {entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")}
    if empty := sorted(folders - set(names)):
        logger.warning("folders without images, which are no classes: %s", shorten(empty, 200))
    return names


def _keys(paths: Sequence[str]) -> list[str]:
    """A key for each path: unique, and unchanged when read back."""
    used: set[str] = set()
    last: Counter[str] = Counter()
    keys = []
    for path in paths:
        folder, slash, name = os.path.splitext(path)[0].rpartition("/")
        key = _printable(folder + slash + name.replace(".", "_"))
        if key.startswith("__"):  # `__x__` is metadata to WebDataset, no sample
            key = "_" + key.lstrip("_")
        unique = key
        while unique in used:
            last[key] += 1
            unique = f"{key}-{last[key] + 1}"
        used.add(unique)
        keys.append(unique)
    return keys


def _printable(text: str) -> str:
    """The text with ``_`` for control characters and for bytes that are not UTF-8."""
    return "".join(letter if letter.isprintable() else "_" for letter in text)


def _samples(
    root: str,
    files: Iterator[tuple[str, str]],
    problems: dict[str, str],
    folders: list[str] | None,
    tally: Tally,
) -> Iterator[Sample]:
    """One sample a file; bad ones go to `tally`."""
    number = {name: b"%d" % i for i, name in enumerate(folders or ())}
    for key, path in files:
        sample: Sample = {"__key__": key, "__url__": path}
        try:
            if path in problems:
                raise SampleError(problems[path])
            if folders is not None and "/" not in path:
                raise SampleError(
                    "lies beside the folders that are classes, so it has no label; move it into one, or give label=None"
                )
            data = _read_image(os.path.join(root, path))
            sample[_field_of(data)] = data
        except SampleError as error:
            tally.failed(SampleError(f"file {shorten(os.path.join(root, path), 300)}: {error}"))
            continue
        if folders is not None:
            sample["cls"] = number[path.split("/", 1)[0]]
        tally.good(1, 1)
        yield sample
    tally.close()
    if not tally.kept:
        raise SampleError(f"all {tally.bad} images are bad; see the log")


def _read_image(path: str) -> bytes:
    """The bytes of a file.

    Raises:
        SampleError: it cannot be read, or is larger than a member of a shard may be.
    """
    try:
        with open(path, "rb") as file:
            n_bytes = os.fstat(file.fileno()).st_size
            if n_bytes > DEFAULT_LIMITS.member_bytes:
                raise SampleError(f"{n_bytes:,} bytes, at most {DEFAULT_LIMITS.member_bytes:,} are packed")
            return file.read()
    except OSError as error:
        raise SampleError(f"cannot be read: {error.strerror}") from error


def _field_of(data: bytes) -> str:
    """The field for an image by its first bytes; `SampleError` if it is no image."""
    name = image_format(data)
    return _FIELDS.get(name, name.lower())
