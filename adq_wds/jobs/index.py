"""Where does every sample of some shards lie? The job behind `adq index`, and the file it makes.

An index is one Parquet file, sorted by shard name and position, a row group per shard:

| column | type | what |
|---|---|---|
| `shard` | string | the shard's name: its file's name, with as much of its folder as makes it unique |
| `index` | int32 | the sample's position in its shard, from 0 |
| `key` | string | its key |
| `byte_offset` | int64 | first byte of its first header in the tar |
| `n_bytes` | int64 | bytes of all its members, headers and padding included: one read |
| `crc32` | uint32 | over its members' payloads, in tar order |

The file's metadata hold, under ``adq_wds``, a JSON header: format ``adq_wds.index``, version, and for each shard its
name, rows, one SHA-256 per column, and `source`, the size and date of its file when it was scanned; its SHA-256 is
under ``adq_wds.sha256``. `load_index` compares all of it when it reads.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from adq_wds.errors import AdqError, ShardError
from adq_wds.files import lock, make_folder
from adq_wds.shards.names import expand_urls, plain_shard_names
from adq_wds.tables.index import IndexedShard, read_index, save_index
from adq_wds.tables.info import read_info
from adq_wds.tables.spans import no_samples, scan_spans, source_stamp, warn_empty

logger = logging.getLogger("adq_wds")

Urls = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]


@dataclass(frozen=True)
class IndexReport:
    """What an index holds now.

    Attributes:
        path: its file.
        shards: shards in it.
        samples: samples in them.
        bytes: bytes of the shards' files.
        scanned: shards that were read just now; the others had not changed since an earlier run.
    """

    path: str
    shards: int
    samples: int
    bytes: int
    scanned: int


def index_shards(
    urls: Urls,
    out: str | os.PathLike[str] = "index.parquet",
    *,
    split: str | None = None,
    progress: bool | None = None,
) -> IndexReport:
    """Scan shards and write where each sample lies to one file, whole or not at all.

    Where `out` is an index already, shards whose size and date are those of then are not read again.

    Args:
        urls: shards, as `expand_urls` reads them; or one description of them (``_info.json`` or a wids JSON file),
            whose counts are compared with what is found.
        out: the index's file.
        split: one split of a description; all by default.
        progress: show a bar; only on a terminal by default.

    Raises:
        ValueError: no shards, or a split without a description.
        ShardError: no shard holds a sample, one is damaged or missing, or holds another number of samples than its description says.
        AdqError: `out` is another file than an index, or cannot be written.
    """
    paths, counts = _listed(urls, split)
    names = plain_shard_names(paths)
    file = Path(out)
    with lock(make_folder(file.parent)):
        old = _earlier(file)
        found = _scan_all(dict(sorted(zip(names, paths, strict=True))), old, progress)
        if counts is not None:
            _compare_counts(dict(zip(names, counts, strict=True)), found)
        sources = {name: shard.source or {} for name, shard in found.items()}
        save_index(file, [(name, shard.spans) for name, shard in found.items()], sources=sources)
    return IndexReport(
        path=str(file),
        shards=len(found),
        samples=sum(len(shard.spans) for shard in found.values()),
        bytes=sum(source["bytes"] for source in sources.values()),
        scanned=sum(shard is not old.get(name) for name, shard in found.items()),
    )


def _listed(urls: Urls, split: str | None) -> tuple[list[str], list[int] | None]:
    """The paths of the shards, and their samples where a description says so."""
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
    return expand_urls(urls), None


def _scan_all(
    path_of: dict[str, str], old: dict[str, IndexedShard], progress: bool | None
) -> dict[str, IndexedShard]:
    """What each shard holds, by name; what is known already is taken over."""
    found: dict[str, IndexedShard] = {}
    sources = {name: source_stamp(path) for name, path in path_of.items()}
    total = sum(source["bytes"] for source in sources.values())
    quiet = None if progress is None else not progress
    with tqdm(total=total, unit="B", unit_scale=True, desc="index", disable=quiet) as bar:
        for name, path in path_of.items():
            if name in old and old[name].source == sources[name] and old[name].spans.members is not None:
                found[name] = old[name]
                if not len(old[name].spans):
                    warn_empty(name)
            else:
                found[name] = IndexedShard(scan_spans(path, shard=name), sources[name])
            bar.update(sources[name]["bytes"])
    if not any(len(shard.spans) for shard in found.values()):
        raise no_samples(len(found))
    return found


def _earlier(file: Path) -> dict[str, IndexedShard]:
    """What an earlier run found; nothing but an index is ever written over."""
    if not file.exists():
        return {}
    try:
        return read_index(file)
    except ShardError as error:
        raise AdqError(
            f"{error}; nothing is written over it: remove it, or give the index another name"
        ) from error


def _compare_counts(said: dict[str, int], found: dict[str, IndexedShard]) -> None:
    differ = [name for name, n in said.items() if len(found[name].spans) != n]
    if differ:
        n_found, n_said = len(found[differ[0]].spans), said[differ[0]]
        more = f" ({len(differ)} shards differ)" if len(differ) > 1 else ""
        raise ShardError(
            f"shard {differ[0]}: {n_found:,} samples, its description says {n_said:,}{more}: fetch the shard again, "
            "or index the shards without their description"
        )
