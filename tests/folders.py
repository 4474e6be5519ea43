"""What lies in folders and shards: for tests that compare what was there before and after."""

import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adq_wds.remote.open_shard import open_shard
from adq_wds.shards.samples_in_tar import Span, iter_spans, read_sample
from adq_wds.tables.index import check_source, read_index
from adq_wds.tables.spans import Spans

Members = list[tuple[str, bytes]]


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file below a folder but locks, by path."""
    return {name: (folder / name).read_bytes() for name in dates(folder)}


def dates(folder: Path) -> dict[str, tuple[int, int]]:
    """What changes when one of them is written anew: its number on the disk, and its date."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".adq.lock")
    stats = {str(path.relative_to(folder)): path.stat() for path in paths}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


def members(path: Path) -> Members:
    """Name and payload of every member of a tar, read by none of our code."""
    with tarfile.open(path) as tar:
        return [(member.name, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]


def spans_of(path: Path) -> list[Span]:
    return list(iter_spans(path.read_bytes(), shard=path.name))


def samples_in(*paths: Path) -> list[dict[str, Any]]:
    """The samples of shards, and of the shards in folders, as they lie, without their URL."""
    samples = []
    for path in (tar for each in paths for tar in (sorted(each.glob("*.tar")) if each.is_dir() else [each])):
        with open_shard(path) as buffer:
            for span in iter_spans(buffer, shard=path.name):
                sample = read_sample(buffer, span, url=path.name)
                samples.append({name: value for name, value in sample.items() if name != "__url__"})
    return samples


def flip(path: Path, at: int | float, bit: int = 0) -> None:
    """Flip a bit of a file: of the byte at a position, or at a share of its length."""
    data = bytearray(path.read_bytes())
    data[at if isinstance(at, int) else int(len(data) * at)] ^= 1 << bit
    path.write_bytes(data)


def load_index(path: Path, *, files: Mapping[str, Path] | None = None) -> dict[str, Spans]:
    """The spans in an index, by shard; with `files`, those of these shards, compared with the files as a stream does."""
    indexed = read_index(path)
    for name, file in (files or {}).items():
        check_source(file, name, indexed[name])
    return {name: indexed[name].spans for name in (indexed if files is None else files)}
