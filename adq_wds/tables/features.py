"""Opens a folder of features, one file per shard, and checks that the files agree."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, cast

import numpy as np
from numpy.typing import DTypeLike, NDArray

from adq_wds.checks import positive
from adq_wds.errors import FeaturesError, shorten
from adq_wds.files import canonical_json, sha256_text
from adq_wds.protocols import Label
from adq_wds.remote.backend import N_AT_ONCE
from adq_wds.remote.outputs import lock, make_folder
from adq_wds.remote.url_path import AnyPath, UrlPath, as_path
from adq_wds.shards.names import expand_urls, plain_shard_names
from adq_wds.tables.arrays import ENCODER, SampleId, features_of_arrays
from adq_wds.tables.features_file import DIGEST_BYTES, FeaturesFile
from adq_wds.tables.headers import EmbeddedBy, refuse_unlike
from adq_wds.tables.notebook import features_html
from adq_wds.tables.spans import SPAN_FIELDS


class FeaturesCommon(EmbeddedBy):
    """The header entries that must be equal in all files of a folder for their rows to be comparable."""

    width: int
    label: str


KEPT_OPEN = 256
"""Files that stay open; of more, each is opened when it is read, as a process may often hold 1,024 open."""
ALIKE = ("encoder", "revision", "preprocessing_hash", "width", "image", "label")


class Features:
    """A folder of features, opened: headers read and compared, rows left on the disk.

    Iterating gives the files of its shards; `len` counts usable samples, not shards.

    Args:
        folder: where `embed_shards` wrote one file per shard.
        shards: use only these; every one must be there. All by default.
        limit: use only the first samples, this many, over the shards in the order of `shards` (of file names,
            without it).

    Attributes:
        files: one `FeaturesFile` per shard, sorted by shard name: the order of samples in every plan.

    Raises:
        ValueError: `limit` is not a positive integer.
        FeaturesError: no files, a damaged one, a shard missing, or files of different encoders or settings.
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, shards: Sequence[str] | None = None, limit: int | None = None
    ) -> None:
        self.folder = as_path(folder)
        self.limit = None if limit is None else positive("limit", limit)
        if shards is None:
            paths: list[AnyPath] = sorted(self.folder.glob("*.parquet"))
        else:
            paths = [self.folder / file_name(shard) for shard in shards]
        if not paths:
            raise FeaturesError(
                f"{self.folder}: no features here (no *.parquet); make them with embed_shards"
            )
        files = _opened(paths, self.limit)
        self.files = sorted(files, key=lambda file: file.shard)
        self._compare()

    @classmethod
    def from_arrays(
        cls,
        shards: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
        keys: Sequence[SampleId],
        embeddings: Any,
        labels: Sequence[Label] | None = None,
        *,
        out: str | os.PathLike[str] = "features",
    ) -> Features:
        """Features of shards on disk from embeddings in memory, for `build_plan`; no image is looked at.

        Every shard is read once, for the offsets, checksums and digests of its samples. The features are written to
        `out`, one file per shard, as plans are made from a folder.

        Args:
            shards: tar shards, as `embed_shards` takes them; all their samples must have a row.
            keys: N sample keys, in any order; (shard, key) where a key stands in several shards.
            embeddings: (N, D) floats, finite; a NumPy array, or what `np.asarray` makes one of.
            labels: N integers >= 0, or N names; None for unlabelled data.
            out: folder for the features; made if missing.

        Returns:
            the features, opened; they have no texture, so plans score by diversity.

        Raises:
            ValueError: other shapes or types, or nothing matches `shards`.
            FeaturesError: keys and samples are not the same (with counts and an example), a row holds NaN or infinity
                (with its key), or `out` holds features made otherwise.
            ShardError, SampleError: damaged shards.
            AdqError: the folder cannot be written, or another job works in it.

        Example::

            features = adq.Features.from_arrays("text-{000..009}.tar", keys, model.encode(texts), out="features")
            plan = adq.build_plan(features, keep=0.2, out="plan.parquet")
        """
        paths = expand_urls(shards)
        names = plain_shard_names(paths)
        folder = make_folder(out)
        with lock(folder):
            for name in names:
                _refuse_foreign(folder / file_name(name))
            for made in features_of_arrays(paths, names, keys, embeddings, labels):
                made.save(folder / file_name(made.shard))
        return cls(folder, shards=names)

    def _compare(self) -> None:
        path_of: dict[str, AnyPath] = {}
        for file in self.files:
            if file.shard in path_of:
                raise FeaturesError(
                    f"{path_of[file.shard]} and {file.path} both describe shard {file.shard}; remove one"
                )
            path_of[file.shard] = file.path
        for shard in path_of:
            short = shard.partition("/")[2]
            if short in path_of:
                raise FeaturesError(
                    f"{self.folder}: {shard} and {short} may be one shard, embedded in two runs; remove the older file"
                )
        remedy = "embed all shards again with one encoder and one label (which alone reads labels alone)"
        refuse_unlike([(file.path, file.header) for file in self.files], ALIKE, remedy)

    def __iter__(self) -> Iterator[FeaturesFile]:
        """The file of each shard, in order."""
        return iter(self.files)

    def __len__(self) -> int:
        """Usable samples in all shards."""
        return sum(file.n for file in self.files)

    def __repr__(self) -> str:
        return f"<Features {len(self):,} samples in {len(self.files)} shards, {self.header['encoder']}, D = {self.width}>"

    def _repr_html_(self) -> str:
        header, names = self.header, {name for file in self.files for name in file.names or ()}
        facts: list[tuple[str, object]] = [
            ("encoder", f"{header['encoder']}, D = {self.width}"),
            ("image, label", f"{header['image']}, {header['label']}"),
            ("classes", f"{len(names):,} names" if names else "numbers, or none"),
            ("could not be used", f"{sum(len(file.bad) for file in self.files):,}"),
            (
                "columns",
                ", ".join(sorted({*self.files[0].header["columns"]} - {f.name for f in SPAN_FIELDS})),
            ),
            ("folder", self.folder),
        ]
        return features_html(f"Features of {len(self):,} samples in {len(self.files):,} shards", facts)

    @property
    def width(self) -> int:
        """D, the length of an embedding."""
        return self.files[0].width

    @property
    def header(self) -> FeaturesCommon:
        """The header entries that all files share."""
        header: Any = self.files[0].header
        common: Any = {name: header[name] for name in ALIKE}
        return cast(FeaturesCommon, common)

    def column(self, read: Callable[[FeaturesFile], NDArray[Any]], dtype: DTypeLike) -> NDArray[Any]:
        """(N,) numbers over all shards: those that `read` gives of each; one shard is read at a time."""
        values, first = np.empty(len(self), dtype), 0
        for file in self.files:
            values[first : first + file.n] = read(file)
            first += file.n
        return values

    def texture(self) -> NDArray[np.float32] | None:
        """(N,) float32 texture levels over all shards; None where no image was looked at."""
        if not all(file.has_texture for file in self.files):
            return None
        return self.column(FeaturesFile.texture, np.float32)

    def digests(self) -> NDArray[np.uint8] | None:
        """(N, 16) uint8, `content_digest` of each sample over all shards; None where a file has none."""
        if not all(file.has_digest for file in self.files):
            return None
        digest, first = np.empty((len(self), DIGEST_BYTES), dtype=np.uint8), 0
        for file in self.files:
            digest[first : first + file.n] = np.asarray(file.digest())
            first += file.n
        return digest

    def score(self, name: str) -> NDArray[np.float32]:
        """(N,) float32 numbers of a score of users, over all shards.

        Raises:
            FeaturesError: a shard lacks it, or shards have it in two revisions; damaged features.
        """
        revisions = {file.scores.get(name): file.path for file in self.files}
        if len(revisions) > 1 and None not in revisions:
            (a, b), (x, y) = list(revisions)[:2], list(revisions.values())[:2]
            raise FeaturesError(
                f"score {name!r} has revision {a!r} in {x} and {b!r} in {y}; embed them again"
            )
        return self.column(lambda file: file.score(name), np.float32)

    @property
    def n_classes(self) -> int:
        """C, the classes of the head that gave the logit gradients.

        Raises:
            FeaturesError: a shard lacks them, or they are of two kinds.
        """
        kinds = {(file.n_classes, file.header.get("logit_grad")): file.path for file in self.files}
        for (n_classes, _), path in kinds.items():
            if n_classes is None:
                raise FeaturesError(
                    f"{path}: no logit gradients here, which kernel 'gradient' needs; embed with logit_grad=True (--logit-grad)"
                )
        if len(kinds) > 1:
            (a, b), (x, y) = list(kinds)[:2], list(kinds.values())[:2]
            raise FeaturesError(
                f"{x} has logit gradients {a}, {y} {b}; embed all shards with the same settings"
            )
        return int(next(iter(kinds))[0] or 0)

    @cached_property
    def hash(self) -> str:
        """SHA-256 over the contents: settings and one hash per shard and column, not file bytes or dates."""
        shards = [[*file.header["shards"], file.n_read, file.names, file.bad] for file in self.files]
        return sha256_text(canonical_json([self.header, shards]))


def _opened(paths: Sequence[AnyPath], limit: int | None) -> list[FeaturesFile]:
    """The files, up to the one that holds the sample `limit`; those at URLs several at a time."""
    if limit is None and isinstance(paths[0], UrlPath):
        with ThreadPoolExecutor(N_AT_ONCE, thread_name_prefix="adq-features") as pool:
            return list(pool.map(FeaturesFile, paths))
    files: list[FeaturesFile] = []
    for path in paths:
        if limit is not None and limit <= 0:
            break
        files.append(FeaturesFile(path, limit=limit, keeps_open=len(paths) <= KEPT_OPEN))
        limit = None if limit is None else limit - files[-1].n_read
    return files


def as_features(features: Features | str | os.PathLike[str]) -> Features:
    """`features` themselves, or those in that folder."""
    return features if isinstance(features, Features) else Features(features)


def _refuse_foreign(path: AnyPath) -> None:
    """Raise `FeaturesError` for a file that an encoder made, which may have taken hours."""
    if path.exists() and (encoder := FeaturesFile(path).header["encoder"]) != ENCODER:
        raise FeaturesError(
            f"{path} was made by encoder {shorten(encoder)}; give another folder as out=, or remove it"
        )


def file_name(shard: str) -> str:
    """The file that holds a shard's features.

    >>> file_name("train-000001.tar"), file_name("a/train.tar")
    ('train-000001.parquet', 'a--train.parquet')
    """
    return shard.removesuffix(".tar").replace("/", "--") + ".parquet"
