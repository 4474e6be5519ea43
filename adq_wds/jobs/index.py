"""Writes where every sample of some shards lies to one index file, the job behind `adq index`; see FORMAT.md."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from adq_wds.checks import no_bar
from adq_wds.engines.choose import EngineName, choose_engine
from adq_wds.engines.engine import Engine, Resources, Result, Task
from adq_wds.engines.shared import lock_for
from adq_wds.errors import AdqError, ShardError, shorten
from adq_wds.files import canonical_json, sha256_text
from adq_wds.planning.class_tasks import Workplace
from adq_wds.remote.backend import Stamp
from adq_wds.remote.outputs import local_folder, make_folder
from adq_wds.remote.url_path import AnyPath, as_path
from adq_wds.shards.names import expand_urls, plain_shard_names
from adq_wds.tables.beside import IndexesBeside
from adq_wds.tables.features import file_name
from adq_wds.tables.index import IndexedShard, read_index, save_index
from adq_wds.tables.info import read_info
from adq_wds.tables.spans import Spans, no_samples, scan_spans, source_stamp, warn_empty

Urls = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]


@dataclass(frozen=True)
class IndexReport:
    """What an index holds now.

    Attributes:
        path: its file.
        shards: shards in it.
        samples: samples in them.
        bytes: bytes of the shards' files.
        scanned: shards that were read just now.
        taken: shards whose samples were taken from another library's index beside them; the others had not changed
            since an earlier run.
    """

    path: str
    shards: int
    samples: int
    bytes: int
    scanned: int
    taken: int = 0

    def __str__(self) -> str:
        taken = f", {self.taken:,} taken from indexes beside them" if self.taken else ""
        unchanged = self.shards - self.scanned - self.taken
        return (
            f"{self.samples:,} samples of {self.shards:,} shards in {self.path} "
            f"({self.scanned:,} shards read{taken}, {unchanged:,} unchanged)"
        )


def index_shards(
    urls: Urls,
    out: str | os.PathLike[str] = "index.parquet",
    *,
    split: str | None = None,
    checksums: bool = True,
    progress: bool | None = None,
    engine: EngineName | Engine = "threads",
    address: str | None = None,
) -> IndexReport:
    """Scan shards and write where each sample lies to one file, whole or not at all.

    Where `out` is an index already, shards of unchanged size and date are not read again.

    Args:
        urls: shards, as `expand_urls` reads them; or one description of them (``_info.json`` or a wids JSON file),
            whose counts are compared with the shards.
        out: the index's file.
        split: one split of a description; all by default.
        checksums: read every byte for checksums. Without, samples are taken from the index that Megatron-Energon or
            webshart wrote beside a shard, if it is still true of the shard, else from its headers, and payloads are never
            verified.
        progress: show a bar; only on a terminal by default.
        engine: what reads the shards: this process (threads), processes of this machine, ray, or shared, which are equal
            commands with one `out`.
        address: of the Ray cluster, ``host:port``; by default the one that Ray finds, or this machine alone.

    Raises:
        ValueError: no shards, or a split without a description.
        ShardError: no shard holds a sample, one is damaged or missing, or its number of samples is not the
            described one.
        AdqError: `out` is a file but no index, or one with checksums that would be lost, or cannot be written.
    """
    paths, counts = _expand(urls, split)
    names = plain_shard_names(paths)
    file = as_path(out)
    runner = choose_engine(engine, address=address, folder=file.parent if engine == "shared" else None)
    place = Workplace(runner, local_folder(file.parent))
    if place.is_shared and not place.is_durable:
        raise ValueError(f"{shorten(str(out))}: engine='shared' writes an index to a folder, not to a URL")
    folder = make_folder(file.parent)
    path_of = dict(sorted(zip(names, paths, strict=True)))
    sources = {name: source_stamp(path) for name, path in path_of.items()}
    settings = {"out": file.name, "checksums": checksums, "shards": sources}
    taken = 0

    def make() -> dict[str, IndexedShard]:
        nonlocal taken
        key = sha256_text(canonical_json(settings))[:16]
        with place.scratch("index", key) if place.is_shared else nullcontext() as scratch:
            work = _Scan(checksums, scratch)
            shards, taken = _all_shards(path_of, sources, earlier, work, runner, progress)
        _compare_counts(dict(zip(names, counts, strict=True)), shards)
        return shards

    def save(shards: dict[str, IndexedShard]) -> None:
        spans = [(name, shard.spans) for name, shard in shards.items()]
        save_index(file, spans, sources=sources, checksums=checksums)

    with lock_for(runner, folder, "index", settings):
        earlier = _load_earlier(file, checksums)
        shards = place.finish(make, save) or (earlier := _load_earlier(file, checksums))
    return IndexReport(
        path=str(file),
        shards=len(shards),
        samples=sum(len(shard.spans) for shard in shards.values()),
        bytes=sum(source["bytes"] for source in sources.values()),
        scanned=sum(shard is not earlier.get(name) for name, shard in shards.items()) - taken,
        taken=taken,
    )


def _expand(urls: Urls, split: str | None) -> tuple[list[str], list[int | None]]:
    """The paths of the shards, and the number of samples in each where a description lists it."""
    urls = [urls] if isinstance(urls, (str, os.PathLike)) else list(urls)
    if len(urls) == 1 and os.fspath(urls[0]).endswith(".json"):
        listed = read_info(urls[0], split=split)
        if not listed:
            raise ValueError(f"{os.fspath(urls[0])} lists no shards")
        return [path for path, _ in listed], [n for _, n in listed]
    if split is not None:
        raise ValueError(
            f"split {split!r} needs a description, such as FOLDER/_info.json, in place of the shards"
        )
    paths = expand_urls(urls)
    return paths, [None] * len(paths)


def _all_shards(
    path_of: dict[str, str],
    sources: dict[str, Stamp],
    earlier: dict[str, IndexedShard],
    work: _Scan,
    engine: Engine,
    progress: bool | None,
) -> tuple[dict[str, IndexedShard], int]:
    """The samples of each shard, by name, and how many shards had them in another library's index.

    Shards of unchanged size and date are not read again.
    """
    shards = {name: old for name, old in earlier.items() if name in sources and old.source == sources[name]}
    tasks = [Task(name, path) for name, path in path_of.items() if name not in shards]
    taken = 0
    total = sum(source["bytes"] for source in sources.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="index", disable=no_bar(progress)) as bar:
        for name, shard in shards.items():
            if not len(shard.spans):
                warn_empty(name)
            bar.update(sources[name]["bytes"])
        for task, result in engine.run(tasks, work, Resources()):
            shards[task.name] = IndexedShard(result["spans"], sources[task.name], work.checksums)
            taken += result["taken"]
            bar.update(sources[task.name]["bytes"])
    if not any(len(shard.spans) for shard in shards.values()):
        raise no_samples(len(shards))
    return {name: shards[name] for name in path_of}, taken


@dataclass(frozen=True)
class _Scan:
    """Tasks of a shard's path, to the spans of its samples.

    Attributes:
        checksums: whether every byte is read.
        folder: of an index of each shard that was read, for other commands; None where there are none.
    """

    checksums: bool
    folder: Path | None

    def __call__(self, tasks: Iterator[Task]) -> Iterator[tuple[Task, Result]]:
        with IndexesBeside() as beside:
            for task in tasks:
                listed = None if self.checksums else beside.spans(task.what, shard=task.name)
                spans = self._scanned(task) if listed is None else Spans.without_checksums(listed)
                yield task, {"spans": spans, "taken": listed is not None}

    def _scanned(self, task: Task) -> Spans:
        file = None if self.folder is None else self.folder / file_name(task.name)
        if file is not None and file.exists():
            return read_index(file)[task.name].spans
        if self.folder is not None and not self.folder.exists():
            raise AdqError(f"{self.folder}: another command has ended this job")
        spans = scan_spans(task.what, shard=task.name, checksums=self.checksums)
        if file is not None:
            save_index(file, [(task.name, spans)], checksums=self.checksums)
        return spans


def _load_earlier(file: AnyPath, checksums: bool) -> dict[str, IndexedShard]:
    """The shards that are known from an earlier run; refuses to overwrite any other file, or checksums."""
    try:
        earlier = read_index(file) if file.exists() else {}
        if not checksums and any(shard.checked for shard in earlier.values()):
            raise ShardError(f"{file}: it has checksums, which the new one would not have")
        return {
            name: shard
            for name, shard in earlier.items()
            if shard.spans.members is not None and shard.checked == checksums  # members: since version 2
        }
    except ShardError as error:
        remedy = "nothing is written over it: remove it, or give the index another name"
        raise AdqError(f"{error}; {remedy}") from error


def _compare_counts(counts: dict[str, int | None], shards: dict[str, IndexedShard]) -> None:
    differ = [name for name, n in counts.items() if n not in (None, len(shards[name].spans))]
    if differ:
        n_samples, n_listed = len(shards[differ[0]].spans), counts[differ[0]]
        more = f" ({len(differ)} shards differ)" if len(differ) > 1 else ""
        raise ShardError(
            f"shard {differ[0]}: {n_samples:,} samples, its description says {n_listed:,}{more}: fetch the shard again, "
            "or index the shards without their description"
        )
