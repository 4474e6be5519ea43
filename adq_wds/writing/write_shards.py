"""Writes a stream of samples, or what a plan keeps of some shards, to new shards."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from tqdm import tqdm

from adq_wds.checks import Count, Ratio, no_bar, positive
from adq_wds.errors import AdqError, SampleError, shorten
from adq_wds.files import canonical_json
from adq_wds.pipes.base import MAX_BAD_FRACTION, OnError, Tally, check_on_error
from adq_wds.protocols import Importance
from adq_wds.remote.outputs import lock, make_folder, write_text
from adq_wds.remote.url_path import AnyPath
from adq_wds.samples.fields import IMAGE_FIELDS, Sample
from adq_wds.shards.names import expand_urls
from adq_wds.stream.dataset import ShardDataset
from adq_wds.tables.index import save_index
from adq_wds.tables.plan import Plan, as_plan
from adq_wds.tables.spans import scan_spans, source_stamp
from adq_wds.writing.smaller import CELL_FIELD, Counted, Parts, new_images, totals, written_anew
from adq_wds.writing.tars import ShardPattern, WrittenShard, write_tars

MAX_SAMPLES = 10_000
MAX_BYTES = 1 << 30


@dataclass(frozen=True)
class WriteReport:
    """Counts of the shards written.

    Attributes:
        shards: new shards.
        samples: samples in them.
        payload_bytes: bytes of their members.
        bytes: bytes on the disk, tar headers and padding included.
        source_bytes: bytes of the shards they came from, whole files; None for a stream.
        parts: where images were written anew: bytes of images, other fields and container (tar headers and padding,
            without the blocks that end a tar), each ``before`` (these samples alone, in their source), ``whole`` (the
            same images at the new size and quality, with all their patches) and ``after``.
        bad: samples left out because their image could not be written anew.
    """

    shards: int
    samples: int
    payload_bytes: int
    bytes: int
    source_bytes: int | None = None
    parts: Parts | None = None
    bad: int = 0

    @property
    def read(self) -> int:
        """Samples read: those written and the bad ones."""
        return self.samples + self.bad

    @property
    def totals(self) -> dict[str, float] | None:
        """Sums of `parts`, and the ratios of ``after`` to the two others: ``of_whole`` and ``of_before``."""
        return None if self.parts is None else totals(self.parts)

    def __str__(self) -> str:
        bad = f" of {self.read:,} read, {self.bad:,} bad ones left out (see the log)," if self.bad else ""
        text = (
            f"{self.samples:,} samples{bad} in {self.shards} shards: {self.bytes:,} bytes on disk "
            f"({self.payload_bytes:,} of them payload)"
        )
        if self.source_bytes is not None:
            share = 100 * self.bytes / max(1, self.source_bytes)
            text += f", {share:.1f} % of the source files' {self.source_bytes:,}"
        if self.parts is None:
            return text
        sums, columns = totals(self.parts), ("before", "whole", "after")
        rows = [[name, *(f"{part[column]:,}" for column in columns)] for name, part in self.parts.items()]
        rows = [["bytes", *columns], *rows, ["all", *(f"{sums[column]:,}" for column in columns)]]
        lines = ["  ".join([f"{row[0]:<12}", *(f"{cell:>15}" for cell in row[1:])]) for row in rows]
        lines += [
            f"after: {sums['of_whole']:.3f} of whole, {sums['of_before']:.3f} of before",
            f"before: these {self.samples:,} samples alone, in their source; whole: at the new size and quality, with all "
            "their patches",
            "container: tar headers and padding, without the blocks that end a tar; on disk, with them: "
            f"{self.bytes:,}",
        ]
        return "\n".join([text, "", *lines])


def write_shards(
    samples: Iterable[Sample],
    pattern: str | os.PathLike[str],
    *,
    plan: Plan | str | os.PathLike[str] | None = None,
    classes: Sequence[str] | None = None,
    max_samples: Count = MAX_SAMPLES,
    max_bytes: Count = MAX_BYTES,
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
        classes: names of the classes in the order of their numbers, for ``_info.json``; those of the plan unless given.
        max_samples: samples in a shard, at most.
        max_bytes: payload bytes in a shard, at most (a larger sample has a shard of its own).
        split: name of the split in ``_info.json``.
        overwrite: replace the shards of an earlier run in the folder.
        progress: show a bar; only on a terminal by default.

    Raises:
        AdqError: the folder holds an earlier run's shards, or cannot be written.
        SampleError: a sample without key, a field that is not bytes, a name that would be read back as another.
    """
    shards = ShardPattern(os.fspath(pattern))
    max_samples, max_bytes = positive("max_samples", max_samples), positive("max_bytes", max_bytes)
    chosen = None if plan is None else as_plan(plan)
    folder = make_folder(shards.folder)
    with lock(folder):
        _clear(shards, overwrite, keep_plan=chosen is not None)
        total = None if chosen is None else chosen.n_kept
        with tqdm(samples, total=total, unit=" samples", desc="write", disable=no_bar(progress)) as stream:
            written = list(write_tars(stream, shards, max_samples=max_samples, max_bytes=max_bytes))
        describe_shards(folder, written, chosen, split, classes)
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
    patch_keep: Ratio | None = None,
    importance: str | Importance = "gradcam++",
    size: int | None = None,
    quality: int | None = None,
    image: str = IMAGE_FIELDS,
    seed: int = 0,
    on_error: OnError = "raise",
    max_bad_fraction: Ratio = MAX_BAD_FRACTION,
    root: str | None = None,
    cache: str | os.PathLike[str] | None = None,
    max_samples: Count = MAX_SAMPLES,
    max_bytes: Count = MAX_BYTES,
    split: str = "train",
    overwrite: bool = False,
    progress: bool | None = None,
) -> WriteReport:
    """Write the samples of some shards that a plan keeps (all without a plan); see `write_shards`.

    Only kept samples are read, and each is compared with the plan's key and checksum.

    Bytes stay untouched unless one of `patch_keep`, `size` and `quality` is given; then images are written anew, as
    JPEGs with 4:2:0 and optimised tables, and the report has the bytes of each part before and after.

    Args:
        urls, plan, pattern: sources, the plan of what is kept, and the new shards.
        patch_keep: ratio of each image's patches of 16 × 16 pixels that are kept. They go to ``patches.jpg`` in
            the image's place.
        importance: which patches are kept: gradcam++, gradcam, attention, texture, random, or another that
            `adq_wds.importance` takes. Both CAMs use ``builtin`` unless another encoder is named.
        size: the images' new side: the largest square in the middle, resized to it; 224 by default with `patch_keep`.
        quality: quality of the new JPEGs, 1 to 100; 90 by default.
        image: field with the image.
        seed: seed of a random importance.
        on_error: what to do with a sample whose image cannot be written anew: "raise" or "skip". Or a function of
            the error that says whether to skip. Skipped ones are logged and counted; they stay in the plan's copy.
        max_bad_fraction: share of bad samples, of all, above which skipping is an error too, once 100 were read, and
            at the end; so are 100 bad ones in a row, and nothing but bad ones.
        root: folder that the plan's shard names are relative to, where a path fits several of them.
        cache: folder where bytes of remote shards stay for another try; see `ShardDataset`.
        max_samples, max_bytes, split, overwrite, progress: as in `write_shards`.

    Raises:
        ValueError: the pattern would replace one of `urls`; an argument is out of range or has no effect; images
            would take more bytes without patches than with them, or than they took.
        SampleError: an image that is to be written anew is bad, or lacks patches already; or too many are.
        PlanError: a shard of the plan is not among `urls`, or the other way round.
        ShardError: a shard changed since it was planned.
    """
    new = new_images(
        patch_keep=patch_keep, importance=importance, size=size, quality=quality, image=image, seed=seed
    )
    tally = _tally(on_error, max_bad_fraction, idle=new is None)
    paths = expand_urls(urls)
    refuse_sources(paths, ShardPattern(os.fspath(pattern)))
    chosen = Plan.from_keys(paths, None) if plan is None else as_plan(plan)
    stream: Iterable[Sample] = ShardDataset(paths, plan=chosen, root=root, rank=0, world=1, cache=cache)
    counted = Counted()
    report = write_shards(
        stream if new is None else written_anew(_with_cells(stream, chosen), new, counted, tally),
        pattern,
        plan=None if plan is None else chosen,
        max_samples=max_samples,
        max_bytes=max_bytes,
        split=split,
        overwrite=overwrite,
        progress=progress,
    )
    report = replace(
        report,
        source_bytes=sum(source_stamp(path)["bytes"] for path in paths),
        parts=None if new is None else counted.parts,
        bad=tally.bad,
    )
    if report.bad and not report.samples:
        raise SampleError(f"all {report.bad} samples are bad; see the log")
    if report.read != chosen.n_kept:
        raise AdqError(
            f"{shorten(os.fspath(pattern))}: {report.samples} samples written and {report.bad} bad, the plan keeps "
            f"{chosen.n_kept}"
        )
    return report


def _tally(on_error: OnError, max_bad_fraction: float, *, idle: bool) -> Tally:
    """A tally of bad samples; `idle`: no image is written anew, so the options have no effect.

    Raises:
        ValueError: an argument is out of range, or has no effect.
    """
    check_on_error(on_error, max_bad_fraction)
    asked = {"on_error": (on_error, "raise"), "max_bad_fraction": (max_bad_fraction, MAX_BAD_FRACTION)}
    for name, (value, default) in asked.items():
        if idle and value != default:
            raise ValueError(
                f"{name}={value!r} has no effect: no image is written anew; give patch_keep=, size= or quality= too"
            )
    return Tally("write", on_error, max_bad_fraction)


def _with_cells(stream: Iterable[Sample], plan: Plan) -> Iterator[Sample]:
    """The plan's samples in its order, each with its bytes in the source."""
    cells = (int(n) for shard in map(plan.shard, plan.shards) for n in shard.spans.n_bytes[shard.kept])
    for sample, n_bytes in zip(stream, cells, strict=True):
        yield {**sample, CELL_FIELD: n_bytes}


def refuse_sources(paths: list[str], shards: ShardPattern) -> None:
    """Raise `ValueError` when a source could be overwritten: `overwrite` begins by removing files."""
    targets = {os.path.realpath(path) for path in shards.existing()}
    for path in paths:
        if os.path.realpath(path) in targets:
            raise ValueError(
                f"shard {shorten(path)} would be written over by {shorten(str(shards.path(0)))}; "
                "write to another folder"
            )


def _clear(shards: ShardPattern, overwrite: bool, *, keep_plan: bool) -> None:
    """Refuse, or remove, the files of an earlier run; `keep_plan`: its plan will be replaced, and may be in use."""
    old = [path for path in (shards.folder / "_info.json", *shards.existing()) if path.exists()]
    if old and not overwrite:
        raise AdqError(
            f"{shorten(str(shards.folder))} holds {old[0].name} of an earlier run; give another folder, or overwrite=True"
        )
    for path in old:  # _info.json goes first: from here on the set is not complete
        path.unlink()
    if old and not keep_plan:
        (shards.folder / "plan.parquet").unlink(missing_ok=True)


def describe_shards(
    folder: AnyPath, written: list[WrittenShard], plan: Plan | None, split: str, classes: Sequence[str] | None
) -> None:
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
    names = plan.header.get("names") if classes is None and plan is not None else classes
    text = canonical_json({"splits": {split: info}, **({"classes": names} if names else {})})
    write_text(folder / "_info.json", text + "\n")
