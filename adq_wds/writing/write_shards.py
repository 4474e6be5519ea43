"""Writes a stream of samples, or what a plan keeps of some shards, to new shards."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any

from tqdm import tqdm

from adq_wds.checks import Count, Ratio, no_bar, positive
from adq_wds.engines.alone import alone_at_url
from adq_wds.engines.choose import EngineName, choose_engine
from adq_wds.engines.engine import Engine, ThisProcess
from adq_wds.engines.shared import lock_for, once
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
from adq_wds.tables.spans import Spans, scan_spans, source_stamp
from adq_wds.tables.write_table import remove_table
from adq_wds.writing.anew_by_engine import check_growth, make_anew
from adq_wds.writing.by_engine import write_runs
from adq_wds.writing.kept import Kept
from adq_wds.writing.report import WriteReport
from adq_wds.writing.smaller import Counted, WriteAnew, new_images, written_anew
from adq_wds.writing.tars import ShardPattern, WrittenShard, write_tars
from adq_wds.writing.unfinished import JOB, Unfinished, check_engine, remove

MAX_SAMPLES = 10_000
MAX_BYTES = 1 << 30


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
    with lock(folder), alone_at_url(folder):
        _clear(shards, overwrite, keep_plan=chosen is not None)
        total = None if chosen is None else chosen.n_kept
        with tqdm(samples, total=total, unit=" samples", desc="write", disable=no_bar(progress)) as stream:
            written = list(write_tars(stream, shards, max_samples=max_samples, max_bytes=max_bytes))
        describe_shards(folder, written, chosen, split, classes)
    return _report(written)


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
    engine: EngineName | Engine = "threads",
    address: str | None = None,
    progress: bool | None = None,
) -> WriteReport:
    """Write the samples of some shards that a plan keeps (all without a plan); see `write_shards`.

    Only kept samples are read, and each is compared with the plan's key and checksum.

    Bytes stay untouched unless one of `patch_keep`, `size` and `quality` is given; then images are written anew, as
    JPEGs with 4:2:0 and optimised tables, and the report has the bytes of each part before and after.

    With an engine other than "threads" each new shard is a task, and the files are the same. A job that is killed goes on
    where it stopped when it is started again with equal arguments, and once finished it has nothing left to do.

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
        max_samples, max_bytes, split, overwrite, progress: as in `write_shards`; `overwrite` is refused with "shared".
        engine: what runs the tasks: threads, processes, ray, shared.
        address: of the Ray cluster.

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
    shards = ShardPattern(os.fspath(pattern))
    refuse_sources(paths, shards)
    runner = choose_engine(engine, address=address, folder=shards.folder)
    check_engine(runner, shards.folder, overwrite=overwrite)
    chosen = Plan.from_keys(paths, None) if plan is None else as_plan(plan)
    kept, copied = Kept(tuple(paths), chosen, root, cache), None if plan is None else chosen
    counted = None if new is None else Counted()
    if not isinstance(runner, ThisProcess):
        settings = {
            "plan": chosen.hash,
            "copied": plan is not None,
            "pattern": shards.path(0).name,
            "max_samples": positive("max_samples", max_samples),
            "max_bytes": positive("max_bytes", max_bytes),
            "split": split,
            "images": None if new is None else {**new.settings, "skip": on_error != "raise"},
        }
        return _write_by_engine(kept, shards, settings, new, tally, counted, runner, overwrite, progress)
    stream: Iterable[Sample] = ShardDataset(paths, plan=chosen, root=root, rank=0, world=1, cache=cache)
    if new is not None and counted is not None:
        stream = written_anew(kept.with_cells(stream, 0, chosen.n_kept), new, counted, tally)
    report = write_shards(
        stream,
        pattern,
        plan=copied,
        max_samples=max_samples,
        max_bytes=max_bytes,
        split=split,
        overwrite=overwrite,
        progress=progress,
    )
    return _completed(report, kept, shards, tally, counted)


def _write_by_engine(
    kept: Kept,
    shards: ShardPattern,
    settings: dict[str, Any],
    new: WriteAnew | None,
    tally: Tally,
    counted: Counted | None,
    engine: Engine,
    overwrite: bool,
    progress: bool | None,
) -> WriteReport:
    """`write_kept` by the tasks of an engine; `settings` are all that the bytes depend on."""
    kept.check()
    if new is not None:
        check_growth(kept, new, strict=tally.on_error == "raise")
    folder = make_folder(shards.folder)
    unfinished = Unfinished(folder.absolute(), settings)
    with lock_for(engine, folder, "write", settings):
        done = unfinished.report
        if done is not None and not overwrite and unfinished.is_whole:
            unfinished.clear()  # which a kill may have cut short
            return WriteReport(**done)

        def begin() -> None:
            again = unfinished.report is not None and (overwrite or not unfinished.is_whole)
            if (again and overwrite) or not unfinished.is_here:
                _clear(shards, overwrite, keep_plan=settings["copied"])
            unfinished.begin(again=again)

        once(engine, "begin", begin)
        try:
            kept = kept.on_disk(unfinished.folder / "plan.parquet")
            made, bounds = kept, {name: settings[name] for name in ("max_samples", "max_bytes")}
            if new is not None and counted is not None:
                made = make_anew(
                    kept, new, unfinished, engine, tally=tally, counted=counted, progress=progress
                )
            written, spans = write_runs(made, shards, unfinished, engine, **bounds, progress=progress)
            plan = kept.plan if settings["copied"] else None
            describe_shards(folder, written, plan, settings["split"], None, spans=spans)
            report = _completed(_report(written), kept, shards, tally, counted)
        except (AdqError, OSError):
            if (done := unfinished.report) is None:
                raise
            return WriteReport(**done)  # another process was faster, and has removed what was unfinished
        unfinished.finish(asdict(report))
    return report


def _report(written: list[WrittenShard]) -> WriteReport:
    return WriteReport(
        len(written),
        sum(shard.n for shard in written),
        sum(shard.payload_bytes for shard in written),
        sum(shard.n_bytes for shard in written),
    )


def _completed(
    report: WriteReport, kept: Kept, shards: ShardPattern, tally: Tally, counted: Counted | None
) -> WriteReport:
    """The report with what `write_kept` knows besides.

    Raises:
        SampleError: all samples are bad.
        AdqError: samples are missing.
    """
    report = replace(
        report,
        source_bytes=sum(source_stamp(path)["bytes"] for path in kept.paths),
        parts=None if counted is None else counted.parts,
        bad=tally.bad,
    )
    if report.bad and not report.samples:
        raise SampleError(f"all {report.bad} samples are bad; see the log")
    if report.read != kept.plan.n_kept:
        raise AdqError(
            f"{shorten(shards.pattern)}: {report.samples} samples written and {report.bad} bad, the plan keeps "
            f"{kept.plan.n_kept}"
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
    job = shards.folder / JOB
    old = [path for path in (shards.folder / "_info.json", *shards.existing(), job) if path.exists()]
    if not old:  # in a folder that is shared another process may begin at this moment
        return
    if not overwrite:
        raise AdqError(
            f"{shorten(str(shards.folder))} holds {JOB if old[0] == job else old[0].name} of an earlier run; give another folder, empty this one, or overwrite=True"
        )
    left: list[AnyPath] = list(job.parent.iterdir()) if job.parent.exists() else []
    # _info.json goes first: from here on the set is not complete; job.json last, which tells what the others are of
    for path in [*old, *left]:
        if path != job:
            remove(path)
    if job in old:
        remove(job)
    if not keep_plan:
        remove_table(shards.folder / "plan.parquet")


def describe_shards(
    folder: AnyPath,
    written: list[WrittenShard],
    plan: Plan | None,
    split: str,
    classes: Sequence[str] | None,
    *,
    spans: list[Spans] | None = None,
) -> None:
    """Write the index, read back from the new files unless their `spans` were; the plan's copy; last `_info.json`."""
    names = [shard.path.name for shard in written]
    if spans is None:
        spans = [scan_spans(shard.path, shard=shard.path.name) for shard in written]
    save_index(folder / "index.parquet", list(zip(names, spans, strict=True)))
    if plan is not None:
        plan.save(folder / "plan.parquet")
    info = {
        "name": split,
        "num_samples": sum(shard.n for shard in written),
        "filenames": names,
        "shard_lengths": [shard.n for shard in written],
    }
    if classes is None and plan is not None:
        classes = plan.header.get("names")
    text = canonical_json({"splits": {split: info}, **({"classes": classes} if classes else {})})
    write_text(folder / "_info.json", text + "\n")
