"""What do we know of each sample? Features: a folder, one file per shard, opened together."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from adq_wds.errors import FeaturesError, shorten
from adq_wds.files import canonical_json, sha256_text
from adq_wds.tables.features_file import FeaturesFile
from adq_wds.tables.parquet import Header

# What must be equal in all files of a folder for their rows to be comparable.
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
        if limit is not None and (
            type(limit) is bool or not isinstance(limit, (int, np.integer)) or limit < 1
        ):
            raise ValueError(f"limit must be an integer >= 1, got {limit!r}")
        self.folder = Path(folder)
        self.limit = None if limit is None else int(limit)
        if shards is None:
            paths = sorted(self.folder.glob("*.parquet"))
        else:
            paths = [self.folder / file_name(shard) for shard in shards]
        if not paths:
            raise FeaturesError(
                f"{self.folder}: no features here (no *.parquet); make them with embed_shards"
            )
        files = []
        left = self.limit
        for path in paths:
            if left is not None and left <= 0:
                break
            files.append(FeaturesFile(path, limit=left))
            left = None if left is None else left - files[-1].n_read
        self.files = sorted(files, key=lambda file: file.shard)
        self._compare()

    def _compare(self) -> None:
        first = self.files[0]
        names = {file.shard for file in self.files}
        for file in self.files:
            short = file.shard.partition("/")[2]
            if short in names:
                raise FeaturesError(
                    f"{self.folder}: {file.shard} and {short} may be one shard, embedded in two runs; remove the older file"
                )
        for before, file in zip(self.files, self.files[1:], strict=False):
            if before.shard == file.shard:
                raise FeaturesError(
                    f"{before.path} and {file.path} both describe shard {file.shard}; remove one"
                )
        for file in self.files:
            for name in ALIKE:
                a, b = first.header.get(name), file.header.get(name)
                if a != b:
                    remedy = (
                        "embed all shards again with one label, which reads labels alone"
                        if name == "label"
                        else "embed all shards with the same settings"
                    )
                    raise FeaturesError(
                        f"{first.path} and {file.path} do not belong together: {name} {shorten(a)} and "
                        f"{shorten(b)}; {remedy}"
                    )

    def __iter__(self) -> Iterator[FeaturesFile]:
        """The file of each shard, in order."""
        return iter(self.files)

    def __len__(self) -> int:
        """Usable samples in all shards."""
        return sum(file.n for file in self.files)

    def __repr__(self) -> str:
        return f"<Features {len(self):,} samples in {len(self.files)} shards, {self.header['encoder']}, D = {self.width}>"

    @property
    def width(self) -> int:
        """D, the length of an embedding."""
        return self.files[0].width

    @property
    def header(self) -> Header:
        """What all files have in common."""
        return {name: self.files[0].header.get(name) for name in ALIKE}

    def texture(self) -> NDArray[np.float32] | None:
        """(N,) float32 texture levels over all shards; None where no image was looked at."""
        if not all(file.has_texture for file in self.files):
            return None
        return np.concatenate([file.texture() for file in self.files])

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
        return np.concatenate([file.score(name) for file in self.files])

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


def file_name(shard: str) -> str:
    """The file that holds a shard's features.

    >>> file_name("train-000001.tar"), file_name("a/train.tar")
    ('train-000001.parquet', 'a--train.parquet')
    """
    return shard.removesuffix(".tar").replace("/", "--") + ".parquet"
