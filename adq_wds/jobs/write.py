"""How does a stream become new, smaller shards?"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from adq_wds.errors import AdqError, shorten
from adq_wds.files import canonical_json, lock, make_folder, write_text
from adq_wds.io.source import ShardDataset
from adq_wds.io.writer import ShardPattern, WrittenShard, write_tars
from adq_wds.jobs.write_smaller import Counted, Parts, new_images, written_anew
from adq_wds.sample import IMAGE_FIELDS, Importance, Sample
from adq_wds.shards import expand_urls
from adq_wds.tables.plan import Plan, as_plan
from adq_wds.tables.spans import save_index, scan_spans, source_stamp

MAX_SAMPLES = 10_000
MAX_BYTES = 1 << 30


@dataclass(frozen=True)
class WriteReport:
    """What was written.

    Attributes:
        shards: new shards.
        samples: samples in them.
        payload_bytes: bytes of their members.
        bytes: bytes on the disk, tar headers and padding included.
        source_bytes: bytes of the shards they came from; None for a stream.
        parts: where images were written anew: bytes of images, other fields and container, each ``before`` (the same
            samples in their source), ``whole`` (the images at the new size and quality, with all their patches) and
            ``after``.
    """

    shards: int
    samples: int
    payload_bytes: int
    bytes: int
    source_bytes: int | None = None
    parts: Parts | None = None


def write_shards(
    samples: Iterable[Sample],
    pattern: str | os.PathLike[str],
    *,
    plan: Plan | str | os.PathLike[str] | None = None,
    max_samples: int = MAX_SAMPLES,
    max_bytes: int = MAX_BYTES,
    split: str = "train",
    overwrite: bool = False,
    progress: bool | None = None,
) -> WriteReport:
    """Write a stream of samples to new tar shards, bytes untouched.

    Beside the shards come ``_info.json`` (as timm reads it), ``index.parquet`` (where every sample lies, with
    checksums read back from the new files), and ``plan.parquet`` where a plan is given. Equal input gives equal
    bytes. A shard takes its final name when it is complete, and ``_info.json`` is written last: while it is
    missing, the set is not complete.

    Args:
        samples: WebDataset-like dicts of bytes with `__key__`.
        pattern: such as ``small/%06d.tar``; its folder is made if missing.
        plan: the plan that chose the samples; copied beside them.
        max_samples: samples in a shard, at most.
        max_bytes: payload bytes in a shard, at most (a larger sample has a shard of its own).
        split: name of the split in ``_info.json``.
        overwrite: replace the shards of another run in the folder.
        progress: show a bar; only on a terminal by default.

    Raises:
        AdqError: the folder holds another run's shards, or cannot be written.
        SampleError: a sample without key, a field that is not bytes, a name that would be read back as another.
    """
    shards = ShardPattern(os.fspath(pattern))
    for name, value in (("max_samples", max_samples), ("max_bytes", max_bytes)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
    chosen = None if plan is None else as_plan(plan)
    folder = make_folder(shards.folder)
    with lock(folder):
        _clear(shards, overwrite, keep_plan=chosen is not None)
        total = None if chosen is None else chosen.n_kept
        quiet = None if progress is None else not progress
        with tqdm(samples, total=total, unit=" samples", desc="write", disable=quiet) as stream:
            written = list(write_tars(stream, shards, max_samples=max_samples, max_bytes=max_bytes))
        _describe(folder, written, chosen, split)
    return WriteReport(
        len(written),
        sum(shard.n for shard in written),
        sum(shard.payload_bytes for shard in written),
        sum(shard.n_bytes for shard in written),
    )


def write_kept(
    urls: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    plan: Plan | str | os.PathLike[str] | None,
    pattern: str | os.PathLike[str],
    *,
    patch_keep: float | None = None,
    importance: str | Importance = "gradcam++",
    size: int | None = None,
    quality: int | None = None,
    image: str = IMAGE_FIELDS,
    seed: int = 0,
    root: str | None = None,
    cache: str | os.PathLike[str] | None = None,
    max_samples: int = MAX_SAMPLES,
    max_bytes: int = MAX_BYTES,
    split: str = "train",
    overwrite: bool = False,
    progress: bool | None = None,
) -> WriteReport:
    """Write the samples of some shards that a plan keeps (all without a plan); see `write_shards`.

    Only kept samples are read, and each is compared with the plan's key and checksum. `root` is the folder that the
    plan's shard names are relative to, where a path fits several of them; `cache` is `ShardDataset`'s.

    Bytes stay untouched unless one of `patch_keep`, `size` and `quality` is given; then images are written anew, as
    JPEGs with 4:2:0 and optimised tables, and the report says what each part took and takes.

    Args:
        urls, plan, pattern: sources, what is kept of them, and where it goes.
        patch_keep: ratio of each image's patches of 16 × 16 pixels that are kept; they go to ``patches.jpg`` in the
            image's place (see `patch_jpeg`).
        importance: which patches: a name or an object, as `adq_wds.importance` takes it.
        size: the images' new side: the largest square in the middle, drawn to it. With `patch_keep` 224 unless said.
        quality: of the JPEGs, 1 … 100; 90 unless said.
        image: field with the image.
        seed: of a random importance.

    Raises:
        ValueError: the pattern would replace one of `urls`; an argument is out of range; without patches images would
            take more bytes than with them.
        SampleError: an image that is to be written anew is bad, or lacks patches already.
        PlanError: a shard of the plan is not among `urls`, or the other way round.
        ShardError: a shard changed since it was planned.
    """
    new = new_images(
        patch_keep=patch_keep, importance=importance, size=size, quality=quality, image=image, seed=seed
    )
    paths = expand_urls(urls)
    refuse_sources(paths, ShardPattern(os.fspath(pattern)))
    chosen = Plan.from_keys(paths, None) if plan is None else as_plan(plan)
    stream: Iterable[Sample] = ShardDataset(paths, plan=chosen, root=root, rank=0, world=1, cache=cache)
    counted = Counted()
    report = write_shards(
        stream if new is None else written_anew(stream, new, counted),
        pattern,
        plan=None if plan is None else chosen,
        max_samples=max_samples,
        max_bytes=max_bytes,
        split=split,
        overwrite=overwrite,
        progress=progress,
    )
    if report.samples != chosen.n_kept:
        raise AdqError(
            f"{shorten(os.fspath(pattern))}: {report.samples} samples written, the plan keeps {chosen.n_kept}"
        )
    n_bytes = sum(source_stamp(path)["bytes"] for path in paths)
    parts = None
    if new is not None:
        cells = sum(int(shard.spans.n_bytes[shard.kept].sum()) for shard in chosen)
        parts = counted.parts(source_cells=cells, new_bytes=report.bytes)
    return replace(report, source_bytes=n_bytes, parts=parts)


def refuse_sources(paths: list[str], shards: ShardPattern) -> None:
    """Raise `ValueError` when a source could be written over: overwriting begins by removing."""
    targets = {os.path.realpath(path) for path in shards.existing()}
    for path in paths:
        if os.path.realpath(path) in targets:
            raise ValueError(
                f"shard {shorten(path)} would be written over by {shorten(str(shards.path(0)))}; "
                "write to another folder"
            )


def _clear(shards: ShardPattern, overwrite: bool, *, keep_plan: bool) -> None:
    """Refuse, or remove, what another run left; `keep_plan`: its plan will be replaced, and may be in use."""
    old = [path for path in (shards.folder / "_info.json", *shards.existing()) if path.exists()]
    if old and not overwrite:
        raise AdqError(
            f"{shards.folder} holds {old[0].name} of another run; give another folder, or overwrite"
        )
    for path in old:  # _info.json goes first: from here on the set is not complete
        path.unlink()
    if old and not keep_plan:
        (shards.folder / "plan.parquet").unlink(missing_ok=True)


def _describe(folder: Path, written: list[WrittenShard], plan: Plan | None, split: str) -> None:
    """Write the index, read back from the new files; the plan's copy; and last `_info.json`."""
    save_index(
        folder / "index.parquet",
        [(shard.path.name, scan_spans(shard.path, shard=shard.path.name)) for shard in written],
    )
    if plan is not None:
        plan.save(folder / "plan.parquet")
    info = {
        "name": split,
        "num_samples": sum(shard.n for shard in written),
        "filenames": [shard.path.name for shard in written],
        "shard_lengths": [shard.n for shard in written],
    }
    names = plan.header.get("names") if plan is not None else None
    text = canonical_json({"splits": {split: info}, **({"classes": names} if names else {})})
    write_text(folder / "_info.json", text + "\n")
