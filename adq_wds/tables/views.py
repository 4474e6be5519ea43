"""Holds the views of a set: two embeddings of random crops for each of some images, one file per shard."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from adq_wds.core import views as core
from adq_wds.core.rng import draws
from adq_wds.errors import FeaturesError, shorten
from adq_wds.files import canonical_json, sha256_text
from adq_wds.remote.url_path import AnyPath
from adq_wds.shards.names import base_name, check_shard_name
from adq_wds.tables.features import Features, file_name
from adq_wds.tables.features_file import FeaturesFile
from adq_wds.tables.headers import EmbeddedBy, Natural, TableHeader, checked, refuse_unlike
from adq_wds.tables.parquet import (
    GroupFile,
    column_hashes,
    embedding_type,
    list_array,
    list_rows,
    write_groups,
)

VERSION = 1
_UNIT_TOLERANCE = 0.01  # of a squared length: rounding to float16 moves it by 0.001
_FROM_FEATURES = ("encoder", "revision", "preprocessing_hash", "image", "width")
_ALIKE = (*_FROM_FEATURES, "seed", "view")


class ViewsSource(EmbeddedBy):
    """The header entries that must be equal in all files of a folder; with the shards they determine every number."""

    width: Annotated[int, range(1, 2**30)]
    seed: Natural
    view: str


class ViewsHeader(TableHeader, ViewsSource):
    """The header of a file of views, as FORMAT.md describes it."""

    columns: list[str]


@dataclass(frozen=True)
class ShardViews:
    """The views of one shard's chosen samples; checked when made and when loaded.

    Attributes:
        shard: the shard's name.
        index: (n,) int32, position in the shard, ascending.
        keys: n keys.
        crc32: (n,) uint32, over the payloads of the sample that was viewed.
        z: (n, 2, D) float16, two unit rows for each sample; a zero row stays zero.
        header: who embedded them, width (D), seed, view (version of the crops).
    """

    shard: str
    index: NDArray[np.int32]
    keys: list[str]
    crc32: NDArray[np.uint32]
    z: NDArray[np.float16]
    header: ViewsSource

    def __post_init__(self) -> None:
        n = len(self.keys)
        if not len(self.index) == len(self.crc32) == len(self.z) == n:
            rows = [len(self.index), len(self.crc32), len(self.z)]
            raise FeaturesError(f"shard {self.shard}: columns of {rows} rows for views of {n} samples")
        try:
            width = checked(self.header, ViewsSource).get("width")
        except ValueError as error:
            raise FeaturesError(f"shard {self.shard}, views: {error}") from error
        if self.z.shape != (n, 2, width) or self.z.dtype != np.float16:
            got = f"{self.z.shape} {self.z.dtype}"
            raise FeaturesError(f"shard {self.shard}: views are {got}, expected ({n}, 2, {width}) float16")
        if n and (self.index[0] < 0 or (np.diff(self.index) <= 0).any()):
            raise FeaturesError(f"shard {self.shard}: the views' positions do not rise from 0 or above")
        self._check_rows()

    def _check_rows(self) -> None:
        rows = self.z.astype(np.float32)
        squares = np.einsum("nvd,nvd->nv", rows, rows)
        fine = (squares == 0) | (np.abs(squares - 1) < _UNIT_TOLERANCE)  # no comparison with NaN is true
        if not fine.all():
            row, view = np.argwhere(~fine)[0]
            raise FeaturesError(
                f"shard {self.shard}, key {shorten(self.keys[row])}: view {view} has squared length "
                f"{squares[row, view]:.4g}, expected 1, or 0"
            )

    def table(self) -> pa.Table:
        """The columns of the file."""
        n, _, width = self.z.shape
        columns = {
            "index": self.index,
            "key": pa.array(self.keys, pa.string()),
            "crc32": self.crc32,
            "views": list_array(self.z.reshape(n, 2 * width)),
        }
        return pa.table(columns, schema=_schema(width))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file, whole or not at all."""
        table = self.table()
        header = {
            **self.header,
            "format": "adq_wds.views",
            "version": VERSION,
            "columns": table.column_names,
            "shards": [{"name": self.shard, "n": len(self.keys), "columns": column_hashes(table)}],
        }
        write_groups(path, table.schema, [table], header, compression="none")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ShardViews:
        """Read the file back; one that is missing, damaged or of another kind is a `FeaturesError`."""
        file = GroupFile(path, kind="views", version=VERSION, error=FeaturesError, header=ViewsHeader)
        with file.reading_header():
            (entry,) = file.header["shards"]
            shard = check_shard_name(entry["name"])
        width = file.header["width"]
        table = file.group(0, _schema(width))
        z = list_rows(table["views"], 2 * width).reshape(-1, 2, width)
        columns = (table["index"].to_numpy(), table["key"].to_pylist(), table["crc32"].to_numpy())
        try:
            return cls(shard, *columns, z, cast(ViewsSource, {name: file.header[name] for name in _ALIKE}))
        except FeaturesError as cause:
            raise FeaturesError(f"{file.path}: damaged: {cause}") from cause


def _schema(width: int) -> pa.Schema:
    return pa.schema(
        [
            pa.field("index", pa.int32(), nullable=False),
            pa.field("key", pa.string(), nullable=False),
            pa.field("crc32", pa.uint32(), nullable=False),
            pa.field("views", embedding_type(2 * width), nullable=False),
        ]
    )


class Views:
    """The views beside some features, loaded: two embeddings for each image of a keyed sample.

    Args:
        features: of the same shards; `embed_views` wrote one file for each into their folder ``views``.

    Raises:
        FeaturesError: a shard's views are missing or damaged, of another encoder or other settings than the others' or
            the features'.
    """

    def __init__(self, features: Features) -> None:
        self._features, self.folder = features, views_folder(features)
        paths = [self.folder / file_name(file.shard) for file in features]
        missing = [path.name for path in paths if not path.is_file()]
        if missing:
            more = f" and {len(missing) - 1} more are" if len(missing) > 1 else " is"
            raise FeaturesError(
                f"{self.folder}: no views here ({missing[0]}{more} missing); embed with views=20_000 (--views 20000)"
            )
        self.files = [ShardViews.load(path) for path in paths]
        again = "embed with views= (--views) again"
        refuse_unlike(list(zip(paths, (file.header for file in self.files), strict=True)), _ALIKE, again)
        refuse_unlike([(features.folder, features.header), (self.folder, self.header)], _FROM_FEATURES, again)

    def __len__(self) -> int:
        """Images; each has two views."""
        return sum(len(file.keys) for file in self.files)

    def __repr__(self) -> str:
        return f"<Views of {len(self):,} samples in {len(self.files)} shards, {self.header['encoder']}>"

    @property
    def header(self) -> ViewsSource:
        """The header entries that all files share."""
        return self.files[0].header

    @cached_property
    def hash(self) -> str:
        """SHA-256 over the contents: settings and one hash per shard and column, not file bytes or dates."""
        shards = [[file.shard, len(file.keys), column_hashes(file.table())] for file in self.files]
        return sha256_text(canonical_json([self.header, shards]))

    def rows(self) -> tuple[NDArray[np.int64], NDArray[np.float16]]:
        """The views by their samples' rows in the features.

        Returns:
            positions (M,) int64 among all rows of the features, ascending; and z (M, 2, D) float16, unit or zero rows.

        Raises:
            FeaturesError: the features are of other samples, or the views are not one keyed sample of the set: a job
                ended early, or shards came or went since.
        """
        position, first = [], 0
        for file, views in zip(self._features, self.files, strict=True):
            position.append(first + _matched(file, views))
            first += file.n
        chosen = np.concatenate(position)
        one_draw = choose_rows(self._features, len(chosen), seed=self.header["seed"])
        if not np.array_equal(chosen, one_draw):
            raise FeaturesError(
                f"{self.folder}: these {len(self)} views are not one keyed sample of the {first} samples (a job ended "
                "early, or shards came or went since); embed with views= (--views) again"
            )
        return chosen, np.concatenate([file.z for file in self.files])


def _matched(file: FeaturesFile, views: ShardViews) -> NDArray[np.int64]:
    """(n,) int64: the rows of a shard's features that its views belong to."""
    table = file.read_columns(["index", "key", "crc32"])
    rows = np.flatnonzero(np.isin(table["index"].to_numpy(), views.index))
    there = table.take(pa.array(rows))
    present = list(zip(*(there[name].to_pylist() for name in ("index", "key", "crc32")), strict=True))
    wanted = list(zip(views.index.tolist(), views.keys, views.crc32.tolist(), strict=True))
    if present != wanted:
        known = set(present)
        key = next((sample[1] for sample in wanted if sample not in known), views.keys[0])
        raise FeaturesError(
            f"shard {file.shard}, key {shorten(key)}: has views, but is another sample, or none, in the features; make "
            "the views again"
        )
    return rows


def views_folder(features: Features) -> AnyPath:
    """The folder of the views of some features."""
    return features.folder / "views"


def choose_rows(features: Features, n: int, *, seed: int) -> NDArray[np.int64]:
    """The n usable samples with the smallest keyed draws, whatever the shards' folders and order.

    Args:
        features: N samples.
        n: how many, >= 0; all when there are fewer. A larger number contains a smaller one.
        seed: of the draw, which is independent of the one that ranks a plan's samples with the same seed.

    Returns:
        (min(n, N),) int64 rows of `features`, ascending.
    """
    each = [
        draws(
            seed,
            0,
            base_name(file.shard),
            file.read_columns(["key"])["key"].to_pylist(),
            purpose=core.CHOOSING,
        )
        for file in features
    ]
    return core.choose(np.concatenate(each), n)
